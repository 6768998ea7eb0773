//! The serving end. Every connection is a task of its own that ends with its peer, at the latest after
//! [`CONNECTION_LIMIT`]; at most [`CONNECTIONS`] at once.

use std::{
    convert::Infallible, fs, future::Future, io, net, os::unix::fs::PermissionsExt, path::Path, sync::Arc,
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use crate::{
    agent::{Agent, Health, Scraped},
    listing::Body,
    routes,
};

/// How many connections are served at once; more wait.
const CONNECTIONS: usize = 64;
/// How long one connection may last.
const CONNECTION_LIMIT: Duration = Duration::from_secs(120);
/// How long a peer may take to send a request's header.
const HEADER_LIMIT: Duration = Duration::from_secs(5);

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
    let listener = put_in_place(path, |path| UnixListener::bind(path)).map_err(|source| ServeError {
        at: path.display().to_string(),
        source,
    })?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        let agent = agent.clone();
        start(accepted, &places, move |request| routes::local(agent.clone(), request)).await;
    }
}

/// Opens a nonblocking listener, to be served.
pub fn listen(address: net::SocketAddr) -> Result<net::TcpListener, ServeError> {
    tasks::listen(address).map_err(|source| ServeError {
        at: address.to_string(),
        source,
    })
}

/// Serves what concerns no pod's start on a listener of this machine until the future is dropped. Others than loopback
/// are refused: whoever can ask can end the agent.
pub async fn serve_admin(listener: net::TcpListener, agent: Arc<dyn Agent>) -> Result<Infallible, ServeError> {
    let address = local(&listener)?;
    if !address.ip().is_loopback() {
        return Err(ServeError {
            at: address.to_string(),
            source: io::Error::other(
                "the admin endpoint is for this machine alone: give an address of 127.0.0.0/8 or [::1]",
            ),
        });
    }
    serve_tcp(listener, move |request| routes::admin(agent.clone(), request)).await
}

/// Serves `/healthz/ready` for a kubelet until the future is dropped.
pub async fn serve_health(listener: net::TcpListener, health: Arc<dyn Health>) -> Result<Infallible, ServeError> {
    serve_tcp(listener, move |request| {
        let answer = routes::health(&*health, &request);
        async move { answer }
    })
    .await
}

/// Serves `/stats/prometheus` and `/metrics` until the future is dropped.
pub async fn serve_metrics(listener: net::TcpListener, scraped: Arc<dyn Scraped>) -> Result<Infallible, ServeError> {
    serve_tcp(listener, move |request| routes::metrics(scraped.clone(), request)).await
}

fn local(listener: &net::TcpListener) -> Result<net::SocketAddr, ServeError> {
    listener.local_addr().map_err(|source| ServeError {
        at: "a listener that was handed over".to_owned(),
        source,
    })
}

async fn serve_tcp<F, Fut>(listener: net::TcpListener, handler: F) -> Result<Infallible, ServeError>
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    let address = local(&listener)?;
    let listener = TcpListener::from_std(listener).map_err(|source| ServeError {
        at: address.to_string(),
        source,
    })?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        start(accepted, &places, handler.clone()).await;
    }
}

/// Binds a local socket under another name, restricts it to its owner, and then puts it in its place in one step: whoever
/// was found there before is never missed, and whoever is found is never half made.
pub fn put_in_place<S>(path: &Path, bind: impl FnOnce(&Path) -> io::Result<S>) -> io::Result<S> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = bind(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
    fs::rename(&fresh, path)?;
    Ok(socket)
}

async fn start<S, F, Fut>(accepted: io::Result<S>, places: &Arc<Semaphore>, handler: F)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Request<Incoming>) -> Fut + Send + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Listing, PodAdded, PodChecked, PodRemoved, Reply, Section, Status, ValidAttachments,
        agent::Answer,
        client::{get, post},
        why::{Arrival, Question, Step, Why},
    };

    struct Fake;

    impl Health for Fake {
        fn pending(&self) -> Vec<String> {
            vec!["knowledge".to_owned()]
        }
    }

    impl Scraped for Fake {
        fn scrape(&self, accept: &str) -> Reply<(&'static str, String)> {
            let text = format!("accept {accept}");
            Box::pin(async move { ("text/plain", text) })
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

        fn list(&self, section: Section) -> Reply<Listing> {
            let name = serde_json::json!(section.as_str());
            Box::pin(async move { Listing::Values(Box::new(std::iter::once(name))) })
        }

        fn logging(&self, change: Option<&str>) -> Result<String, String> {
            change.map_or_else(|| Ok("info".to_owned()), |change| Err(format!("{change:?}?")))
        }

        fn why(&self, question: Question) -> Reply<Result<Why, String>> {
            Box::pin(async move { Err(format!("{question:?}")) })
        }

        fn arrival(&self, arrival: Arrival) -> Result<Vec<Step>, String> {
            Err(arrival.workload)
        }

        fn profile(&self, _: Duration) -> Reply<Result<Vec<u8>, String>> {
            Box::pin(async { Err("no".to_owned()) })
        }

        fn heap(&self, _: Duration) -> Reply<Result<Vec<u8>, String>> {
            Box::pin(async { Err("no".to_owned()) })
        }

        fn memory(&self) -> String {
            String::new()
        }

        fn quit(&self) {}
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
