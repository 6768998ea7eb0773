//! Connections do not get the last file descriptors: alone in its process, since that concerns all of it.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{fs::File, net::SocketAddr};

use l4::FailureKind;
use lab::{Lab, LabPod, echo, eventually, expect_echo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A connection over which something was said and answered.
async fn answered(client: &LabPod, at: SocketAddr) -> Option<TcpStream> {
    let mut socket = client.dial(at).await.ok()?;
    socket.write_all(b"hello").await.ok()?;
    let mut answer = [0; 5];
    socket.read_exact(&mut answer).await.ok()?;
    Some(socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_do_not_get_the_last_descriptors() {
    const LIMIT: u64 = 400;
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    lab.publish();
    echo(server.listen(8080).await);
    let at = server.at(8080);
    let mut before = answered(&client, at).await.unwrap();

    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, LIMIT, hard).unwrap();
    let mut live = Vec::new();
    while let Some(socket) = answered(&client, at).await {
        live.push(socket);
    }
    assert!(live.len() > 20, "{} connections", live.len());
    let line = lab.line(&["RLIMIT_NOFILE"]);
    assert!(
        line.contains("of its 400 (RLIMIT_NOFILE) the last 100 are not for connections"),
        "{line}"
    );
    assert!(proxy.counters().failed(FailureKind::Exhausted) > 0);
    // It was no lack that accept met: the rest is free for what keeps the agent going.
    assert_eq!(proxy.counters().accept_errors, 0);
    let kept: Vec<File> = (0..50).map(|_| File::open("/dev/null").unwrap()).collect();
    drop(kept);
    expect_echo(&mut before, b"what lives goes on").await;
    for socket in &mut live {
        expect_echo(socket, b"this too").await;
    }

    // Some end, and others are let in.
    live.truncate(live.len() / 2);
    eventually("a connection is served again", async || {
        answered(&client, at).await.is_some()
    })
    .await;
    // So are they when the limit is raised.
    while let Some(socket) = answered(&client, at).await {
        live.push(socket);
    }
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(answered(&client, at).await.is_some());
}
