//! One kind's watch against an API that answers as it is told to. Time is paused.

use std::sync::{Arc, Mutex, atomic::Ordering};

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

/// What the test is told next.
async fn next(told: &mut mpsc::UnboundedReceiver<String>) -> String {
    let told = tokio::time::timeout(Duration::from_secs(3600), told.recv()).await;
    told.expect("something is told").unwrap()
}

/// Does something while a kind is followed.
async fn while_following(client: Client, kind: Kind, what: impl AsyncFnOnce(&mut mpsc::UnboundedReceiver<String>)) {
    let (tell, mut told) = mpsc::unbounded_channel();
    tokio::select! {
        () = follow(client, kind, "istio-system", Tell(tell)) => panic!("it ended"),
        () = what(&mut told) => {}
    }
}

/// Follows a kind until all of this was told.
async fn tells(client: Client, kind: Kind, expected: &[&str]) {
    while_following(client, kind, async |told| {
        for expected in expected {
            assert_eq!(next(told).await, *expected);
        }
    })
    .await;
}

const NO_STREAMS: &str = r#"{"kind": "Status", "code": 422, "reason": "Invalid", "message": "", "status": "Failure"}"#;
const ABSENT: &str = r#"{"kind": "Status", "code": 404, "reason": "NotFound", "message": "", "status": "Failure"}"#;
const ONE: &str = r#"{"kind": "GatewayList", "apiVersion": "gateway.networking.k8s.io/v1beta1",
    "metadata": {"resourceVersion": "5"},
    "items": [{"metadata": {"name": "a", "namespace": "b", "uid": "u", "resourceVersion": "4"}}]}"#;

const OTHER: &str = r#"{"kind": "GatewayList", "apiVersion": "gateway.networking.k8s.io/v1beta1",
    "metadata": {"resourceVersion": "7"},
    "items": [{"metadata": {"name": "b", "namespace": "b", "uid": "v", "resourceVersion": "6"}}]}"#;
const STREAM: &str = r#"{"type": "ADDED", "object": {"metadata": {"name": "a", "namespace": "b", "uid": "u", "resourceVersion": "4"}}}
{"type": "BOOKMARK", "object": {"kind": "Gateway", "apiVersion": "gateway.networking.k8s.io/v1", "metadata": {"resourceVersion": "5", "annotations": {"k8s.io/initial-events-end": "true"}}}}
"#;
const EXPIRED: &str = r#"{"kind": "Status", "code": 410, "reason": "Expired", "message": "", "status": "Failure"}"#;
const FORBIDDEN: &str = r#"{"kind": "Status", "code": 403, "reason": "Forbidden", "message": "", "status": "Failure"}"#;
const BROKEN: &str =
    r#"{"kind": "Status", "code": 500, "reason": "InternalError", "message": "", "status": "Failure"}"#;
const OTHERS: &str = r#"{"kind": "APIGroupList", "apiVersion": "v1", "groups": [
    {"name": "discovery.k8s.io", "versions": [{"groupVersion": "discovery.k8s.io/v1", "version": "v1"}]}]}"#;
const GROUPS: &str = r#"{"kind": "APIGroupList", "apiVersion": "v1", "groups": [
    {"name": "discovery.k8s.io", "versions": [{"groupVersion": "discovery.k8s.io/v1", "version": "v1"}]},
    {"name": "gateway.networking.k8s.io", "versions": [
        {"groupVersion": "gateway.networking.k8s.io/v1", "version": "v1"},
        {"groupVersion": "gateway.networking.k8s.io/v1beta1", "version": "v1beta1"}]}]}"#;
const BETA: &str = r#"{"kind": "APIGroupList", "apiVersion": "v1", "groups": [
    {"name": "discovery.k8s.io", "versions": [{"groupVersion": "discovery.k8s.io/v1", "version": "v1"}]},
    {"name": "gateway.networking.k8s.io", "versions": [
        {"groupVersion": "gateway.networking.k8s.io/v1beta1", "version": "v1beta1"}]}]}"#;
