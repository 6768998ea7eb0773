//! What is answered to which request.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde::de::DeserializeOwned;

use crate::{
    agent::{ASK_AGAIN, Agent, Health, Reply, Scraped, Section},
    guard,
    listing::Body,
    why::{Arrival, Question},
};

/// How large a request's body may be: the ids of all sandboxes of a node fit.
const BODY_LIMIT: usize = 256 << 10;
/// How long a profile takes where nothing is said, and at most.
const PROFILE: Duration = Duration::from_secs(10);
const LONGEST_PROFILE: u64 = 60;

const INDEX: &str = "\
undercurrent's admin endpoint\n
GET  /config_dump                 everything the agent knows, in ztunnel's form
GET  /workloads /services /policies /certificates /connections /capture
GET  /status                      what the agent is and does
GET  /logging                     what is logged
POST /logging?level=debug         log this from now on; per part: level=info,l4=debug
POST /logging?reset               log what the agent was started with
POST /why, /why/arrival           what would become of a connection, and why
GET  /stats/prometheus, /metrics  counters
GET  /debug/pprof/profile?seconds=10  where the CPU goes (pprof)
GET  /debug/pprof/heap?seconds=10     who allocated what, of what was allocated then and is in use after it (pprof)
GET  /memory                      what memory is used for, as the kernel sees it
GET  /healthz/ready               ready, or what is pending
POST /quitquitquit                end the agent, as SIGTERM does
";

/// Over the local socket, which only root can open.
pub(crate) async fn local(agent: Arc<dyn Agent>, request: Request<Incoming>) -> Response<Body> {
    if request.method() != Method::POST {
        return common(agent, request).await;
    }
    match request.uri().path() {
        "/cmdadd" => tell(request.into_body(), |event| agent.pod_added(event)).await,
        "/cmddel" => tell(request.into_body(), |event| agent.pod_removed(event)).await,
        "/cmdcheck" => tell(request.into_body(), |event| agent.pod_checked(event)).await,
        "/gc" => tell(request.into_body(), |valid| agent.garbage(valid)).await,
        _ => common(agent, request).await,
    }
}

/// Over TCP on loopback.
pub(crate) async fn admin(agent: Arc<dyn Agent>, request: Request<Incoming>) -> Response<Body> {
    match guard::refuse(request.headers()) {
        Some(why) => text(StatusCode::FORBIDDEN, why),
        None => common(agent, request).await,
    }
}

async fn common(agent: Arc<dyn Agent>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
    let is_get = matches!(head.method, Method::GET);
    let section = Section::ALL
        .into_iter()
        .find(|section| path.strip_prefix('/') == Some(section.as_str()));
    if let (true, Some(section)) = (is_get, section) {
        return json(agent.list(section).await.into_body());
    }
    match (&head.method, path) {
        (&Method::GET, "/") => text(StatusCode::OK, INDEX),
        (&Method::GET, "/status") => match serde_json::to_string_pretty(&agent.status()) {
            Ok(status) => json(full(status)),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        (&Method::GET, "/healthz/ready") => readiness(&agent.pending()),
        (&Method::GET, "/stats/prometheus" | "/metrics") => scrape(&*agent, &head.headers).await,
        (&Method::GET, "/logging") => logging(agent.logging(None)),
        (&Method::POST, "/logging") => logging(agent.logging(level(query).as_deref())),
        (&Method::POST, "/why") => match read::<Question>(body).await {
            Ok(question) => match agent.why(question).await {
                Ok(why) => json(full(serde_json::to_string(&why).unwrap_or_default())),
                Err(error) => text(StatusCode::NOT_FOUND, error),
            },
            Err(error) => text(StatusCode::BAD_REQUEST, error),
        },
        (&Method::POST, "/why/arrival") => match read::<Arrival>(body).await {
            Ok(arrival) => match agent.arrival(arrival) {
                Ok(steps) => json(full(serde_json::to_string(&steps).unwrap_or_default())),
                Err(error) => text(StatusCode::NOT_FOUND, error),
            },
            Err(error) => text(StatusCode::BAD_REQUEST, error),
        },
        (&Method::GET, "/debug/pprof/profile") => profile(query, |during| agent.profile(during)).await,
        (&Method::GET, "/debug/pprof/heap") => profile(query, |during| agent.heap(during)).await,
        (&Method::GET, "/memory") => text(StatusCode::OK, agent.memory()),
        (&Method::POST, "/quitquitquit") => {
            agent.quit();
            text(StatusCode::OK, "shutdown now\n")
        }
        (method, _) if method != Method::GET && method != Method::POST => text(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET, and POST for what changes something\n",
        ),
        (&Method::GET, "/quitquitquit" | "/why") | (&Method::POST, "/status" | "/config_dump") => text(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("not by {}: see GET /\n", head.method),
        ),
        (method, path) => text(StatusCode::NOT_FOUND, format!("there is no {method} {path} here\n")),
    }
}

pub(crate) fn health<B>(health: &dyn Health, request: &Request<B>) -> Response<Body> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz/ready") => readiness(&health.pending()),
        _ => text(StatusCode::NOT_FOUND, "not found\n"),
    }
}

