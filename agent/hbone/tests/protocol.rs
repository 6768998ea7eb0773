//! What a client that does not keep to the rules gets, with the `h2` crate or bare bytes as the client.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{net::SocketAddr, rc::Rc};

use bytes::Bytes;
use common::{CLIENT, DialTarget, Mesh, Noise, SERVER, Seen, run, within};
use h2::client::SendRequest;
use hbone::{Accepted, Config, TunnelError};
use http::{Method, Request, Version};
use rustls::pki_types::ServerName;
use tasks::drain_channel;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsConnector;

type Served = JoinHandle<Result<(), TunnelError>>;

/// A server of the other end of this pipe, past its TLS handshake.
fn plain_server(config: Config) -> (DuplexStream, Served, Rc<Seen>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let seen = Rc::new(Seen::default());
    let handler = DialTarget {
        seen: seen.clone(),
        stalls: Rc::default(),
    };
    let address: SocketAddr = "127.0.0.1:15008".parse().unwrap();
    let accepted = Accepted {
        peer: CLIENT.parse().unwrap(),
        proof: std::sync::Arc::default(),
        peer_address: address,
        local_address: address,
    };
    let served = tokio::task::spawn_local(async move {
        let (_trigger, drain) = drain_channel();
        hbone::serve_plain(far, accepted, Rc::new(config), handler, drain).await
    });
    (near, served, seen)
}

async fn h2_client(io: DuplexStream) -> SendRequest<Bytes> {
    let (requests, connection) = h2::client::handshake(io).await.unwrap();
    tokio::task::spawn_local(async move {
        let _ = connection.await;
    });
    requests
}

async fn status(requests: &SendRequest<Bytes>, request: Request<()>) -> Result<u16, h2::Error> {
    let mut requests = requests.clone().ready().await?;
    let (response, _send) = requests.send_request(request, false)?;
    within("an answer", response)
        .await
        .map(|response| response.status().as_u16())
}

fn connect(authority: &str) -> Request<()> {
    Request::builder()
        .version(Version::HTTP_2)
        .method(Method::CONNECT)
        .uri(authority)
        .body(())
        .unwrap()
}

#[test]
fn what_is_no_connect_with_a_port_gets_400() {
    run(async {
        let (io, _served, _) = plain_server(Config::default());
        let requests = h2_client(io).await;
        let get = Request::builder().uri("http://10.0.0.1/").body(()).unwrap();
        assert_eq!(status(&requests, get).await.unwrap(), 400);
        assert_eq!(status(&requests, connect("10.0.0.1")).await.unwrap(), 400);
        assert_eq!(status(&requests, connect("user@10.0.0.1:80")).await.unwrap(), 400);
        // And what is one, but for nobody.
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert_eq!(status(&requests, connect(&closed.to_string())).await.unwrap(), 503);
    });
}

#[test]
fn headers_beyond_the_limit_get_431_and_only_those() {
    run(async {
        let (io, _served, _) = plain_server(Config::default());
        let requests = h2_client(io).await;
        let mut huge = connect("host:401");
        huge.headers_mut()
            .insert("baggage", "x".repeat(80 << 10).parse().unwrap());
        assert_eq!(status(&requests, huge).await.unwrap(), 431);
        assert_eq!(status(&requests, connect("host:401")).await.unwrap(), 401);
    });
}

#[test]
fn a_stream_beyond_the_limit_waits_for_its_turn() {
    run(async {
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = Config {
            max_concurrent_streams: 2,
            ..Config::default()
        };
        let (io, _served, seen) = plain_server(config);
        let requests = h2_client(io).await;
        let target = application.local_addr().unwrap().to_string();
        assert_eq!(status(&requests, connect("host:401")).await.unwrap(), 401);
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut requests = requests.clone().ready().await.unwrap();
            open.push(requests.send_request(connect(&target), false).unwrap());
        }
        for (response, _) in &mut open {
            assert_eq!(response.await.unwrap().status(), 200);
        }
        let third = status(&requests, connect(&target));
        let (third, ()) = tokio::join!(third, async {
            tokio::task::yield_now().await;
            assert_eq!(seen.lives.borrow().len(), 2);
            open.pop();
        });
        assert_eq!(third.unwrap(), 200);
    });
}

/// A frame: its length, type, flags and stream are put before the payload.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn preface() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes
}

/// Never indexed literals, names included.
fn headers(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend(text.as_bytes());
        }
    }
    block
}

/// Frame types and the first four bytes of their payloads, until the server closes or is silent.
async fn answers(io: &mut DuplexStream) -> Vec<(u8, u32, Vec<u8>)> {
    let mut frames = Vec::new();
    let read = async {
        loop {
            let mut head = [0; 9];
            if io.read_exact(&mut head).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            if io.read_exact(&mut payload).await.is_err() {
                return;
            }
            frames.push((
                head[3],
                u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
                payload,
            ));
        }
    };
    let _ = tokio::time::timeout(std::time::Duration::from_millis(200), read).await;
    frames
}