const GATEWAYS: &str = r#"{"kind": "APIResourceList", "apiVersion": "v1",
    "groupVersion": "gateway.networking.k8s.io/v1", "resources": [
    {"name": "gateways", "singularName": "", "namespaced": true, "kind": "Gateway", "verbs": ["list"]}]}"#;

#[tokio::test(start_paused = true)]
async fn an_older_version_without_streaming_lists_is_found() {
    let (client, asked) = api(|path| match path {
        path if path.ends_with("/apis") => (200, BETA),
        path if path.ends_with("/apis/gateway.networking.k8s.io/v1beta1") => (200, GATEWAYS),
        path if path.contains("/v1/") => (404, ABSENT),
        path if path.contains("sendInitialEvents") => (422, NO_STREAMS),
        path if path.contains("watch=") => (200, ""),
        _ => (200, ONE),
    });
    while_following(client, Kind::Gateway, async |told| {
        assert_eq!(next(told).await, "+a");
        assert_eq!(next(told).await, "synced");
    })
    .await;
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
    let (client, asked) = api(move |path| match there.load(Ordering::SeqCst) {
        false if path.ends_with("/apis") => (200, OTHERS),
        false => (404, ABSENT),
        true if path.contains("sendInitialEvents") => (422, NO_STREAMS),
        true if path.contains("watch=") => (200, ""),
        true => (200, ONE),
    });
    while_following(client, Kind::Gateway, async |told| {
        assert_eq!(next(told).await, "synced");
        assert!(asked.lock().unwrap().len() <= 4, "it is not asked for without a pause");
        comes.store(true, Ordering::SeqCst);
        assert_eq!(next(told).await, "+a");
    })
    .await;
}

