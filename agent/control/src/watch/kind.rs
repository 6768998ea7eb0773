//! One kind: its watch, for as long as the process runs.
//!
//! Started again from where it was, with back-off, whenever it breaks; from a new listing when the API has forgotten that
//! place. A kind that the API does not have is empty, is noted, and is looked for again every so often. Streaming lists
//! where the API has them, else pages.

use std::time::Duration;

use futures_util::StreamExt;
use k8s::live::Kind;
use kube::{
    Api, Client,
    core::GroupVersionKind,
    discovery::ApiResource,
    runtime::watcher::{self, watcher},
};
use tasks::Backoff;

use super::{
    known::{Known, Step, Tally},
    object::Raw,
};

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often a kind that is not there is looked for.
const ABSENT_WAIT: Duration = Duration::from_secs(30);

/// What happens to a kind.
pub trait Follow: Send {
    /// A step, and how far the kind was followed with it; waits if whoever takes it is busy. False: nobody does any more.
    fn step(&mut self, step: Step, tally: Tally) -> impl Future<Output = bool> + Send;
    /// The watch broke or works again: the reason, or nothing.
    fn state(&mut self, trouble: Option<String>);
}

/// The versions of a kind's group that may be served, the best first.
fn versions(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::ServiceEntry | Kind::WorkloadEntry => &["v1", "v1beta1", "v1alpha3"],
        Kind::PeerAuthentication | Kind::AuthorizationPolicy | Kind::Gateway | Kind::GatewayClass => &["v1", "v1beta1"],
        _ => &["v1"],
    }
}

/// The kind as the API names it.
pub fn resource(kind: Kind, version: &str) -> ApiResource {
    let plural = match kind {
        Kind::Namespace => "namespaces",
        Kind::Node => "nodes",
        Kind::Pod => "pods",
        Kind::Service => "services",
        Kind::ServiceAccount => "serviceaccounts",
        Kind::ConfigMap => "configmaps",
        Kind::EndpointSlice => "endpointslices",
        Kind::ServiceEntry => "serviceentries",
        Kind::WorkloadEntry => "workloadentries",
        Kind::PeerAuthentication => "peerauthentications",
        Kind::AuthorizationPolicy => "authorizationpolicies",
        Kind::Gateway => "gateways",
        Kind::GatewayClass => "gatewayclasses",
    };
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(kind.group(), version, kind.name()), plural)
}

/// How a watch ended.
enum Ended {
    /// Nobody listens.
    Dropped,
    /// Start from a new listing.
    Again,
    /// The API does not have the kind in this version.
    Absent,
}

/// Follows a kind until nobody listens. `mesh_config`: where the one ConfigMap of interest is.
pub async fn follow(client: Client, kind: Kind, mesh_config: &str, mut to: impl Follow) {
    let mut known = Known::default();
    let (mut streaming, mut place) = (true, 0);
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let versions = versions(kind);
        let resource = resource(kind, versions[place % versions.len()]);
        let (api, config): (Api<Raw>, _) = match kind {
            Kind::ConfigMap => (
                Api::namespaced_with(client.clone(), mesh_config, &resource),
                watcher::Config::default().fields("metadata.name=istio"),
            ),
            _ => (Api::all_with(client.clone(), &resource), watcher::Config::default()),
        };
        let config = if streaming { config.streaming_lists() } else { config };
        match watch(api, config, &mut streaming, &mut known, &mut backoff, &mut to).await {
            Ended::Dropped => return,
            Ended::Again => {}
            Ended::Absent if place + 1 < versions.len() => place += 1,
            Ended::Absent => {
                place = 0;
                to.state(Some("the API does not have this kind".into()));
                for step in known.clear() {
                    if !to.step(step, known.tally()).await {
                        return;
                    }
                }
                tokio::time::sleep(ABSENT_WAIT.mul_f64(0.8 + 0.4 * fraction())).await;
            }
        }
    }
}

async fn watch(
    api: Api<Raw>,
    config: watcher::Config,
    streaming: &mut bool,
    known: &mut Known,
    backoff: &mut Backoff,
    to: &mut impl Follow,
) -> Ended {
    let mut events = watcher(api, config).boxed();
    while let Some(event) = events.next().await {
        let error = match event {
            Ok(event) => {
                backoff.reset();
                to.state(None);
                for step in known.take(event) {
                    if !to.step(step, known.tally()).await {
                        return Ended::Dropped;
                    }
                }
                continue;
            }
            Err(error) => error,
        };
        match code(&error) {
            Some(404) => return Ended::Absent,
            // The API does not do streaming lists.
            Some(400 | 422) if *streaming => {
                *streaming = false;
                return Ended::Again;
            }
            // It has forgotten where we were.
            Some(410) => return Ended::Again,
            _ => {}
        }
        to.state(Some(error.to_string()));
        tokio::time::sleep(backoff.next((fraction() * 1024.0) as u64)).await;
    }
    Ended::Again
}

