//! Out of file descriptors: alone in its process, since that concerns all of it.

#![allow(clippy::unwrap_used)]

mod lab;

use lab::{Lab, echo, eventually, expect_echo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_survives_being_out_of_file_descriptors() {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    lab.publish();
    echo(server.listen(8080).await);
    let mut before = client.dial(server.at(8080)).await.unwrap();
    expect_echo(&mut before, b"before").await;

    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 200, hard).unwrap();
    let mut waiting = Vec::new();
    eventually("accept fails", async || {
        // The one that takes the last descriptor can't be accepted.
        waiting.pop();
        while let Ok(socket) = client.dial(server.at(8080)).await {
            waiting.push(socket);
        }
        proxy.counters().accept_errors > 0
    })
    .await;
    expect_echo(&mut before, b"what lives goes on").await;

    // There is room again: whoever waited in the queue is served.
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    drop(waiting);
    expect_echo(&mut client.dial(server.at(8080)).await.unwrap(), b"after").await;
}
