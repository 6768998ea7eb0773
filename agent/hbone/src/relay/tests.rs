//! A pump between a real application and two ends of HTTP/2 in memory, without TLS.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

use crate::wire::tests::Woken;

use super::*;

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialled, listener.accept().await.unwrap().0)
}

/// The two ends of a stream, and what drives them until they are dropped. The peer's end reads nothing by itself.
async fn stream() -> (SendStream<Bytes>, Pump, JoinSet<()>) {
    let config = crate::Config {
        send_buffer: 8 * TURN,
        ..crate::Config::default()
    };
    let (near, far) = tokio::io::duplex(TURN);
    let (client, server) = tokio::join!(config.client().handshake(near), config.server().handshake(far));
    let ((mut requests, connection), mut server) = (client.unwrap(), server.unwrap());
    let mut driving = JoinSet::new();
    driving.spawn_local(async move { connection.await.unwrap() });
    let (answer, send) = requests.send_request(http::Request::new(()), false).unwrap();
    let (request, mut respond) = server.accept().await.unwrap().unwrap();
    let answered = respond.send_response(http::Response::new(()), false).unwrap();
    driving.spawn_local(async move { while server.accept().await.is_some() {} });
    drop(answer.await.unwrap());
    (send, Pump::new(answered, request.into_body()), driving)
}

/// One poll: whether it waits awake.
fn poll_once(pump: &mut Pump, application: &TcpStream, live: &Live) -> bool {
    let woken = Arc::new(Woken::default());
    let waker = woken.clone().into();
    let failed = pin!(std::future::pending());
    let polled = pump.poll(application, failed, live, &mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    woken.is_set()
}

#[tokio::test(flavor = "local")]
async fn one_poll_copies_no_more_than_a_turn_to_the_application() {
    let (mut send, mut pump, _driving) = stream().await;
    let ((application, mut reader), live) = (pair().await, Live::default());
    // Room for more than a turn, though nobody reads.
    SockRef::from(&application).set_send_buffer_size(4 * TURN).unwrap();
    for _ in 0..32 {
        send.send_data(vec![7; TURN / 8].into(), false).unwrap();
    }
    // Until more than a turn has arrived.
    while pump.recv.flow_control().used_capacity() <= 2 * TURN {
        tokio::task::yield_now().await;
    }
    assert!(poll_once(&mut pump, &application, &live), "it would wait for ever");
    assert_eq!(live.from_peer(), TURN as u64);
    // The next turns bring the rest.
    let mut got = vec![0; 4 * TURN];
    let (read, ()) = tokio::join!(reader.read_exact(&mut got), async {
        while live.from_peer() < 4 * TURN as u64 {
            poll_once(&mut pump, &application, &live);
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(read.unwrap(), 4 * TURN);
}

#[tokio::test(flavor = "local")]
async fn one_poll_copies_no_more_than_a_turn_to_the_peer() {
    let (_send, mut pump, _driving) = stream().await;
    let ((application, mut writer), live) = (pair().await, Live::default());
    SockRef::from(&application).set_recv_buffer_size(8 * TURN).unwrap();
    let writing = tokio::task::spawn_local(async move { writer.write_all(&vec![7; 8 * TURN]).await });
    let mut peeked = vec![0; TURN];
    while application.peek(&mut peeked).await.unwrap() < peeked.len() {
        tokio::task::yield_now().await;
    }
    assert!(poll_once(&mut pump, &application, &live), "it would wait for ever");
    let copied = live.to_peer() as usize;
    assert!((TURN..TURN + LARGEST_READ).contains(&copied), "{copied}");
    writing.abort();
}

#[tokio::test]
async fn a_read_that_fills_its_room_is_not_taken_for_the_last() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let writer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let reader = listener.accept().await.unwrap().0;
    assert_eq!(writer.try_write(&[7; 100]).unwrap(), 100);
    reader.readable().await.unwrap();
    // Less room than is asked for, as behind the first part of a record.
    let mut buffer = BytesMut::with_capacity(64);
    buffer.extend_from_slice(&[0; 60]);
    let room = buffer.capacity() - buffer.len();
    assert_eq!(read_some(&reader, &mut buffer, 64).unwrap(), room);
    let ready = poll_fn(|cx| Poll::Ready(reader.poll_read_ready(cx).is_ready())).await;
    assert!(ready, "the rest would wait for ever");
}
