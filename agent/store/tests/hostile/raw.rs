//! A server with the limits of a test, and a client that sends whatever bytes it is told to.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use store::{
    Engine,
    http::{Config, Front, Limits},
    kinds,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Nothing here takes this long, unless it never happens.
pub const NEVER: Duration = Duration::from_secs(60);

/// The server.
pub struct Hostile {
    _front: Front,
    pub address: SocketAddr,
    pub engine: Engine,
    administrator: ClientConfig,
    _directory: tempfile::TempDir,
}

/// What was answered.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub text: String,
}

impl Hostile {
    pub async fn start(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let engine = Engine::open(directory.path()).unwrap();
        let namespace = json!({"metadata": {"name": "shop"}});
        let namespaces = kinds::by_plural("", "namespaces").unwrap();
        engine.create(namespaces, "", namespace, false).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = Config {
            directory: directory.path().to_owned(),
            listeners: vec![listener],
            names: Vec::new(),
            limits,
        };
        let front = Front::start(config, engine.clone()).unwrap();
        let address = front.addresses()[0];
        let kubeconfig: Value = serde_yaml_ng::from_str(&front.kubeconfig("https://x")).unwrap();
        Self {
            administrator: administrator(&kubeconfig),
            address,
            engine,
            _front: front,
            _directory: directory,
        }
    }

    /// A connection of the administrator; `protocols` as in ALPN.
    pub async fn connect_with(&self, protocols: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
        let mut config = self.administrator.clone();
        config.alpn_protocols = protocols.iter().map(|one| one.as_bytes().to_vec()).collect();
        let socket = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, socket).await
    }

    pub async fn connect(&self) -> TlsStream<TcpStream> {
        self.connect_with(&["http/1.1"]).await.unwrap()
    }

    /// Sends these bytes, and reads until the server closes or says no more.
    pub async fn send(&self, bytes: &[u8]) -> Reply {
        let mut connection = self.connect().await;
        connection.write_all(bytes).await.unwrap();
        reply(&mut connection).await
    }

    /// One request with a body.
    pub async fn ask(&self, method: &str, path: &str, media_type: &str, body: &[u8]) -> Reply {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {media_type}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat()).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, "", b"").await
    }

    /// Whether the server goes on as if nothing had been.
    pub async fn is_well(&self) -> bool {
        self.get("/api/v1/namespaces/shop").await.status == 200
    }
}

/// Reads to the end.
pub async fn reply(connection: &mut TlsStream<TcpStream>) -> Reply {
    let mut bytes = Vec::new();
    // A server that cuts a connection says so in many ways; what it said before is what counts.
    let _ = tokio::time::timeout(NEVER, connection.read_to_end(&mut bytes))
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    Reply {
        status: status.unwrap_or(0),
        text,
    }
}

fn administrator(kubeconfig: &Value) -> ClientConfig {
    let pem = |value: &Value| STANDARD.decode(value.as_str().unwrap()).unwrap();
    let mut roots = RootCertStore::empty();
    let root = pem(&kubeconfig["clusters"][0]["cluster"]["certificate-authority-data"]);
    roots.add(CertificateDer::from_pem_slice(&root).unwrap()).unwrap();
    let user = &kubeconfig["users"][0]["user"];
    let certificate = CertificateDer::from_pem_slice(&pem(&user["client-certificate-data"])).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&pem(&user["client-key-data"])).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap()
}
