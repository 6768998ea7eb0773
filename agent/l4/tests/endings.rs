//! How connections and proxies end: drained, removed, dropped, or by a panic.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{net::SocketAddr, time::Duration};

use l4::FailureKind;
use lab::{echo, eventually, expect_echo, expect_refused, expect_reset, new_address, policy, two::two};
use model::{Action, Match, StringMatch};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A proxy that drains, once its listener here is closed.
async fn draining(proxy: l4::Proxy, hbone: SocketAddr) -> tokio::task::JoinHandle<()> {
    let drained = tokio::spawn(async move { proxy.drain(Duration::from_secs(600)).await });
    eventually("the listeners are closed", async || {
        TcpStream::connect(hbone).await.is_err()
    })
    .await;
    drained
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_waits_for_what_lives_and_takes_nothing_new() {
    let two = two();
    echo(two.server.listen(8080).await);
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"hello").await;
    let far = draining(two.far, two.server.at(15008)).await;
    expect_echo(&mut live, b"still here").await;
    assert!(!far.is_finished());
    live.shutdown().await.unwrap();
    assert_eq!(live.read(&mut [0; 1]).await.unwrap(), 0);
    far.await.unwrap();
    two.near.drain(Duration::from_secs(600)).await;
}

/// An agent that another one took over from serves its connections for as long as an hour.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_forbidden_while_a_proxy_drains_is_closed() {
    let mut two = two();
    echo(two.server.listen(8080).await);
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"hello").await;
    let far = draining(two.far, two.server.at(15008)).await;
    two.lab.publish();
    expect_echo(&mut live, b"still here").await;
    two.lab.contents.policies.push(policy(
        "nobody",
        Action::Deny,
        Match {
            not_principals: vec![StringMatch::Exact("nobody".into())],
            ..Match::default()
        },
    ));
    two.lab.publish();
    expect_reset(live).await;
    two.lab.line(&[
        "inbound",
        "no longer allowed: denied by AuthorizationPolicy shop/nobody",
    ]);
    far.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_end_in_time_is_reset() {
    let two = two();
    echo(two.server.listen(8080).await);
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"hello").await;
    two.near.drain(Duration::ZERO).await;
    expect_reset(live).await;
    two.lab
        .line(&["outbound", "bytes_sent=5 bytes_recv=5", "the proxy is shutting down"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_pod_is_served_no_longer() {
    let two = two();
    echo(two.server.listen(8080).await);
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"hello").await;
    two.far.retire_pod(&two.server.uid);
    eventually("nothing new", async || {
        TcpStream::connect(two.server.at(15008)).await.is_err()
    })
    .await;
    expect_echo(&mut live, b"still here").await;
    two.far.remove_pod(&two.server.uid);
    expect_reset(live).await;
    two.lab.line(&["inbound", "the pod was removed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_ends_one_connection_and_no_other() {
    let two = two();
    echo(two.server.listen(8080).await);
    let mut other = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut other, b"before").await;
    for _ in 0..4 {
        expect_refused(two.client.dial(two.server.at(lab::PANIC_PORT)).await).await;
    }
    two.lab.line(&["outbound", "a bug"]);
    expect_echo(&mut other, b"after").await;
    expect_echo(&mut two.client.dial(two.server.at(8080)).await.unwrap(), b"new").await;
    eventually("all are counted", async || {
        two.near.counters().failed(FailureKind::Panicked) == 4
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_proxy_resets_what_lives() {
    let two = two();
    echo(two.server.listen(8080).await);
    let outside = TcpListener::bind(SocketAddr::new(new_address(), 0)).await.unwrap();
    let address = outside.local_addr().unwrap();
    echo(outside);
    let mut tunnelled = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut tunnelled, b"hello").await;
    let mut plain = two.client.dial(address).await.unwrap();
    expect_echo(&mut plain, b"hello").await;
    drop(two.near);
    expect_reset(tunnelled).await;
    expect_reset(plain).await;
}
