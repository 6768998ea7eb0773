//! What two applications see of each other through a tunnel: the same as through one TCP connection.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{io, time::Duration};

use common::{Noise, Pair, run, socket_pair, within};
use hbone::{Config, DrainMode, Live, OpenError, RelayError, TunnelError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

async fn read_all(socket: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    within("the end of a stream", socket.read_to_end(&mut bytes)).await?;
    Ok(bytes)
}

#[test]
fn bytes_pass_both_ways_and_are_counted() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, mut ended) = pair.connect().await;
        client.write_all(b"question").await.unwrap();
        let mut question = [0; 8];
        server.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, b"question");
        server.write_all(b"the answer").await.unwrap();
        drop(server);
        assert_eq!(read_all(&mut client).await.unwrap(), b"the answer");
        drop(client);
        let end = ended.recv().await.unwrap();
        assert_eq!((end.to_peer, end.from_peer, end.outcome), (8, 10, Ok(())));
        pair.server
            .seen
            .until("the server's end", |seen| seen.ends.borrow().len() == 1)
            .await;
        let end = pair.server.seen.ends.borrow()[0].clone();
        assert_eq!((end.to_peer, end.from_peer, end.outcome), (10, 8, Ok(())));
        assert_eq!(pair.streams(), 0);
    });
}

#[test]
fn the_server_may_speak_first() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, _ended) = pair.connect().await;
        server.write_all(b"220 hello").await.unwrap();
        let mut greeting = [0; 9];
        within("the greeting", client.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 hello");
    });
}

#[test]
fn half_close_passes_each_way() {
    run(async {
        let pair = Pair::new().await;
        // The client ends first, and still hears the whole answer.
        let (mut client, mut server, mut ended) = pair.connect().await;
        client.write_all(b"all I have").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap(), b"all I have");
        server.write_all(b"late answer").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await.unwrap(), b"late answer");
        assert_eq!(ended.recv().await.unwrap().outcome, Ok(()));
        // The server ends first.
        let (mut client, mut server, mut ended) = pair.connect().await;
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await.unwrap(), b"");
        client.write_all(b"still talking").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap(), b"still talking");
        assert_eq!(ended.recv().await.unwrap().outcome, Ok(()));
    });
}

async fn is_reset(socket: &mut TcpStream) {
    let error = read_all(socket).await.expect_err("a clean end instead of a reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_reset_passes_as_a_reset_each_way() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, mut ended) = pair.connect().await;
        client.write_all(b"some").await.unwrap();
        server.read_exact(&mut [0; 4]).await.unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
        is_reset(&mut server).await;
        assert_eq!(ended.recv().await.unwrap().outcome, Err(RelayError::ApplicationReset));

        let (mut client, server, mut ended) = pair.connect().await;
        server.set_zero_linger().unwrap();
        drop(server);
        is_reset(&mut client).await;
        assert_eq!(
            ended.recv().await.unwrap().outcome,
            Err(RelayError::PeerReset { code: 10 })
        );
        assert_eq!(pair.streams(), 0);
    });
}

#[test]
fn a_reset_after_a_half_close_is_noticed() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, mut ended) = pair.connect().await;
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap(), b"");
        client.set_zero_linger().unwrap();
        drop(client);
        assert_eq!(ended.recv().await.unwrap().outcome, Err(RelayError::ApplicationReset));
        // The server's side has had the end: what remains to be seen is that it can no longer write.
        within("the write to fail", async {
            while server.write_all(b"anybody?").await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    });
}

#[test]
fn a_reset_of_a_blocked_writer_is_noticed() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, server, mut ended) = pair.connect().await;
        fill(&mut client).await;
        client.set_zero_linger().unwrap();
        drop(client);
        assert_eq!(ended.recv().await.unwrap().outcome, Err(RelayError::ApplicationReset));
        drop(server);
    });
}

/// Writes until nothing more is taken for a while; answers how much was.
async fn fill(socket: &mut TcpStream) -> usize {
    let block = vec![7; 64 << 10];
    let mut written = 0;
    while let Ok(count) = tokio::time::timeout(Duration::from_millis(300), socket.write(&block)).await {
        written += count.unwrap();
    }
    written
}

#[test]
fn a_reader_that_does_not_read_holds_the_writer_back() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, _ended) = pair.connect().await;
        let written = fill(&mut client).await;
        // The window, the send buffer, and what the kernel holds in six socket buffers.
        assert!(written < 64 << 20, "{written} bytes are somewhere");
        // Another stream of the same tunnel goes on.
        let (mut other, mut other_server, _ended) = pair.connect().await;
        other.write_all(b"ping").await.unwrap();
        within("the other stream", other_server.read_exact(&mut [0; 4]))
            .await
            .unwrap();
        // And so does this one, once it is read.
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap().len(), written);
    });
}

