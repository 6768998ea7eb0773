//! Make before break: what an agent gets before it takes this node's pods over from another.

use std::{path::Path, time::Duration};

use anyhow::Context;
use identity::Identities;
use mesh::Knowledge;
use model::Identity;
use tokio::time::Instant;

use super::expectation::{Expected, Oracle};
use crate::node::records::Records;

/// How long certificates are waited for. One that can't be had would hold up an upgrade for ever.
const CERTIFICATES: Duration = Duration::from_secs(60);

/// Resolves once the mesh is known, for which it waits as long as it takes, and there is a certificate for every pod that
/// is to be captured as things stand.
pub async fn prepare(
    oracle: &Oracle,
    knowledge: &Knowledge,
    identities: &Identities,
    directory: &Path,
) -> anyhow::Result<()> {
    let (_, found) = Records::open(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    if let Oracle::Cluster(pods) = oracle {
        pods.tell(found.values());
    }
    let (mut changed, mut issued) = (knowledge.changed(), identities.issued());
    while !knowledge.snapshot().ready() {
        // The writer lives as long as the process.
        changed.changed().await.context("nothing can be learnt of the mesh")?;
    }
    let until = Instant::now() + CERTIFICATES;
    loop {
        let identity = |record| match oracle.expected(record, knowledge) {
            Ok(Expected::Captured { identity, .. }) => Some(identity),
            _ => None,
        };
        let wanted: Vec<Identity> = found.values().filter_map(identity).collect();
        wanted.iter().for_each(|identity| identities.want(identity));
        let missing: Vec<_> = wanted
            .iter()
            .filter(|wanted| identities.cached(wanted).is_none())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Ok(()) = changed.changed() => {}
            Ok(()) = issued.changed() => {}
            () = tokio::time::sleep_until(until) => {
                let missing = missing.len();
                tracing::warn!(missing, "taking over without all certificates: they do not come");
                return Ok(());
            }
        }
    }
}
