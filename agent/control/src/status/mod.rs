//! What becomes of objects, told where their authors look: a condition on policies and ServiceEntries, an Event on
//! everything else, and where the API keeps no status of the kind (`where_there_is_no_status_an_event_tells`).
//!
//! ```text
//! index ─ findings, objects seen ─► Board ──┐
//! agents ─ acknowledged, refused ───────────┴─► (the replica that leads) ─► status.conditions, Events
//! ```
//! A condition is written when it differs from the one that stands there, with the version that was read, and with the
//! conditions of others as they were: Istio's CRDs have no list keys, so a server-side apply of ours would take the whole
//! list. Writes are a few at a time and spaced; an object that changes often is told of once, as it is then, and one that can't be told
//! yet holds up no other (`what_can_not_be_told_yet_holds_up_nothing`). What an agent refused is told anew when it does no
//! more, or is gone (`what_no_agent_refuses_any_more_is_told`). With the API
//! away, what is open stays open. Drain ends the task at once: conditions are for people, and the next leader looks at all.

mod board;
mod condition;
mod event;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::StreamExt;
use k8s::{ObjectRef, live::Kind};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tasks::{DrainMode, DrainSignal};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{sync::watch, time::Instant};

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

/// By the names of resources.
type Refused = BTreeMap<Arc<str>, Arc<xds::Refusal>>;

/// How telling one object ended.
enum Told {
    /// All is said.
    Done,
    /// Agents have yet to answer, or the object changed meanwhile, or the API is away.
    Later,
}

/// After an agent that refused is gone: it may just come back.
const SETTLED: Duration = Duration::from_secs(10);

