//! A control plane that says what the test says.

use std::{net::SocketAddr, pin::Pin};

use futures_util::Stream;
use proto::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, Message,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
    prost_types::Any,
    security, workload as wire,
};
use tokio::{io::AsyncWriteExt, net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap, transport::Server};

/// A control plane.
pub struct Fake {
    pub address: SocketAddr,
    streams: mpsc::UnboundedReceiver<Asked>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A client's stream. Dropped, it ends.
pub struct Asked {
    headers: MetadataMap,
    requests: mpsc::UnboundedReceiver<DeltaDiscoveryRequest>,
    responses: mpsc::UnboundedSender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, streams) = mpsc::unbounded_channel();
        let service = AggregatedDiscoveryServiceServer::new(Service(sender));
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Self {
            address,
            streams,
            server,
        }
    }

    pub async fn stream(&mut self) -> Asked {
        self.streams.recv().await.unwrap()
    }
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap().to_str().unwrap()
    }

    pub async fn request(&mut self) -> DeltaDiscoveryRequest {
        self.requests.recv().await.unwrap()
    }

    pub fn send(&mut self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).unwrap();
    }
}

struct Service(mpsc::UnboundedSender<Asked>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let headers = request.metadata().clone();
        let mut incoming = request.into_inner();
        let (asked, requests) = mpsc::unbounded_channel();
        let (responses, outgoing) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(request)) = incoming.message().await {
                if asked.send(request).is_err() {
                    return;
                }
            }
        });
        let stream = Asked {
            headers,
            requests,
            responses,
        };
        self.0
            .send(stream)
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing))))
    }
}

/// Somebody who answers every connection with what is no HTTP/2.
pub async fn garbage() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(&[b'x'; 4096]).await;
        }
    });
    address
}

/// A response that is a whole state.
pub fn state(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: "nonce".to_owned(),
        system_version_info: "1".to_owned(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn resource(type_url: &str, name: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        aliases: Vec::new(),
        version: "v".to_owned(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value,
        }),
    }
}

/// A pod of namespace `shop` with this last byte of an address, and a status as on the wire.
pub fn workload(name: &str, last: u8, status: i32) -> Resource {
    let uid = format!("c//v1/Pod/shop/{name}");
    let workload = wire::Workload {
        uid: uid.clone(),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 0, 0, last].into()],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        status,
        ..Default::default()
    };
    let address = wire::Address {
        r#type: Some(wire::address::Type::Workload(workload)),
    };
    resource(ADDRESS_TYPE, &uid, address.encode_to_vec())
}

/// A policy of namespace `shop`, with an action as on the wire.
pub fn policy(name: &str, action: i32) -> Resource {
    let policy = security::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: security::Scope::Namespace.into(),
        action,
        ..Default::default()
    };
    resource(AUTHORIZATION_TYPE, &format!("shop/{name}"), policy.encode_to_vec())
}
