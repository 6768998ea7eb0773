//! Tunnels: shared, bounded, reused, rotated, given up.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{cell::Cell, net::SocketAddr, rc::Rc, time::Duration};

use common::{CLIENT, Pair, Seen, echo, run, socket_pair, within};
use futures_util::future::join_all;
use hbone::{Config, DrainMode, HandshakeError, OpenError, RelayError, Standing};
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

async fn with_echo(client: Config, server: Config) -> Pair {
    let mut pair = Pair::with(client, server).await;
    let spare = TcpListener::bind("127.0.0.1:0").await.unwrap();
    echo(std::mem::replace(&mut pair.application, spare));
    pair
}

async fn quick(pair: &Pair) {
    let stream = pair.open().await.unwrap();
    let (mut client, captured) = socket_pair().await;
    let relay = stream.relay(captured);
    let talk = async {
        client.write_all(b"ping").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"ping");
    };
    let (end, ()) = within("an echo", async { tokio::join!(relay, talk) }).await;
    assert_eq!(end.outcome, Ok(()));
}

#[test]
fn connections_share_a_tunnel() {
    run(async {
        let pair = with_echo(Config::default(), Config::default()).await;
        for _ in 0..20 {
            quick(&pair).await;
        }
        assert_eq!(pair.server.seen.tunnels.get(), 1);
        let tunnels = pair.pool.tunnels();
        assert_eq!((tunnels.len(), tunnels[0].served, tunnels[0].streams), (1, 20, 0));
        assert_eq!(pair.server.seen.peers.borrow()[0].to_string(), CLIENT);
    });
}

#[test]
fn a_thousand_streams_at_once_need_ten_tunnels() {
    run(async {
        let pair = with_echo(Config::default(), Config::default()).await;
        let streams = within("1000 opens", join_all((0..1000).map(|_| pair.open()))).await;
        let streams: Vec<_> = streams.into_iter().map(Result::unwrap).collect();
        assert_eq!(pair.streams(), 1000);
        assert_eq!(pair.server.seen.tunnels.get(), 10);
        assert!(
            pair.pool
                .tunnels()
                .iter()
                .all(|tunnel| tunnel.streams == tunnel.capacity)
        );
        drop(streams);
        assert_eq!(pair.streams(), 0);
        // What became free is used again.
        let streams = within("1000 more", join_all((0..1000).map(|_| pair.open()))).await;
        assert!(streams.iter().all(Result::is_ok));
        assert_eq!(pair.server.seen.tunnels.get(), 10);
    });
}

#[test]
fn a_peer_that_allows_fewer_streams_gets_more_tunnels() {
    run(async {
        let few = Config {
            max_concurrent_streams: 3,
            ..Config::default()
        };
        let pair = with_echo(Config::default(), few).await;
        // Its SETTINGS are known once it has answered.
        let mut streams = vec![pair.open().await.unwrap()];
        for _ in 0..8 {
            streams.push(within("an open", pair.open()).await.unwrap());
        }
        assert_eq!(pair.server.seen.tunnels.get(), 3);
    });
}

#[test]
fn other_identities_addresses_and_workloads_have_other_tunnels() {
    run(async {
        let pair = with_echo(Config::default(), Config::default()).await;
        quick(&pair).await;
        let mut other = pair.key.clone();
        other.source = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
        let credentials = pair.mesh.credentials(&other.source.to_string()).await;
        let opened = pair
            .pool
            .open(&other, &credentials, common::dial, common::request(pair.target))
            .await;
        opened.unwrap();
        let mut wider = pair.key.clone();
        wider.destination.push(CLIENT.parse().unwrap());
        let opened = pair
            .pool
            .open(&wider, &pair.credentials, common::dial, common::request(pair.target))
            .await;
        opened.unwrap();
        // A new pod, of the same identity, that was given the address of one before it.
        let mut successor = pair.key.clone();
        successor.workload = model::WorkloadUid::of_pod("Kubernetes", "shop", "server-2");
        let opened = pair
            .pool
            .open(
                &successor,
                &pair.credentials,
                common::dial,
                common::request(pair.target),
            )
            .await;
        opened.unwrap();
        assert_eq!(pair.server.seen.tunnels.get(), 4);
    });
}

