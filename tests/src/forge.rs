//! A forged HBONE client: whatever certificate, protocol and request a scenario wants, from inside any namespace.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow};
use http::{Method, Request};
use identity::{Authority, Clock, Issued, LocalAuthority};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api,
    config::{KubeConfigOptions, Kubeconfig},
};
use model::{Identity, TrustDomain};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{Mesh, netns};

const LIMIT: Duration = Duration::from_secs(20);

/// What is offered in the handshake.
pub struct Offer {
    certificate: Option<Issued>,
    alpn: Vec<Vec<u8>>,
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The peer answered with this HTTP status.
    Status(u16),
    /// There was no answer: what was seen instead.
    Refused(String),
}

impl Outcome {
    /// Whether nothing was accepted.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

/// What the mesh's own authority signs with: certificate and issuers, and the key. From its Secret, as whoever may do
/// everything.
fn authority(mesh: &Mesh) -> Result<(String, String)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let secret = runtime.block_on(async {
        let kubeconfig = Kubeconfig::read_from(mesh.file("kubeconfig"))?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let secrets: Api<Secret> = Api::namespaced(kube::Client::try_from(config)?, "istio-system");
        anyhow::Ok(secrets.get("istio-ca-secret").await?)
    })?;
    let text = |name: &str| {
        let value = secret.data.as_ref().and_then(|data| data.get(name));
        let value = value.with_context(|| format!("istio-ca-secret has no {name}"))?;
        anyhow::Ok(String::from_utf8(value.0.clone())?)
    };
    Ok((text("ca-cert.pem")? + &text("root-cert.pem")?, text("ca-key.pem")?))
}

/// Writes what a program of its own needs to be this identity: `chain.pem`, `key.pem` and `roots.pem`.
pub fn write_certificates(mesh: &Mesh, identity: &str, to: &Path) -> Result<()> {
    let issued = Offer::of(mesh, identity)?.certificate.context("it has a certificate")?;
    let text = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der));
    let certificates =
        |all: &[CertificateDer<'_>]| -> String { all.iter().map(|one| text("CERTIFICATE", one)).collect() };
    std::fs::create_dir_all(to)?;
    std::fs::write(to.join("chain.pem"), certificates(&issued.chain))?;
    std::fs::write(to.join("roots.pem"), certificates(&issued.roots))?;
    std::fs::write(to.join("key.pem"), text("PRIVATE KEY", issued.key.secret_der()))?;
    Ok(())
}

impl Offer {
    /// A certificate for this identity, by the mesh's own authority.
    pub fn of(mesh: &Mesh, identity: &str) -> Result<Self> {
        let (certificate, key) = authority(mesh)?;
        let authority = LocalAuthority::from_pem(&certificate, &key)?;
        Self::by(&authority, identity)
    }

    /// One that ended a week ago.
    pub fn expired(mesh: &Mesh, identity: &str) -> Result<Self> {
        let (certificate, key) = authority(mesh)?;
        let week = Duration::from_secs(7 * 24 * 3600);
        let clock = Clock::of(move || SystemTime::now() - week);
        Self::by(
            &LocalAuthority::from_pem(&certificate, &key)?.with_clock(clock),
            identity,
        )
    }

    /// One of an authority that nobody knows.
    pub fn by_a_stranger(identity: &str) -> Result<Self> {
        let (certificate, key) = identity::generate_root(&TrustDomain::default())?;
        Self::by(&LocalAuthority::from_pem(&certificate, &key)?, identity)
    }

    fn by(authority: &LocalAuthority, identity: &str) -> Result<Self> {
        let identity: Identity = identity.parse().map_err(|error| anyhow!("{error}"))?;
        let issued = runtime()?.block_on(authority.issue(&identity))?;
        Ok(Self {
            certificate: Some(issued),
            alpn: vec![b"h2".to_vec()],
        })
    }

    /// None at all.
    pub fn no_certificate() -> Self {
        Self {
            certificate: None,
            alpn: vec![b"h2".to_vec()],
        }
    }

    /// With other application protocols.
    pub fn with_alpn(mut self, protocols: &[&str]) -> Self {
        self.alpn = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        self
    }

