//! One kind: its watch, for as long as the process runs.
//!
//! Started again from where it was, with back-off, whenever it breaks; from a new listing when the API has forgotten that
//! place. The first listing is a streaming one where the API has them; later ones, and others, are the newest, in pages, so
//! that nothing goes back in time (`what_is_listed_again_is_the_newest`).
//! A kind that the API does not have is empty, is noted, and is looked for again every so often.

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

/// How a kind is followed, from one watch to the next.
struct Course {
    known: Known,
    /// The API does streaming lists, as far as is known.
    streaming: bool,
    backoff: Backoff,
}

impl Course {
    async fn pause(&mut self) {
        tokio::time::sleep(self.backoff.next((fraction() * 1024.0) as u64)).await;
    }
}

/// Follows a kind until nobody listens. `mesh_config`: where the one ConfigMap of interest is.
pub async fn follow(client: Client, kind: Kind, mesh_config: &str, mut to: impl Follow) {
    let mut course = Course {
        known: Known::default(),
        streaming: true,
        backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
    };
    let mut place = 0;
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
        match watch(api, config, &mut course, &mut to).await {
            Ended::Dropped => return,
            Ended::Again => {}
            Ended::Absent if place + 1 < versions.len() => place += 1,
            Ended::Absent => {
                place = 0;
                to.state(Some("the API does not have this kind".into()));
                for step in course.known.clear() {
                    if !to.step(step, course.known.tally()).await {
                        return;
                    }
                }
                tokio::time::sleep(ABSENT_WAIT.mul_f64(0.8 + 0.4 * fraction())).await;
            }
        }
    }
}

async fn watch(api: Api<Raw>, config: watcher::Config, course: &mut Course, to: &mut impl Follow) -> Ended {
    // They may be older than what is known, where the API is several.
    let streams = course.streaming && !course.known.is_listed();
    let config = if streams { config.streaming_lists() } else { config };
    let mut events = watcher(api, config).boxed();
    while let Some(event) = events.next().await {
        let error = match event {
            Ok(event) => {
                // The others come before the API has answered, or before it has all.
                if matches!(event, Event::InitDone | Event::Apply(_) | Event::Delete(_)) {
                    course.backoff.reset();
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
            Some(404) => return Ended::Absent,
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
