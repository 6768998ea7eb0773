//! A pump between a real application and two ends of HTTP/2 in memory, without TLS.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

use crate::wire::tests::Woken;

use super::*;

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialled, listener.accept().await.unwrap().0)
}

/// A stream between a client, the peer, and a server, and what drives them until they are dropped.
struct Ends {
    peer: (SendStream<Bytes>, RecvStream),
    ours: (SendStream<Bytes>, RecvStream),
    driving: JoinSet<()>,
}

async fn ends(peer: crate::Config, ours: crate::Config) -> Ends {
    let (near, far) = tokio::io::duplex(TURN);
    let (client, server) = tokio::join!(peer.client().handshake(near), ours.server().handshake(far));
    let ((mut requests, connection), mut server) = (client.unwrap(), server.unwrap());
    let mut driving = JoinSet::new();
    driving.spawn_local(async move { connection.await.unwrap() });
    let (answer, send) = requests.send_request(http::Request::new(()), false).unwrap();
    let (request, mut respond) = server.accept().await.unwrap().unwrap();
    let answered = respond.send_response(http::Response::new(()), false).unwrap();
    driving.spawn_local(async move { while server.accept().await.is_some() {} });
    Ends {
        peer: (send, answer.await.unwrap().into_body()),
        ours: (answered, request.into_body()),
        driving,
    }
}

/// The peer's end of a stream, and ours. The peer's reads nothing by itself.
async fn stream() -> (SendStream<Bytes>, Pump, JoinSet<()>) {
    let config = crate::Config {
        send_buffer: 8 * TURN,
        ..crate::Config::default()
    };
    let ends = ends(config.clone(), config).await;
    let (send, recv) = ends.ours;
    (ends.peer.0, Pump::new(send, recv), ends.driving)
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

/// What an application said before it closed, and then reset what the peer still sent, while the peer reads nothing.
struct Gone {
    send: SendStream<Bytes>,
    body: RecvStream,
    relay: JoinHandle<Result<(), RelayError>>,
    live: Live,
    _driving: JoinSet<()>,
}

/// More than the peer's window, and less than a socket takes that nobody reads.
const LAST_WORDS: usize = 48 << 10;

async fn gone() -> Gone {
    let window = 16 << 10;
    let peer = crate::Config {
        stream_window: window,
        ..crate::Config::default()
    };
    let ends = ends(peer, crate::Config::default()).await;
    let ((mut send, body), live) = (ends.peer, Live::default());
    let (application, mut far) = pair().await;
    let watched = SockRef::from(&application).try_clone().unwrap();
    let watched = TcpStream::from_std(watched.into()).unwrap();
    far.write_all(&vec![7; LAST_WORDS]).await.unwrap();
    drop(far);
    while !watched.ready(Interest::READABLE).await.unwrap().is_read_closed() {
        tokio::task::yield_now().await;
    }
    send.send_data("x".into(), false).unwrap();
    let (ours, seen) = (ends.ours, live.clone());
    let relay = tokio::task::spawn_local(async move { relay(application, ours.0, ours.1, &seen).await });
    while live.to_peer() < u64::from(window) {
        tokio::task::yield_now().await;
    }
    watched.ready(Interest::ERROR).await.unwrap();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(live.to_peer(), u64::from(window));
    Gone {
        send,
        body,
        relay,
        live,
        _driving: ends.driving,
    }
}

impl Gone {
    /// To its end, which is no reset.
    async fn read_all(&mut self) -> usize {
        let mut got = 0;
        while let Some(data) = self.body.data().await {
            let count = data.unwrap().len();
            self.body.flow_control().release_capacity(count).unwrap();
            got += count;
        }
        got
    }
}

#[tokio::test(flavor = "local")]
async fn the_last_words_of_an_application_that_is_gone_arrive() {
    for (more, end) in [("", false), ("more", false), ("", true), ("more", true)] {
        let mut gone = gone().await;
        if !more.is_empty() || end {
            gone.send.send_data(more.into(), end).unwrap();
        }
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(gone.read_all().await, LAST_WORDS, "{more:?}, {end}");
        if !end {
            gone.send.send_data("for nobody".into(), true).unwrap();
        }
        assert_eq!(gone.relay.await.unwrap(), Err(RelayError::ApplicationReset));
        assert_eq!(gone.live.from_peer(), 1);
    }
}

#[tokio::test(flavor = "local")]
async fn who_goes_on_sending_to_an_application_that_is_gone_is_told() {
    for hears in [true, false] {
        let mut gone = gone().await;
        if hears {
            assert_eq!(gone.read_all().await, LAST_WORDS);
        }
        let reset = loop {
            gone.send.reserve_capacity(TURN);
            match poll_fn(|cx| gone.send.poll_capacity(cx)).await {
                Some(capacity) => gone.send.send_data(vec![7; capacity.unwrap()].into(), false).unwrap(),
                None => break poll_fn(|cx| gone.send.poll_reset(cx)).await.unwrap(),
            }
        };
        assert_eq!(reset, Reason::CONNECT_ERROR);
        assert_eq!(gone.relay.await.unwrap(), Err(RelayError::ApplicationReset));
    }
}
