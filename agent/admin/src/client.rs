//! The asking end.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;

/// How long an agent may take to answer; capturing a pod is the longest it does.
const TIMEOUT: Duration = Duration::from_secs(60);
const ANSWER_LIMIT: usize = 64 << 20;

/// Why there is no answer, or what the refusal says.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers at {path}: {why}{}", what_to_do(.why), path = .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        why: io::Error,
    },
    /// The agent said no.
    #[error("the agent answers {status}: {text}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// Why.
        text: String,
    },
    /// The connection broke.
    #[error("the agent's answer broke off: {0}")]
    Broken(String),
    /// Nothing came in time.
    #[error("the agent at {path} did not answer within {} s", .after.as_secs(), path = .path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
}

impl ClientError {
    /// Whether the agent is about to be back, or followed by another, so that asking again may be answered.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken(_) => true,
            Self::Refused { status, .. } => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout { .. } => false,
        }
    }
}

fn what_to_do(why: &io::Error) -> &'static str {
    match why.kind() {
        io::ErrorKind::PermissionDenied => "; only root may ask it",
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => "; it does not run",
        _ => "",
    }
}

/// `GET` from the agent behind this socket; the text of the answer.
pub async fn get(socket: &Path, path: &str) -> Result<String, ClientError> {
    within(TIMEOUT, socket, path, None::<&()>).await
}

/// `POST` a value as JSON.
pub async fn post(socket: &Path, path: &str, value: &impl Serialize) -> Result<String, ClientError> {
    within(TIMEOUT, socket, path, Some(value)).await
}

/// `POST` where there is a value, else `GET`, and no longer than `limit`.
pub async fn within(
    limit: Duration,
    socket: &Path,
    path: &str,
    value: Option<&impl Serialize>,
) -> Result<String, ClientError> {
    let exchange = match value.map(serde_json::to_vec).transpose() {
        Ok(Some(body)) => exchange(socket, Method::POST, path, body.into()),
        Ok(None) => exchange(socket, Method::GET, path, Bytes::new()),
        Err(error) => return Err(ClientError::Broken(error.to_string())),
    };
    let timeout = |_elapsed| ClientError::Timeout {
        path: socket.to_owned(),
        after: limit,
    };
    tokio::time::timeout(limit, exchange).await.map_err(timeout)?
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Bytes) -> Result<String, ClientError> {
    let stream = UnixStream::connect(socket).await.map_err(|why| ClientError::Connect {
        path: socket.to_owned(),
        why,
    })?;
    let broken = |error: &dyn std::fmt::Display| ClientError::Broken(error.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broken(&error))?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "agent")
        .body(Full::new(body))
        .map_err(|error| broken(&error))?;
    let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
    let status = response.status();
    let text = Limited::new(response.into_body(), ANSWER_LIMIT)
        .collect()
        .await
        .map_err(|error| broken(&error))?
        .to_bytes();
    driver.abort();
    let text = String::from_utf8_lossy(&text).into_owned();
    if status.is_success() {
        Ok(text)
    } else {
        Err(ClientError::Refused {
            status,
            text: text.trim_end().to_owned(),
        })
    }
}
