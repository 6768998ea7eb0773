//! The annotation by which the control plane learns that a pod's capture stands (`ambient.istio.io/redirection`), and Events
//! for pods that were to be captured and can't be.
//!
//! ```text
//! the reconciler: what each pod should say ─► Board ─┐
//! the API: what it says ─► Cluster ──────────────────┴─ differs ─► PATCH status ─ fails ─► again, with back-off
//! ```
//! Compares and repairs: an annotation that an agent before this one left wrong is put right as soon as this one knows how
//! the pod is. Until it knows it leaves it alone (`nothing_is_said_of_what_is_not_known_yet`). Written to the status
//! subresource, as Istio's CNI agent does, with the pod's uid, so that its successor is never meant.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s::Enablement;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::{
    Api,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use model::NamespacedName;
use serde_json::json;
use tasks::Backoff;
use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::kube_source::{Cluster, ListedPod, REDIRECTION, left_out};

const PATCHES_AT_ONCE: usize = 8;
const PATCH_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// The Event's reason for a pod that is captured, but not as its annotations ask.
const IN_PART: &str = "AnnotationIgnored";

/// A pod, what enrols it, and what of its annotations is not done.
type Listed = (ListedPod, Enablement, Vec<String>);

/// What a pod's annotation is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Captured, and the proxy serves it.
    Enabled,
    /// Nothing: it is not captured.
    Absent,
    /// Not known yet: whatever it says.
    Leave,
}

impl Wish {
    fn is(self, said: Option<&str>) -> bool {
        match self {
            Self::Enabled => said == Some("enabled"),
            Self::Absent => said.is_none(),
            Self::Leave => true,
        }
    }

    fn value(self) -> Option<&'static str> {
        match self {
            Self::Enabled => Some("enabled"),
            Self::Absent | Self::Leave => None,
        }
    }
}

/// What the reconciler of pods wants to be said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wishes {
    /// By pod, with the uid that it has in the API.
    pub pods: BTreeMap<NamespacedName, (String, Wish)>,
    /// Whether these are all pods of the node: no other is captured.
    pub complete: bool,
    /// Pods that nobody told of, and that were looked for in vain.
    pub missed: BTreeSet<NamespacedName>,
}

/// Where the reconciler writes its wishes.
#[derive(Clone, Default)]
pub struct Board(Arc<BoardInner>);

#[derive(Default)]
struct BoardInner {
    wishes: Mutex<Wishes>,
    changed: watch::Sender<u64>,
}

impl Board {
    /// Puts up the wishes, all of them.
    pub fn put(&self, wishes: Wishes) {
        let mut current = self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != wishes {
            *current = wishes;
            drop(current);
            self.0.changed.send_modify(|changes| *changes += 1);
        }
    }

