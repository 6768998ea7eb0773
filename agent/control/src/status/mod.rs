//! What becomes of objects, told where their authors look: a condition on policies, an Event on everything else.
//!
//! ```text
//! index ─ findings, policies seen ─► Board ─┐
//! agents ─ acknowledged, refused ───────────┴─► (the replica that leads) ─► status.conditions, Events
//! ```
//! A condition is written when it differs from the one that stands there, with the version that was read, and with the
//! conditions of others as they were: Istio's CRDs have no list keys, so a server-side apply of ours would take the whole
//! list. Writes are a few at a time and spaced; an object that changes often is told of once, as it is then. With the API
//! away, what is open stays open. Drain ends the task at once: conditions are for people, and the next leader looks at all.

mod board;
mod condition;
mod event;

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use k8s::{ObjectRef, live::Kind};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tasks::{DrainMode, DrainSignal};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::watch;

use self::{
    board::{Record, SeenState},
    condition::{Condition, Progress},
};
use crate::{
    watch::{Raw, resource},
    xds,
};

pub use board::{Board, Seen};

const AT_ONCE: usize = 4;
/// Between two writes of one of those.
const SPACE: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(2);
/// How long the API may take for one object.
const PATIENCE: Duration = Duration::from_secs(10);
const MANAGER: &str = "undercurrent-control";

/// How telling one object ended.
enum Told {
    /// All is said.
    Done,
    /// Agents have yet to answer, or the object changed meanwhile, or the API is away.
    Later,
}

/// Tells.
pub struct Reporter {
    /// To the API.
    pub client: Client,
    /// What.
    pub board: Arc<Board>,
    /// What agents have.
    pub acknowledged: Arc<xds::Acknowledged>,
    /// The name that Events carry.
    pub replica: String,
}

impl Reporter {
    /// Runs until drained.
    pub async fn run(self, mut leads: watch::Receiver<bool>, mut drain: DrainSignal) {
        let mut in_force = self.acknowledged.in_force();
        let mut later = false;
        loop {
            tokio::select! {
                _ = drain.reached(DrainMode::Graceful) => return,
                () = self.board.changed() => {}
                changed = in_force.changed() => if changed.is_err() { return },
                changed = leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.board.reopen_all();
                }
                () = tokio::time::sleep(RETRY), if later => {}
            }
            let generation = *in_force.borrow_and_update();
            let refused = self.refusals().into_iter().flat_map(|refusal| refusal.resources);
            self.board.reopen(refused);
            if *leads.borrow() {
                later = self.tell(generation).await;
            }
        }
    }

    fn refusals(&self) -> Vec<xds::Refusal> {
        let clients = self.acknowledged.clients().into_iter();
        let refusals = clients.flat_map(|client| client.refused.into_iter().flatten());
        refusals
            .filter(|refusal| refusal.view == xds::View::Authorization)
            .collect()
    }

    /// Whether something is left.
    async fn tell(&self, in_force: u64) -> bool {
        let refusals = self.refusals();
        let told = futures_util::stream::iter(self.board.open()).map(|(object, record)| {
            let refusals = &refusals;
            async move {
                let told = async {
                    match &record.seen {
                        Some(seen) => self.condition(&object, &record, seen, in_force, refusals).await,
                        None => event::write(&self.client, &self.replica, &object, &record.findings).await,
                    }
                };
                match tokio::time::timeout(PATIENCE, told).await {
                    Ok(Ok(Told::Done)) => self.board.done(&object, &record),
                    Ok(Ok(Told::Later)) | Err(_) => return true,
                    Ok(Err(error)) => {
                        tracing::debug!(%object, %error, "cannot tell an object's author; trying again");
                        return true;
                    }
                }
                false
            }
        });
        told.buffer_unordered(AT_ONCE).any(|later| async move { later }).await
    }

    async fn condition(
        &self,
        object: &ObjectRef,
        record: &Record,
        seen: &SeenState,
        in_force: u64,
        refusals: &[xds::Refusal],
    ) -> Result<Told, kube::Error> {
        let progress = self.progress(object, record, in_force, refusals);
        let waiting = matches!(progress, Progress::Waiting(..));
        if waiting && record.since.elapsed() < condition::PATIENCE {
            return Ok(Told::Later);
        }
        let condition = condition::condition(&record.findings, &progress);
        let stands = condition::merged(seen.conditions.as_ref(), &condition, seen.generation, "").is_none();
        if !stands && !self.write(object, seen, &condition).await? {
            return Ok(Told::Later);
        }
        Ok(if waiting { Told::Later } else { Told::Done })
    }

    fn progress(&self, object: &ObjectRef, record: &Record, in_force: u64, refusals: &[xds::Refusal]) -> Progress {
        let name = format!("{}/{}", object.namespace, object.name);
        let refusal = refusals
            .iter()
            .find(|refusal| refusal.resources.iter().any(|resource| **resource == *name));
        if let Some(refusal) = refusal {
            return Progress::Rejected {
                node: refusal.node.clone(),
                message: refusal.message.clone(),
            };
        }
        let agents = self.acknowledged.connected();
        match in_force >= record.generation {
            true => Progress::InForce(agents),
            false => Progress::Waiting(self.acknowledged.lagging(record.generation), agents),
        }
    }

    /// Whether the object stands as it was seen, and so says this now.
    async fn write(&self, object: &ObjectRef, seen: &SeenState, condition: &Condition) -> Result<bool, kube::Error> {
        let (group, version) = seen.version.split_once('/').unwrap_or(("", &seen.version));
        let Some(kind) = Kind::find(group, &object.kind) else {
            return Ok(true);
        };
        let api = Api::<Raw>::namespaced_with(self.client.clone(), &object.namespace, &resource(kind, version));
        let Some(found) = api.get_opt(&object.name).await? else {
            return Ok(true);
        };
        let text = |pointer: &str| found.value.pointer(pointer).cloned().unwrap_or_default();
        if text("/metadata/uid") != seen.uid || text("/metadata/generation") != seen.generation {
            // The watch brings the newer one.
            return Ok(true);
        }
        let now = OffsetDateTime::now_utc()
            .replace_nanosecond(0)
            .unwrap_or_else(|_| OffsetDateTime::now_utc());
        let now = now.format(&Rfc3339).unwrap_or_default();
        let before = found.value.pointer("/status/conditions");
        let Some(conditions) = condition::merged(before, condition, seen.generation, &now) else {
            return Ok(true);
        };
        let patch = json!({
            "metadata": {"resourceVersion": text("/metadata/resourceVersion")},
            "status": {"conditions": conditions},
        });
        let params = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        let written = api.patch_status(&object.name, &params, &Patch::Merge(&patch)).await;
        tokio::time::sleep(SPACE).await;
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(true),
            Err(error) => Err(error),
        }
    }
}
