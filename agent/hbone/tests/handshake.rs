//! Who is refused, and in which words.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use common::{CLIENT, Mesh, Pair, SERVER, run, within};
use hbone::{Config, HandshakeError, OpenError, TunnelError};
use identity::{Clock, Credentials, PeerIdentityError};
use rustls::{
    ClientConfig, RootCertStore,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// Believes anyone: the server is under test.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

fn credulous(versions: &[&'static rustls::SupportedProtocolVersion]) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous))
        .with_no_client_auth()
}

/// Shakes hands with the server; the error is what the client hears.
async fn shake(address: SocketAddr, config: ClientConfig) -> Result<(), std::io::Error> {
    let socket = TcpStream::connect(address).await.unwrap();
    let name = ServerName::IpAddress(address.ip().into());
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
    // The client certificate is looked at after the client has finished.
    let mut byte = [0];
    loop {
        if within("the server's answer", stream.read(&mut byte)).await? == 0 {
            return Ok(());
        }
    }
}

/// What the server says of one connection that `attack` makes.
async fn server_says<T>(attack: impl AsyncFnOnce(SocketAddr) -> T) -> (TunnelError, T) {
    says(Config::default(), attack).await
}

/// Gives up who does not shake hands, and not before one that does has had its time on a busy machine.
fn impatient() -> Config {
    Config {
        handshake_timeout: Duration::from_secs(2),
        ..Config::default()
    }
}

/// As [`server_says`], of a server with this configuration.
async fn says<T>(config: Config, attack: impl AsyncFnOnce(SocketAddr) -> T) -> (TunnelError, T) {
    let pair = Pair::with(Config::default(), config).await;
    let result = attack(pair.server.address).await;
    let seen = &pair.server.seen;
    seen.until("the tunnel's end", |seen| !seen.tunnel_ends.borrow().is_empty())
        .await;
    let end = seen.tunnel_ends.borrow()[0].clone();
    // The rest is unharmed.
    pair.open().await.unwrap();
    (end.unwrap_err(), result)
}

async fn send(address: SocketAddr, bytes: &[u8]) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = within("the end", socket.read_to_end(&mut answer)).await;
}

#[test]
fn what_is_not_tls_is_named() {
    run(async {
        let (error, ()) = server_says(async |at| send(at, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await).await;
        assert_eq!(error.to_string(), "the peer speaks plain HTTP, not TLS");
        let (error, ()) = server_says(async |at| send(at, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await).await;
        assert_eq!(error.to_string(), "the peer speaks plain HTTP, not TLS");
        let mut noise = [0; 3000];
        common::Noise(99).fill(&mut noise);
        let (error, ()) = server_says(async |at| send(at, &noise).await).await;
        assert_eq!(error.to_string(), "the peer does not speak TLS");
        let (error, _) = server_says(async |at| TcpStream::connect(at).await.map(drop)).await;
        assert!(
            matches!(error, TunnelError::Handshake(HandshakeError::Closed)),
            "{error}"
        );
    });
}

#[test]
fn a_half_open_handshake_is_given_up() {
    run(async {
        let (error, _socket) = says(impatient(), async |at| {
            let mut socket = TcpStream::connect(at).await.unwrap();
            socket.write_all(&[22, 3, 1]).await.unwrap();
            socket
        })
        .await;
        assert!(
            matches!(error, TunnelError::Handshake(HandshakeError::Timeout(_))),
            "{error}"
        );
    });
}

#[test]
fn a_tunnel_that_never_speaks_http2_is_given_up() {
    run(async {
        let mesh = Mesh::new();
        let server = common::server(&*mesh.credentials(SERVER).await, &Rc::new(impatient())).await;
        let tls = mesh.credentials(CLIENT).await.client_config(&[SERVER.parse().unwrap()]);
        let socket = TcpStream::connect(server.address).await.unwrap();
        let name = ServerName::IpAddress(server.address.ip().into());
        let _stream = TlsConnector::from(tls).connect(name, socket).await.unwrap();
        let seen = &server.seen;
        seen.until("the tunnel's end", |seen| !seen.tunnel_ends.borrow().is_empty())
            .await;
        assert!(matches!(
            seen.tunnel_ends.borrow()[0],
            Err(TunnelError::Handshake(HandshakeError::Timeout(_)))
        ));
    });
}

#[test]
fn a_client_without_certificate_is_refused() {
    run(async {
        let (error, heard) = server_says(async |at| {
            let mut config = credulous(&[&rustls::version::TLS13]);
            config.alpn_protocols = vec![b"h2".to_vec()];
            shake(at, config).await
        })
        .await;
        assert_eq!(error.to_string(), "the peer sent no certificate");
        assert!(heard.unwrap_err().to_string().contains("CertificateRequired"));
    });
}

#[test]
fn old_tls_and_other_protocols_are_refused() {
    run(async {
        let (error, heard) = server_says(async |at| shake(at, credulous(&[&rustls::version::TLS12])).await).await;
        assert_eq!(error.to_string(), "the peer offers no TLS 1.3");
        assert!(heard.unwrap_err().to_string().contains("ProtocolVersion"));
        let (error, heard) = server_says(async |at| {
            let mut config = credulous(&[&rustls::version::TLS13]);
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            shake(at, config).await
        })
        .await;
        assert_eq!(error.to_string(), "the peer does not offer HTTP/2 (ALPN h2)");
        let heard = heard.unwrap_err().to_string();
        assert!(heard.contains("NoApplicationProtocol"), "{heard}");
    });
}

/// How an open ends for both when client and server have these credentials.
async fn open_between(client: Arc<Credentials>, server: Arc<Credentials>, expected: &str) -> (OpenError, TunnelError) {
    let mut pair = Pair::new().await;
    pair.server = common::server(&server, &Rc::new(Config::default())).await;
    pair.key.address = pair.server.address;
    pair.key.destination = vec![expected.parse().unwrap()];
    pair.credentials = client;
    let error = pair.open().await.err().expect("refused");
    let seen = &pair.server.seen;
    seen.until("the tunnel's end", |seen| !seen.tunnel_ends.borrow().is_empty())
        .await;
    assert_eq!(pair.streams(), 0);
    let end = seen.tunnel_ends.borrow()[0].clone();
    (error, end.unwrap_err())
}

#[test]
fn an_expired_certificate_is_refused_by_each_side() {
    run(async {
        let mesh = Mesh::new();
        let later = Clock::of(|| SystemTime::now() + Duration::from_secs(25 * 3600));
        let (client, server) = (
            mesh.credentials(CLIENT).await,
            mesh.credentials_at(SERVER, &Clock::system()).await,
        );
        // The same certificates, judged by a server that lives a day later.
        let late = {
            let authority = Mesh {
                authority: mesh.authority.with_clock(later.clone()),
                domain: mesh.domain,
            };
            authority.credentials_at(SERVER, &later).await
        };
        let (open, end) = open_between(client, late.clone(), SERVER).await;
        // The client finds the server's not valid yet, by its own clock.
        assert!(
            matches!(
                open,
                OpenError::Handshake {
                    source: HandshakeError::NotYetValid(_),
                    ..
                }
            ),
            "{open}"
        );
        assert!(end.to_string().contains("refused the handshake"), "{end}");
        drop(server);
    });
}

#[test]
fn an_expired_client_is_told_so() {
    run(async {
        let mesh = Mesh::new();
        let past = Clock::of(|| SystemTime::now() - Duration::from_secs(25 * 3600));
        let server = mesh.credentials(SERVER).await;
        let old = Mesh {
            authority: mesh.authority.with_clock(past.clone()),
            domain: mesh.domain,
        };
        let client = old.credentials_at(CLIENT, &past).await;
        // The client's clock is wrong too, so it must not mind the server's.
        let identity = CLIENT.parse().unwrap();
        let mut pair = Pair::new().await;
        pair.server = common::server(&server, &Rc::new(Config::default())).await;
        let _: &model::Identity = &identity;
        let config = {
            let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Credulous))
                .with_client_cert_resolver(client.client_config(&[]).client_auth_cert_resolver.clone());
            config.alpn_protocols = vec![b"h2".to_vec()];
            config
        };
        let heard = shake(pair.server.address, config).await.unwrap_err();
        assert!(heard.to_string().contains("CertificateExpired"), "{heard}");
        let seen = &pair.server.seen;
        seen.until("the tunnel's end", |seen| !seen.tunnel_ends.borrow().is_empty())
            .await;
        let end = seen.tunnel_ends.borrow()[0].clone().unwrap_err();
        assert!(end.to_string().starts_with("the peer's certificate expired 3"), "{end}");
    });
}

#[test]
fn a_client_of_another_trust_domain_or_authority_is_refused() {
    run(async {
        let mesh = Mesh::new();
        let server = mesh.credentials(SERVER).await;
        // Signed by the same authority, but of another domain.
        let foreign = "spiffe://elsewhere/ns/shop/sa/web";
        let (open, end) = open_between(mesh.credentials(foreign).await, server.clone(), SERVER).await;
        assert_eq!(
            end.to_string(),
            "the peer is of another trust domain: spiffe://elsewhere/ns/shop/sa/web, this mesh is cluster.local"
        );
        assert!(
            matches!(&open, OpenError::Handshake { source: HandshakeError::Refused(why), .. }
                if why.contains("does not accept our identity")),
            "{open}"
        );
        // Another authority's: the client does not trust the server either.
        let stranger = Mesh::new().credentials(CLIENT).await;
        let (open, _) = open_between(stranger, server, SERVER).await;
        assert!(
            matches!(
                open,
                OpenError::Handshake {
                    source: HandshakeError::UnknownIssuer,
                    ..
                }
            ),
            "{open}"
        );
    });
}

#[test]
fn a_server_of_another_identity_is_refused_by_the_client() {
    run(async {
        let mesh = Mesh::new();
        let (client, server) = (mesh.credentials(CLIENT).await, mesh.credentials(SERVER).await);
        let (open, end) = open_between(client, server, "spiffe://cluster.local/ns/shop/sa/other").await;
        assert!(
            matches!(
                &open,
                OpenError::Handshake {
                    source: HandshakeError::Identity(PeerIdentityError::Unexpected { .. }),
                    ..
                }
            ),
            "{open}"
        );
        assert!(open.retryable(), "another endpoint may be who is meant");
        assert!(end.to_string().contains("it does not accept our identity"), "{end}");
    });
}

#[test]
fn the_exchange_is_post_quantum_and_the_suite_aes_128() {
    run(async {
        let pair = Pair::new().await;
        let tls = pair.credentials.client_config(&pair.key.destination);
        let socket = TcpStream::connect(pair.server.address).await.unwrap();
        let name = ServerName::IpAddress(pair.server.address.ip().into());
        let stream = TlsConnector::from(tls).connect(name, socket).await.unwrap();
        let session = stream.get_ref().1;
        assert_eq!(
            session.negotiated_key_exchange_group().unwrap().name(),
            rustls::NamedGroup::X25519MLKEM768
        );
        assert_eq!(
            session.negotiated_cipher_suite().unwrap().suite(),
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
        );
        // A peer that prefers AES-256, as a ztunnel does, and knows no hybrid exchange, is accepted too.
        let mut provider = default_provider();
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
        provider
            .kx_groups
            .retain(|group| group.name() == rustls::NamedGroup::X25519);
        let mut old = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        old.dangerous().set_certificate_verifier(Arc::new(Credulous));
        old.client_auth_cert_resolver = pair.credentials.client_config(&[]).client_auth_cert_resolver.clone();
        old.alpn_protocols = vec![b"h2".to_vec()];
        let socket = TcpStream::connect(pair.server.address).await.unwrap();
        let name = ServerName::IpAddress(pair.server.address.ip().into());
        let mut stream = TlsConnector::from(Arc::new(old)).connect(name, socket).await.unwrap();
        let session = stream.get_ref().1;
        assert_eq!(
            session.negotiated_cipher_suite().unwrap().suite(),
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
        );
        // The server's SETTINGS come: it has accepted us.
        let mut frame = [0; 9];
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .await
            .unwrap();
        within("SETTINGS", stream.read_exact(&mut frame)).await.unwrap();
        assert_eq!(frame[3], 4);
    });
}
