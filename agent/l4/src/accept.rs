//! Takes connections from one listener, fairly and whatever happens.
//!
//! At most [`TURN`] in one go, then the rest of the shard gets its turn. When `accept` fails the loop never ends: a
//! connection that died in the queue is passed over, and where file descriptors or memory are short it waits and says
//! so, once a second with a count. What waits in the listener's queue meanwhile is served afterwards.

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use tokio::net::{TcpListener, TcpStream};

use crate::{counters::increment, shard::Shard};

/// Connections taken in one go.
const TURN: usize = 16;
const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// Takes connections until the task is ended.
pub(crate) async fn accept_all(shard: Rc<Shard>, listener: TcpListener, serve: impl Fn(TcpStream, SocketAddr)) {
    let mut backoff = tasks::Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    let mut taken = 0;
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                backoff.reset();
                serve(socket, peer);
                taken += 1;
                if taken == TURN {
                    taken = 0;
                    tokio::task::yield_now().await;
                }
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                increment(&shard.counters.accept_errors);
                shard.accept_errors.say(|| {
                    tracing::error!("accept failed: {error}; connections wait in the listeners' queues meanwhile");
                });
                tokio::time::sleep(backoff.next(shard.random())).await;
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
