//! What each fuzz target does with its bytes: one function a target, named like it.
//!
//! To fuzz, with coverage: `cargo +nightly fuzz run -s none TARGET` in `tests/fuzz`; or with any compiler,
//! `RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
//! -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
//! cargo build --release --bins --target x86_64-unknown-linux-gnu`, and then run `target/*/release/TARGET`.
//! As a smoke run of a bounded number of iterations, without: `cargo test --manifest-path tests/fuzz/Cargo.toml`.
//!
//! A new target: a function here, a file of three lines in `fuzz_targets/`, a `[[bin]]`, a line in `smoke` below.

mod kubernetes;

pub use kubernetes::{kubernetes_object, store_body, store_patch, store_target};

use std::{net::SocketAddr, rc::Rc, time::Duration};

use hbone::{Accepted, Config, Decision, Handler, IncomingRequest, RelayEnd};
use identity::{Authority as _, Clock, Credentials, LocalAuthority, generate_root};
use model::{Authority, Identity, TrustDomain};
use rustls_pki_types::CertificateDer;
use tasks::drain_channel;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

/// The `:authority` of a CONNECT: what is accepted reads back as itself.
pub fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(authority) = text.parse::<Authority>() {
        assert_eq!(authority.to_string().parse(), Ok(authority));
    }
}

/// A SPIFFE name: what is accepted is written exactly so.
pub fn identity(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(identity) = text.parse::<Identity>() {
        assert_eq!(identity.to_string(), text);
    }
}

/// What a pod or a name server sends: read, answered, refused or passed on, and nothing else.
pub fn dns_message(data: &[u8]) {
    l4::dns::try_message(data);
}

/// The certificate of a peer.
pub fn peer_certificate(data: &[u8]) {
    let _ = identity::peer_identity(&[CertificateDer::from(data)]);
}

/// HTTP/2 as the server gets it after the TLS handshake. The preface is put before the data, unless its first byte is odd.
pub fn http2_server(data: &[u8]) {
    let Some((first, data)) = data.split_first() else {
        return;
    };
    run(async {
        let (mut near, far) = tokio::io::duplex(1 << 16);
        let address = SocketAddr::from(([127, 0, 0, 1], 15008));
        let accepted = Accepted {
            peer: "spiffe://cluster.local/ns/a/sa/b".parse().expect("an identity"),
            proof: std::sync::Arc::default(),
            peer_address: address,
            local_address: address,
        };
        let (_trigger, drain) = drain_channel();
        let served = hbone::serve_plain(far, accepted, Rc::new(Config::default()), Refuse, drain);
        let attack = async {
            if first % 2 == 0 {
                let _ = near
                    .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                    .await;
            }
            let (mut reads, mut writes) = tokio::io::split(near);
            let _ = writes.write_all(data).await;
            let _ = writes.shutdown().await;
            let _ = reads.read_to_end(&mut Vec::new()).await;
        };
        let _ = tokio::join!(served, attack);
    });
}

/// The first bytes on an accepted connection, before anybody has shown a certificate.
pub fn tunnel_socket(data: &[u8]) {
    let tls = credentials().server_config();
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (attacker, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut attacker, accepted) = (attacker.expect("a connection"), accepted.expect("a connection").0);
        let (_trigger, drain) = drain_channel();
        let served = hbone::serve(accepted, tls, Rc::new(Config::default()), Refuse, drain);
        let attack = async {
            let _ = attacker.write_all(data).await;
            let _ = attacker.shutdown().await;
            let _ = attacker.read_to_end(&mut Vec::new()).await;
        };
        let (served, ()) = tokio::join!(served, attack);
        assert!(served.is_err(), "a tunnel without a certificate");
    });
}

/// Refuses everyone.
#[derive(Clone)]
struct Refuse;

impl Handler for Refuse {
    type Context = ();

    async fn connect(&self, _: &Accepted, request: IncomingRequest) -> Decision<()> {
        let status = if request.authority.is_ok() { 401 } else { 400 };
        Decision::Refuse { status, reason: None }
    }

    fn relayed(&self, (): (), _: RelayEnd) {}
}

fn credentials() -> &'static Credentials {
    static CREDENTIALS: std::sync::OnceLock<Credentials> = std::sync::OnceLock::new();
    CREDENTIALS.get_or_init(make_credentials)
}

