//! Takes connections from one listener, fairly and whatever happens.
//!
//! At most [`TURN`] in one go, then the rest of the shard gets its turn. When `accept` fails the loop never ends: a
//! connection that died in the queue is passed over, and where file descriptors or memory are short it waits and says
//! so, once a second with a count. What waits in the listener's queue meanwhile is served afterwards.
//!
//! A listener that closes because its pod leaves the mesh still has in its queue what was steered to it before: that is
//! taken first (`what_waited_when_a_pod_left_is_carried`).

use std::{io, net::SocketAddr, pin::pin, rc::Rc, time::Duration};

use tasks::{Backoff, DrainMode, DrainSignal};
use tokio::net::{TcpListener, TcpStream};

use crate::{counters::increment, shard::Shard};

/// Connections taken in one go.
const TURN: usize = 16;
const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// What a listener's queue holds at most, as capture makes them.
const LONGEST_QUEUE: usize = 4096;

/// Takes connections until the task is ended, or until it is told to close and has taken what waited.
pub(crate) async fn accept_all(
    shard: Rc<Shard>,
    listener: TcpListener,
    mut closing: DrainSignal,
    serve: impl Fn(TcpStream, SocketAddr),
) {
    let mut turn = Turn {
        shard,
        backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
        taken: 0,
    };
    let mut closed = pin!(closing.reached(DrainMode::Graceful));
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            _ = &mut closed => break,
        };
        turn.serve(accepted, &serve).await;
    }
    // Asked of the socket itself: what came since the last look at the poll is not known to the runtime.
    let Ok(listener) = listener.into_std() else {
        return;
    };
    for _ in 0..LONGEST_QUEUE {
        match listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            accepted => turn.serve(accepted.and_then(polled), &serve).await,
        }
    }
}

fn polled((socket, peer): (std::net::TcpStream, SocketAddr)) -> io::Result<(TcpStream, SocketAddr)> {
    socket.set_nonblocking(true)?;
    Ok((TcpStream::from_std(socket)?, peer))
}

struct Turn {
    shard: Rc<Shard>,
    backoff: Backoff,
    taken: usize,
}

impl Turn {
    async fn serve(&mut self, accepted: io::Result<(TcpStream, SocketAddr)>, serve: &impl Fn(TcpStream, SocketAddr)) {
        match accepted {
            Ok((socket, peer)) => {
                self.backoff.reset();
                serve(socket, peer);
                self.taken += 1;
                if self.taken == TURN {
                    self.taken = 0;
                    tokio::task::yield_now().await;
                }
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                increment(&self.shard.counters.accept_errors);
                self.shard.accept_errors.say(|| {
                    tracing::error!("accept failed: {error}; connections wait in the listeners' queues meanwhile");
                });
                tokio::time::sleep(self.backoff.next(self.shard.random())).await;
            }
        }
    }
}

/// Errors of the connection that was to be accepted (see accept(2)), not of the listener.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable,
        PermissionDenied, TimedOut,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionReset
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | HostUnreachable
            | PermissionDenied
            | TimedOut
    )
}
