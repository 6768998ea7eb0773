//! A cluster in this process: the embedded API with two nodes, their agents' pods and two applications, and control
//! planes on it, spoken to over TLS as an agent does.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use control::{Config, Control};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, ServiceAccount};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse, istio_certificate_service_client::IstioCertificateServiceClient,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use store::Server;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

/// Nothing here takes this long, unless it never happens.
const NEVER: Duration = Duration::from_secs(60);

/// Waits until something is so.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let wait = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(NEVER, wait)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}

pub fn object<K: serde::de::DeserializeOwned>(value: serde_json::Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// The API and what stands in it.
pub struct Cluster {
    directory: tempfile::TempDir,
    address: SocketAddr,
    server: Option<Server>,
    pub client: Client,
}

impl Cluster {
    pub async fn new() -> Self {
        // kube-rs takes the process's provider.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = start(&directory, listener).await;
        let kubeconfig = Kubeconfig::from_yaml(&server.kubeconfig(&format!("https://{address}"))).unwrap();
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options)
            .await
            .unwrap();
        let client = Client::try_from(config).unwrap();
        let cluster = Self {
            directory,
            address,
            server: Some(server),
            client,
        };
        cluster.populate().await;
        cluster
    }

    async fn populate(&self) {
        for name in ["istio-system", "shop"] {
            let namespaces = Api::<Namespace>::all(self.client.clone());
            if namespaces.get_opt(name).await.unwrap().is_none() {
                create(&namespaces, json!({"metadata": {"name": name}})).await;
            }
        }
        for name in ["n1", "n2"] {
            create(
                &Api::<Node>::all(self.client.clone()),
                json!({"metadata": {"name": name}}),
            )
            .await;
        }
        for (namespace, name) in [("istio-system", "ztunnel"), ("shop", "cart"), ("shop", "db")] {
            let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), namespace);
            create(&accounts, json!({"metadata": {"name": name}})).await;
        }
        self.pod("istio-system", "agent-1", "ztunnel", "n1").await;
        self.pod("istio-system", "agent-2", "ztunnel", "n2").await;
        self.pod("shop", "cart-1", "cart", "n1").await;
        self.pod("shop", "db-1", "db", "n2").await;
    }

    pub fn api<K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>>(
        &self,
        namespace: &str,
    ) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub async fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) {
        let pods = self.api::<Pod>(namespace);
        let spec = json!({
            "serviceAccountName": account, "nodeName": node, "containers": [{"name": "app", "image": "app"}],
        });
        create(&pods, json!({"metadata": {"name": name}, "spec": spec})).await;
        let status = json!({"status": {"phase": "Running"}});
        pods.patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .unwrap();
    }

    pub async fn delete_pod(&self, namespace: &str, name: &str) {
        let now = DeleteParams::default().grace_period(0);
        self.api::<Pod>(namespace).delete(name, &now).await.unwrap();
    }

    /// A token of an account, bound to a pod.
    pub async fn token(&self, namespace: &str, account: &str, pod: Option<&str>, audience: &str) -> String {
        let mut spec = json!({"audiences": [audience], "expirationSeconds": 3600});
        if let Some(pod) = pod {
            let uid = self.api::<Pod>(namespace).get(pod).await.unwrap().metadata.uid;
            spec["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid});
        }
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
        let accounts = self.api::<ServiceAccount>(namespace);
        let answer: serde_json::Value = accounts
            .create_subresource("token", account, &PostParams::default(), &request)
            .await
            .unwrap();
        answer["status"]["token"].as_str().unwrap().to_owned()
    }

    /// The token of the agent on a node.
    pub async fn agent(&self, number: u8) -> String {
        self.token("istio-system", "ztunnel", Some(&format!("agent-{number}")), "istio-ca")
            .await
    }

    pub async fn control(&self) -> Replica {
        self.control_with(Config::default()).await
    }

    pub async fn control_with(&self, config: Config) -> Replica {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = Config {
            xds: loopback,
            monitoring: loopback,
            ..config
        };
        Replica {
            control: Control::start(self.client.clone(), config).await.unwrap(),
            roots: self.api("istio-system"),
        }
    }

    pub async fn stop_api(&mut self) {
        self.server.take().unwrap().stop().await;
    }

    pub async fn start_api(&mut self) {
        let listener = TcpListener::bind(self.address).unwrap();
        self.server = Some(start(&self.directory, listener).await);
    }
}