pub(crate) async fn metrics(scraped: Arc<dyn Scraped>, request: Request<Incoming>) -> Response<Body> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/stats/prometheus" | "/metrics") => scrape(&*scraped, request.headers()).await,
        _ => text(StatusCode::NOT_FOUND, "there are /stats/prometheus and /metrics\n"),
    }
}

async fn scrape<S: Scraped + ?Sized>(scraped: &S, headers: &hyper::HeaderMap) -> Response<Body> {
    let accept = headers.get("accept").and_then(|accept| accept.to_str().ok());
    let (kind, metrics) = scraped.scrape(accept.unwrap_or_default()).await;
    with_type(full(metrics), kind)
}

/// What `?level=` says; nothing for `?reset`.
fn level(query: &str) -> Option<String> {
    let value = |pair: &str| Some(pair.strip_prefix("level=")?.replace("%2C", ",").replace("%3D", "="));
    match query.split('&').find_map(value) {
        Some(level) => Some(level),
        None => query
            .split('&')
            .any(|word| word == "reset" || word == "reset=true")
            .then(String::new),
    }
}

fn logging(level: Result<String, String>) -> Response<Body> {
    match level {
        Ok(level) => text(StatusCode::OK, format!("current log level is {level}\n")),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

async fn profile(query: &str, taken: impl FnOnce(Duration) -> Reply<Result<Vec<u8>, String>>) -> Response<Body> {
    let seconds = query.split('&').find_map(|pair| pair.strip_prefix("seconds="));
    let during = match seconds.map(str::parse::<u64>) {
        None => PROFILE,
        Some(Ok(seconds)) if (1..=LONGEST_PROFILE).contains(&seconds) => Duration::from_secs(seconds),
        Some(_) => {
            let words = format!("seconds: a whole number from 1 to {LONGEST_PROFILE}\n");
            return text(StatusCode::BAD_REQUEST, words);
        }
    };
    match taken(during).await {
        Ok(profile) => with_type(full(profile), "application/octet-stream"),
        Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    }
}

async fn tell<T: DeserializeOwned>(body: Incoming, what: impl FnOnce(T) -> crate::agent::Answer) -> Response<Body> {
    match read(body).await {
        Ok(event) => match what(event).await {
            Ok(()) => text(StatusCode::OK, ""),
            Err(error) if error == ASK_AGAIN => text(StatusCode::SERVICE_UNAVAILABLE, error),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
        Err(error) => text(StatusCode::BAD_REQUEST, error),
    }
}

async fn read<T: DeserializeOwned>(body: Incoming) -> Result<T, String> {
    let body = Limited::new(body, BODY_LIMIT)
        .collect()
        .await
        .map_err(|error| error.to_string())?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| format!("the request's body can't be used: {error}\n"))
}

fn readiness(pending: &[String]) -> Response<Body> {
    if pending.is_empty() {
        return text(StatusCode::OK, "ready\n");
    }
    let words = format!("not ready, pending: {}\n", pending.join(", "));
    text(StatusCode::INTERNAL_SERVER_ERROR, words)
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

fn text(status: StatusCode, words: impl Into<Bytes>) -> Response<Body> {
    let mut response = with_type(full(words), "text/plain; charset=utf-8");
    *response.status_mut() = status;
    response
}

fn json(body: Body) -> Response<Body> {
    with_type(body, "application/json")
}

fn with_type(body: Body, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
