//! HTTP/1.1 and HTTP/2 without TLS, by hyper; gRPC and WebSocket branch off here.

use std::{convert::Infallible, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::net::TcpStream;

use super::{
    call::CallArgs,
    connect::{Url, connect},
    grpc,
    payload::{Hash, Payload},
    report::{Called, Seen},
    websocket,
};

pub(super) type Body = BoxBody<Bytes, hyper::Error>;

/// A body that is there already.
pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never: Infallible| match never {})
        .boxed()
}

/// Serves a connection to its end.
pub(super) async fn serve(stream: TcpStream, peer: SocketAddr, local: SocketAddr) {
    let service = service_fn(move |request| async move { Ok::<_, Infallible>(answer(request, peer, local).await) });
    let server = auto::Builder::new(TokioExecutor::new());
    // How a connection ends is the peer's business; each request was logged.
    let _ = server
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await;
}

async fn answer(mut request: Request<Incoming>, peer: SocketAddr, local: SocketAddr) -> Response<Body> {
    let version = match request.version() {
        http::Version::HTTP_2 => "http/2",
        http::Version::HTTP_10 => "http/1.0",
        _ => "http/1.1",
    };
    let mut seen = Seen::new(version, peer, local);
    seen.method = Some(request.method().to_string());
    seen.path = request.uri().path_and_query().map(ToString::to_string);
    seen.headers = headers(request.headers());
    if let Some(host) = request.uri().authority() {
        seen.headers.insert(":authority".to_owned(), host.to_string());
    }
    if websocket::is_upgrade(&request) {
        return websocket::accept(&mut request, seen);
    }
    if grpc::is_call(&request) {
        return grpc::answer(request, seen).await;
    }
    let path = request.uri().path().to_owned();
    if path == "/echo" {
        seen.log();
        return Response::new(request.into_body().boxed());
    }
    let mut hash = Hash::new();
    let mut kept = Vec::new();
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        match frame.map(hyper::body::Frame::into_data) {
            Ok(Ok(bytes)) => {
                hash.update(&bytes);
                kept.extend_from_slice(&bytes[..bytes.len().min(4096_usize.saturating_sub(kept.len()))]);
            }
            Ok(Err(_trailers)) => {}
            Err(error) => {
                seen.error = Some(error.to_string());
                break;
            }
        }
    }
    seen.bytes = hash.1;
    if seen.bytes > 0 {
        seen.sha256 = Some(hash.hex());
        seen.body = String::from_utf8(kept).ok().filter(|_| seen.bytes <= 4096);
    }
    seen.log();
    let mut response = Response::new(full(format!("{}\n", seen.json())));
    response
        .headers_mut()
        .insert("content-type", http::HeaderValue::from_static("application/json"));
    let asked = path
        .strip_prefix("/status/")
        .and_then(|code| StatusCode::from_bytes(code.as_bytes()).ok());
    if let Some(status) = asked.filter(|status| status.as_u16() >= 200) {
        *response.status_mut() = status;
    }
    response
}

pub(super) fn headers(headers: &HeaderMap) -> std::collections::BTreeMap<String, String> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers
        .iter()
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect()
}

/// The request that the arguments describe, without a body.
pub(super) fn request(url: &Url, args: &CallArgs, http2: bool) -> Result<http::request::Builder> {
    let has_body = args.body.is_some() || args.bytes.is_some();
    let method = args
        .method
        .clone()
        .unwrap_or_else(|| if has_body { "POST" } else { "GET" }.to_owned());
    let mut builder = Request::builder().method(method.as_str());
    builder = match http2 {
        true => builder.uri(format!("http://{}{}", url.authority, url.path)),
        false => builder.uri(&url.path).header("host", &url.authority),
    };
    for header in &args.header {
        let (name, value) = header
            .split_once(':')
            .with_context(|| format!("{header:?} is not NAME: VALUE"))?;
        builder = builder.header(name.trim(), value.trim());
    }
    Ok(builder.header("user-agent", "undercurrent-app"))
}

/// Calls over HTTP/1.1, or over HTTP/2 with prior knowledge.
pub(super) async fn call(url: &Url, args: &CallArgs, called: &mut Called, http2: bool) -> Result<()> {
    let stream = TokioIo::new(connect(&url.authority, args.timeout(), called).await?);
    let payload = Payload::new(args.body.as_deref(), args.bytes).all();
    let mut sent = Hash::new();
    sent.update(&payload);
    called.bytes_sent = sent.1;
    let request = request(url, args, http2)?
        .body(full(payload))
        .context("the request can't be sent")?;
    let closing;
    let response = if http2 {
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
            .await
            .context("HTTP/2")?;
        closing = tokio::spawn(connection);
        sender.send_request(request).await
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .context("HTTP/1.1")?;
        closing = tokio::spawn(connection);
        sender.send_request(request).await
    };
    let response = response.context("request")?;
    called.status = Some(response.status().as_u16());
    called.headers = headers(response.headers());
    let mut body = response.into_body();
    let mut received = Hash::new();
    let mut kept = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(bytes) = frame.context("the response's body")?.into_data() {
            received.update(&bytes);
            kept.extend_from_slice(&bytes[..bytes.len().min((256_usize << 10).saturating_sub(kept.len()))]);
        }
    }
    end(closing).await;
    called.bytes_received = received.1;
    if args.bytes.is_some() && url.path == "/echo" {
        let matches = received.hex() == sent.hex();
        called.hash_matches = Some(matches);
        ensure!(matches, "what came back is not what was sent");
    } else {
        called.take(&kept);
    }
    let status = called.status.unwrap_or_default();
    ensure!(status < 400, "status {status}");
    Ok(())
}

/// Lets a connection end in good order, once nobody sends on it any more: a process that ends first resets it.
pub(super) async fn end<T>(connection: tokio::task::JoinHandle<T>) {
    // One that a server keeps open is reset after all.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(200), connection).await;
}