    fn wishes(&self) -> Wishes {
        self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One annotation to write.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Difference {
    pod: NamespacedName,
    uid: String,
    value: Option<&'static str>,
}

/// What has to be written so that the API says what is wished.
fn differences(wishes: &Wishes, listed: &[Listed]) -> Vec<Difference> {
    let mut differences = Vec::new();
    for (pod, _, _) in listed {
        let name = name_of(pod);
        let wish = match wishes.pods.get(&name) {
            Some((uid, wish)) if *uid == pod.metadata.uid => *wish,
            _ if wishes.complete => Wish::Absent,
            _ => Wish::Leave,
        };
        let said = pod.metadata.annotations.get(REDIRECTION).map(String::as_str);
        if !wish.is(said) {
            differences.push(Difference {
                pod: name,
                uid: pod.metadata.uid.clone(),
                value: wish.value(),
            });
        }
    }
    differences
}

fn name_of(pod: &ListedPod) -> NamespacedName {
    NamespacedName::new(pod.metadata.namespace.as_str(), pod.metadata.name.as_str())
}

/// Why a pod that was to be in the mesh is not: the Event's reason and text.
fn complaint(pod: &ListedPod, enablement: Enablement, wishes: &Wishes) -> Option<(&'static str, &'static str)> {
    // One on its way out is still listed when the plugin has taken it from us.
    if pod.ended || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    match enablement {
        // Long past the plugin's call: it was started without it.
        Enablement::Captured if pod.running && wishes.complete && wishes.missed.contains(&name_of(pod)) => Some((
            "StartedWithoutMesh",
            "asked to be in the mesh, but it was started before the CNI plugin was there, and its network namespace was not \
             found (--netns-dir): restart it",
        )),
        other => left_out(other),
    }
}

/// Keeps annotations as wished, and complains of pods that can't be captured, until dropped.
pub async fn run(cluster: Cluster, board: Board, node: String) {
    let recorder = Recorder::new(
        cluster.client().clone(),
        Reporter {
            controller: "undercurrent.io/node".to_owned(),
            instance: Some(node),
        },
    );
    let mut writer = Writer {
        cluster: cluster.clone(),
        recorder,
        failed: BTreeMap::new(),
        said: BTreeSet::new(),
        writing: BTreeSet::new(),
        running: JoinSet::new(),
    };
    let (mut listed, mut wished) = (cluster.changed(), board.0.changed.subscribe());
    loop {
        let again = writer.look(&board.wishes());
        tokio::select! {
            // Their senders are in `cluster` and `board`.
            _ = listed.changed() => {}
            _ = wished.changed() => {}
            Some(done) = writer.running.join_next() => writer.done(done),
            () = sleep_until(again) => {}
        }
    }
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

type Written = (Difference, Result<(), String>);

struct Writer {
    cluster: Cluster,
    recorder: Recorder,
    /// When to try again, by pod uid.
    failed: BTreeMap<String, (Instant, Backoff)>,
    /// Complaints made, by pod uid.
    said: BTreeSet<(String, &'static str, String)>,
    writing: BTreeSet<String>,
    running: JoinSet<Written>,
}

impl Writer {
    /// Starts what is to be done now; answers when to look again even if nothing changes.
    fn look(&mut self, wishes: &Wishes) -> Option<Instant> {
        let listed = self.cluster.listed()?;
        let there: BTreeSet<_> = listed.iter().map(|(pod, _, _)| pod.metadata.uid.clone()).collect();
        self.failed.retain(|uid, _| there.contains(uid));
        let stands = |(uid, reason, note): &(String, &str, String)| {
            let said = |(pod, _, problems): &Listed| {
                pod.metadata.uid == *uid && (*reason != IN_PART || problems.contains(note))
            };
            listed.iter().any(said)
        };
        // What is mended and spoiled again is said again.
        self.said.retain(stands);
        let (now, mut next) = (Instant::now(), None);
        for difference in differences(wishes, &listed) {
            if let Some((when, _)) = self.failed.get(&difference.uid).filter(|(when, _)| *when > now) {
                next = Some(next.map_or(*when, |next: Instant| next.min(*when)));
            } else if self.writing.len() < PATCHES_AT_ONCE && self.writing.insert(difference.uid.clone()) {
                self.running.spawn(write(self.cluster.clone(), difference));
            }
        }
        for (pod, enablement, problems) in &listed {
            let not_captured = complaint(pod, *enablement, wishes).map(|(reason, note)| (reason, note.to_owned()));
            let in_part = problems.iter().map(|problem| (IN_PART, problem.clone()));
            for (reason, note) in not_captured.into_iter().chain(in_part) {
                if self.said.insert((pod.metadata.uid.clone(), reason, note.clone())) {
                    tracing::warn!(pod = %name_of(pod), reason, "{note}");
                    tokio::spawn(complain(self.recorder.clone(), reference(pod), reason, note));
                }
            }
        }
        next
    }

    fn done(&mut self, done: Result<Written, tokio::task::JoinError>) {
        let Ok((difference, outcome)) = done else {
            // A panic: what was being written is not known. All may be tried again.
            self.writing.clear();
            return;
        };
        self.writing.remove(&difference.uid);
        match outcome {
            Ok(()) => {
                self.failed.remove(&difference.uid);
            }
            Err(error) => {
                let first = || (Instant::now(), Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF));
                let failed = self.failed.entry(difference.uid).or_insert_with(first);
                failed.0 = Instant::now() + failed.1.next(random());
                tracing::warn!(pod = %difference.pod, error, "the pod's annotation {REDIRECTION} is not as it should be");
            }
        }
    }
}

fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

async fn write(cluster: Cluster, difference: Difference) -> Written {
    let pods = Api::<Pod>::namespaced(cluster.client().clone(), &difference.pod.namespace);
    let patch = Patch::Merge(json!({
        "metadata": { "uid": difference.uid, "annotations": { REDIRECTION: difference.value } }
    }));
    let params = PatchParams::default();
    let patched = pods.patch_status(&difference.pod.name, &params, &patch);
    let outcome = match tokio::time::timeout(PATCH_TIMEOUT, patched).await {
        Ok(Ok(pod)) => {
            cluster.learn_pod(pod);
            Ok(())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!("no answer within {} s", PATCH_TIMEOUT.as_secs())),
    };
    (difference, outcome)
}

fn reference(pod: &ListedPod) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(pod.metadata.name.clone()),
        namespace: Some(pod.metadata.namespace.clone()),
        uid: Some(pod.metadata.uid.clone()),
        ..ObjectReference::default()
    }
}

async fn complain(recorder: Recorder, pod: ObjectReference, reason: &'static str, note: String) {
    let event = Event {
        type_: EventType::Warning,
        reason: reason.to_owned(),
        // The API takes 1 kB.
        note: Some(note.chars().take(1000).collect()),
        action: "Capture".to_owned(),
        secondary: None,
    };
    let published = tokio::time::timeout(PATCH_TIMEOUT, recorder.publish(&event, &pod)).await;
    if let Ok(Err(error)) = published {
        tracing::warn!(pod = pod.name, %error, "the Event cannot be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, uid: &str, annotation: Option<&str>) -> Listed {
        let mut metadata = k8s::Metadata {
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            uid: uid.to_owned(),
            ..k8s::Metadata::default()
        };
        let said = annotation.map(|value| (REDIRECTION.to_owned(), value.to_owned()));
        metadata.annotations.extend(said);
        let pod = ListedPod {
            metadata,
            service_account: "default".into(),
            addresses: Vec::new(),
            host_network: false,
            running: true,
            ended: false,
        };
        (pod, Enablement::Captured, Vec::new())
    }

    fn wishes(complete: bool, wish: Wish) -> Wishes {
        Wishes {
            pods: BTreeMap::from([(NamespacedName::new("shop", "a"), ("u1".to_owned(), wish))]),
            complete,
            missed: BTreeSet::from([NamespacedName::new("shop", "b")]),
        }
    }

    #[test]
    fn what_differs_is_written_and_nothing_else() {
        for (wish, said, expected) in [
            (Wish::Enabled, None, Some(Some("enabled"))),
            (Wish::Enabled, Some("pending"), Some(Some("enabled"))),
            (Wish::Enabled, Some("enabled"), None),
            (Wish::Absent, Some("pending"), Some(None)),
            (Wish::Absent, Some("enabled"), Some(None)),
            (Wish::Absent, None, None),
            (Wish::Leave, Some("enabled"), None),
        ] {
            let found = differences(&wishes(false, wish), &[pod("a", "u1", said)]);
            let values: Vec<_> = found.into_iter().map(|difference| difference.value).collect();
            assert_eq!(values, Vec::from_iter(expected), "{wish:?} {said:?}");
        }
    }

    #[test]
    fn nothing_is_said_of_what_is_not_known_yet() {
        let listed = [pod("b", "u2", Some("enabled")), pod("a", "other", Some("enabled"))];
        assert_eq!(differences(&wishes(false, Wish::Enabled), &listed), []);
        // Once all pods of the node are known, the rest is wrong: another pod, and the successor of one.
        assert_eq!(differences(&wishes(true, Wish::Enabled), &listed).len(), 2);
    }

    #[test]
    fn a_pod_that_cannot_be_captured_is_complained_of() {
        let (mut listed, _, _) = pod("b", "u2", None);
        let complete = wishes(true, Wish::Enabled);
        let reason =
            |pod: &ListedPod, enablement, wishes: &Wishes| complaint(pod, enablement, wishes).map(|said| said.0);
        assert_eq!(
            reason(&listed, Enablement::HostNetwork, &complete),
            Some("HostNetworkNotCaptured")
        );
        assert_eq!(
            reason(&listed, Enablement::Sidecar, &complete),
            Some("SidecarNotCaptured")
        );
        assert_eq!(reason(&listed, Enablement::NotAsked, &complete), None);
        assert_eq!(
            reason(&listed, Enablement::Captured, &complete),
            Some("StartedWithoutMesh")
        );
        assert_eq!(
            reason(&listed, Enablement::Captured, &wishes(false, Wish::Enabled)),
            None
        );
        // It is about to be found.
        let looking = Wishes {
            missed: BTreeSet::new(),
            ..complete.clone()
        };
        assert_eq!(reason(&listed, Enablement::Captured, &looking), None);
        listed.metadata.deletion_timestamp = Some("2026-01-01T00:00:00Z".to_owned());
        assert_eq!(reason(&listed, Enablement::Captured, &complete), None);
        listed.metadata.deletion_timestamp = None;
        listed.ended = true;
        assert_eq!(reason(&listed, Enablement::HostNetwork, &complete), None);
    }
}
