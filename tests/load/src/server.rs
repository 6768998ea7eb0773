//! The server: answers requests, swallows uploads. One thread, edge-triggered.
//!
//! It knows nothing of what sits between it and the client. A connection that says something else than [`crate::wire`]
//! is closed; a client that does not read stalls only itself.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::slab::Slab;
use crate::wire::{HELLO, Kind};

const LISTENER: Token = Token(usize::MAX);
/// Reads in a row before the others get a turn.
const TURN: usize = 16;

enum Phase {
    Hello {
        bytes: [u8; HELLO],
        have: usize,
    },
    Requests {
        request: u64,
        response: u64,
        close: bool,
        have: u64,
    },
    Upload {
        bytes: u64,
    },
    Done,
}

struct Connection {
    stream: TcpStream,
    phase: Phase,
    /// Bytes of responses that the socket did not take yet.
    owed: u64,
}

enum Turn {
    /// Read until nothing was left: epoll will say when there is more.
    Drained,
    /// There may be more.
    Again,
    Closed,
}

/// Serves for ever; every connection is independent of the others.
pub fn serve(listen: SocketAddr) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut listener = TcpListener::bind(listen)?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut connections: Slab<Connection> = Slab::new();
    let mut again: VecDeque<usize> = VecDeque::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut events = Events::with_capacity(1024);
    loop {
        let timeout = (!again.is_empty()).then_some(std::time::Duration::ZERO);
        match poll.poll(&mut events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        }
        for event in &events {
            match event.token() {
                LISTENER => accept(&listener, &poll, &mut connections)?,
                Token(at) => again.push_back(at),
            }
        }
        for _ in 0..again.len() {
            let Some(at) = again.pop_front() else { break };
            let Some(connection) = connections.get_mut(at) else {
                continue;
            };
            match connection.turn(&mut buffer) {
                Ok(Turn::Drained) => {}
                Ok(Turn::Again) => again.push_back(at),
                Ok(Turn::Closed) | Err(_) => connections.remove(at),
            }
        }
    }
}

fn accept(listener: &TcpListener, poll: &Poll, connections: &mut Slab<Connection>) -> io::Result<()> {
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                let _ = stream.set_nodelay(true);
                let at = connections.next();
                poll.registry()
                    .register(&mut stream, Token(at), Interest::READABLE | Interest::WRITABLE)?;
                connections.insert(Connection {
                    stream,
                    phase: Phase::Hello {
                        bytes: [0; HELLO],
                        have: 0,
                    },
                    owed: 0,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // The client was gone before it was accepted, or descriptors ran out: the next accept may go well.
            Err(error) => {
                eprintln!("load: accept: {error}");
                return Ok(());
            }
        }
    }
}

impl Connection {
    fn turn(&mut self, buffer: &mut [u8]) -> io::Result<Turn> {
        self.pay(buffer)?;
        if matches!(self.phase, Phase::Done) && self.owed == 0 {
            return Ok(Turn::Closed);
        }
        for _ in 0..TURN {
            let read = match self.stream.read(buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Drained),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if read == 0 {
                return self.end();
            }
            if !self.take(&buffer[..read]) {
                return Ok(Turn::Closed);
            }
            self.pay(buffer)?;
            if matches!(self.phase, Phase::Done) && self.owed == 0 {
                return Ok(Turn::Closed);
            }
            // A short read found the socket empty: a later byte raises a new event.
            if read < buffer.len() && !matches!(self.phase, Phase::Upload { .. }) {
                return Ok(Turn::Drained);
            }
        }
        Ok(Turn::Again)
    }

    /// Counts what came in; false if it makes no sense.
    fn take(&mut self, mut input: &[u8]) -> bool {
        while !input.is_empty() {
            match &mut self.phase {
                Phase::Hello { bytes, have } => {
                    let part = input.len().min(HELLO - *have);
                    bytes[*have..*have + part].copy_from_slice(&input[..part]);
                    *have += part;
                    input = &input[part..];
                    if *have < HELLO {
                        return true;
                    }
                    match Kind::decode(bytes) {
                        Some(Kind::Requests {
                            request,
                            response,
                            close,
                        }) => {
                            self.phase = Phase::Requests {
                                request: request.into(),
                                response: response.into(),
                                close,
                                have: 0,
                            };
                        }
                        Some(Kind::Upload) => self.phase = Phase::Upload { bytes: 0 },
                        None => return false,
                    }
                }
                Phase::Requests {
                    request,
                    response,
                    close,
                    have,
                } => {
                    *have += input.len() as u64;
                    let whole = *have / *request;
                    *have %= *request;
                    self.owed += whole * *response;
                    if *close && whole > 0 {
                        self.phase = Phase::Done;
                    }
                    return true;
                }
                Phase::Upload { bytes } => {
                    *bytes += input.len() as u64;
                    return true;
                }
                Phase::Done => return true,
            }
        }
        true
    }

    /// Writes what is owed, as far as the socket takes it. The content does not matter.
    fn pay(&mut self, buffer: &[u8]) -> io::Result<()> {
        while self.owed > 0 {
            let part = buffer.len().min(usize::try_from(self.owed).unwrap_or(usize::MAX));
            match self.stream.write(&buffer[..part]) {
                Ok(wrote) => self.owed -= wrote as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The client's FIN: an upload is answered with what arrived of it.
    fn end(&mut self) -> io::Result<Turn> {
        if let Phase::Upload { bytes } = self.phase {
            self.stream.write_all(&bytes.to_be_bytes())?;
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(Turn::Closed)
    }
}
