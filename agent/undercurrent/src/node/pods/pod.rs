//! A pod as the reconciler knows it: its record, what was last done to it, and what it waits for.

use std::time::Duration;

use model::{Identity, NamespacedName};
use tokio::{sync::oneshot, time::Instant};

use super::{
    Outcome,
    expectation::{Expected, Trouble},
};
use crate::node::{records::PodRecord, redirection::Wish};

/// How long a pod that leaves the mesh stays captured, at the most, so that its peers learn of it before.
const RELEASE_WITHIN: Duration = Duration::from_secs(5);
/// How long peers may take longer than this node to learn that a pod has left the mesh.
const SLOWER_PEERS: Duration = Duration::from_secs(1);

/// A pod of this node.
pub(super) struct Pod {
    pub(super) record: PodRecord,
    pub(super) state: State,
    pub(super) trouble: Option<Trouble>,
    /// Known from before this agent's start, running since, and perhaps captured.
    pub(super) restored: bool,
    /// On its way out of the mesh, and not released yet.
    pub(super) leaving: Option<Leaving>,
    /// Its peers were told that it is on its way out.
    pub(super) sent_away: bool,
    /// Plugins that wait, and until when.
    pub(super) waiting: Vec<(oneshot::Sender<Outcome>, Instant)>,
}

/// A pod that is to be released.
#[derive(Clone, Copy)]
pub(super) struct Leaving {
    since: Instant,
    /// Since when the mesh has known.
    known: Option<Instant>,
}

impl Leaving {
    /// When it is released, as far as is known now.
    pub(super) fn ends(self) -> Instant {
        let latest = self.since + RELEASE_WITHIN;
        self.known.map_or(latest, |known| latest.min(known + SLOWER_PEERS))
    }
}

/// What the kernel and the proxy were last told of a pod.
#[derive(Clone, PartialEq)]
pub(super) enum State {
    Unknown,
    Told(Expected),
}

impl Pod {
    pub(super) fn new(record: PodRecord, restored: bool) -> Self {
        Self {
            record,
            state: State::Unknown,
            trouble: None,
            restored,
            leaving: None,
            sent_away: false,
            waiting: Vec::new(),
        }
    }

    /// One from the records. It runs, unless it was let wait until now.
    pub(super) fn restored(record: PodRecord) -> Self {
        let restored = !record.starting && record.captured != Some(false);
        Self::new(record, restored)
    }

    /// The record says what is done to the pod now; whether that is news.
    pub(super) fn note(&mut self) -> bool {
        let captured = Some(self.captured_as().is_some());
        let (was_starting, before) = (
            std::mem::take(&mut self.record.starting),
            std::mem::replace(&mut self.record.captured, captured),
        );
        was_starting || before != captured
    }

    pub(super) fn captured_as(&self) -> Option<&Identity> {
        match &self.state {
            State::Told(Expected::Captured { identity, .. }) => Some(identity),
            _ => None,
        }
    }

    /// Answers who waits, unless there may be a better answer soon.
    pub(super) fn answer(&mut self, now: Instant) {
        let outcome = match &self.trouble {
            None => Ok(()),
            Some(Trouble::Failed(text)) => Err(text.clone()),
            Some(Trouble::Waiting(text)) => {
                let (over, waiting) = self.waiting.drain(..).partition(|(_, until)| *until <= now);
                self.waiting = waiting;
                let over: Vec<(oneshot::Sender<Outcome>, Instant)> = over;
                over.into_iter()
                    .for_each(|(answer, _)| drop(answer.send(Err(text.clone()))));
                return;
            }
        };
        // A plugin that does not wait any more asks again.
        let waiting = self.waiting.drain(..);
        waiting.for_each(|(answer, _)| drop(answer.send(outcome.clone())));
    }

    /// Whether it may be released: the mesh knows that it has left, and all peers may know by now. One that lingers is not
    /// released as soon as this node knows.
    pub(super) fn may_be_released(&mut self, known: bool, lingers: bool) -> bool {
        let now = Instant::now();
        let leaving = self.leaving.get_or_insert(Leaving {
            since: now,
            known: None,
        });
        if known {
            leaving.known.get_or_insert(now);
        } else {
            leaving.known = None;
        }
        known && !lingers || now >= leaving.ends()
    }

    /// What its annotation is to say.
    pub(super) fn wish(&self) -> Option<(NamespacedName, (String, Wish))> {
        let api = self.record.api.as_ref()?;
        let wish = match &self.state {
            _ if self.leaving.is_some() => Wish::Absent,
            State::Told(Expected::Captured { .. }) => Wish::Enabled,
            State::Told(Expected::Uncaptured(_)) => Wish::Absent,
            // Found again: the kernel still captures it, and this agent is about to serve it.
            State::Unknown if self.restored => Wish::Leave,
            State::Unknown => Wish::Absent,
        };
        Some((self.record.pod.clone(), (api.uid.clone(), wish)))
    }
}

#[cfg(test)]
mod tests {
    use model::WorkloadUid;
    use tokio::time::advance;

    use super::*;

    fn record(captured: Option<bool>) -> PodRecord {
        PodRecord {
            pod: NamespacedName::new("shop", "web"),
            netns: "/var/run/netns/x".into(),
            addresses: Vec::new(),
            container_id: String::new(),
            found: false,
            starting: false,
            captured,
            api: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_leaves_is_released_when_its_peers_may_know() {
        let mut pod = Pod::new(record(Some(true)), false);
        assert!(!pod.may_be_released(false, true));
        advance(Duration::from_secs(2)).await;
        assert!(!pod.may_be_released(true, true));
        advance(Duration::from_millis(900)).await;
        assert!(!pod.may_be_released(true, true));
        // What this node knows was taken back, and is said again.
        assert!(!pod.may_be_released(false, true));
        assert!(!pod.may_be_released(true, true));
        advance(SLOWER_PEERS).await;
        assert!(pod.may_be_released(true, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_control_plane_that_is_away_holds_up_no_release() {
        let mut pod = Pod::new(record(Some(true)), false);
        assert!(!pod.may_be_released(false, true));
        advance(RELEASE_WITHIN).await;
        assert!(pod.may_be_released(false, true));
    }

    #[tokio::test(start_paused = true)]
    async fn who_would_refuse_what_comes_in_plaintext_is_released_at_once() {
        let mut pod = Pod::new(record(Some(true)), false);
        assert!(!pod.may_be_released(false, false));
        assert!(pod.may_be_released(true, false));
    }

    #[test]
    fn what_was_not_captured_is_not_taken_over() {
        for (captured, restored) in [(None, true), (Some(true), true), (Some(false), false)] {
            assert_eq!(Pod::restored(record(captured)).restored, restored, "{captured:?}");
        }
        let starting = PodRecord {
            starting: true,
            ..record(Some(true))
        };
        assert!(!Pod::restored(starting).restored);
    }

    #[test]
    fn a_record_says_what_is_done_to_the_pod() {
        let mut pod = Pod::new(record(None), false);
        pod.state = State::Told(Expected::Uncaptured(WorkloadUid("uid".into())));
        assert!(pod.note() && pod.record.captured == Some(false) && !pod.note());
        pod.state = State::Told(Expected::Captured {
            uid: WorkloadUid("uid".into()),
            identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
            settings: model::PodSettings::default(),
        });
        assert!(pod.note() && pod.record.captured == Some(true) && !pod.note());
    }
}