fn make_credentials() -> Credentials {
    let domain = TrustDomain::default();
    let (certificate, key) = generate_root(&domain).expect("a root");
    let authority = LocalAuthority::from_pem(&certificate, &key).expect("an authority");
    let identity: Identity = "spiffe://cluster.local/ns/a/sa/b".parse().expect("an identity");
    let issued = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime")
        .block_on(authority.issue(&identity))
        .expect("a certificate");
    Credentials::new(identity, &domain, issued, &Clock::system()).expect("credentials")
}

fn run<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    }
    let bounded = async {
        tokio::time::timeout(Duration::from_secs(20), work)
            .await
            .expect("a hang")
    };
    RUNTIME.with(|runtime| LocalSet::new().block_on(runtime, bounded))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::examples;

    type Target<'a> = (&'static str, fn(&[u8]), &'a [&'a [u8]], u32);

    /// The first bytes that our own client sends.
    fn client_hello() -> Vec<u8> {
        let issued = std::sync::Arc::new(make_credentials());
        let identity = issued.identity().clone();
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let key = hbone::TunnelKey {
                source: identity.clone(),
                destination: vec![identity],
                workload: model::WorkloadUid::default(),
                address: listener.local_addr().expect("an address"),
            };
            let dial = || {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            };
            let request = hbone::ConnectRequest {
                authority: Authority::Host("a".into(), 80),
                headers: vec![],
            };
            let pool = hbone::Pool::new(Rc::new(Config::default()));
            let mut hello = vec![0; 4096];
            let read = async {
                let mut socket = listener.accept().await.expect("a connection").0;
                let count = socket.read(&mut hello).await.expect("a hello");
                hello.truncate(count);
            };
            let (opened, ()) = tokio::join!(pool.open(&key, &issued, dial, request), read);
            assert!(opened.is_err());
            hello
        })
    }

    /// Each with examples of what is right, so that changing a few bytes goes deep.
    fn targets<'a>(hello: &'a [&'a [u8]]) -> Vec<Target<'a>> {
        vec![
        ("authority", authority, &[b"10.0.0.1:80", b"[fd00::1]:15008", b"web.shop.svc.cluster.local:80"], 50_000),
        ("identity", identity, &[b"spiffe://cluster.local/ns/shop/sa/web"], 50_000),
        (
            "dns_message",
            dns_message,
            &[
                b"\x12\x34\x01\0\0\x01\0\0\0\0\0\x01\x03web\x04shop\0\0\x01\0\x01\0\0\x29\x04\xd0\0\0\x80\0\0\0",
                b"\x12\x34\x81\x80\0\x01\0\x01\0\0\0\0\x01a\0\0\x01\0\x01\xc0\x0c\0\x01\0\x01\0\0\0\x1e\0\x04\x0a\0\0\x01",
            ],
            50_000,
        ),
        ("peer_certificate", peer_certificate, &[b"\x30\x82\x01\x00\x30\x81\xa6\xa0\x03\x02\x01\x02"], 50_000),
        (
            "http2_server",
            http2_server,
            &[b"\0\0\0\x1b\x01\x04\0\0\0\x01\0\x07:method\x07CONNECT\0\x0a:authority\x0610.0:1\0\0\x04\x08\0\0\0\0\x01\0\0\0\x01"],
            1500,
        ),
        (
            "tunnel_socket",
            tunnel_socket,
            &[b"\x16\x03\x01\0\x10\x01\0\0\x0c\x03\x03", b"GET / HTTP/1.1\r\n\r\n"],
            300,
        ),
            ("tunnel_socket", tunnel_socket, hello, 1000),
            ("store_body", store_body, examples::BODIES, 5_000),
            ("store_target", store_target, examples::TARGETS, 50_000),
            ("store_patch", store_patch, examples::PATCHES, 20_000),
            ("kubernetes_object", kubernetes_object, examples::OBJECTS, 20_000),
        ]
    }

    #[test]
    fn smoke() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as usize
        };
        let hello = client_hello();
        for (name, target, examples, iterations) in targets(&[&hello]) {
            println!("{name}: {iterations} iterations");
            for _ in 0..iterations {
                let mut data = examples[random() % examples.len()].to_vec();
                for _ in 0..random() % 8 {
                    let at = random() % (data.len() + 1);
                    match random() % 4 {
                        0 => data.insert(at, random() as u8),
                        1 if at < data.len() => drop(data.remove(at)),
                        2 => data.truncate(at.max(1)),
                        _ if at < data.len() => data[at] = random() as u8,
                        _ => data.extend_from_within(..at),
                    }
                }
                target(&data);
            }
        }
    }
}
