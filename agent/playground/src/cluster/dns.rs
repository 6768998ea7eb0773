//! The cluster's name server: services of the cluster and their addresses, over UDP and TCP, for every pod.
//!
//! Thin: A and AAAA of `SERVICE.NAMESPACE.svc.cluster.local`, for a headless service its pods; any other name does not
//! exist. It is in the control plane's namespace, where each pod's resolv.conf has it; what it knows is replaced at each
//! round of the reconciler. For pods in the mesh it is the server behind the agent's. Killed with the cluster's process:
//! then pods in the mesh still find what the mesh knows, and the others nothing.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
};

use anyhow::{Context, Result};
use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{
        RData, Record, RecordType,
        rdata::{A, AAAA},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
};

use crate::{
    hosts::Name,
    layout::{CONTROL_NETNS, control_addresses},
    netns,
};

const PORT: u16 = 53;
const TTL: u32 = 5;
/// Connections at once; more wait.
const CONNECTIONS: usize = 256;
/// What fits into a datagram for a client that does not say more.
const PLAIN_UDP: usize = 512;

/// What is known, by full name.
#[derive(Clone, Default)]
pub(super) struct Dns(Arc<RwLock<HashMap<String, Vec<IpAddr>>>>);

impl Dns {
    /// Listens in the control plane's namespace, and answers for as long as the process lives.
    pub fn start() -> Result<Self> {
        let dns = Self::default();
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        for address in control_addresses() {
            let end = SocketAddr::new(address, PORT);
            let (datagrams, listener) = netns::inside(CONTROL_NETNS, || {
                let datagrams = std::net::UdpSocket::bind(end).with_context(|| format!("cannot bind {end}"))?;
                let listener = std::net::TcpListener::bind(end).with_context(|| format!("cannot listen on {end}"))?;
                datagrams.set_nonblocking(true)?;
                listener.set_nonblocking(true)?;
                Ok((datagrams, listener))
            })?;
            let (datagrams, listener) = (UdpSocket::from_std(datagrams)?, TcpListener::from_std(listener)?);
            tokio::spawn(dns.clone().serve_datagrams(datagrams));
            tokio::spawn(dns.clone().serve_connections(listener, connections.clone()));
        }
        Ok(dns)
    }

    /// These are the services now.
    pub fn publish(&self, names: &[Name]) {
        let full = |name: &Name| format!("{}.{}.svc.cluster.local.", name.name, name.namespace);
        let known = names.iter().map(|name| (full(name), name.addresses.clone())).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    async fn serve_datagrams(self, socket: UdpSocket) {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
                continue;
            };
            if let Some(answer) = self.answer(&buffer[..length], true) {
                // The client asks again.
                let _ = socket.send_to(&answer, client).await;
            }
        }
    }

    async fn serve_connections(self, listener: TcpListener, connections: Arc<Semaphore>) {
        while let Ok(permit) = connections.clone().acquire_owned().await {
            // Without descriptors it fails until somebody closes one.
            let Ok((stream, _)) = listener.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            let dns = self.clone();
            tokio::spawn(async move {
                // However it ends: the client's connection is closed.
                let _ = dns.serve_connection(stream).await;
                drop(permit);
            });
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let mut query = vec![0; usize::from(stream.read_u16().await?)];
            stream.read_exact(&mut query).await?;
            let Some(answer) = self.answer(&query, false) else {
                return Ok(());
            };
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
            stream.write_u16(length).await?;
            stream.write_all(&answer[..usize::from(length)]).await?;
        }
    }

    fn answer(&self, query: &[u8], datagram: bool) -> Option<Vec<u8>> {
        let query = Message::from_vec(query).ok()?;
        if query.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut response = Message::response(query.metadata.id, query.metadata.op_code);
        response.metadata.recursion_desired = query.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        let [question] = query.queries.as_slice() else {
            response.metadata.response_code = ResponseCode::NotImp;
            return response.to_vec().ok();
        };
        response.add_query(question.clone());
        if query.metadata.op_code != OpCode::Query {
            response.metadata.response_code = ResponseCode::NotImp;
            return response.to_vec().ok();
        }
        response.metadata.authoritative = true;
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match known.get(&question.name().to_lowercase().to_ascii()) {
            Some(addresses) => {
                let data = addresses.iter().filter_map(|ip| match (ip, question.query_type()) {
                    (IpAddr::V4(ip), RecordType::A) => Some(RData::A(A(*ip))),
                    (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA(AAAA(*ip))),
                    _ => None,
                });
                let name = question.name();
                response.answers = data.map(|data| Record::from_rdata(name.clone(), TTL, data)).collect();
            }
            None => response.metadata.response_code = ResponseCode::NXDomain,
        }
        let bytes = response.to_vec().ok()?;
        let limit = query
            .edns
            .map_or(PLAIN_UDP, |edns| usize::from(edns.max_payload()).max(PLAIN_UDP));
        if datagram && bytes.len() > limit {
            return response.truncate().to_vec().ok();
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{op::Query, rr::Name as DnsName};

    use super::*;

    fn ask(dns: &Dns, name: &str, kind: RecordType, datagram: bool) -> Message {
        let mut query = Message::query();
        query.add_query(Query::query(DnsName::from_ascii(name).unwrap(), kind));
        Message::from_vec(&dns.answer(&query.to_vec().unwrap(), datagram).unwrap()).unwrap()
    }

    #[test]
    fn a_service_has_the_addresses_of_the_family_that_is_asked_for() {
        let dns = Dns::default();
        let addresses = (0..200).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        dns.publish(&[Name {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            addresses,
        }]);
        let name = "Web.shop.svc.cluster.local.";
        assert_eq!(ask(&dns, name, RecordType::A, false).answers.len(), 200);
        assert!(ask(&dns, name, RecordType::A, true).metadata.truncation);
        let other = ask(&dns, name, RecordType::AAAA, true);
        assert_eq!(
            (other.metadata.response_code, other.answers.len()),
            (ResponseCode::NoError, 0)
        );
        let nobody = ask(&dns, "web.bank.svc.cluster.local.", RecordType::A, true);
        assert_eq!(nobody.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(dns.answer(b"nonsense", true), None);
    }
}
