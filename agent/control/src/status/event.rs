//! An Event on an object whose kind has no condition here: one for each thing to say, counted when it is said again.

use k8s::{Effect, Finding, ObjectRef, live::Kind};
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{
    Told,
    condition::{describe, reason},
};
use crate::watch::{Raw, resource};

/// Where Events of objects without a namespace are.
const DEFAULT_NAMESPACE: &str = "default";

/// Writes it.
pub(super) async fn write(
    client: &Client,
    replica: &str,
    object: &ObjectRef,
    findings: &[Finding],
) -> Result<Told, kube::Error> {
    let worst = findings
        .iter()
        .filter(|finding| finding.effect > Effect::Note)
        .max_by_key(|finding| finding.effect);
    let Some((worst, kind)) = worst.zip(Kind::ALL.into_iter().find(|kind| kind.name() == object.kind)) else {
        return Ok(Told::Done);
    };
    let resource = resource(kind, "v1");
    let objects = match object.namespace.is_empty() {
        true => Api::<Raw>::all_with(client.clone(), &resource),
        false => Api::<Raw>::namespaced_with(client.clone(), &object.namespace, &resource),
    };
    let Some(found) = objects.get_opt(&object.name).await? else {
        return Ok(Told::Done);
    };
    let about = ObjectReference {
        api_version: Some(resource.api_version.clone()),
        kind: Some(object.kind.clone()),
        name: Some(object.name.clone()),
        namespace: Some(object.namespace.clone()).filter(|namespace| !namespace.is_empty()),
        uid: found.meta().uid.clone(),
        resource_version: found.meta().resource_version.clone(),
        ..ObjectReference::default()
    };
    let event = event(about, reason(&worst.problem), describe(findings), replica);
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let name = event.metadata.name.clone().unwrap_or_default();
    let events = Api::<Event>::namespaced(client.clone(), &namespace);
    match events.create(&PostParams::default(), &event).await {
        Ok(_) => Ok(Told::Done),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let before = events.get_opt(&name).await?;
            let count = before.and_then(|event| event.count).unwrap_or(1).saturating_add(1);
            let patch = json!({"count": count, "lastTimestamp": event.last_timestamp});
            events
                .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await?;
            Ok(Told::Done)
        }
        // The namespace is ending.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Ok(Told::Done),
        Err(error) => Err(error),
    }
}

fn event(about: ObjectReference, reason: &str, message: String, replica: &str) -> Event {
    let now = Some(Time(Timestamp::now()));
    let about_name = about.name.clone().unwrap_or_default();
    let what = format!("{:?} {reason} {message}", about.uid);
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, what.as_bytes());
    let hash: String = hash.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    // A name has at most 253 characters.
    let about_name: String = about_name.chars().take(200).collect();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{about_name}.{hash}")),
            namespace: Some(about.namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.into())),
            ..ObjectMeta::default()
        },
        involved_object: about,
        type_: Some("Warning".into()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        first_timestamp: now.clone(),
        last_timestamp: now,
        count: Some(1),
        source: Some(EventSource {
            component: Some(super::MANAGER.into()),
            host: None,
        }),
        reporting_component: Some(super::MANAGER.into()),
        reporting_instance: Some(replica.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_under_the_same_name() {
        let about = || ObjectReference {
            name: Some("x".repeat(253)),
            uid: Some("u".into()),
            ..ObjectReference::default()
        };
        let name = |message: &str| event(about(), "Invalid", message.into(), "r").metadata.name.unwrap();
        assert_eq!(name("a"), name("a"));
        assert_ne!(name("a"), name("b"));
        assert!(name("a").len() <= 253);
    }
}