async fn start(directory: &tempfile::TempDir, listener: TcpListener) -> Server {
    let config = store::Config {
        directory: directory.path().to_owned(),
        listeners: vec![listener],
        names: Vec::new(),
        service_cidrs: Vec::new(),
    };
    Server::start(config).await.unwrap()
}

pub async fn create<K>(api: &Api<K>, value: serde_json::Value)
where
    K: serde::de::DeserializeOwned + serde::Serialize + Clone + std::fmt::Debug,
{
    api.create(&PostParams::default(), &object(value)).await.unwrap();
}

/// A control plane.
pub struct Replica {
    pub control: Control,
    roots: Api<Secret>,
}

impl Replica {
    /// The roots in force, as they are stored.
    pub async fn bundle(&self) -> Vec<CertificateDer<'static>> {
        let secret = eventually("the authority's state", || async {
            self.roots.get_opt("undercurrent-ca-state").await.unwrap_or_default()
        });
        let pem = secret.await.data.unwrap()["root-cert.pem"].0.clone();
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().unwrap()
    }

    /// Connected as an agent, once it is ready.
    pub async fn connect(&self) -> Channel {
        self.ready().await;
        let mut roots = rustls::RootCertStore::empty();
        for root in self.bundle().await {
            roots.add(root).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let connector = TlsConnector::from(Arc::new(tls));
        let address = self.control.xds();
        let connect = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = "istiod.istio-system.svc".try_into().unwrap();
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        Endpoint::from_static("http://istiod.istio-system.svc:15012")
            .connect_with_connector(connect)
            .await
            .unwrap()
    }

    pub async fn ready(&self) {
        eventually("the control plane is ready", || async {
            (self.get("/readyz").await?.0 == 200).then_some(())
        })
        .await;
    }

    /// A page of monitoring.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = TcpStream::connect(self.control.monitoring()).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let status = answer.get(9..12)?.parse().ok()?;
        Some((status, answer.split_once("\r\n\r\n")?.1.to_owned()))
    }
}

/// A request with a new P-256 key.
pub fn csr() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["ignored.example".into()]).unwrap();
    params.serialize_request(&key).unwrap().pem().unwrap()
}

pub const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
pub const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";

/// Asks for a certificate.
pub async fn certificate(
    channel: &Channel,
    token: &str,
    identity: Option<&str>,
    csr: String,
) -> Result<Vec<String>, Status> {
    use proto::prost_types::{Struct, Value, value::Kind};
    let metadata = identity.map(|identity| Struct {
        fields: [(
            "ImpersonatedIdentity".to_owned(),
            Value {
                kind: Some(Kind::StringValue(identity.to_owned())),
            },
        )]
        .into(),
    });
    let mut request = Request::new(IstioCertificateRequest {
        csr,
        validity_duration: 0,
        metadata,
    });
    let bearer = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let answer: IstioCertificateResponse = IstioCertificateServiceClient::new(channel.clone())
        .create_certificate(request)
        .await?
        .into_inner();
    Ok(answer.cert_chain)
}

/// The one URI of a certificate.
pub fn identity_of(pem: &str) -> String {
    use x509_parser::{extensions::GeneralName, prelude::FromDer};
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&der).unwrap();
    let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
    match names.as_slice() {
        [GeneralName::URI(uri)] => (*uri).to_owned(),
        other => panic!("{other:?}"),
    }
}

/// Whether a certificate chain is one that a peer with this bundle accepts.
pub fn verifies(chain: &[String], bundle: &[CertificateDer<'static>]) -> bool {
    let der: Vec<_> = chain[..chain.len() - 1]
        .iter()
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .collect();
    let mut roots = rustls::RootCertStore::empty();
    for root in bundle {
        roots.add(root.clone()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .unwrap();
    verifier
        .verify_client_cert(&der[0], &der[1..], rustls_pki_types::UnixTime::now())
        .is_ok()
}

/// The roots that came with a certificate.
pub fn roots_of(chain: &[String]) -> Vec<CertificateDer<'static>> {
    let last = chain.last().unwrap().as_bytes();
    CertificateDer::pem_slice_iter(last).collect::<Result<_, _>>().unwrap()
}

/// The data of a ConfigMap, if it is there.
pub async fn config_map(cluster: &Cluster, namespace: &str, name: &str) -> Option<String> {
    let map = cluster.api::<ConfigMap>(namespace).get_opt(name).await.ok()??;
    map.data?.get("root-cert.pem").cloned()
}
