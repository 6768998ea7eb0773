//! The serving end. Every connection is a task of its own that ends with its peer, at the latest after some time; there is a
//! number of them at once. Over the local socket, which is root's, more wait. Over TCP whoever comes is served, and the
//! source with the most loses its oldest ([`tasks::Places`]): any pod can open a connection to readiness and metrics, and
//! must not keep others from them (`readiness_is_answered_while_strangers_say_nothing`,
//! `who_does_not_read_holds_few_pages_and_no_scraper_up`).

use std::{
    convert::Infallible, fs, future::Future, io, net, os::unix::fs::PermissionsExt, path::Path, sync::Arc,
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tasks::Places;
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

/// How many connections are served at once, and how long one may last.
#[derive(Clone, Copy)]
struct Terms {
    places: usize,
    limit: Duration,
    /// Whether more than one request may come by a connection.
    keep_alive: bool,
}

const TERMS: Terms = Terms {
    places: 64,
    limit: Duration::from_secs(120),
    keep_alive: true,
};
/// A probe is one question, and its answer a line.
const HEALTH: Terms = Terms {
    limit: Duration::from_secs(5),
    keep_alive: false,
    ..TERMS
};
/// Who does not read holds a page, 20 MB at the most ([`Scraped::scrape`]).
const METRICS: Terms = Terms { places: 8, ..TERMS };
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
    let places = Arc::new(Semaphore::new(TERMS.places));
    loop {
        let Some((stream, _)) = accepted(listener.accept().await).await else {
            continue;
        };
        // Never closed.
        let place = places.clone().acquire_owned().await;
        let agent = agent.clone();
        let connection = serve(stream, TERMS, move |request| routes::local(agent.clone(), request));
        tokio::spawn(async move {
            connection.await;
            drop(place);
        });
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
    serve_tcp(listener, TERMS, move |request| routes::admin(agent.clone(), request)).await
}

/// Serves `/healthz/ready` for a kubelet until the future is dropped.
pub async fn serve_health(listener: net::TcpListener, health: Arc<dyn Health>) -> Result<Infallible, ServeError> {
    serve_tcp(listener, HEALTH, move |request| {
        let answer = routes::health(&*health, &request);
        async move { answer }
    })
    .await
}

/// Serves `/stats/prometheus` and `/metrics` until the future is dropped. One page is made at a time.
pub async fn serve_metrics(listener: net::TcpListener, scraped: Arc<dyn Scraped>) -> Result<Infallible, ServeError> {
    let turns = Arc::new(Semaphore::new(1));
    serve_tcp(listener, METRICS, move |request| {
        let (scraped, turns) = (scraped.clone(), turns.clone());
        async move {
            let _turn = turns.acquire().await;
            routes::metrics(scraped, request).await
        }
    })
    .await
}

fn local(listener: &net::TcpListener) -> Result<net::SocketAddr, ServeError> {
    listener.local_addr().map_err(|source| ServeError {
        at: "a listener that was handed over".to_owned(),
        source,
    })
}

async fn serve_tcp<F, Fut>(listener: net::TcpListener, terms: Terms, handler: F) -> Result<Infallible, ServeError>
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    let address = local(&listener)?;
    let listener = TcpListener::from_std(listener).map_err(|source| ServeError {
        at: address.to_string(),
        source,
    })?;
    let mut places = Places::new(terms.places);
    loop {
        let Some((stream, peer)) = accepted(listener.accept().await).await else {
            continue;
        };
        let task = tokio::spawn(serve(stream, terms, handler.clone()));
        if let Some(source) = places.enter(peer.ip().to_canonical(), task.abort_handle()) {
            tracing::debug!(%address, %source, "too many connections: the source with the most lost its oldest");
        }
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

/// What was accepted. Where that failed, it says so and waits a little.
async fn accepted<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "the admin socket cannot accept a connection");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

/// Serves one connection to its end.
async fn serve<S, F, Fut>(stream: S, terms: Terms, handler: F)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Request<Incoming>) -> Fut + Send + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = handler(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .keep_alive(terms.keep_alive)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(terms.limit, connection).await {
        tracing::debug!(%error, "admin connection ended");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpSocket, TcpStream},
    };

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

    /// Time stands still until it is dropped: tokio's paused clock goes on by itself only while nothing blocks.
    struct Still(#[expect(dead_code, reason = "dropping it ends it")] std::sync::mpsc::Sender<()>);

    impl Still {
        fn stand() -> Self {
            tokio::time::pause();
            let (end, ended) = std::sync::mpsc::channel();
            tokio::task::spawn_blocking(move || ended.recv());
            Self(end)
        }
    }

    async fn dial(from: &str, to: net::SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(net::SocketAddr::new(from.parse().unwrap(), 0)).unwrap();
        socket.connect(to).await.unwrap()
    }

    async fn ask(from: &str, to: net::SocketAddr, path: &str) -> TcpStream {
        let mut stream = dial(from, to).await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: n1\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// What comes until the other end closes.
    async fn all(mut stream: TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    fn is_open(stream: &TcpStream) -> bool {
        matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    const STRANGER: &str = "127.0.0.2";
    const KUBELET: &str = "127.0.0.3";

    #[tokio::test]
    async fn readiness_is_answered_while_strangers_say_nothing() {
        let _still = Still::stand();
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve_health(listener, Arc::new(Fake)));
        let mut silent = Vec::new();
        for _ in 0..64 {
            silent.push(dial(STRANGER, address).await);
        }
        for _ in 0..2 {
            let answer = all(ask(KUBELET, address, "/healthz/ready").await).await;
            assert!(answer.contains("not ready, pending: knowledge"), "{answer}");
            // Its place is free again.
            assert!(answer.contains("connection: close"), "{answer}");
        }
        assert_eq!(silent.iter().filter(|stream| is_open(stream)).count(), 63);
        server.abort();
    }

    /// More than the buffers of two sockets hold.
    const PAGE: usize = 32 << 20;

    /// How many pages are being made, and were at the most.
    #[derive(Clone, Default)]
    struct Large(Arc<[AtomicUsize; 2]>);

    impl Scraped for Large {
        fn scrape(&self, _accept: &str) -> Reply<(&'static str, String)> {
            let Self(counts) = self.clone();
            Box::pin(async move {
                let made = counts[0].fetch_add(1, SeqCst) + 1;
                counts[1].fetch_max(made, SeqCst);
                tokio::task::yield_now().await;
                counts[0].fetch_sub(1, SeqCst);
                ("text/plain", "x".repeat(PAGE))
            })
        }
    }

    /// Whether the whole page comes.
    async fn page_comes(mut stream: TcpStream) -> bool {
        let (mut read, mut buffer) = (0, vec![0; 1 << 20]);
        while read < PAGE {
            match stream.read(&mut buffer).await {
                Ok(1..) if read == 0 && !buffer.starts_with(b"HTTP/1.1 200") => return false,
                Ok(0) | Err(_) => return false,
                Ok(more) => read += more,
            }
        }
        true
    }

    #[tokio::test]
    async fn who_does_not_read_holds_few_pages_and_no_scraper_up() {
        let _still = Still::stand();
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let large = Large::default();
        let server = tokio::spawn(serve_metrics(listener, Arc::new(large.clone())));
        let mut deaf = Vec::new();
        for _ in 0..64 {
            deaf.push(ask(STRANGER, address, "/metrics").await);
        }
        assert!(page_comes(ask(KUBELET, address, "/metrics").await).await);
        let mut held = 0;
        for stream in deaf {
            held += usize::from(page_comes(stream).await);
        }
        assert!(held < METRICS.places, "{held}");
        assert_eq!(large.0[1].load(SeqCst), 1);
        server.abort();
    }
}