#[test]
fn the_tunnels_of_a_workload_that_leaves_or_is_gone_take_no_more_streams_and_finish_those_they_have() {
    run(async {
        let pair = Pair::new().await;
        for (standing, reviews, tunnels) in [
            (Standing::Good, 2, 1),
            (Standing::Leaving, 3, 2),
            (Standing::Gone, 1, 3),
        ] {
            let (mut client, mut server, _ended) = pair.connect().await;
            pair.pool.review(|key| {
                assert_eq!(*key, pair.key);
                standing
            });
            // One that leaves may still be dialled by its address: what is opened then is not closed by the next review.
            for _ in 1..reviews {
                let (_client, _server, _ended) = pair.connect().await;
                pair.pool.review(|_| standing);
            }
            drop(pair.connect().await);
            assert_eq!(pair.server.seen.tunnels.get(), tunnels, "{standing:?}");
            client.write_all(b"goes on").await.unwrap();
            within("the bytes", server.read_exact(&mut [0; 7])).await.unwrap();
        }
    });
}

#[test]
fn a_failed_dial_fails_everyone_who_waited_and_nobody_later() {
    run(async {
        let mut pair = with_echo(Config::default(), Config::default()).await;
        let good = pair.key.address;
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        pair.key.address = closed.local_addr().unwrap();
        drop(closed);
        let dials = Rc::new(Cell::new(0));
        let counted = || {
            dials.set(dials.get() + 1);
            common::dial()
        };
        let open = || {
            pair.pool
                .open(&pair.key, &pair.credentials, counted, common::request(pair.target))
        };
        for result in join_all((0..10).map(|_| open())).await {
            assert!(matches!(result, Err(OpenError::Dial { .. })));
        }
        assert_eq!(dials.get(), 1);
        assert!(pair.pool.tunnels().is_empty());
        pair.key.address = good;
        quick(&pair).await;
    });
}

#[test]
fn a_peer_that_does_not_answer_times_out() {
    run(async {
        let config = Config {
            response_timeout: Duration::from_millis(200),
            ..Config::default()
        };
        let pair = with_echo(config, Config::default()).await;
        pair.server.stalls.set(true);
        assert!(matches!(pair.open().await, Err(OpenError::ResponseTimeout(_))));
        assert_eq!(pair.streams(), 0);
        assert_eq!(pair.pool.tunnels().len(), 1);
    });
}

#[test]
fn a_peer_that_does_not_shake_hands_times_out() {
    run(async {
        let config = Config {
            handshake_timeout: Duration::from_millis(200),
            ..Config::default()
        };
        let mut pair = with_echo(config, Config::default()).await;
        let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
        pair.key.address = mute.local_addr().unwrap();
        assert!(matches!(
            pair.open().await,
            Err(OpenError::Handshake {
                source: HandshakeError::Timeout(_),
                ..
            })
        ));
        assert!(pair.pool.tunnels().is_empty());
    });
}

#[test]
fn who_gives_up_waiting_does_not_end_the_dial_for_others() {
    run(async {
        let pair = with_echo(Config::default(), Config::default()).await;
        let mut first = Box::pin(pair.open());
        let started = tokio::time::timeout(Duration::ZERO, first.as_mut()).await;
        assert!(started.is_err());
        let (second, ()) = tokio::join!(pair.open(), async { drop(first) });
        second.unwrap();
        assert_eq!(pair.server.seen.tunnels.get(), 1);
        assert_eq!(pair.streams(), 0);
    });
}

