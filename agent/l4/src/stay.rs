//! A pod's stay in the proxy: from when it is added until it leaves.
//!
//! ```text
//! home ── accepts ──► connection + Entry ──► another of the pod's shards carries it, and drops the entry
//!   └─ stops accepting: drops its own        └─ Stay::complete: no entry is left, nothing more can come
//! ```
//! A pod that leaves the mesh leaves each shard when that shard is told, and its home may be told last. What it accepted
//! and handed over until then is of this stay, and carried like all that was accepted before
//! (`what_the_home_handed_over_last_is_carried`), also where the pod has come back meanwhile: that is another stay.

use model::WorkloadUid;
use tokio::sync::watch;

/// A stay, as each of the pod's shards knows it.
#[derive(Clone, Debug)]
pub(crate) struct Stay {
    number: u64,
    open: watch::Receiver<()>,
}

/// What a connection enters a stay by. While there is one, more may come.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub pod: WorkloadUid,
    number: u64,
    _open: watch::Sender<()>,
}

/// A new stay of a pod; no other one of this proxy has its number.
pub(crate) fn begin(pod: WorkloadUid, number: u64) -> (Entry, Stay) {
    let (sender, open) = watch::channel(());
    let entry = Entry {
        pod,
        number,
        _open: sender,
    };
    (entry, Stay { number, open })
}

impl Stay {
    pub(crate) fn is_entered_by(&self, entry: &Entry) -> bool {
        self.number == entry.number
    }

    /// Resolves when no more can come.
    pub(crate) async fn complete(&self) {
        let mut open = self.open.clone();
        // Nothing is ever sent: it fails when the last entry is gone.
        while open.changed().await.is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_stay_is_complete_when_its_last_entry_is_gone() {
        let uid = WorkloadUid("cluster//Pod/shop/web".into());
        let (entry, stay) = begin(uid.clone(), 1);
        let under_way = entry.clone();
        drop(entry);
        assert!(stay.complete().now_or_never().is_none());
        let (other, later) = begin(uid, 2);
        assert!(stay.is_entered_by(&under_way) && !stay.is_entered_by(&other) && !later.is_entered_by(&under_way));
        drop(under_way);
        assert!(stay.complete().now_or_never().is_some());
        assert!(later.complete().now_or_never().is_none());
    }
}
