//! Telling many tasks that it is time to end.
//!
//! ```text
//! running ─► graceful: take nothing new, finish what is there ─► immediate: end now
//! ```
//! A mode never goes back. A dropped trigger means immediate: whoever owned the tasks is gone.

use tokio::sync::watch;

/// How urgently to end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DrainMode {
    /// Not at all.
    Running,
    /// Take nothing new, finish what is there.
    Graceful,
    /// End now.
    Immediate,
}

/// The end that tells.
#[derive(Debug)]
pub struct DrainTrigger(watch::Sender<DrainMode>);

/// The end that listens; cheap to clone.
#[derive(Clone, Debug)]
pub struct DrainSignal(watch::Receiver<DrainMode>);

/// A trigger and its signal.
pub fn drain_channel() -> (DrainTrigger, DrainSignal) {
    let (sender, receiver) = watch::channel(DrainMode::Running);
    (DrainTrigger(sender), DrainSignal(receiver))
}

impl DrainTrigger {
    /// Asks for this mode; a more urgent one that was asked for before stays.
    pub fn drain(&self, mode: DrainMode) {
        self.0.send_if_modified(|current| {
            let more = mode > *current;
            *current = mode.max(*current);
            more
        });
    }

    /// Whether every signal is gone.
    pub fn has_ended(&self) -> bool {
        self.0.is_closed()
    }

    /// Resolves when every signal is gone, that is, when all who listened have ended.
    pub async fn ended(&self) {
        self.0.closed().await;
    }
}

impl DrainSignal {
    /// What is asked for now.
    pub fn mode(&self) -> DrainMode {
        if self.0.has_changed().is_err() {
            DrainMode::Immediate
        } else {
            *self.0.borrow()
        }
    }

    /// Resolves once at least this mode is asked for.
    pub async fn reached(&mut self, mode: DrainMode) -> DrainMode {
        match self.0.wait_for(|current| *current >= mode).await {
            Ok(current) => *current,
            Err(_trigger_dropped) => DrainMode::Immediate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn modes_only_get_more_urgent() {
        let (trigger, mut signal) = drain_channel();
        assert_eq!(signal.mode(), DrainMode::Running);
        trigger.drain(DrainMode::Immediate);
        trigger.drain(DrainMode::Graceful);
        assert_eq!(signal.reached(DrainMode::Graceful).await, DrainMode::Immediate);
    }

    #[tokio::test]
    async fn a_dropped_trigger_is_immediate() {
        let (trigger, mut signal) = drain_channel();
        drop(trigger);
        assert_eq!(signal.reached(DrainMode::Graceful).await, DrainMode::Immediate);
        assert_eq!(signal.mode(), DrainMode::Immediate);
    }
}
