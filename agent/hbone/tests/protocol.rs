//! What a client that does not keep to the rules gets, with the `h2` crate or bare bytes as the client; and what one that
//! does gets through, though it looks like an attack.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{net::SocketAddr, rc::Rc};

use bytes::Bytes;
use common::{CLIENT, DialTarget, Mesh, Noise, Pair, SERVER, Seen, echo, run, socket_pair, within};
use h2::client::SendRequest;
use hbone::{Accepted, Config, TunnelError};
use http::{Method, Request, Version};
use rustls::pki_types::ServerName;
use tasks::drain_channel;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

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

/// Its type, stream and payload; `None` at the end.
async fn read_frame(io: &mut (impl AsyncRead + Unpin)) -> Option<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    io.read_exact(&mut head).await.ok()?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    io.read_exact(&mut payload).await.ok()?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some((head[3], stream, payload))
}

/// The first frame of a type and stream.
async fn until_frame(io: &mut (impl AsyncRead + Unpin), kind: u8, stream: u32) -> Vec<u8> {
    within("a frame", async {
        loop {
            match read_frame(io).await {
                Some((7, _, why)) => panic!("the tunnel was ended: {}", String::from_utf8_lossy(&why)),
                Some((got, of, payload)) if (got, of) == (kind, stream) => return payload,
                Some(_) => {}
                None => panic!("the connection was closed"),
            }
        }
    })
    .await
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
            let reset = until_frame(&mut io, 3, 1).await;
            assert_eq!(reset, [0, 0, 0, 1], "{extra:?}");
        }
    });
}

#[test]
fn settings_are_those_of_a_ztunnel() {
    run(async {
        let (mut io, _served, _) = plain_server(Config::default());
        io.write_all(&preface()).await.unwrap();
        let settings = until_frame(&mut io, 4, 0).await;
        let mut settings: Vec<_> = settings
            .chunks(6)
            .map(|entry| (entry[1], u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]])))
            .collect();
        settings.sort_unstable();
        assert_eq!(settings, [(3, 200), (4, 4_194_304), (5, 1_048_576), (6, 65_536)]);
        let window = until_frame(&mut io, 8, 0).await;
        assert_eq!(window, 16_711_681u32.to_be_bytes());
    });
}

fn connect_frame(stream: u32, target: SocketAddr) -> Vec<u8> {
    let fields = [(":method", "CONNECT"), (":authority", &*target.to_string())];
    frame(1, 4, stream, &headers(&fields))
}

/// A tunnel of bare bytes with one live stream, 1, to an application that echoes.
async fn with_live_stream() -> (DuplexStream, Rc<Seen>, SocketAddr) {
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = application.local_addr().unwrap();
    echo(application);
    let (mut io, _served, seen) = plain_server(Config::default());
    io.write_all(&preface()).await.unwrap();
    io.write_all(&connect_frame(1, target)).await.unwrap();
    until_frame(&mut io, 1, 1).await;
    (io, seen, target)
}

async fn expect_echo(io: &mut DuplexStream) {
    io.write_all(&frame(0, 0, 1, b"ping")).await.unwrap();
    assert_eq!(until_frame(io, 0, 1).await, b"ping");
}

#[test]
fn connects_given_up_before_they_were_looked_at_do_not_end_the_tunnel() {
    run(async {
        let (mut io, _seen, target) = with_live_stream().await;
        // The client gave up while the server stood still, which then reads all at once.
        let mut bytes = Vec::new();
        for n in 1..=200 {
            bytes.extend(connect_frame(2 * n + 1, target));
            bytes.extend(frame(3, 0, 2 * n + 1, &[0, 0, 0, 8]));
        }
        io.write_all(&bytes).await.unwrap();
        expect_echo(&mut io).await;
    });
}

/// The streams that the other end resets, in its order.
async fn resets(io: &mut (impl AsyncRead + Unpin), count: usize) -> Vec<u32> {
    let mut streams = Vec::new();
    while streams.len() < count {
        let (kind, stream, _) = within("a reset", read_frame(io)).await.unwrap();
        if kind == 3 {
            streams.push(stream);
        }
    }
    streams
}

/// Sends DATA to streams that the other end has reset, frame by frame, as when it was under way.
async fn send_late_data(io: &mut (impl AsyncRead + AsyncWrite + Unpin), streams: &[u32]) {
    for _ in 0..110 {
        for stream in streams {
            io.write_all(&frame(0, 0, *stream, b"x")).await.unwrap();
        }
        io.write_all(&frame(6, 0, 0, b"received")).await.unwrap();
        until_frame(io, 6, 0).await;
    }
}

#[test]
fn data_under_way_to_streams_that_the_server_cut_does_not_end_the_tunnel() {
    run(async {
        let (mut io, seen, target) = with_live_stream().await;
        for n in 1..=60 {
            io.write_all(&connect_frame(2 * n + 1, target)).await.unwrap();
        }
        seen.until("all streams", |seen| seen.lives.borrow().len() == 61).await;
        for live in &seen.lives.borrow()[1..] {
            live.cut();
        }
        let cut = resets(&mut io, 60).await;
        send_late_data(&mut io, &cut[50..]).await;
        expect_echo(&mut io).await;
    });
}

#[test]
fn data_under_way_to_streams_that_the_client_dropped_does_not_end_its_tunnel() {
    run(async {
        let mut pair = Pair::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        pair.key.address = listener.local_addr().unwrap();
        let tls = TlsAcceptor::from(pair.mesh.credentials(SERVER).await.server_config());
        // Grants each CONNECT until all were reset, but the first.
        let server = tokio::task::spawn_local(async move {
            let mut io = tls.accept(listener.accept().await.unwrap().0).await.unwrap();
            io.read_exact(&mut [0; 24]).await.unwrap();
            io.write_all(&frame(4, 0, 0, &[])).await.unwrap();
            let mut reset = Vec::new();
            while reset.len() < 60 {
                match read_frame(&mut io).await.unwrap() {
                    (1, stream, _) => io.write_all(&frame(1, 4, stream, &[0x88])).await.unwrap(),
                    (3, stream, _) => reset.push(stream),
                    _ => {}
                }
            }
            send_late_data(&mut io, &reset[50..]).await;
            io.write_all(&frame(0, 0, 1, b"still here")).await.unwrap();
            io
        });
        let live = pair.open().await.unwrap();
        let (mut client, captured) = socket_pair().await;
        tokio::task::spawn_local(live.relay(captured));
        let mut dropped = Vec::new();
        for _ in 0..60 {
            dropped.push(pair.open().await.unwrap());
        }
        drop(dropped);
        let mut got = [0; 10];
        within("the live stream", client.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, b"still here");
        server.abort();
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
            handshake_timeout: std::time::Duration::from_secs(5),
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
