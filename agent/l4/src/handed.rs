//! What arrives in a tunnel for a waypoint whose HBONE this agent terminates (`application_tunnel`, Istio's annotation
//! `ambient.istio.io/waypoint-inbound-binding`): which requests are its business, and how the application gets them.
//!
//! Such a waypoint may be asked for addresses that are not its own: those of what is behind it, and no others
//! (`a_waypoint_takes_only_what_is_behind_it`); ztunnel takes any, and so lends the waypoint's identity to whoever asks.
//! A peer may know of a new waypoint before this agent does: the request waits for as long as a question to the control
//! plane may take, then it is refused.
//!
//! With `PROXY` the application is dialled at the pod's loopback and told source, target and identity by a header. So
//! nobody else may reach that port: in plaintext it is refused (`the_port_of_the_proxy_header_is_nobody_elses`).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use mesh::Snapshot;
use model::{ApplicationTunnel, ApplicationTunnelProtocol, Authority, Workload};
use policy::Facts;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{application, ask, connection::Connection, failure::Failure, pod::is_own_port};

/// Waits until it is known that what is asked for is this workload's business, if it can come to be so.
pub(crate) async fn wait_until_behind(connection: &Connection, own: IpAddr, asked: &Authority) -> Result<(), Failure> {
    let knowledge = &connection.shard.knowledge;
    let Authority::Address(address) = asked else {
        return Ok(());
    };
    let is_known = |snapshot: &Snapshot| {
        // Who is not (or no longer) such a waypoint has nothing to wait for, and is refused by what it is.
        let workload = snapshot.workload(&connection.pod.uid);
        let waypoint = workload.filter(|workload| workload.application_tunnel.is_some());
        waypoint.is_none_or(|waypoint| snapshot.is_waypoint_for(waypoint, asked))
    };
    if address.ip() == own || is_known(&knowledge.snapshot()) {
        return Ok(());
    }
    let look = || {
        let snapshot = knowledge.snapshot();
        match is_known(&snapshot) {
            true => Ok(()),
            false => Err(snapshot.to_ask_behind(asked)),
        }
    };
    let known = ask::until_known(connection, look).await;
    known.ok_or_else(|| Failure::NotBehind(asked.clone()))
}

/// On demand: waits until it is known whether this peer is a waypoint of the workload, where that matters to the verdict,
/// which is made in any case: who has not turned out to be one by then is none.
pub(crate) async fn wait_for_waypoints(connection: &Connection, facts: &Facts) {
    let lacking = || {
        let snapshot = connection.shard.knowledge.snapshot();
        let workload = snapshot.workload(&connection.pod.uid);
        workload.map_or(Vec::new(), |workload| snapshot.to_ask_before(facts, workload))
    };
    if lacking().is_empty() {
        return;
    }
    let look = || {
        Some(lacking())
            .filter(|lacking| !lacking.is_empty())
            .map_or(Ok(()), Err)
    };
    ask::until_known(connection, look).await;
}

/// Dials the application of such a waypoint for a request that was allowed.
pub(crate) async fn dial(
    connection: &Connection,
    workload: &Arc<Workload>,
    tunnel: ApplicationTunnel,
    asked: SocketAddr,
    own: IpAddr,
    peer: &model::Identity,
) -> Result<TcpStream, Failure> {
    let port = tunnel.port.unwrap_or(asked.port());
    if is_own_port(port) {
        return Err(Failure::Loop(SocketAddr::new(own, port)));
    }
    match tunnel.protocol {
        ApplicationTunnelProtocol::None => {
            let target = SocketAddr::new(own, port);
            Ok(application::dial(connection, target, connection.client.ip()).await?)
        }
        ApplicationTunnelProtocol::Proxy => {
            let loopback = loopback_of(workload);
            let target = SocketAddr::new(loopback, port);
            let mut application = application::dial(connection, target, loopback).await?;
            let header = crate::proxy_header::encode(connection.client, asked, peer);
            let written = application.write_all(&header).await;
            written.map_err(|error| Failure::Relay(format!("the waypoint took no PROXY header: {error}")))?;
            Ok(application)
        }
    }
}

/// Where a waypoint that has IPv4 listens, and one that has not.
fn loopback_of(workload: &Workload) -> IpAddr {
    match workload.workload_ips.iter().any(IpAddr::is_ipv4) || workload.workload_ips.is_empty() {
        true => Ipv4Addr::LOCALHOST.into(),
        false => Ipv6Addr::LOCALHOST.into(),
    }
}

/// Refuses plaintext to the port at which the application believes whatever a PROXY header says.
pub(crate) fn refuse_proxy_port(workload: &Workload, target: SocketAddr) -> Result<(), Failure> {
    let takes_headers = |tunnel: &ApplicationTunnel| {
        tunnel.protocol == ApplicationTunnelProtocol::Proxy && tunnel.port.is_none_or(|port| port == target.port())
    };
    match workload.application_tunnel.as_ref().is_some_and(takes_headers) {
        true => Err(Failure::ProxyPort(target)),
        false => Ok(()),
    }
}
