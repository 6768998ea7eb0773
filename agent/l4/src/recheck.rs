//! Judges live connections again when what they were judged by changes: policy or identity.
//!
//! ```text
//! a new snapshot ─► each pod with connections: is its standing another? ─► its connections, a few at a time
//!                      └ no: nothing to do, whatever else changed in the mesh
//! ```
//! | what changed | inbound | outbound |
//! | --- | --- | --- |
//! | the policies of the pod, or that nothing is known of it | reset when no longer allowed, with the rule | - |
//! | the pod's own identity (service account, trust domain) | reset, unless the old one is an alias's of the new | the same |
//! | anything, where pods are REGISTRY_ONLY | - | what left the mesh is reset when the registry no longer names it ([`crate::egress`]) |
//!
//! Roots that are no longer trusted are [`crate::distrust`]'s.
//!
//! Policy is enforced where a connection arrives, so outbound ones are not judged by it. A peer's certificate that expires
//! does not end a connection: it proved who the peer is when the connection began, and the peer is still that; ztunnel does
//! the same.
//!
//! Invariant: between two looks nothing is missed. A connection that begins is judged by a snapshot at least as new as the
//! last look at its pod, and a pod without connections is not remembered (`a_live_connection_is_closed_when_policy_changes`).
//! A shard without connections sleeps, whatever changes: most shards of a node do, most of the time.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use mesh::Standing;
use model::{Identity, WorkloadUid, canonical_socket};
use policy::{Reason, Verdict};
use telemetry::Direction;

use crate::{connection::Live, egress, failure::Failure, shard::Shard};

/// Connections judged in one go.
const TURN: usize = 256;

/// Waits for changes and judges again, for as long as the shard lives.
pub(crate) async fn run(shard: Rc<Shard>) {
    let mut changed = shard.knowledge.changed();
    let mut standings: HashMap<WorkloadUid, Standing> = HashMap::new();
    let mut looked = 0;
    loop {
        if shard.connections.borrow().is_empty() {
            standings.clear();
            // What changes meanwhile is a change still, when there is one.
            shard.first_connection().await;
        }
        if changed.changed().await.is_err() {
            return;
        }
        let touched = touched(&shard, &mut standings, &mut looked);
        let registry_only = shard.knowledge.snapshot().is_registry_only_somewhere();
        if touched.is_empty() && !registry_only {
            continue;
        }
        let live: Vec<Rc<Live>> = shard
            .connections
            .borrow()
            .iter()
            .filter(|(_, live)| registry_only && live.known.borrow().exit.is_some() || touched.contains(&live.pod.uid))
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

/// The pods with connections whose standing is another than when it was last looked at, by the snapshot `looked`.
fn touched(shard: &Shard, standings: &mut HashMap<WorkloadUid, Standing>, looked: &mut u64) -> HashSet<WorkloadUid> {
    let snapshot = shard.knowledge.snapshot();
    let before = std::mem::replace(looked, snapshot.generation());
    let mut now: HashMap<WorkloadUid, Standing> = HashMap::new();
    let mut touched = HashSet::new();
    for pod in shard.all_pods() {
        if pod.connections.get() > 0 && !now.contains_key(&pod.uid) {
            now.insert(pod.uid.clone(), snapshot.standing(&pod.uid));
        }
        if let Some(standing) = now.get(&pod.uid)
            && is_touched(standings.get(&pod.uid), standing, pod.judged.get(), before)
        {
            touched.insert(pod.uid.clone());
        }
    }
    *standings = now;
    touched
}

/// Whether connections of a pod may have been judged by another standing than it has now: it was another at the last look,
/// or one of them was judged since, by what may have been yet another and is over already.
fn is_touched<S: PartialEq>(then: Option<&S>, now: &S, judged: u64, looked: u64) -> bool {
    then != Some(now) || judged > looked
}

fn judge_again(shard: &Shard, connection: &Live) {
    if let Some(failure) = other_identity(shard, connection) {
        return connection.stop(failure);
    }
    if let Some(reason) = egress::closed_by_now(shard, connection) {
        connection.stop(Failure::NoLongerRegistered(reason));
        return;
    }
    let verdict = {
        let known = connection.known.borrow();
        let Some(facts) = &known.facts else { return };
        debug_assert_eq!(facts.destination, canonical_socket(facts.destination));
        let snapshot = shard.knowledge.snapshot();
        match snapshot.workload(&connection.pod.uid) {
            Some(workload) => snapshot.verdict(facts, workload),
            // A pod that nothing is known of takes nothing.
            None => Verdict::deny(Reason::NoKnowledge),
        }
    };
    connection.known.borrow_mut().dry_run = verdict.dry_run;
    if verdict.allowed {
        connection.known.borrow_mut().rule = Some(verdict.reason);
    } else {
        connection.stop(Failure::NoLongerAllowed(verdict.reason));
    }
}

/// Whether the pod is no longer who it was when the connection began.
fn other_identity(shard: &Shard, connection: &Live) -> Option<Failure> {
    let known = connection.known.borrow();
    let began = match connection.direction {
        Direction::Inbound => known.destination_workload.as_ref()?,
        Direction::Outbound => known.source_workload.as_ref()?,
    };
    let snapshot = shard.knowledge.snapshot();
    let workload = snapshot.workload(&connection.pod.uid)?;
    let trust = shard.identities.trust();
    let (was, now): (Identity, Identity) = (began.identity(), workload.identity());
    (trust.normalize(was.clone()) != trust.normalize(now.clone())).then(|| Failure::OtherIdentity { was, now })
}

#[cfg(test)]
mod tests {
    use super::is_touched;

    #[test]
    fn a_pod_is_touched_by_what_is_over_before_it_is_looked_at() {
        // At the look (3) it was open. It is closed (4), and what was judged by then is judged again.
        assert!(is_touched(Some(&"open"), &"closed", 3, 3));
        // It was closed (4), opened for a connection (5), and is closed again (6): as it was, and still.
        assert!(is_touched(Some(&"closed"), &"closed", 5, 4));
        assert!(!is_touched(Some(&"closed"), &"closed", 4, 4));
        // Nobody looked at it before.
        assert!(is_touched(None, &"closed", 4, 4));
    }
}
