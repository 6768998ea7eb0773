//! The serving end. Every connection is a task of its own that ends with its peer, at the latest after
//! [`CONNECTION_LIMIT`]; at most [`CONNECTIONS`] at once.

use std::{convert::Infallible, fs, future::Future, io, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path};
use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use crate::status::{PodAdded, PodChecked, PodRemoved, Status, ValidAttachments};

/// How many connections are served at once; more wait.
const CONNECTIONS: usize = 64;
/// How long one connection may last.
const CONNECTION_LIMIT: Duration = Duration::from_secs(120);
/// How long a peer may take to send a request's header.
const HEADER_LIMIT: Duration = Duration::from_secs(5);
/// How large a request's body may be: the ids of all sandboxes of a node fit.
const BODY_LIMIT: usize = 256 << 10;

/// The answer to a pod event, when it is there.
pub type Answer = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// Whether the process can do its work.
pub trait Health: Send + Sync + 'static {
    /// What is pending; nothing when it is ready.
    fn pending(&self) -> Vec<String>;
}

/// What the socket asks of the agent.
pub trait Agent: Health {
    /// What it is and does.
    fn status(&self) -> Status;
    /// A pod is about to start: resolves once it is captured, or known not to be.
    fn pod_added(&self, event: PodAdded) -> Answer;
    /// A pod is gone.
    fn pod_removed(&self, event: PodRemoved) -> Answer;
    /// Whether a pod is captured, or known not to be.
    fn pod_checked(&self, event: PodChecked) -> Answer;
    /// Pods of other sandboxes than these are gone.
    fn garbage(&self, valid: ValidAttachments) -> Answer;
}

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {at}: {source}")]
pub struct ServeError {
    at: String,
    #[source]
    source: io::Error,
}

/// Serves the local socket until the future is dropped. A socket that a dead agent left behind is replaced.
pub async fn serve_socket(path: &Path, agent: Arc<dyn Agent>) -> Result<Infallible, ServeError> {
    let listener = bind(path).map_err(|source| ServeError {
        at: path.display().to_string(),
        source,
    })?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        let agent = agent.clone();
        start(accepted, &places, move |request| answer(agent.clone(), request)).await;
    }
}

/// Serves `/healthz/ready` for a kubelet until the future is dropped.
pub async fn serve_health(address: SocketAddr, health: Arc<dyn Health>) -> Result<Infallible, ServeError> {
    let listener = TcpListener::bind(address).await.map_err(|source| ServeError {
        at: address.to_string(),
        source,
    })?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        let health = health.clone();
        start(accepted, &places, move |request| {
            let health = health.clone();
            async move {
                match (request.method(), request.uri().path()) {
                    (&Method::GET, "/healthz/ready") => readiness(&health.pending()),
                    _ => text(StatusCode::NOT_FOUND, "not found\n".to_owned()),
                }
            }
        })
        .await;
    }
}

/// The socket is made under another name, restricted to its owner, and then put in its place in one step.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
    fs::rename(&fresh, path)?;
    Ok(listener)
}

async fn start<S, F, Fut>(accepted: io::Result<S>, places: &Arc<Semaphore>, handler: F)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Request<Incoming>) -> Fut + Send + 'static,
    Fut: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let stream = match accepted {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "the admin socket cannot accept a connection");
            return tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let Ok(place) = places.clone().acquire_owned().await else {
        return;
    };
    tokio::spawn(async move {
        let service = service_fn(move |request| {
            let answer = handler(request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_LIMIT)
            .serve_connection(TokioIo::new(stream), service);
        if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIMIT, connection).await {
            tracing::debug!(%error, "admin connection ended");
        }
        drop(place);
    });
}

