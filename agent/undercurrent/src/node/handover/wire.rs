//! Messages between holders, and between a holder and its worker: one packet each (SOCK_SEQPACKET), JSON, with sockets as
//! ancillary data.
//!
//! Tolerant, since both ends may be of different versions: a word that is not known is [`Message::Unknown`] and passed
//! over, fields that are not known are ignored, and sockets of a message that can't be read are closed
//! (`what_is_not_understood_is_passed_over`). Nothing that comes in can panic, block for longer than [`PATIENCE`] or make
//! this end keep more than one packet.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

/// Counts changes that an agent of another version can't cope with; then there is no hand-over, but a plain start.
pub const VERSION: u32 = 1;

/// How long a peer may take to make room for a message, or to say what it owes.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a packet at most.
const PACKET: usize = 64 << 10;

/// Sockets of a packet at most; a pod has a handful.
pub const SOCKETS: usize = 64;

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum Message {
    /// The first word between holders, in both directions.
    Hello { version: u32 },
    /// Sockets of a pod (by its uid), or of the node itself, in the order of their kinds. What was held under this key
    /// before is let go.
    Hold { key: String, kinds: Vec<String> },
    /// What is held under this key is let go.
    Release { key: String },
    /// All that is held was said. To a worker: whether an agent before it is in charge of the node, or only finishes its
    /// connections.
    All {
        predecessor: bool,
        #[serde(default)]
        finishes: bool,
    },
    /// From a successor: it could take over.
    Ready,
    /// To a worker: stop being in charge, but serve on.
    Yield,
    /// The node is the successor's.
    Yielded,
    /// To a worker that yielded: the successor is gone, be in charge again.
    Resume,
    /// From a worker: it is in charge and serves.
    Serving,
    /// To a worker that yielded: the successor serves; finish what is there.
    Drain,
    /// To a worker: the agent before it has ended.
    Gone,
    /// A word of a later version.
    #[serde(other)]
    Unknown,
}

/// What the agent before this one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Former {
    /// There is none, or it has ended.
    Gone,
    /// It finishes its connections; the node is ours.
    Finishes,
    /// It is in charge of the node.
    InCharge,
}

impl Message {
    /// All that is held was said.
    pub fn all(former: Former) -> Self {
        Self::All {
            predecessor: former == Former::InCharge,
            finishes: former == Former::Finishes,
        }
    }

    /// What it says of the agent before; none: it is another message.
    pub fn former(&self) -> Option<Former> {
        match self {
            Self::All { predecessor: true, .. } => Some(Former::InCharge),
            Self::All { finishes: true, .. } => Some(Former::Finishes),
            Self::All { .. } => Some(Former::Gone),
            _ => None,
        }
    }
}

/// A message with its sockets.
#[derive(Debug)]
pub struct Packet {
    pub message: Message,
    pub sockets: Vec<OwnedFd>,
}

impl From<Message> for Packet {
    fn from(message: Message) -> Self {
        Self {
            message,
            sockets: Vec::new(),
        }
    }
}

/// One end of a conversation.
#[derive(Debug)]
pub struct Channel(Socket);

impl Channel {
    /// Both ends of a new one.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None)?;
        Ok((Self::new(one)?, Self::new(other)?))
    }

    /// Of a connected socket. A peer that does not read is given up after [`PATIENCE`].
    pub fn new(socket: Socket) -> io::Result<Self> {
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// To whoever listens at a path.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Self::new(socket)
    }

    /// How long [`Self::receive`] waits; none: for ever.
    pub fn wait_at_most(&self, limit: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(limit)
    }

    pub fn into_socket(self) -> OwnedFd {
        self.0.into()
    }

    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Says something; the sockets stay the caller's.
    pub fn send(&self, message: &Message, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > PACKET || sockets.len() > SOCKETS {
            return Err(io::Error::other("a message of a hand-over is too long"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !sockets.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(sockets)) {
            return Err(io::Error::other("too many sockets for one message"));
        }
        loop {
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                sent => return sent.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// Waits for the next message; none: the peer is gone.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0; PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let length = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                received => break received?.bytes,
            }
        };
        if length == 0 {
            return Ok(None);
        }
        let rights = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
            _ => None,
        });
        let sockets: Vec<OwnedFd> = rights.flatten().collect();
        Ok(Some(Packet::read(&bytes[..length], sockets)))
    }
}

impl Packet {
    fn read(bytes: &[u8], sockets: Vec<OwnedFd>) -> Self {
        let message = serde_json::from_slice(bytes).unwrap_or(Message::Unknown);
        let sockets = match &message {
            Message::Hold { kinds, .. } if kinds.len() == sockets.len() => sockets,
            // Cut short on the way: who can't have all sockets opens them anew.
            Message::Hold { key, .. } => return Message::Release { key: key.clone() }.into(),
            _ => Vec::new(),
        };
        Self { message, sockets }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    #[test]
    fn sockets_arrive_with_their_message() {
        let (one, other) = Channel::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hold = Message::Hold {
            key: "pod".to_owned(),
            kinds: vec!["inbound".to_owned()],
        };
        one.send(&hold, &[listener.as_fd()]).unwrap();
        one.send(&Message::Ready, &[]).unwrap();
        let mut packet = other.receive().unwrap().unwrap();
        assert_eq!(packet.message, hold);
        let arrived = TcpListener::from(packet.sockets.remove(0));
        assert_eq!(arrived.local_addr().unwrap(), listener.local_addr().unwrap());
        assert_eq!(other.receive().unwrap().unwrap().message, Message::Ready);
        drop(one);
        assert!(other.receive().unwrap().is_none());
    }

    #[test]
    fn what_is_not_understood_is_passed_over() {
        let read = |text: &str| Packet::read(text.as_bytes(), Vec::new()).message;
        assert_eq!(read(r#"{"type":"teleport","to":"mars"}"#), Message::Unknown);
        assert_eq!(read(r#"{"type":"yield","why":"later versions say"}"#), Message::Yield);
        assert_eq!(read("\u{0}"), Message::Unknown);
        let key = "a".to_owned();
        assert_eq!(
            read(r#"{"type":"hold","key":"a","kinds":["inbound"]}"#),
            Message::Release { key },
            "its socket is missing"
        );
    }

    #[test]
    fn what_the_agent_before_does_is_told_to_every_version() {
        for one in [Former::Gone, Former::Finishes, Former::InCharge] {
            let text = serde_json::to_vec(&Message::all(one)).unwrap();
            let message = Packet::read(&text, Vec::new()).message;
            assert_eq!(message.former(), Some(one));
        }
        let former = |text: &str| Packet::read(text.as_bytes(), Vec::new()).message.former();
        assert_eq!(former(r#"{"type":"all","predecessor":true}"#), Some(Former::InCharge));
        assert_eq!(former(r#"{"type":"all","predecessor":false}"#), Some(Former::Gone));
    }

    proptest! {
        #[test]
        fn any_packet_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            Packet::read(&bytes, Vec::new());
        }
    }
}