#[test]
fn a_rotated_certificate_opens_a_new_tunnel_and_the_old_one_drains() {
    run(async {
        let mut pair = with_echo(Config::default(), Config::default()).await;
        let old = pair.open().await.unwrap();
        pair.credentials = pair.mesh.credentials(CLIENT).await;
        quick(&pair).await;
        assert_eq!(pair.server.seen.tunnels.get(), 2);
        // What runs goes on.
        let (mut client, captured) = socket_pair().await;
        let relay = tokio::task::spawn_local(old.relay(captured));
        client.write_all(b"still here").await.unwrap();
        within("the echo", client.read_exact(&mut [0; 10])).await.unwrap();
        drop(client);
        relay.await.unwrap().outcome.unwrap();
        pair.server
            .seen
            .until("the old tunnel's end", |seen| seen.tunnel_ends.borrow().len() == 1)
            .await;
        pair.server.seen.tunnel_ends.borrow()[0].clone().unwrap();
    });
}

#[test]
fn a_graceful_drain_finishes_streams_and_takes_no_new_ones() {
    run(async {
        let pair = Pair::new().await;
        let (mut client, mut server, _ended) = pair.connect().await;
        client.write_all(b"before").await.unwrap();
        server.read_exact(&mut [0; 6]).await.unwrap();
        pair.drain(DrainMode::Graceful);
        server.write_all(b"after").await.unwrap();
        client.read_exact(&mut [0; 5]).await.unwrap();
        let opened = within("an open that is refused or on another tunnel", async {
            // The GOAWAY may be on its way.
            loop {
                let tunnels = pair.server.seen.tunnels.get();
                match pair.open().await {
                    Ok(_) if tunnels == pair.server.seen.tunnels.get() => {}
                    other => return other,
                }
            }
        })
        .await;
        // The drained server accepts no stream in a new tunnel either.
        assert!(opened.is_err() || pair.server.seen.tunnels.get() == 2);
        client.write_all(b"goes on").await.unwrap();
        server.read_exact(&mut [0; 7]).await.unwrap();
        drop((client, server));
        pair.server
            .seen
            .until("the tunnel's end", |seen| !seen.tunnel_ends.borrow().is_empty())
            .await;
        pair.server.seen.tunnel_ends.borrow()[0].clone().unwrap();
    });
}

/// What stands between client and server does with bytes.
#[derive(Clone, Copy, PartialEq)]
enum Middle {
    Pass,
    /// Swallows them, without closing.
    Swallow,
    /// Closes the connection that they came on, and passes those of the next.
    CloseOnce,
    /// Changes one of them.
    Tamper,
}

/// A listener that passes connections on to `back`, for as long as `mode` says so.
async fn middle(back: SocketAddr, mode: Rc<Cell<Middle>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        loop {
            let (near, _) = listener.accept().await.unwrap();
            let far = TcpStream::connect(back).await.unwrap();
            tokio::task::spawn_local(pass(near, far, mode.clone()));
        }
    });
    front
}

async fn pass(mut near: TcpStream, mut far: TcpStream, mode: Rc<Cell<Middle>>) -> std::io::Result<()> {
    let mut buffers = (vec![0; 65536], vec![0; 65536]);
    loop {
        let (to, bytes) = tokio::select! {
            n = near.read(&mut buffers.0) => (&mut far, &mut buffers.0[..n?]),
            n = far.read(&mut buffers.1) => (&mut near, &mut buffers.1[..n?]),
        };
        match mode.get() {
            _ if bytes.is_empty() => return Ok(()),
            Middle::Pass => to.write_all(bytes).await?,
            Middle::Swallow => {}
            Middle::Tamper => {
                *bytes.last_mut().unwrap() ^= 1;
                to.write_all(bytes).await?;
            }
            Middle::CloseOnce => {
                mode.set(Middle::Pass);
                return Ok(());
            }
        }
    }
}

#[test]
fn a_stale_tunnel_is_replaced_without_anybody_noticing() {
    run(async {
        let mut pair = with_echo(Config::default(), Config::default()).await;
        let mode = Rc::new(Cell::new(Middle::Pass));
        pair.key.address = middle(pair.server.address, mode.clone()).await;
        quick(&pair).await;
        mode.set(Middle::CloseOnce);
        quick(&pair).await;
        assert_eq!(pair.server.seen.tunnels.get(), 2);
        assert_eq!(pair.streams(), 0);
        // A new one that breaks is an error: what is tried once more is only what may have been stale.
        mode.set(Middle::CloseOnce);
        pair.key.source = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
        assert!(pair.open().await.is_err());
    });
}