    fn config(self) -> Result<Arc<ClientConfig>> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)));
        let mut config = match self.certificate {
            Some(issued) => builder.with_client_auth_cert(issued.chain, issued.key)?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn;
        config.enable_sni = false;
        Ok(Arc::new(config))
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Runs to the end, or says what did not come in time.
fn limited<T>(exchange: impl Future<Output = T>, late: impl FnOnce() -> String) -> Result<T> {
    runtime()?
        .block_on(async { timeout(LIMIT, exchange).await })
        .with_context(late)
}

/// Sends one CONNECT, from inside a namespace.
pub fn connect(from: &str, to: SocketAddr, offer: Offer, authority: &str, headers: &[(&str, &str)]) -> Result<Outcome> {
    let config = offer.config()?;
    netns::inside(from, || {
        let exchange = async {
            let stream = match handshake(to, config).await {
                Ok(stream) => stream,
                Err(why) => return Ok(Outcome::Refused(why)),
            };
            Ok(request(stream, authority, headers)
                .await
                .map_or_else(Outcome::Refused, Outcome::Status))
        };
        limited(exchange, || format!("{to} neither answers nor refuses"))?
    })
}

async fn handshake(to: SocketAddr, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, String> {
    let tcp = TcpStream::connect(to).await.map_err(|error| error.to_string())?;
    let name = ServerName::from(to.ip());
    TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .map_err(|error| error.to_string())
}

async fn request(stream: TlsStream<TcpStream>, authority: &str, headers: &[(&str, &str)]) -> Result<u16, String> {
    let said = |error: h2::Error| error.to_string();
    let (sender, connection) = h2::client::handshake(stream).await.map_err(said)?;
    let mut request = Request::builder().method(Method::CONNECT).uri(authority);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(()).map_err(|error| error.to_string())?;
    let exchange = async {
        let mut sender = sender.ready().await.map_err(said)?;
        let (response, _stream) = sender.send_request(request, false).map_err(said)?;
        Ok(response.await.map_err(said)?.status().as_u16())
    };
    // The connection is driven for as long as the answer takes.
    tokio::select! {
        answer = exchange => answer,
        ended = connection => Err(ended.map_or_else(|error| error.to_string(), |()| "the peer closed".to_owned())),
    }
}

/// Sends bytes that are not TLS (or are anything), and reads to the end.
pub fn send_raw(from: &str, to: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    netns::inside(from, || {
        let exchange = async {
            let mut tcp = TcpStream::connect(to).await?;
            tcp.write_all(bytes).await?;
            let mut answer = Vec::new();
            // A reset is an end like another.
            let _ = tcp.read_to_end(&mut answer).await;
            Ok::<_, anyhow::Error>(answer)
        };
        limited(exchange, || format!("{to} does not close"))?
    })
}

/// Sends bytes inside a tunnel whose handshake is right, and reads to the end.
pub fn send_inside(from: &str, to: SocketAddr, offer: Offer, bytes: &[u8]) -> Result<Vec<u8>> {
    let config = offer.config()?;
    netns::inside(from, || {
        let exchange = async {
            let mut stream = handshake(to, config).await.map_err(|why| anyhow!(why))?;
            // It may be closed while we still write: that is an answer, too.
            let _ = stream.write_all(bytes).await;
            let _ = stream.flush().await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            Ok::<_, anyhow::Error>(answer)
        };
        limited(exchange, || format!("{to} does not close"))?
    })
}

/// Connections that were opened and say nothing, or the first bytes of a handshake. Closed when dropped.
pub fn half_open(from: &str, to: SocketAddr, count: usize) -> Result<Vec<std::net::TcpStream>> {
    /// The header of a TLS record that promises a ClientHello of 512 bytes.
    const BEGINNING: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    netns::inside(from, || {
        let mut open = Vec::with_capacity(count);
        for number in 0..count {
            let connection = std::net::TcpStream::connect_timeout(&to, LIMIT);
            let mut connection = connection.with_context(|| format!("half-open connection {number}"))?;
            if number % 2 == 0 {
                // The peer may have dropped it already: there are too many, that is the point.
                let _ = std::io::Write::write_all(&mut connection, BEGINNING);
            }
            open.push(connection);
        }
        Ok(open)
    })
}

/// Takes any server for the right one: what is tested is what the server makes of us.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
