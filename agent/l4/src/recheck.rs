//! Judges live connections again when knowledge changes.
//!
//! A connection that is no longer allowed is reset and its record names the rule. Only inbound connections are judged:
//! policy is enforced where it arrives.

use std::rc::Rc;

use model::{WorkloadUid, canonical_socket};
use policy::{Facts, Reason, Verdict};

use crate::{connection::Live, failure::Failure, shard::Shard};

/// Connections judged in one go.
const TURN: usize = 256;

/// Waits for changes and judges again, for as long as the shard lives.
pub(crate) async fn run(shard: Rc<Shard>) {
    let mut changed = shard.knowledge.changed();
    while changed.changed().await.is_ok() {
        let live: Vec<Rc<Live>> = shard
            .connections
            .borrow()
            .iter()
            .map(|(_, live)| live.clone())
            .collect();
        for turn in live.chunks(TURN) {
            for connection in turn {
                judge_again(&shard, connection);
            }
            tokio::task::yield_now().await;
        }
    }
}

fn judge_again(shard: &Shard, connection: &Live) {
    let verdict = {
        let known = connection.known.borrow();
        let Some(facts) = &known.facts else { return };
        judge(shard, facts, &connection.pod.uid)
    };
    if verdict.allowed {
        connection.known.borrow_mut().rule = Some(verdict.reason);
    } else {
        connection.stop(Failure::NoLongerAllowed(verdict.reason));
    }
}

/// Whether a connection to this pod may be, by what is known now. A pod that nothing is known of takes nothing.
pub(crate) fn judge(shard: &Shard, facts: &Facts, pod: &WorkloadUid) -> Verdict {
    let snapshot = shard.knowledge.snapshot();
    debug_assert_eq!(facts.destination, canonical_socket(facts.destination));
    match snapshot.workload(pod) {
        Some(workload) => snapshot.verdict(facts, workload),
        None => Verdict::deny(Reason::NoKnowledge),
    }
}