/// How often it asks within so many minutes.
async fn asks_within(
    minutes: u64,
    kind: Kind,
    answer: impl Fn(&str) -> (u16, &'static str) + Send + Sync + 'static,
) -> usize {
    let (client, asked) = api(answer);
    let (tell, _told) = mpsc::unbounded_channel();
    let follow = follow(client, kind, "istio-system", Tell(tell));
    let ended = tokio::time::timeout(Duration::from_secs(60 * minutes), follow).await;
    assert!(ended.is_err(), "it goes on");
    asked.lock().unwrap().len()
}

#[tokio::test(start_paused = true)]
async fn what_fails_again_and_again_is_asked_for_more_and_more_rarely() {
    let asks = asks_within(10, Kind::Pod, |path| match path.contains("sendInitialEvents") {
        true => (422, NO_STREAMS),
        false => (500, BROKEN),
    });
    let asks = asks.await;
    assert!(asks < 50, "{asks}");
    let asks = asks_within(10, Kind::Pod, |_| (410, EXPIRED)).await;
    assert!(asks < 50, "{asks}");
}

#[tokio::test(start_paused = true)]
async fn what_is_listed_again_is_the_newest() {
    let (client, asked) = api(|path| match path {
        path if path.contains("sendInitialEvents") => (200, STREAM),
        path if path.contains("watch=") => (410, EXPIRED),
        _ => (200, OTHER),
    });
    tells(client, Kind::Gateway, &["+a", "synced", "+b", "-a", "synced"]).await;
    let asked = asked.lock().unwrap();
    let streams = asked.iter().filter(|path| path.contains("sendInitialEvents"));
    assert_eq!(streams.count(), 1, "{asked:?}");
    let lists: Vec<_> = asked.iter().filter(|path| !path.contains("watch=")).collect();
    assert!(lists.iter().all(|path| !path.contains("resourceVersion=")), "{lists:?}");
}

type Answer = fn(&str) -> (u16, &'static str);

/// An API that has `a`, then answers so for some requests, then has `b` in its stead.
fn away(requests: usize, answer: Answer) -> impl Fn(&str) -> (u16, &'static str) + Send + Sync {
    let listed = std::sync::atomic::AtomicUsize::new(0);
    move |path| {
        let seen = listed.load(Ordering::SeqCst);
        match path {
            path if path.contains("sendInitialEvents") => (422, NO_STREAMS),
            _ if (1..=requests).contains(&seen) => {
                listed.store(seen + 1, Ordering::SeqCst);
                answer(path)
            }
            path if path.contains("watch=") => (410, EXPIRED),
            _ if seen == 0 => {
                listed.store(1, Ordering::SeqCst);
                (200, ONE)
            }
            _ => (200, OTHER),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_found_for_a_while_is_kept() {
    let other = |_: &str| (404, "404 page not found");
    let html = |_: &str| (404, "<html>");
    let status = |_: &str| (404, ABSENT);
    // The API answers, and says that it has the kind.
    let served = |path: &str| match path {
        path if path.ends_with("/apis") => (200, GROUPS),
        path if path.ends_with("/apis/gateway.networking.k8s.io/v1") => (200, GATEWAYS),
        _ => (404, ABSENT),
    };
    // It is about to list it again.
    let soon = |path: &str| match path.ends_with("/apis") {
        true => (200, OTHERS),
        false => (404, "404 page not found"),
    };
    let answers: [(usize, Answer); 5] = [(30, other), (30, html), (30, status), (30, served), (4, soon)];
    for kind in [Kind::Gateway, Kind::Pod, Kind::EndpointSlice] {
        for (requests, answer) in answers {
            let (client, _) = api(away(requests, answer));
            tells(client, kind, &["+a", "synced", "+b", "-a", "synced"]).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_found_at_the_start_is_waited_for() {
    let requests = std::sync::atomic::AtomicUsize::new(0);
    let (client, _) = api(move |path| match path {
        _ if requests.fetch_add(1, Ordering::SeqCst) < 10 => (404, "404 page not found"),
        path if path.contains("sendInitialEvents") => (422, NO_STREAMS),
        path if path.contains("watch=") => (410, EXPIRED),
        _ => (200, ONE),
    });
    tells(client, Kind::AuthorizationPolicy, &["+a"]).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_api_goes_on_not_having_is_gone() {
    let (client, asked) = api(away(usize::MAX - 1, |path| match path.ends_with("/apis") {
        true => (200, OTHERS),
        false => (404, "404 page not found"),
    }));
    tells(client, Kind::Gateway, &["+a", "synced", "-a", "synced"]).await;
    let asked = asked.lock().unwrap();
    assert_eq!(
        asked.iter().filter(|path| path.ends_with("/apis")).count(),
        4,
        "{asked:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_api_that_is_back_and_forgot_where_a_watch_was_is_asked_at_once() {
    let back = Arc::new(std::sync::Mutex::new(None));
    let since = Arc::clone(&back);
    let watches = std::sync::atomic::AtomicUsize::new(0);
    let (client, _) = api(move |path| match path {
        path if path.contains("sendInitialEvents") => (422, NO_STREAMS),
        path if path.contains("watch=") && watches.fetch_add(1, Ordering::SeqCst) < 30 => (500, BROKEN),
        path if path.contains("watch=") => {
            since.lock().unwrap().get_or_insert_with(tokio::time::Instant::now);
            (410, EXPIRED)
        }
        _ if since.lock().unwrap().is_none() => (200, ONE),
        _ => (200, OTHER),
    });
    tells(client, Kind::Gateway, &["+a", "synced", "+b"]).await;
    // Of the clock that stands still: what was waited for on purpose.
    let waited = back.lock().unwrap().unwrap().elapsed();
    assert!(waited < FIRST_WAIT * 3, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn who_may_not_ask_which_kinds_there_are_tries_the_versions() {
    for later in [false, true] {
        let there = Arc::new(std::sync::atomic::AtomicBool::new(!later));
        let comes = Arc::clone(&there);
        let (client, _) = api(move |path| match path {
            path if path.ends_with("/apis") => (403, FORBIDDEN),
            path if !path.contains("/v1beta1/") || !there.load(Ordering::SeqCst) => (404, ABSENT),
            path if path.contains("sendInitialEvents") => (422, NO_STREAMS),
            path if path.contains("watch=") => (200, ""),
            _ => (200, ONE),
        });
        while_following(client, Kind::Gateway, async |told| {
            if later {
                assert_eq!(next(told).await, "synced");
                comes.store(true, Ordering::SeqCst);
            }
            loop {
                match &*next(told).await {
                    "+a" => return,
                    other => assert!(later && other == "synced", "{other}"),
                }
            }
        })
        .await;
    }
}
