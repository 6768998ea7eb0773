//! Queries over TCP: each with its length before it, several on one connection (RFC 7766).
//!
//! The connection was captured as any other, so its destination is known. What the mesh knows is answered here. The first
//! query that it does not know opens the way to the server, as the pod's connection there would have gone: through the
//! mesh, by its routes and policies. From then on answers of both are written as they come, whole ones at a time. Answers
//! that follow each other without end (zone transfers) pass too.
//!
//! The server can't be reached, or not in time: the query is answered with SERVFAIL, and the next one tries again. It closes:
//! so does the client's connection, for what was asked and not answered is lost.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{Decision, Transport, decide, learn, servfail};
use crate::{connection::Live, counters::increment, failure::Failure};

/// Opens the way to the server.
pub(crate) trait Dial {
    /// A connection to it.
    async fn dial(&self) -> Result<TcpStream, Failure>;
}

/// Serves a connection to a name server until either end closes.
pub(crate) async fn serve(live: &Live, client: TcpStream, server: SocketAddr, dial: impl Dial) -> Option<Failure> {
    // Without it small answers are late, not lost.
    let _ = client.set_nodelay(true);
    let (reader, writer) = client.into_split();
    let mut session = Session {
        live,
        server,
        writer,
        upstream: None,
    };
    session.run(Frames::new(reader), dial).await.err().map(|error| {
        let text = format!("DNS over TCP failed: {error}");
        Failure::Relay(text)
    })
}

struct Session<'a> {
    live: &'a Live,
    server: SocketAddr,
    writer: OwnedWriteHalf,
    upstream: Option<(Frames, OwnedWriteHalf)>,
}

impl Session<'_> {
    async fn run(&mut self, mut client: Frames, dial: impl Dial) -> io::Result<()> {
        let mut asking = true;
        while asking || self.upstream.is_some() {
            let from_server = async {
                match &mut self.upstream {
                    Some((frames, _)) => frames.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                query = client.next(), if asking => match query? {
                    Some(query) => self.ask(&query, &dial).await?,
                    None => {
                        asking = false;
                        // The server is told that there is no more, and finishes what it has.
                        if let Some((_, writer)) = &mut self.upstream {
                            writer.shutdown().await?;
                        }
                    }
                },
                response = from_server => match response? {
                    Some(response) => {
                        learn(&self.live.shard, &self.live.pod, self.server, &response[2..]);
                        self.reply(&response).await?;
                    }
                    None => return Ok(()),
                },
            }
        }
        Ok(())
    }

    async fn ask(&mut self, framed: &[u8], dial: &impl Dial) -> io::Result<()> {
        let query = &framed[2..];
        self.live.relay.count(framed.len() as u64, 0);
        let (shard, pod) = (&self.live.shard, &self.live.pod);
        match decide(shard, pod, query, Transport::Tcp) {
            Decision::Reply(reply) => return self.reply(&framed_message(&reply)).await,
            // There is no saying what this is.
            Decision::Drop => return Err(io::ErrorKind::InvalidData.into()),
            Decision::Forward => increment(&shard.counters.dns_forwarded),
        }
        let upstream = match &mut self.upstream {
            Some(upstream) => upstream,
            None => match self.dial(dial).await {
                Ok(stream) => {
                    let (reader, writer) = stream.into_split();
                    self.upstream.insert((Frames::new(reader), writer))
                }
                Err(error) => {
                    increment(&shard.counters.dns_failed);
                    tracing::debug!(pod = %pod.uid, server = %self.server, "a name server was not reached: {error}");
                    return self.reply(&framed_message(&servfail(query))).await;
                }
            },
        };
        upstream.1.write_all(framed).await
    }

    /// What the client asks next has to wait, so this takes no longer than a query may.
    async fn dial(&self, dial: &impl Dial) -> Result<TcpStream, String> {
        let within = self.live.shard.config.dns.timeout;
        match tokio::time::timeout(within, dial.dial()).await {
            Ok(dialled) => dialled.map_err(|error| error.to_string()),
            Err(_elapsed) => Err(format!("it did not answer within {within:?}")),
        }
    }

    async fn reply(&mut self, framed: &[u8]) -> io::Result<()> {
        self.live.relay.count(0, framed.len() as u64);
        self.writer.write_all(framed).await
    }
}

fn framed_message(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend(length.to_be_bytes());
    framed.extend(&message[..usize::from(length)]);
    framed
}

/// Messages of a stream, with their lengths before them. Waiting for one can be given up and begun again.
struct Frames {
    reader: OwnedReadHalf,
    read: Vec<u8>,
}

impl Frames {
    fn new(reader: OwnedReadHalf) -> Self {
        Self {
            reader,
            read: Vec::new(),
        }
    }

    /// The next one; none: the other end has closed, in the middle of one perhaps.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(length) = self.read.first_chunk::<2>() {
                let whole = 2 + usize::from(u16::from_be_bytes(*length));
                if self.read.len() >= whole {
                    let rest = self.read.split_off(whole);
                    return Ok(Some(std::mem::replace(&mut self.read, rest)));
                }
                self.read.reserve(whole - self.read.len());
            } else {
                self.read.reserve(512);
            }
            if self.reader.read_buf(&mut self.read).await? == 0 {
                return Ok(None);
            }
        }
    }
}
