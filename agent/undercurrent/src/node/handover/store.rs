//! What holders keep, and how one gets it from another.
//!
//! A new agent that finds nobody, or nobody that it can talk to, starts as if nobody were there
//! (`an_agent_of_another_version_is_started_without`).

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket, Type};

use super::wire::{self, Channel, Former, Message, Packet};

/// How long an agent that is there may take to say its first word: it may be busy with another successor.
const FIRST_WORD: Duration = Duration::from_secs(30);

/// Sockets, by what they are for.
#[derive(Debug, Default)]
pub struct Held {
    kinds: Vec<String>,
    sockets: Vec<OwnedFd>,
}

/// All of a node.
pub type Store = BTreeMap<String, Held>;

/// Keeps or lets go of what a message says; other messages are for the machine.
pub fn keep(held: &mut Store, packet: Packet) -> Option<Message> {
    match packet.message {
        Message::Hold { key, kinds } => {
            let sockets = packet.sockets;
            held.insert(key, Held { kinds, sockets });
            None
        }
        Message::Release { key } => {
            held.remove(&key);
            None
        }
        other => Some(other),
    }
}

/// Passes on what is to be held, and nothing else.
pub fn pass_on(channel: &Channel, packet: &Packet) -> io::Result<()> {
    match &packet.message {
        message @ (Message::Hold { .. } | Message::Release { .. }) => {
            let sockets: Vec<_> = packet.sockets.iter().map(AsFd::as_fd).collect();
            channel.send(message, &sockets)
        }
        _ => Ok(()),
    }
}

pub fn tell_all(channel: &Channel, held: &Store, former: Former) -> io::Result<()> {
    for (key, Held { kinds, sockets }) in held {
        let (key, kinds) = (key.clone(), kinds.clone());
        let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        channel.send(&Message::Hold { key, kinds }, &sockets)?;
    }
    channel.send(&Message::all(former), &[])
}

/// Greets a successor. None: it speaks otherwise, and starts without a hand-over.
pub fn greet(socket: Socket, held: &Store) -> io::Result<Option<Channel>> {
    socket.set_nonblocking(false)?;
    let channel = Channel::new(socket)?;
    channel.wait_at_most(Some(wire::PATIENCE))?;
    let Some(packet) = channel.receive()? else {
        return Ok(None);
    };
    channel.send(&Message::Hello { version: wire::VERSION }, &[])?;
    if packet.message != (Message::Hello { version: wire::VERSION }) {
        tracing::warn!(said = ?packet.message, "a new agent speaks otherwise: no hand-over");
        return Ok(None);
    }
    tell_all(&channel, held, Former::InCharge)?;
    Ok(Some(channel))
}

pub fn listen(path: &Path) -> io::Result<Socket> {
    admin::put_in_place(path, |path| {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(4)?;
        Ok(socket)
    })
}

/// Finds the agent that is in charge, and all that it holds. None: there is none, or none to talk to.
pub fn join(path: &Path) -> Option<(Channel, Store)> {
    // Who retires while we wait in its queue has a successor, which then is the one.
    for _ in 0..10 {
        match ask(path) {
            Ok(Joined::With(channel, held)) => {
                tracing::info!(held = held.len(), "an agent is in charge: taking over from it");
                return Some((channel, held));
            }
            Ok(Joined::Nobody) => return None,
            Ok(Joined::TooLate) => std::thread::sleep(Duration::from_millis(50)),
            Err(error) => {
                tracing::warn!(socket = %path.display(), %error, "no hand-over: starting as if no agent were there");
                return None;
            }
        }
    }
    None
}

enum Joined {
    With(Channel, Store),
    Nobody,
    TooLate,
}

fn ask(path: &Path) -> io::Result<Joined> {
    let channel = match Channel::connect(path) {
        Ok(channel) => channel,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(Joined::Nobody);
        }
        Err(error) => return Err(error),
    };
    channel.wait_at_most(Some(FIRST_WORD))?;
    channel.send(&Message::Hello { version: wire::VERSION }, &[])?;
    match channel.receive()? {
        None => return Ok(Joined::TooLate),
        Some(packet) if packet.message == (Message::Hello { version: wire::VERSION }) => {}
        Some(packet) => return Err(io::Error::other(format!("it speaks otherwise: {:?}", packet.message))),
    }
    channel.wait_at_most(Some(wire::PATIENCE))?;
    let mut held = Store::new();
    while let Some(packet) = channel.receive()? {
        if let Some(Message::All { .. }) = keep(&mut held, packet) {
            channel.wait_at_most(None)?;
            return Ok(Joined::With(channel, held));
        }
    }
    Ok(Joined::TooLate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, thread};

    fn store() -> (Store, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let held = Held {
            kinds: vec!["inbound".to_owned()],
            sockets: vec![listener.into()],
        };
        (Store::from([("pod".to_owned(), held)]), address)
    }

    fn accept(listener: &Socket) -> Socket {
        loop {
            match listener.accept() {
                Ok((socket, _)) => return socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn a_successor_gets_what_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handover.sock");
        assert!(join(&path).is_none(), "nobody is there");
        let listener = listen(&path).unwrap();
        let (held, address) = store();
        let joining = thread::spawn(move || join(&path));
        let theirs = greet(accept(&listener), &held).unwrap().unwrap();
        let (ours, mut got) = joining.join().unwrap().unwrap();
        drop(held);
        let socket = got.remove("pod").unwrap().sockets.remove(0);
        assert_eq!(TcpListener::from(socket).local_addr().unwrap(), address);
        theirs.send(&Message::Yielded, &[]).unwrap();
        assert_eq!(ours.receive().unwrap().unwrap().message, Message::Yielded);
    }

    #[test]
    fn an_agent_of_another_version_is_started_without() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handover.sock");
        let listener = listen(&path).unwrap();
        let joining = thread::spawn(move || join(&path).is_none());
        let other = Channel::new(accept(&listener)).unwrap();
        assert!(other.receive().unwrap().is_some());
        other.send(&Message::Hello { version: 99 }, &[]).unwrap();
        assert!(joining.join().unwrap());
        // And the other way round.
        let (ours, theirs) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let theirs = Channel::new(theirs).unwrap();
        theirs.send(&Message::Hello { version: 99 }, &[]).unwrap();
        assert!(greet(ours, &store().0).unwrap().is_none());
    }
}
