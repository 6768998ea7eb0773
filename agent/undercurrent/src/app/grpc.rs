//! gRPC, as far as an echo needs it: one message there, one back, by hand on HTTP/2.
//!
//! The message is `message Echo { bytes payload = 1; string seen = 2; }`; `seen` is the server's report. Framing:
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::{
    call::CallArgs,
    connect::{Url, connect},
    http::{Body, end, full, headers},
    payload::Payload,
    report::{Called, Seen},
};

const LARGEST: usize = 64 << 20;

/// Whether a request is a gRPC call.
pub(super) fn is_call(request: &Request<Incoming>) -> bool {
    let kind = request.headers().get("content-type");
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Answers a call with its own message.
pub(super) async fn answer(request: Request<Incoming>, mut seen: Seen) -> Response<Body> {
    "grpc".clone_into(&mut seen.protocol);
    let read = http_body_util::Limited::new(request.into_body(), LARGEST)
        .collect()
        .await;
    let message = read
        .map_err(|error| error.to_string())
        .and_then(|body| unframe(body.to_bytes()).map_err(|error| error.to_string()));
    let payload = message.map(|message| field(&message, 1).unwrap_or_default());
    let (frames, status) = match payload {
        Ok(payload) => {
            seen.bytes = payload.len() as u64;
            seen.log();
            let mut message = encode(1, &payload);
            message.extend_from_slice(&encode(2, seen.json().as_bytes()));
            (vec![Frame::data(frame(&message))], "0")
        }
        Err(why) => {
            seen.error = Some(why);
            seen.log();
            (Vec::new(), "13")
        }
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let frames = frames.into_iter().chain([Frame::trailers(trailers)]).map(Ok);
    let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed());
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

/// Calls: `grpc://host:port[/package.Service/Method]`.
pub(super) async fn call(url: &Url, args: &CallArgs, called: &mut Called) -> Result<()> {
    let stream = TokioIo::new(connect(&url.authority, args.timeout(), called).await?);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
        .await
        .context("HTTP/2")?;
    let closing = tokio::spawn(connection);
    let payload = Payload::new(args.body.as_deref(), args.bytes).all();
    let path = if url.path == "/" {
        "/undercurrent.app.Echo/Echo"
    } else {
        &url.path
    };
    let request = Request::builder()
        .method("POST")
        .uri(format!("http://{}{path}", url.authority))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(full(frame(&encode(1, &payload))))
        .context("the request can't be sent")?;
    let response = sender.send_request(request).await.context("request")?;
    called.bytes_sent = payload.len() as u64;
    called.status = Some(response.status().as_u16());
    called.headers = headers(response.headers());
    let body = response.into_body().collect().await.context("the response's body")?;
    drop(sender);
    end(closing).await;
    let status = body
        .trailers()
        .or(None)
        .and_then(|trailers| trailers.get("grpc-status"))
        .cloned();
    let status = status.map(|status| String::from_utf8_lossy(status.as_bytes()).into_owned());
    let status = status.or_else(|| called.headers.get("grpc-status").cloned());
    ensure!(
        status.as_deref() == Some("0"),
        "grpc-status {}",
        status.as_deref().unwrap_or("missing")
    );
    let message = unframe(body.to_bytes())?;
    let echoed = field(&message, 1).unwrap_or_default();
    called.bytes_received = echoed.len() as u64;
    called.hash_matches = Some(echoed == payload);
    if let Some(seen) = field(&message, 2) {
        called.take(&seen);
    }
    ensure!(echoed == payload, "what came back is not what was sent");
    Ok(())
}

fn frame(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

fn unframe(mut bytes: Bytes) -> Result<Bytes> {
    ensure!(bytes.len() >= 5, "no message");
    ensure!(bytes.get_u8() == 0, "a compressed message");
    let length = bytes.get_u32() as usize;
    ensure!(bytes.len() >= length, "the message is cut short");
    Ok(bytes.slice(..length))
}

fn encode(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut message = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        message.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    message.push(length as u8);
    message.extend_from_slice(bytes);
    message
}

/// A length-delimited field of a message; none if it is not there or the message is malformed.
fn field(message: &[u8], number: u64) -> Option<Vec<u8>> {
    let mut rest = message;
    let varint = |rest: &mut &[u8]| -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, tail) = rest.split_first().context("cut short")?;
            *rest = tail;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Ok(value);
            }
        }
        bail!("too long")
    };
    while !rest.is_empty() {
        let key = varint(&mut rest).ok()?;
        match key & 7 {
            0 => drop(varint(&mut rest).ok()?),
            1 => rest = rest.get(8..)?,
            5 => rest = rest.get(4..)?,
            2 => {
                let length = usize::try_from(varint(&mut rest).ok()?).ok()?;
                let value = rest.get(..length)?;
                if key >> 3 == number {
                    return Some(value.to_vec());
                }
                rest = &rest[length..];
            }
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_reads_back() {
        for length in [0, 1, 127, 128, 70_000] {
            let payload = vec![7; length];
            let mut message = encode(1, &payload);
            message.extend(encode(2, b"seen"));
            let message = unframe(frame(&message)).unwrap();
            assert_eq!(field(&message, 1).unwrap(), payload);
            assert_eq!(field(&message, 2).unwrap(), b"seen");
            assert_eq!(field(&message, 3), None);
        }
    }

    #[test]
    fn malformed_messages_are_refused() {
        assert!(unframe(Bytes::from_static(&[0, 0, 0, 0, 9, 1])).is_err());
        assert!(unframe(Bytes::from_static(&[1, 0, 0, 0, 0])).is_err());
        for bad in [&[0x0a, 0xff][..], &[0x0a, 5, 1], &[0xff; 11], &[0x0b], &[0x09, 1]] {
            assert_eq!(field(bad, 1), None);
        }
    }
}
