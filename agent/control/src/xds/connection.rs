//! A connection that can be cut from inside, whatever it waits for.
//!
//! A client that stops reading keeps HTTP/2's flow control shut, so that its stream can't even be told that it is ended,
//! while its pings are answered and the connection looks alive. The service that gives up on such a client finds the
//! connection's [`Peer`] in the request and cuts it. Wrap accepted connections (after TLS) in [`Connection`] for that;
//! a stream on any other connection can only be reset.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// Bytes to and from a peer.
#[derive(Debug)]
pub struct Connection<IO> {
    io: IO,
    peer: Peer,
}

/// Who is at the other end; in the extensions of every request.
#[derive(Clone)]
pub struct Peer {
    address: SocketAddr,
    cut: Arc<Cut>,
}

#[derive(Default)]
struct Cut {
    done: AtomicBool,
    reader: AtomicWaker,
}

impl Peer {
    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the connection, with all that goes over it.
    pub fn cut(&self) {
        self.cut.done.store(true, Ordering::Release);
        self.cut.reader.wake();
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.done.load(Ordering::Acquire) {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "cut: the peer does not read",
            ));
        }
        Ok(())
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({})", self.address)
    }
}

impl<IO> Connection<IO> {
    /// Of this peer.
    pub fn new(io: IO, address: SocketAddr) -> Self {
        let cut = Arc::default();
        Self {
            io,
            peer: Peer { address, cut },
        }
    }
}

impl<IO> Connected for Connection<IO> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.peer.cut.reader.register(cx.waker());
        self.peer.check()?;
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.peer.check()?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.peer.check()?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.peer.check()?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.peer.check()?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn who_waits_to_read_is_woken_by_the_cut() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut connection = Connection::new(ours, "192.0.2.1:1".parse().unwrap());
        let peer = connection.connect_info();
        assert_eq!(peer.address(), "192.0.2.1:1".parse().unwrap());
        let read = async { connection.read_u8().await };
        let (read, ()) = tokio::join!(read, async { peer.cut() });
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(connection.write_all(b"x").await.is_err());
    }
}