fn code(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status.code),
        _ => None,
    }
}

/// Somewhere from 0 to 1, so that many that failed together do not come back together.
fn fraction() -> f64 {
    let mut bytes = [0; 2];
    // Without random numbers there is no jitter, and nothing worse.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u16::from_le_bytes(bytes)) / f64::from(u16::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http::{Request, Response};
    use kube::client::Body;
    use tokio::sync::mpsc;

    use super::*;

    /// Answers each request by its path and query, and remembers them.
    fn api(answer: impl Fn(&str) -> (u16, &'static str) + Send + Sync + 'static) -> (Client, Arc<Mutex<Vec<String>>>) {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (seen, answer) = (asked.clone(), Arc::new(answer));
        let service = tower::service_fn(move |request: Request<Body>| {
            let path = request.uri().to_string();
            let (code, text) = answer(&path);
            seen.lock().unwrap().push(path);
            let response = Response::builder()
                .status(code)
                .body(Body::from(text.as_bytes().to_vec()));
            async move { Ok::<_, std::convert::Infallible>(response.unwrap()) }
        });
        (Client::new(service, "default"), asked)
    }

    struct Tell(mpsc::UnboundedSender<String>);

    impl Follow for Tell {
        async fn step(&mut self, step: Step, _tally: Tally) -> bool {
            let told = match step {
                Step::Put(raw) => format!("+{}", raw.name()),
                Step::Gone(_, name) => format!("-{name}"),
                Step::Synced => "synced".into(),
            };
            self.0.send(told).is_ok()
        }

        fn state(&mut self, _: Option<String>) {}
    }

    const NO_STREAMS: &str =
        r#"{"kind": "Status", "code": 422, "reason": "Invalid", "message": "", "status": "Failure"}"#;
    const ABSENT: &str = r#"{"kind": "Status", "code": 404, "reason": "NotFound", "message": "", "status": "Failure"}"#;
    const ONE: &str = r#"{"kind": "GatewayList", "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "metadata": {"resourceVersion": "5"},
        "items": [{"metadata": {"name": "a", "namespace": "b", "uid": "u", "resourceVersion": "4"}}]}"#;

    #[tokio::test(start_paused = true)]
    async fn an_older_version_without_streaming_lists_is_found() {
        let (client, asked) = api(|path| match path {
            path if path.contains("/v1/") => (404, ABSENT),
            path if path.contains("sendInitialEvents") => (422, NO_STREAMS),
            path if path.contains("watch=") => (200, ""),
            _ => (200, ONE),
        });
        let (tell, mut told) = mpsc::unbounded_channel();
        let follow = follow(client, Kind::Gateway, "istio-system", Tell(tell));
        tokio::select! {
            () = follow => panic!("it ended"),
            () = async {
                assert_eq!(told.recv().await.unwrap(), "+a");
                assert_eq!(told.recv().await.unwrap(), "synced");
            } => {}
        }
        assert!(
            asked
                .lock()
                .unwrap()
                .iter()
                .any(|path| path.contains("/v1beta1/gateways?"))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_kind_that_is_not_there_is_empty_and_is_found_when_it_comes() {
        let there = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let comes = there.clone();
        let (client, asked) = api(move |path| match there.load(std::sync::atomic::Ordering::SeqCst) {
            false => (404, ABSENT),
            true if path.contains("sendInitialEvents") => (422, NO_STREAMS),
            true if path.contains("watch=") => (200, ""),
            true => (200, ONE),
        });
        let (tell, mut told) = mpsc::unbounded_channel();
        let follow = follow(client, Kind::Gateway, "istio-system", Tell(tell));
        tokio::select! {
            () = follow => panic!("it ended"),
            () = async {
                assert_eq!(told.recv().await.unwrap(), "synced");
                assert!(asked.lock().unwrap().len() <= 4, "it is not asked for without a pause");
                comes.store(true, std::sync::atomic::Ordering::SeqCst);
                assert_eq!(told.recv().await.unwrap(), "+a");
            } => {}
        }
    }
}
