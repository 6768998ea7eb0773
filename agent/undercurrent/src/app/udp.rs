//! UDP: each datagram comes back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::net::UdpSocket;

use super::{
    call::CallArgs,
    connect::{Url, resolve},
    payload::Payload,
    report::{Called, Seen, canonical},
};

const LARGEST: usize = 65_507;

/// Answers each datagram with itself, without end; an empty one or `report` with what was seen.
pub(super) async fn serve(socket: UdpSocket) -> Result<()> {
    let local = socket.local_addr().context("getsockname")?;
    let mut buffer = vec![0; LARGEST];
    loop {
        // An ICMP answer to an earlier datagram shows up here and concerns only that.
        let Ok((count, peer)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let mut seen = Seen::new("udp", peer, local);
        seen.bytes = count as u64;
        seen.log();
        let answer = if count == 0 || buffer[..count] == *b"report" {
            seen.json().into_bytes()
        } else {
            buffer[..count].to_vec()
        };
        let _ = socket.send_to(&answer, peer).await;
    }
}

/// Calls: one datagram, one answer.
pub(super) async fn call(url: &Url, args: &CallArgs, called: &mut Called) -> Result<()> {
    let address = resolve(&url.authority).await?[0];
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await.context("bind")?;
    socket.connect(address).await.context("connect")?;
    called.peer = socket.peer_addr().ok().map(canonical);
    called.local = socket.local_addr().ok().map(canonical);
    let text = args.body.as_deref().unwrap_or("report");
    let payload = Payload::new(Some(text), args.bytes).all();
    socket.send(&payload).await.context("send")?;
    called.bytes_sent = payload.len() as u64;
    let mut buffer = vec![0; LARGEST];
    let timeout = args.timeout().min(Duration::from_secs(5));
    let received = tokio::time::timeout(timeout, socket.recv(&mut buffer)).await;
    let count = received.context("no answer in time")?.context("receive")?;
    called.bytes_received = count as u64;
    if args.bytes.is_some() {
        called.hash_matches = Some(buffer[..count] == payload);
        ensure!(buffer[..count] == payload, "what came back is not what was sent");
    } else {
        called.take(&buffer[..count]);
    }
    Ok(())
}
