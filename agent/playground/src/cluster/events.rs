//! Objects that nothing here acts on: each gets an event that says so, which `kubectl describe` shows.

use anyhow::Result;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::{
    api::{Api, Target},
    deployments::{name, namespace},
};

/// Says of an object that nothing makes its pods.
pub(super) async fn not_run(
    api: &mut Api,
    api_version: &str,
    kind: &str,
    metadata: &ObjectMeta,
    now: &str,
) -> Result<()> {
    let uid = metadata.uid.as_deref().unwrap_or_default();
    let event = Target::core(
        "Event",
        "events",
        namespace(metadata),
        &format!("{}.not-run", name(metadata)),
    );
    let said = json!({
        "involvedObject": {
            "apiVersion": api_version, "kind": kind, "name": name(metadata), "namespace": namespace(metadata), "uid": uid,
        },
        "type": "Warning", "reason": "NotRun",
        "message": format!("the playground has no controller for a {kind}: it makes no pods (Pods, ReplicaSets and Deployments run here)"),
        "source": {"component": "playground"},
        "firstTimestamp": metadata.creation_timestamp.as_ref().map_or_else(|| json!(now), |time| json!(time)),
        "lastTimestamp": metadata.creation_timestamp.as_ref().map_or_else(|| json!(now), |time| json!(time)),
        "count": 1,
    });
    api.ensure(event, said, true).await.map(drop)
}
