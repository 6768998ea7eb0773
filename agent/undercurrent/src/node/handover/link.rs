//! The worker's end of its holder: what it inherits, what it lets the holder keep, and the orders that it gets.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, bail};
use nix::sys::{prctl, signal::SigSet, signal::Signal};
use tokio::sync::mpsc;

use super::wire::{Channel, Former, Message, Packet};

/// Orders that wait; a holder gives a handful, and waits for room.
const ORDERS: usize = 64;

/// Sockets by what they are for.
pub type Sockets = Vec<(String, OwnedFd)>;

/// What the holder says after the start.
#[derive(Debug)]
pub enum Order {
    /// The agent before this one opened these since it was asked.
    Inherit(String, Sockets),
    /// Stop being in charge.
    Yield,
    /// The node is ours.
    Yielded,
    /// Be in charge again.
    Resume,
    /// Finish what is there.
    Drain,
    /// The agent before this one has ended.
    Gone,
}

/// The worker's way to its holder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    channel: Channel,
    /// What is inherited and was not claimed yet.
    inherited: Mutex<BTreeMap<String, Sockets>>,
}

/// What a worker starts with.
pub struct Attached {
    pub link: Link,
    pub orders: mpsc::Receiver<Order>,
    pub former: Former,
}

/// Attaches to the holder, which is at the other end of standard input: the worker dies with it. To be called before any
/// thread is started.
pub fn attach() -> anyhow::Result<Attached> {
    prctl::set_pdeathsig(Some(Signal::SIGKILL)).context("cannot follow the holder into its death")?;
    // The holder's, which are inherited.
    SigSet::all().thread_unblock().context("cannot unblock signals")?;
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    attach_to(Channel::new(input.into())?)
}

fn attach_to(channel: Channel) -> anyhow::Result<Attached> {
    let mut inherited = BTreeMap::new();
    let former = loop {
        let received = channel.receive().context("standard input is no holder's socket")?;
        let Some(packet) = received else {
            bail!("the holder is gone");
        };
        if let Some(former) = packet.message.former() {
            break former;
        }
        if let Message::Hold { key, kinds } = packet.message {
            inherited.insert(key, named(kinds, packet.sockets));
        }
    };
    let (orders, ordered) = mpsc::channel(ORDERS);
    let ears = channel.try_clone()?;
    std::thread::Builder::new().name("holder".to_owned()).spawn(move || {
        // When the holder is gone, so is this process.
        while let Ok(Some(packet)) = ears.receive() {
            if let Some(order) = order(packet)
                && orders.blocking_send(order).is_err()
            {
                return;
            }
        }
    })?;
    Ok(Attached {
        link: Link(Arc::new(Inner {
            channel,
            inherited: Mutex::new(inherited),
        })),
        orders: ordered,
        former,
    })
}

fn order(packet: Packet) -> Option<Order> {
    match packet.message {
        Message::Hold { key, kinds } => Some(Order::Inherit(key, named(kinds, packet.sockets))),
        // Let go by the other, which was in charge; what is in use here is let go by ourselves.
        Message::Release { key } => Some(Order::Inherit(key, Vec::new())),
        Message::Yield => Some(Order::Yield),
        Message::Yielded => Some(Order::Yielded),
        Message::Resume => Some(Order::Resume),
        Message::Drain => Some(Order::Drain),
        Message::Gone => Some(Order::Gone),
        _ => None,
    }
}

fn named(kinds: Vec<String>, sockets: Vec<OwnedFd>) -> Sockets {
    kinds.into_iter().zip(sockets).collect()
}

impl Link {
    /// Adds to what is inherited.
    pub fn inherit(&self, key: String, sockets: Sockets) {
        let mut inherited = self.inherited();
        if sockets.is_empty() {
            inherited.remove(&key);
        } else {
            inherited.insert(key, sockets);
        }
    }

    /// Takes what is inherited under a key.
    pub fn claim(&self, key: &str) -> Sockets {
        self.inherited().remove(key).unwrap_or_default()
    }

    /// Lets the holder keep duplicates of sockets, so that they outlive this process.
    pub fn hold(&self, key: &str, sockets: &[(&str, OwnedFd)]) {
        let message = Message::Hold {
            key: key.to_owned(),
            kinds: sockets.iter().map(|(kind, _)| (*kind).to_owned()).collect(),
        };
        let sockets: Vec<_> = sockets.iter().map(|(_, socket)| socket.as_fd()).collect();
        if let Err(error) = self.0.channel.send(&message, &sockets) {
            tracing::error!(key, %error, "the holder does not keep these listeners: a crash would close them");
        }
    }

    /// Nothing is to be kept under this key any more.
    pub fn release(&self, key: &str) {
        self.say(Message::Release { key: key.to_owned() });
    }

    /// Lets go of what is inherited and nobody claimed: of pods that are gone.
    pub fn release_unclaimed(&self) {
        let unclaimed = std::mem::take(&mut *self.inherited());
        for key in unclaimed.into_keys() {
            tracing::info!(key, "held listeners of a pod that is gone are let go");
            self.release(&key);
        }
    }

    /// Says something to the holder. If it is gone, this process ends anyway.
    pub fn say(&self, message: Message) {
        if let Err(error) = self.0.channel.send(&message, &[]) {
            tracing::error!(%error, ?message, "the holder does not listen");
        }
    }

    fn inherited(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Sockets>> {
        self.0.inherited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[tokio::test]
    async fn a_worker_inherits_and_gets_orders() {
        let (holder, worker) = Channel::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hold = |key: &str| Message::Hold {
            key: key.to_owned(),
            kinds: vec!["inbound".to_owned()],
        };
        for key in ["a", "gone"] {
            holder.send(&hold(key), &[listener.as_fd()]).unwrap();
        }
        holder.send(&Message::all(Former::InCharge), &[]).unwrap();
        let Attached {
            link,
            mut orders,
            former,
        } = attach_to(worker).unwrap();
        assert_eq!(former, Former::InCharge);
        let sockets = link.claim("a");
        assert_eq!(sockets[0].0, "inbound");
        assert!(link.claim("a").is_empty());
        holder.send(&Message::Unknown, &[]).unwrap();
        holder.send(&Message::Yielded, &[]).unwrap();
        assert!(matches!(orders.recv().await, Some(Order::Yielded)));
        link.hold("a", &[("inbound", sockets.into_iter().next().unwrap().1)]);
        assert_eq!(holder.receive().unwrap().unwrap().message, hold("a"));
        link.release_unclaimed();
        let released = holder.receive().unwrap().unwrap().message;
        assert_eq!(released, Message::Release { key: "gone".to_owned() });
    }
}
