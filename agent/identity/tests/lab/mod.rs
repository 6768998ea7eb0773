//! A certificate authority as Istio's, on a loopback port, that can be slow, lie and go away.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use identity::{CaClient, CaClientConfig, Clock, ControlAddress, Upstream};
use model::Identity;
use proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    },
    prost_types::value::Kind,
};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// A root that signs whatever a test wants.
pub struct Root {
    pub certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Root {
    pub fn new(name: &str) -> Arc<Self> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        Arc::new(Self { certificate, issuer })
    }

    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// Makes the request's certificate out to `identity`, until `end`.
    fn sign(&self, mut csr: CertificateSigningRequestParams, identity: &str, end: SystemTime) -> String {
        let params = &mut csr.params;
        params.subject_alt_names = vec![SanType::URI(identity.to_owned().try_into().unwrap())];
        params.not_before = (end - Duration::from_secs(25 * 3600)).into();
        params.not_after = end.into();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        csr.signed_by(&self.issuer).unwrap().pem()
    }

    /// A server's certificate and key for 127.0.0.1.
    pub fn server(&self) -> Arc<rustls::ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }
}

/// What the fake does with the next requests.
#[derive(Clone)]
pub enum Mood {
    Honest,
    /// Another name than asked for.
    Misnamed(&'static str),
    Expired,
    /// The certificate of another key.
    OtherKey,
    /// This, word for word.
    Says(Vec<String>),
    Fails(Status),
    Silent,
}

/// What a request said.
#[derive(Clone, Debug)]
pub struct Seen {
    pub token: String,
    pub cluster: String,
    pub identity: String,
    pub validity: i64,
    pub csr: String,
}

pub struct Fake {
    pub root: Mutex<Arc<Root>>,
    pub mood: Mutex<Mood>,
    pub seen: Mutex<Vec<Seen>>,
}

struct Service(Arc<Fake>);

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name: &str| {
            let value = request.metadata().get(name).map(|value| value.to_str().unwrap());
            value.unwrap_or_default().to_owned()
        };
        let (token, cluster) = (header("authorization"), header("clusterid"));
        let message = request.into_inner();
        let asked = message.metadata.unwrap().fields["ImpersonatedIdentity"].kind.clone();
        let Some(Kind::StringValue(identity)) = asked else {
            panic!("{asked:?}")
        };
        self.0.seen.lock().unwrap().push(Seen {
            token,
            cluster,
            identity: identity.clone(),
            validity: message.validity_duration,
            csr: message.csr.clone(),
        });
        let mood = self.0.mood.lock().unwrap().clone();
        let root = self.0.root.lock().unwrap().clone();
        let csr = || CertificateSigningRequestParams::from_pem(&message.csr).unwrap();
        let tomorrow = SystemTime::now() + Duration::from_secs(24 * 3600);
        let leaf = match mood {
            Mood::Honest => root.sign(csr(), &identity, tomorrow),
            Mood::Misnamed(other) => root.sign(csr(), other, tomorrow),
            Mood::Expired => root.sign(csr(), &identity, SystemTime::now() - Duration::from_secs(60)),
            Mood::OtherKey => {
                let other = CertificateParams::default();
                let other = other.serialize_request(&KeyPair::generate().unwrap()).unwrap();
                let other = CertificateSigningRequestParams::from_pem(&other.pem().unwrap()).unwrap();
                root.sign(other, &identity, tomorrow)
            }
            Mood::Says(cert_chain) => return Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Mood::Fails(status) => return Err(status),
            Mood::Silent => std::future::pending().await,
        };
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: vec![leaf, root.pem()],
        }))
    }
}

/// The fake on its port, and what a client needs.
pub struct Lab {
    pub fake: Arc<Fake>,
    pub address: SocketAddr,
    directory: TempDir,
    serving: Option<Runtime>,
}

impl Lab {
    pub async fn new() -> Self {
        let root = Root::new("first");
        let fake = Arc::new(Fake {
            root: Mutex::new(root.clone()),
            mood: Mutex::new(Mood::Honest),
            seen: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let lab = Self {
            serving: Some(serve(listener, fake.clone())),
            fake,
            address,
            directory: tempfile::tempdir().unwrap(),
        };
        lab.write("roots", &root.pem());
        lab.write("token", "one\n");
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn mood(&self, mood: Mood) {
        *self.fake.mood.lock().unwrap() = mood;
    }

    pub fn last(&self) -> Seen {
        self.fake.seen.lock().unwrap().last().unwrap().clone()
    }

    /// It goes away, with its connections.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.serving.take() {
            runtime.shutdown_background();
        }
    }

    /// It is back on the same port.
    pub async fn start(&mut self) {
        let listener = loop {
            match std::net::TcpListener::bind(self.address) {
                Ok(listener) => break listener,
                Err(_still_taken) => tokio::task::yield_now().await,
            }
        };
        self.serving = Some(serve(listener, self.fake.clone()));
    }

    pub fn client(&self) -> CaClient {
        self.client_of(&[format!("http://{}", self.address)])
    }

    pub fn client_of(&self, addresses: &[String]) -> CaClient {
        let parse = |address: &String| address.parse::<ControlAddress>().unwrap();
        CaClient::new(CaClientConfig {
            upstream: Upstream {
                addresses: addresses.iter().map(parse).collect(),
                roots_file: self.path("roots"),
            },
            token_file: self.path("token"),
            cluster: "c1".into(),
            clock: Clock::system(),
        })
    }

    /// TLS before the fake: answers the address.
    pub async fn tls(&self, config: Arc<rustls::ServerConfig>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, behind) = (listener.local_addr().unwrap(), self.address);
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let mut stream = acceptor.accept(socket).await?;
                    let mut behind = tokio::net::TcpStream::connect(behind).await?;
                    tokio::io::copy_bidirectional(&mut stream, &mut behind).await
                });
            }
        });
        address
    }
}

/// On a runtime of its own, so that its connections end with it.
fn serve(listener: std::net::TcpListener, fake: Arc<Fake>) -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let service = IstioCertificateServiceServer::new(Service(fake));
    runtime.spawn(async move {
        listener.set_nonblocking(true).unwrap();
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
        let server = Server::builder().add_service(service);
        server.serve_with_incoming(incoming).await.unwrap();
    });
    runtime
}

pub fn web() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

/// A port where nobody listens.
pub async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop();
    }
}