async fn answer(agent: Arc<dyn Agent>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    match (&head.method, head.uri.path()) {
        (&Method::GET, "/status") => match serde_json::to_string_pretty(&agent.status()) {
            Ok(json) => text(StatusCode::OK, json),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        (&Method::GET, "/healthz/ready") => readiness(&agent.pending()),
        (&Method::POST, "/cmdadd") => tell(body, |event| agent.pod_added(event)).await,
        (&Method::POST, "/cmddel") => tell(body, |event| agent.pod_removed(event)).await,
        (&Method::POST, "/cmdcheck") => tell(body, |event| agent.pod_checked(event)).await,
        (&Method::POST, "/gc") => tell(body, |valid| agent.garbage(valid)).await,
        (method, path) => text(StatusCode::NOT_FOUND, format!("there is no {method} {path} here\n")),
    }
}

async fn tell<T: DeserializeOwned>(body: Incoming, what: impl FnOnce(T) -> Answer) -> Response<Full<Bytes>> {
    match read(body).await {
        Ok(event) => outcome(what(event).await),
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

fn readiness(pending: &[String]) -> Response<Full<Bytes>> {
    if pending.is_empty() {
        return text(StatusCode::OK, "ready\n".to_owned());
    }
    text(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("not ready, pending: {}\n", pending.join(", ")),
    )
}

fn outcome(result: Result<(), String>) -> Response<Full<Bytes>> {
    match result {
        Ok(()) => text(StatusCode::OK, String::new()),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

fn text(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{get, post};

    struct Fake;

    impl Health for Fake {
        fn pending(&self) -> Vec<String> {
            vec!["knowledge".to_owned()]
        }
    }

    impl Agent for Fake {
        fn status(&self) -> Status {
            Status {
                node: "n1".to_owned(),
                ..Status::default()
            }
        }

        fn pod_added(&self, event: PodAdded) -> Answer {
            Box::pin(async move {
                if event.pod_name == "good" {
                    Ok(())
                } else {
                    Err("no such netns".to_owned())
                }
            })
        }

        fn pod_removed(&self, _event: PodRemoved) -> Answer {
            Box::pin(async { Ok(()) })
        }

        fn pod_checked(&self, event: PodChecked) -> Answer {
            Box::pin(async move { Err(format!("{} is not captured", event.pod_name)) })
        }

        fn garbage(&self, valid: ValidAttachments) -> Answer {
            Box::pin(async move { Err(valid.container_ids.join("+")) })
        }
    }

    #[tokio::test]
    async fn what_the_agent_says_is_what_the_client_gets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let serving = path.clone();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let server = tokio::spawn(async move { serve_socket(&serving, Arc::new(Fake)).await });
        let status = loop {
            match get(&path, "/status").await {
                Ok(status) => break status,
                Err(_not_yet) => tokio::task::yield_now().await,
            }
        };
        assert_eq!(serde_json::from_str::<Status>(&status).unwrap().node, "n1");
        let pending = get(&path, "/healthz/ready").await.unwrap_err().to_string();
        assert!(pending.contains("not ready, pending: knowledge"), "{pending}");
        let event = |name: &str| PodAdded {
            netns: "/x".into(),
            pod_name: name.to_owned(),
            pod_namespace: "shop".to_owned(),
            ips: vec![],
            container_id: String::new(),
            pod_uid: String::new(),
        };
        post(&path, "/cmdadd", &event("good")).await.unwrap();
        let refused = post(&path, "/cmdadd", &event("bad")).await.unwrap_err().to_string();
        assert!(refused.contains("no such netns"), "{refused}");
        let valid = ValidAttachments {
            container_ids: vec!["a".to_owned(), "b".to_owned()],
        };
        let dropped = post(&path, "/gc", &valid).await.unwrap_err().to_string();
        assert!(dropped.contains("a+b"), "{dropped}");
        let checked = PodChecked {
            pod_name: "web".to_owned(),
            pod_namespace: "shop".to_owned(),
        };
        let checked = post(&path, "/cmdcheck", &checked).await.unwrap_err().to_string();
        assert!(checked.contains("web is not captured"), "{checked}");
        let garbage = post(&path, "/cmdadd", &7).await.unwrap_err().to_string();
        assert!(garbage.contains("400"), "{garbage}");
        server.abort();
    }
}
