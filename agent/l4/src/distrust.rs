//! Looks at live tunnels again when a root is no longer trusted.
//!
//! ```text
//! a root left the bundle, or went with the certificate that had it ─► each connection in a tunnel, a few at a time:
//!     its peer's certificates no longer chain to a root ─► reset, with that as the reason
//! ```
//! Both directions: whoever answered is judged as whoever asked (`a_root_that_leaves_takes_its_connections_along`). New
//! requests in old tunnels are judged as well ([`refuse`]), outbound ones also by the pool before they are sent. While no root leaves, nothing is
//! done at all. A pod whose own certificate is gone judges nobody, and keeps nobody.

use std::rc::Rc;

use identity::Proof;
use model::Identity;
use telemetry::Direction;

use crate::{connection::Live, failure::Failure, shard::Shard};

/// Peers judged in one go: each may cost a signature or two.
const TURN: usize = 16;

/// Waits for roots to leave, for as long as the shard lives.
pub(crate) async fn run(shard: Rc<Shard>) {
    let mut left = shard.identities.trust().root_left();
    while left.changed().await.is_ok() {
        let live: Vec<Rc<Live>> = shard
            .connections
            .borrow()
            .iter()
            .map(|(_, live)| live.clone())
            .collect();
        for turn in live.chunks(TURN) {
            for connection in turn {
                if let Some(failure) = untrusted(&shard, connection) {
                    connection.stop(failure);
                }
            }
            tokio::task::yield_now().await;
        }
    }
}

fn untrusted(shard: &Shard, connection: &Live) -> Option<Failure> {
    let known = connection.known.borrow();
    let proof = known.proof.as_ref()?;
    let own = match connection.direction {
        Direction::Inbound => &known.destination_workload,
        Direction::Outbound => &known.source_workload,
    };
    let own = own.as_ref()?.identity();
    let peer = known
        .peer
        .as_ref()
        .map_or_else(|| "the peer".to_owned(), ToString::to_string);
    (!is_trusted(shard, &own, proof)).then(|| Failure::NoLongerTrusted(peer))
}

fn is_trusted(shard: &Shard, own: &Identity, proof: &Proof) -> bool {
    let credentials = shard.identities.cached(own);
    credentials.is_some_and(|credentials| credentials.still_trusts(proof))
}

/// Refuses what goes through a tunnel whose peer would no longer be let in.
pub(crate) fn refuse(
    shard: &Shard,
    own: &Identity,
    proof: &Proof,
    peer: impl FnOnce() -> Identity,
) -> Result<(), Failure> {
    match shard.identities.trust().has_lost_none() || is_trusted(shard, own, proof) {
        true => Ok(()),
        false => Err(Failure::NoLongerTrusted(peer().to_string())),
    }
}
