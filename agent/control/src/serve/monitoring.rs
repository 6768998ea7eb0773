//! 15014: `/metrics` for Prometheus, `/readyz` and `/healthz` for the kubelet, `/debug/syncz` for people. Read only.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tasks::{DrainMode, DrainSignal};
use tokio::{net::TcpListener, sync::Semaphore};

const CONNECTIONS: usize = 128;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What there is to see.
pub struct Monitoring {
    /// Metrics.
    pub registry: Registry,
    /// Nothing when ready; else what it waits for.
    pub waits_for: Box<dyn Fn() -> Option<String> + Send + Sync>,
    /// Who is connected and has what.
    pub syncz: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
}

/// Serves until drained to the end.
pub async fn serve(listener: TcpListener, monitoring: Arc<Monitoring>, mut drain: DrainSignal) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            _ = drain.reached(DrainMode::Immediate) => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // Over the bound, the connection is closed: whoever scrapes will come again.
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let monitoring = monitoring.clone();
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let answer = answer(&monitoring, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a monitoring connection ended");
            }
        });
    }
}

fn answer<B>(monitoring: &Monitoring, request: &Request<B>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET".into());
    }
    match request.uri().path() {
        "/metrics" | "/stats/prometheus" => metrics(&monitoring.registry),
        "/healthz" | "/livez" => text(StatusCode::OK, "ok\n".into()),
        "/readyz" | "/ready" => match (monitoring.waits_for)() {
            None => text(StatusCode::OK, "ready\n".into()),
            Some(what) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {what}\n")),
        },
        "/debug/syncz" => {
            let json = serde_json::to_vec_pretty(&(monitoring.syncz)()).unwrap_or_default();
            with_type(StatusCode::OK, "application/json", json.into())
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /readyz, /healthz and /debug/syncz\n".into(),
        ),
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut body = String::new();
    match prometheus_client::encoding::text::encode(&mut body, registry) {
        Ok(()) => {
            let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            with_type(StatusCode::OK, format, body.into())
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

fn with_type(status: StatusCode, format: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(format));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_says_what_it_waits_for() {
        let monitoring = Monitoring {
            registry: Registry::default(),
            waits_for: Box::new(|| Some("pods".into())),
            syncz: Box::new(|| serde_json::json!({"clients": []})),
        };
        let ask = |path: &str| {
            answer(&monitoring, &Request::get(path).body(()).unwrap())
                .status()
                .as_u16()
        };
        let statuses = ["/readyz", "/healthz", "/metrics", "/debug/syncz", "/other"].map(ask);
        assert_eq!(statuses, [503, 200, 200, 200, 404]);
        let post = Request::post("/readyz").body(()).unwrap();
        assert_eq!(answer(&monitoring, &post).status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
