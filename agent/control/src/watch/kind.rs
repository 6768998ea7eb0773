//! One kind: its watch, for as long as the process runs.
//!
//! Started again from where it was, with back-off, whenever it breaks; from a new listing when the API has forgotten that
//! place. The first listing is a streaming one where the API has them; later ones, and others, are the newest, in pages, so
//! that nothing goes back in time (`what_is_listed_again_is_the_newest`).
//!
//! ```text
//! 404 of a kind that is built in, or nobody says which kinds there are ─► as any other error: what is known stays
//! 404 ─► the API has it in another version ─► followed in that one
//! 404 ─► the API does not have it ─► nothing is known of it, or it says so for a minute ─► empty, looked for now and then
//! ```
//! So nobody who answers in the API's stead takes policies away (`what_is_not_found_for_a_while_is_kept`,
//! `what_is_not_found_at_the_start_is_waited_for`, `what_the_api_goes_on_not_having_is_gone`).

use std::time::Duration;

use futures_util::StreamExt;
use k8s::live::Kind;
use kube::{
    Api, Client,
    core::GroupVersionKind,
    discovery::ApiResource,
    runtime::watcher::{self, Event, watcher},
};
use tasks::Backoff;

use super::{
    known::{Known, Step, Tally},
    object::Raw,
    served::{Served, served},
};

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often the API says that it does not have a kind of which something is known until that is believed.
const CERTAIN: u32 = 4;
const CERTAIN_WAIT: Duration = Duration::from_secs(20);
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

/// Whether every API has it, in the one version.
fn is_built_in(kind: Kind) -> bool {
    matches!(kind.group(), "" | "discovery.k8s.io")
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
    /// There is no such kind, or so it was said.
    NotFound(String),
}

/// How a kind is followed, from one watch to the next.
struct Course {
    known: Known,
    /// The API does streaming lists, as far as is known.
    streaming: bool,
    backoff: Backoff,
    /// How often the API said that it does not have the kind, since it last had it.
    absences: u32,
    /// The API forgot where we were, and it has not worked since.
    forgotten: bool,
}

impl Course {
    /// It works.
    fn works(&mut self) {
        self.backoff.reset();
        self.absences = 0;
        self.forgotten = false;
    }

    async fn pause(&mut self) {
        tokio::time::sleep(self.backoff.next((fraction() * 1024.0) as u64)).await;
    }
}

/// Follows a kind until nobody listens. `mesh_config`: where the one ConfigMap of interest is.
pub async fn follow(client: Client, kind: Kind, mesh_config: &str, mut to: impl Follow) {
    let ways: Vec<_> = versions(kind).iter().map(|version| resource(kind, version)).collect();
    let mut course = Course {
        known: Known::default(),
        streaming: true,
        backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
        absences: 0,
        forgotten: false,
    };
    let mut place = 0;
    loop {
        let way = &ways[place];
        let (api, config): (Api<Raw>, _) = match kind {
            Kind::ConfigMap => (
                Api::namespaced_with(client.clone(), mesh_config, way),
                watcher::Config::default().fields("metadata.name=istio"),
            ),
            _ => (Api::all_with(client.clone(), way), watcher::Config::default()),
        };
        let error = match watch(kind, api, config, &mut course, &mut to).await {
            Ended::Dropped => return,
            Ended::Again => continue,
            Ended::NotFound(error) => error,
        };
        match served(&client, &ways).await {
            Served::In(now) => {
                course.absences = 0;
                if std::mem::replace(&mut place, now) == now {
                    to.state(Some(error));
                }
                course.pause().await;
            }
            // Who may not ask tries the other versions, and then goes on without.
            Served::Forbidden if !course.known.is_listed() || course.known.is_empty() => {
                place = (place + 1) % ways.len();
                if place == 0 && !absent(&mut course, &mut to).await {
                    return;
                }
            }
            Served::Forbidden => {
                course.absences = 0;
                to.state(Some(format!("{error}; reading /apis is forbidden")));
                course.pause().await;
            }
            Served::Unknown(why) => {
                course.absences = 0;
                to.state(Some(format!("{error}; {why}")));
                course.pause().await;
            }
            Served::Nowhere => {
                course.absences += 1;
                if !absent(&mut course, &mut to).await {
                    return;
                }
            }
        }
    }
}

/// The API does not have the kind. False: nobody listens.
async fn absent(course: &mut Course, to: &mut impl Follow) -> bool {
    let known = &mut course.known;
    if !known.is_empty() && course.absences < CERTAIN {
        to.state(Some(
            "the API does not have this kind any more, or not yet again".into(),
        ));
        tokio::time::sleep(CERTAIN_WAIT.mul_f64(0.8 + 0.4 * fraction())).await;
        return true;
    }
    to.state(Some("the API does not have this kind".into()));
    for step in known.clear() {
        if !to.step(step, known.tally()).await {
            return false;
        }
    }
    tokio::time::sleep(ABSENT_WAIT.mul_f64(0.8 + 0.4 * fraction())).await;
    true
}

async fn watch(kind: Kind, api: Api<Raw>, config: watcher::Config, course: &mut Course, to: &mut impl Follow) -> Ended {
    // They may be older than what is known, where the API is several.
    let streams = course.streaming && !course.known.is_listed();
    let config = if streams { config.streaming_lists() } else { config };
    let mut events = watcher(api, config).boxed();
    while let Some(event) = events.next().await {
        let error = match event {
            Ok(event) => {
                // The others come before the API has answered, or before it has all.
                if matches!(event, Event::InitDone | Event::Apply(_) | Event::Delete(_)) {
                    course.works();
                    to.state(None);
                }
                for step in course.known.take(event) {
                    if !to.step(step, course.known.tally()).await {
                        return Ended::Dropped;
                    }
                }
                continue;
            }
            Err(error) => error,
        };
        let forgotten = match code(&error) {
            Some(404) if !is_built_in(kind) => return Ended::NotFound(error.to_string()),
            // The API does not do streaming lists.
            Some(400 | 422) if streams => {
                course.streaming = false;
                return Ended::Again;
            }
            // It has forgotten where we were.
            Some(410) => true,
            _ => matches!(error, watcher::Error::NoResourceVersion),
        };
        to.state(Some(error.to_string()));
        if forgotten && !std::mem::replace(&mut course.forgotten, true) {
            // It answers again: what failed before is no reason to wait.
            course.backoff.reset();
        }
        course.pause().await;
        if forgotten {
            return Ended::Again;
        }
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
#[path = "kind_tests.rs"]
mod tests;