#[test]
fn a_connect_with_scheme_or_path_is_a_protocol_error_of_its_stream() {
    run(async {
        for extra in [(":scheme", "https"), (":path", "/"), (":protocol", "websocket")] {
            let (mut io, _served, _) = plain_server(Config::default());
            let fields = [(":method", "CONNECT"), (":authority", "10.0.0.1:80"), extra];
            let mut bytes = preface();
            bytes.extend(frame(1, 4, 1, &headers(&fields)));
            io.write_all(&bytes).await.unwrap();
            let reset = answers(&mut io)
                .await
                .into_iter()
                .find(|(kind, stream, _)| (*kind, *stream) == (3, 1));
            assert_eq!(reset.unwrap().2, [0, 0, 0, 1], "{extra:?}");
        }
    });
}

#[test]
fn settings_are_those_of_a_ztunnel() {
    run(async {
        let (mut io, _served, _) = plain_server(Config::default());
        io.write_all(&preface()).await.unwrap();
        let frames = answers(&mut io).await;
        let (_, _, settings) = frames.iter().find(|(kind, ..)| *kind == 4).unwrap();
        let mut settings: Vec<_> = settings
            .chunks(6)
            .map(|entry| (entry[1], u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]])))
            .collect();
        settings.sort_unstable();
        assert_eq!(settings, [(3, 200), (4, 4_194_304), (5, 1_048_576), (6, 65_536)]);
        let (_, _, window) = frames
            .iter()
            .find(|(kind, stream, _)| (*kind, *stream) == (8, 0))
            .unwrap();
        assert_eq!(window[..], 16_711_681u32.to_be_bytes());
    });
}

#[test]
fn a_flood_of_resets_ends_the_tunnel() {
    run(async {
        let (mut io, served, _) = plain_server(Config::default());
        let block = headers(&[(":method", "CONNECT"), (":authority", "host:401")]);
        let flood = async {
            io.write_all(&preface()).await?;
            for n in 0..100_000u32 {
                let stream = 2 * n + 1;
                let mut bytes = frame(1, 4, stream, &block);
                bytes.extend(frame(3, 0, stream, &[0, 0, 0, 8]));
                io.write_all(&bytes).await?;
            }
            std::io::Result::Ok(())
        };
        assert!(within("the flood to be cut off", flood).await.is_err());
        let end = within("the tunnel's end", served).await.unwrap().unwrap_err();
        assert!(matches!(end, TunnelError::Http2(_)), "{end}");
    });
}

#[test]
fn endless_continuations_end_the_tunnel() {
    run(async {
        let (mut io, served, _) = plain_server(Config::default());
        let flood = async {
            io.write_all(&preface()).await?;
            io.write_all(&frame(1, 0, 1, &headers(&[(":method", "CONNECT")])))
                .await?;
            for _ in 0..100_000 {
                io.write_all(&frame(9, 0, 1, &headers(&[("a", "b")]))).await?;
            }
            std::io::Result::Ok(())
        };
        assert!(within("the flood to be cut off", flood).await.is_err());
        assert!(within("the tunnel's end", served).await.unwrap().is_err());
    });
}

#[test]
fn random_bytes_never_panic() {
    run(async {
        let mut noise = Noise(4242);
        for round in 0..300 {
            let (mut io, served, _) = plain_server(Config::default());
            let mut bytes = vec![0; 4 + round * 3];
            noise.fill(&mut bytes);
            if round % 2 == 0 {
                // Frames of a known type, with anything in them.
                for n in 0..bytes.len() / 20 {
                    let at = n * 20;
                    let kind = bytes[at] % 10;
                    let piece = frame(
                        kind,
                        bytes[at + 1],
                        u32::from(bytes[at + 2] % 8),
                        &bytes[at + 9..at + 20],
                    );
                    bytes[at..at + 20].copy_from_slice(&piece);
                }
                let _ = io.write_all(&preface()).await;
            }
            let _ = io.write_all(&bytes).await;
            drop(io);
            if let Err(error) = within("the server's end", served).await {
                panic!("round {round}: {error}");
            }
        }
    });
}

#[test]
fn a_thousand_half_open_handshakes_harm_nobody() {
    run(async {
        let mesh = Mesh::new();
        let config = Rc::new(Config {
            handshake_timeout: std::time::Duration::from_millis(500),
            ..Config::default()
        });
        let server = common::server(&*mesh.credentials(SERVER).await, &config).await;
        let mut half_open = Vec::new();
        for _ in 0..1000 {
            let mut socket = TcpStream::connect(server.address).await.unwrap();
            socket.write_all(&[22, 3]).await.unwrap();
            half_open.push(socket);
        }
        let tls = mesh.credentials(CLIENT).await.client_config(&[SERVER.parse().unwrap()]);
        let socket = TcpStream::connect(server.address).await.unwrap();
        let name = ServerName::IpAddress(server.address.ip().into());
        within("a handshake", TlsConnector::from(tls).connect(name, socket))
            .await
            .unwrap();
        let seen = &server.seen;
        seen.until("all to be given up", |seen| seen.tunnel_ends.borrow().len() >= 1000)
            .await;
    });
}