/// What became of a condition.
enum Written {
    /// It stands there, or the object is another by now.
    Stands,
    /// The object changed meanwhile.
    Changed,
    /// The API has no place for it.
    NoStatus,
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
        let mut refusing = self.acknowledged.refusing();
        let mut refused = Refused::new();
        // No longer refused, and since when that is to be believed.
        let mut parted: BTreeMap<Arc<str>, Instant> = BTreeMap::new();
        let mut later = false;
        loop {
            tokio::select! {
                _ = drain.reached(DrainMode::Graceful) => return,
                () = self.board.changed() => {}
                changed = in_force.changed() => if changed.is_err() { return },
                changed = refusing.changed() => if changed.is_err() { return },
                changed = leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.board.reopen_all();
                }
                () = tokio::time::sleep(RETRY), if later || !parted.is_empty() => {}
            }
            let generation = *in_force.borrow_and_update();
            refusing.mark_unchanged();
            let before = std::mem::replace(&mut refused, self.refused());
            let now = Instant::now();
            parted.extend(before.into_keys().map(|name| (name, now + SETTLED)));
            parted.retain(|name, _| !refused.contains_key(name));
            let settled = parted.extract_if(.., |_, at| *at <= now).map(|(name, _)| name);
            self.board.reopen(settled.chain(refused.keys().cloned()));
            if *leads.borrow() {
                later = self.tell(generation).await;
            }
        }
    }

    /// The policies that agents refuse, by the names of their resources.
    fn refused(&self) -> Refused {
        self.acknowledged.refused(xds::View::Authorization)
    }

    /// Whether something is left.
    async fn tell(&self, in_force: u64) -> bool {
        let refused = self.refused();
        let told = futures_util::stream::iter(self.board.open()).map(|(object, record)| {
            let refused = &refused;
            async move {
                let told = async {
                    match &record.seen {
                        Some(seen) => self.condition(&object, &record, seen, in_force, refused).await,
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
        told.buffer_unordered(AT_ONCE)
            .fold(false, |any, later| async move { any | later })
            .await
    }

    async fn condition(
        &self,
        object: &ObjectRef,
        record: &Record,
        seen: &SeenState,
        in_force: u64,
        refused: &Refused,
    ) -> Result<Told, kube::Error> {
        let progress = self.progress(object, record, in_force, refused);
        let waiting = matches!(progress, Progress::Waiting(..));
        if waiting && record.since.elapsed() < condition::PATIENCE {
            return Ok(Told::Later);
        }
        let condition = condition::condition(&record.findings, &progress);
        let stands = condition::merged(seen.conditions.as_ref(), &condition, seen.generation, "").is_none();
        let written = match stands {
            true => Written::Stands,
            false => self.write(object, seen, &condition).await?,
        };
        match written {
            Written::Stands if !waiting => Ok(Told::Done),
            Written::Stands | Written::Changed => Ok(Told::Later),
            Written::NoStatus => event::write(&self.client, &self.replica, object, &record.findings).await,
        }
    }

    fn progress(&self, object: &ObjectRef, record: &Record, in_force: u64, refused: &Refused) -> Progress {
        let name = format!("{}/{}", object.namespace, object.name);
        // They are of policies, and what a ServiceEntry is called a policy may be, too.
        if let Some(refusal) = refused.get(&*name).filter(|_| condition::is_policy(object)) {
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

    /// Puts the condition there, if the object stands as it was seen.
    async fn write(&self, object: &ObjectRef, seen: &SeenState, condition: &Condition) -> Result<Written, kube::Error> {
        let (group, version) = seen.version.split_once('/').unwrap_or(("", &seen.version));
        let Some(kind) = Kind::find(group, &object.kind) else {
            return Ok(Written::Stands);
        };
        let api = Api::<Raw>::namespaced_with(self.client.clone(), &object.namespace, &resource(kind, version));
        let Some(found) = api.get_opt(&object.name).await? else {
            return Ok(Written::Stands);
        };
        let text = |pointer: &str| found.value.pointer(pointer).cloned().unwrap_or_default();
        if text("/metadata/uid") != seen.uid || text("/metadata/generation") != seen.generation {
            // The watch brings the newer one.
            return Ok(Written::Stands);
        }
        let now = OffsetDateTime::now_utc()
            .replace_nanosecond(0)
            .unwrap_or_else(|_| OffsetDateTime::now_utc());
        let now = now.format(&Rfc3339).unwrap_or_default();
        let before = found.value.pointer("/status/conditions");
        let Some(conditions) = condition::merged(before, condition, seen.generation, &now) else {
            return Ok(Written::Stands);
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
            // A field that the CRD does not have is dropped without a word.
            Ok(after) => match condition::stands(after.value.pointer("/status/conditions")) {
                true => Ok(Written::Stands),
                false => Ok(Written::NoStatus),
            },
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Written::Changed),
            // The object was there a moment ago: its kind has no status of its own, or it is gone, as the watch tells.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Written::NoStatus),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::{Request, Response};
    use http_body_util::BodyExt as _;
    use k8s::{Effect, Finding, Place, Problem};
    use kube::client::Body;
    use serde_json::Value;
    use tokio::sync::mpsc;

    use super::*;

    /// An API: answers by method and path, and remembers what it was asked to write.
    fn reporter(
        answer: impl Fn(&str, &str) -> (u16, Value) + Send + Sync + 'static,
    ) -> (Reporter, Arc<Mutex<Vec<String>>>) {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (seen, answer) = (asked.clone(), Arc::new(answer));
        let service = tower::service_fn(move |request: Request<Body>| {
            let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
            let (code, text) = answer(&method, &path);
            if method != "GET" {
                seen.lock().unwrap().push(format!("{method} {path}"));
            }
            let response = Response::builder()
                .status(code)
                .body(Body::from(text.to_string().into_bytes()));
            async move { Ok::<_, std::convert::Infallible>(response.unwrap()) }
        });
        let reporter = Reporter {
            client: Client::new(service, "default"),
            board: Arc::default(),
            acknowledged: Arc::default(),
            replica: "r".into(),
        };
        (reporter, asked)
    }

    fn failure(code: u16, reason: &str) -> (u16, Value) {
        let status = json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": ""});
        (code, status)
    }

    fn object(kind: Kind, name: &str) -> Value {
        json!({"apiVersion": format!("{}/v1", kind.group()), "kind": kind.name(),
            "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": 1, "resourceVersion": "5"},
            "status": {"conditions": [{"type": "ZtunnelAccepted"}]}})
    }

    fn seen(kind: Kind, name: &str) -> Seen {
        let mut object = object(kind, name);
        object["status"] = Value::Null;
        Seen::of(kind, "shop", name, Some(&object)).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn what_can_not_be_told_yet_holds_up_nothing() {
        let kind = Kind::AuthorizationPolicy;
        let (reporter, asked) = reporter(move |_, path| match path.contains("/bad") {
            true => failure(500, "InternalError"),
            false => (200, object(kind, "good")),
        });
        let policies = (0..20).map(|number| seen(kind, &format!("bad-{number}")));
        let policies = policies.chain([seen(kind, "good")]).collect();
        reporter.board.note(policies, Vec::new(), 0);
        assert!(reporter.tell(0).await, "twenty are left");
        let left: Vec<_> = reporter
            .board
            .open()
            .into_iter()
            .map(|(object, _)| object.name)
            .collect();
        assert!(left.len() == 20 && !left.contains(&"good".to_owned()), "{left:?}");
        let path = "PATCH /apis/security.istio.io/v1/namespaces/shop/authorizationpolicies/good/status";
        assert_eq!(*asked.lock().unwrap(), [path]);
    }

    /// The condition that the API was asked for next.
    async fn asked_for(patches: &mut mpsc::UnboundedReceiver<Value>) -> (String, String) {
        let patch = tokio::time::timeout(Duration::from_secs(60), patches.recv()).await;
        let patch = patch.expect("a condition is written").unwrap();
        let condition = &patch["status"]["conditions"][0];
        let text = |key: &str| condition[key].as_str().unwrap().to_owned();
        (text("reason"), text("message"))
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_agent_refuses_any_more_is_told() {
        let kind = Kind::AuthorizationPolicy;
        let (to, mut patches) = mpsc::unbounded_channel();
        let service = tower::service_fn(move |request: Request<Body>| {
            let to = to.clone();
            async move {
                if request.method() == "PATCH" {
                    let patch = request.into_body().collect().await.unwrap().to_bytes();
                    to.send(serde_json::from_slice(&patch).unwrap()).unwrap();
                }
                let body = Body::from(object(kind, "p").to_string().into_bytes());
                Ok::<_, std::convert::Infallible>(Response::new(body))
            }
        });
        let reporter = Reporter {
            client: Client::new(service, "default"),
            board: Arc::default(),
            acknowledged: Arc::default(),
            replica: "r".into(),
        };
        let (board, acknowledged) = (reporter.board.clone(), reporter.acknowledged.clone());
        let (_leads, leads) = watch::channel(true);
        let (_drain, drain) = tasks::drain_channel();
        let other = xds::testing::refusing(&acknowledged, 1, "shop/other");
        let agent = xds::testing::refusing(&acknowledged, 2, "shop/p");
        board.note(vec![seen(kind, "p")], Vec::new(), 1);
        tokio::select! {
            () = reporter.run(leads, drain) => panic!("it ended"),
            () = async {
                assert_eq!(asked_for(&mut patches).await.0, "Rejected");
                drop(agent);
                let (reason, message) = asked_for(&mut patches).await;
                assert_eq!(reason, "Accepted", "{message}");
                drop(other);
            } => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn where_there_is_no_status_an_event_tells() {
        // A status that is no resource of its own; and one whose conditions the CRD does not have.
        for without in [true, false] {
            let kind = Kind::ServiceEntry;
            let (reporter, asked) = reporter(move |method, path| match (method, path.ends_with("/status")) {
                ("PATCH", true) if without => failure(404, "NotFound"),
                ("POST", _) => (201, json!({"metadata": {"name": "e"}, "involvedObject": {}})),
                _ => {
                    let mut object = object(kind, "entry");
                    object["status"] = json!({});
                    (200, object)
                }
            });
            let finding = Finding {
                place: Place::default(),
                object: kind.object("shop", "entry"),
                field: "spec.hosts[0]".into(),
                problem: Problem::Unsupported("a wildcard".into()),
                effect: Effect::Narrowed,
            };
            let findings = vec![(kind.object("shop", "entry"), vec![finding])];
            reporter.board.note(vec![seen(kind, "entry")], findings, 0);
            assert!(!reporter.tell(0).await && reporter.board.open().is_empty());
            let asked = asked.lock().unwrap();
            let status = "PATCH /apis/networking.istio.io/v1/namespaces/shop/serviceentries/entry/status";
            assert_eq!(*asked, [status, "POST /api/v1/namespaces/shop/events"]);
        }
    }
}