#[test]
fn a_tampered_record_ends_the_tunnel() {
    run(async {
        let mut pair = with_echo(Config::default(), Config::default()).await;
        let mode = Rc::new(Cell::new(Middle::Pass));
        pair.key.address = middle(pair.server.address, mode.clone()).await;
        let stream = pair.open().await.unwrap();
        let (mut client, captured) = socket_pair().await;
        let relay = tokio::task::spawn_local(stream.relay(captured));
        client.write_all(b"ping").await.unwrap();
        client.read_exact(&mut [0; 4]).await.unwrap();
        mode.set(Middle::Tamper);
        client.write_all(b"pong").await.unwrap();
        assert!(
            within("a reset, not tampered bytes", client.read(&mut [0]))
                .await
                .is_err()
        );
        assert!(relay.await.unwrap().outcome.is_err());
        let seen = &pair.server.seen;
        seen.until("the server's end", |seen| !seen.tunnel_ends.borrow().is_empty())
            .await;
        assert!(seen.tunnel_ends.borrow()[0].is_err());
        broke(seen, "the connection broke").await;
    });
}

#[test]
fn an_idle_tunnel_is_closed() {
    run(async {
        let config = Config {
            idle_timeout: Duration::from_millis(50),
            ..Config::default()
        };
        let pair = with_echo(config, Config::default()).await;
        quick(&pair).await;
        pair.server
            .seen
            .until("the tunnel's end", |seen| seen.tunnel_ends.borrow().len() == 1)
            .await;
        pair.server.seen.tunnel_ends.borrow()[0].clone().unwrap();
        within("the pool to forget it", async {
            while !pair.pool.tunnels().is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        quick(&pair).await;
        assert_eq!(pair.server.seen.tunnels.get(), 2);
    });
}

/// Notices soon that a peer has vanished, and not before one that lives has had its time on a busy machine.
fn impatient() -> Config {
    Config {
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_secs(2),
        ..Config::default()
    }
}

#[test]
fn a_peer_that_vanishes_is_noticed_by_each_side() {
    run(async {
        let mut pair = with_echo(impatient(), impatient()).await;
        let mode = Rc::new(Cell::new(Middle::Pass));
        pair.key.address = middle(pair.server.address, mode.clone()).await;
        let stream = pair.open().await.unwrap();
        let (mut client, captured) = socket_pair().await;
        let relay = tokio::task::spawn_local(stream.relay(captured));
        client.write_all(b"ping").await.unwrap();
        client.read_exact(&mut [0; 4]).await.unwrap();
        // Longer than both times: PINGs keep it alive.
        tokio::time::sleep(impatient().ping_timeout + Duration::from_millis(500)).await;
        assert_eq!(pair.streams(), 1);
        mode.set(Middle::Swallow);
        let end = within("the relay's end", relay).await.unwrap();
        assert!(end.outcome.is_err());
        pair.server
            .seen
            .until("the server's end", |seen| !seen.tunnel_ends.borrow().is_empty())
            .await;
    });
}

#[test]
fn a_stream_of_a_peer_that_vanished_ends_as_broken() {
    run(async {
        let mut pair = with_echo(Config::default(), impatient()).await;
        let mode = Rc::new(Cell::new(Middle::Pass));
        pair.key.address = middle(pair.server.address, mode.clone()).await;
        let _stream = pair.open().await.unwrap();
        mode.set(Middle::Swallow);
        broke(&pair.server.seen, "the peer did not answer a PING in 2s").await;
    });
}

/// The server's one stream ended with its tunnel, and says why.
async fn broke(seen: &Seen, why: &str) {
    seen.until("the stream's end", |seen| !seen.ends.borrow().is_empty())
        .await;
    match &seen.ends.borrow()[0].outcome {
        Err(RelayError::TunnelClosed(reason)) => assert!(reason.contains(why), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn dropping_or_draining_the_pool_closes_its_tunnels() {
    run(async {
        let pair = with_echo(Config::default(), Config::default()).await;
        quick(&pair).await;
        pair.pool.drain();
        assert!(matches!(pair.open().await, Err(OpenError::Draining)));
        pair.server
            .seen
            .until("the first tunnel's end", |seen| seen.tunnel_ends.borrow().len() == 1)
            .await;
        pair.server.seen.tunnel_ends.borrow()[0].clone().unwrap();

        let pair = with_echo(Config::default(), Config::default()).await;
        quick(&pair).await;
        drop(pair.pool);
        pair.server
            .seen
            .until("the tunnel's end", |seen| seen.tunnel_ends.borrow().len() == 1)
            .await;

        let pair = Pair::new().await;
        let (mut client, _server, _ended) = pair.connect().await;
        pair.pool.close();
        assert!(within("the reset", client.read(&mut [0])).await.is_err());
    });
}

#[derive(Clone, Debug)]
enum Step {
    Open,
    OpenAndGiveUp { after_polls: u8 },
    OpenRefused,
    Finish(usize),
    Drop(usize),
    Rotate,
    Yield(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Open),
        2 => (0..12u8).prop_map(|after_polls| Step::OpenAndGiveUp { after_polls }),
        1 => Just(Step::OpenRefused),
        2 => any::<usize>().prop_map(Step::Finish),
        2 => any::<usize>().prop_map(Step::Drop),
        1 => Just(Step::Rotate),
        2 => (0..20u8).prop_map(Step::Yield),
    ];
    proptest::collection::vec(step, 1..60)
}

async fn play(steps: Vec<Step>) {
    let few = Config {
        streams_per_tunnel: 3,
        ..Config::default()
    };
    let mut pair = with_echo(few.clone(), few).await;
    let mut open = Vec::new();
    for step in steps {
        match step {
            Step::Open => open.push(within("an open", pair.open()).await.unwrap()),
            Step::OpenAndGiveUp { after_polls } => {
                let mut opening = Box::pin(pair.open());
                for _ in 0..after_polls {
                    let polled = tokio::time::timeout(Duration::ZERO, opening.as_mut()).await;
                    if let Ok(stream) = polled {
                        open.push(stream.unwrap());
                        break;
                    }
                }
            }
            Step::OpenRefused => {
                let refused = hbone::ConnectRequest {
                    authority: "host:401".parse().unwrap(),
                    headers: vec![],
                };
                let opened = pair
                    .pool
                    .open(&pair.key, &pair.credentials, common::dial, refused)
                    .await;
                assert!(matches!(opened, Err(OpenError::Refused { status: 401, .. })));
            }
            Step::Finish(index) if !open.is_empty() => {
                let stream = open.swap_remove(index % open.len());
                let (client, captured) = socket_pair().await;
                drop(client);
                within("a relay", stream.relay(captured)).await.outcome.unwrap();
            }
            Step::Drop(index) if !open.is_empty() => drop(open.swap_remove(index % open.len())),
            Step::Rotate => pair.credentials = pair.mesh.credentials(CLIENT).await,
            Step::Yield(times) => {
                for _ in 0..times {
                    tokio::task::yield_now().await;
                }
            }
            Step::Finish(_) | Step::Drop(_) => {}
        }
        assert!(pair.streams() >= open.len());
    }
    let left = open.len();
    within("what was given up to be given back", async {
        while pair.streams() != left {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(open);
    assert_eq!(pair.streams(), 0);
    let seen = &pair.server.seen;
    seen.until("every accepted stream's end", |seen| {
        seen.ends.borrow().len() == seen.lives.borrow().len()
    })
    .await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn counts_return_to_zero(steps in steps()) {
        run(play(steps));
    }
}
