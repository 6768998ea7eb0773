//! Bounds handshakes that are not finished: who opens a thousand and says nothing starves itself and not the others
//! ([`tasks::Places`]).

use std::{cell::RefCell, net::IpAddr, rc::Rc};

use tasks::Places;
use tokio::task::AbortHandle;

/// The handshakes of one pod on one shard.
#[derive(Clone)]
pub(crate) struct HalfOpen(Rc<RefCell<Places>>);

impl HalfOpen {
    /// At most `limit` of them.
    pub(crate) fn new(limit: usize) -> Self {
        Self(Rc::new(RefCell::new(Places::new(limit))))
    }

    /// Enters a task that begins its handshake. Returns whose was dropped to make room.
    pub(crate) fn enter(&self, source: IpAddr, task: AbortHandle) -> Option<IpAddr> {
        self.0.borrow_mut().enter(source, task)
    }

    /// Takes out a task whose handshake is over.
    pub(crate) fn leave(&self, task: tokio::task::Id) {
        self.0.borrow_mut().leave(task);
    }

    /// Ends all of them.
    pub(crate) fn abort_all(&self) {
        self.0.borrow_mut().abort_all();
    }
}