#[test]
fn small_writes_to_a_reader_that_does_not_read_do_not_end_the_tunnel() {
    run(async {
        let config = Config {
            stream_window: 64 << 10,
            ..Config::default()
        };
        let pair = Pair::with(config.clone(), config).await;
        let (mut client, mut server, _ended) = pair.connect().await;
        fill(&mut client).await;
        let (mut reader, mut writer, _ended) = pair.connect().await;
        // Answers byte by byte, while the client does not read.
        let mut written = 0;
        while let Ok(count) = tokio::time::timeout(Duration::from_millis(300), writer.write(b"x")).await {
            written += count.unwrap();
            if written % 16 == 0 {
                tokio::task::yield_now().await;
            }
            if written == 300_000 {
                break;
            }
        }
        drop(writer);
        assert_eq!(read_all(&mut reader).await.unwrap().len(), written);
        client.shutdown().await.unwrap();
        read_all(&mut server).await.unwrap();
    });
}

#[test]
fn one_byte_writes_arrive() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, _ended) = pair.connect().await;
        let text: Vec<u8> = (0..2000u32).map(|n| n as u8).collect();
        for byte in &text {
            client.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await.unwrap(), text);
    });
}

async fn send_noise(socket: &mut tokio::net::tcp::OwnedWriteHalf, seed: u64, total: usize) {
    let (mut noise, mut block, mut left) = (Noise(seed), vec![0; 256 << 10], total);
    while left > 0 {
        let count = left.min(block.len());
        noise.fill(&mut block[..count]);
        socket.write_all(&block[..count]).await.unwrap();
        left -= count;
    }
    socket.shutdown().await.unwrap();
}

async fn expect_noise(socket: &mut tokio::net::tcp::OwnedReadHalf, seed: u64, total: usize) {
    let (mut noise, mut expected, mut got) = (Noise(seed), vec![0; 256 << 10], vec![0; 256 << 10]);
    let mut left = total;
    while left > 0 {
        let count = left.min(expected.len());
        noise.fill(&mut expected[..count]);
        socket.read_exact(&mut got[..count]).await.unwrap();
        assert!(expected[..count] == got[..count], "wrong bytes, {left} before the end");
        left -= count;
    }
    assert_eq!(socket.read(&mut got).await.unwrap(), 0);
}

#[test]
fn much_passes_both_ways_at_once_unchanged() {
    const TOTAL: usize = 96 << 20;
    run(async {
        let pair = Pair::new().await;
        let (client, server, mut ended) = pair.connect().await;
        let (mut client_reads, mut client_writes) = client.into_split();
        let (mut server_reads, mut server_writes) = server.into_split();
        within("the transfers", async {
            tokio::join!(
                send_noise(&mut client_writes, 1, TOTAL),
                send_noise(&mut server_writes, 2, TOTAL),
                expect_noise(&mut server_reads, 1, TOTAL),
                expect_noise(&mut client_reads, 2, TOTAL),
            )
        })
        .await;
        let end = ended.recv().await.unwrap();
        assert_eq!((end.to_peer, end.from_peer), (TOTAL as u64, TOTAL as u64));
        assert_eq!(end.outcome, Ok(()));
    });
}

#[test]
fn no_truncation_when_the_tunnel_dies() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, mut ended) = pair.connect().await;
        server.write_all(b"half of an ans").await.unwrap();
        client.read_exact(&mut [0; 14]).await.unwrap();
        pair.drain(DrainMode::Immediate);
        is_reset(&mut client).await;
        is_reset(&mut server).await;
        assert!(matches!(
            ended.recv().await.unwrap().outcome,
            Err(RelayError::TunnelClosed(_) | RelayError::PeerReset { .. })
        ));
        let seen = &pair.server.seen;
        seen.until("the tunnel's end", |seen| seen.tunnel_ends.borrow().len() == 1)
            .await;
        assert!(matches!(seen.tunnel_ends.borrow()[0], Err(TunnelError::Drained)));
        assert_eq!(seen.ends.borrow()[0].outcome, Err(RelayError::Cut));
    });
}

#[test]
fn a_relay_that_is_cut_or_dropped_resets_both_sides() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, mut ended) = pair.connect().await;
        pair.server.seen.lives.borrow()[0].cut();
        is_reset(&mut server).await;
        is_reset(&mut client).await;
        assert_eq!(
            ended.recv().await.unwrap().outcome,
            Err(RelayError::PeerReset { code: 10 })
        );

        let (stream, accepted) = tokio::join!(pair.open(), pair.application.accept());
        let (mut client, captured) = socket_pair().await;
        let live = Live::default();
        let relay = tokio::task::spawn_local(stream.unwrap().relay_watched(captured, live.clone()));
        client.write_all(b"x").await.unwrap();
        let mut server = accepted.unwrap().0;
        server.read_exact(&mut [0]).await.unwrap();
        assert_eq!(live.to_peer(), 1);
        relay.abort();
        is_reset(&mut server).await;
        is_reset(&mut client).await;
        assert_eq!(pair.streams(), 0);
    });
}

#[test]
fn a_refused_connection_is_an_answer_not_a_stream() {
    run(async {
        let pair = Pair::new().await;
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        assert!(matches!(
            pair.open_to(closed).await,
            Err(OpenError::Refused { status: 503, .. })
        ));
        let denied = hbone::ConnectRequest {
            authority: "host:401".parse().unwrap(),
            headers: vec![],
        };
        let opened = pair.pool.open(&pair.key, &pair.credentials, common::dial, denied).await;
        assert!(matches!(opened, Err(OpenError::Refused { status: 401, .. })));
        assert_eq!(pair.streams(), 0);
    });
}
