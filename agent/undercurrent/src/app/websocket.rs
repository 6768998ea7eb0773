//! WebSocket (RFC 6455), as far as an echo needs it: whole messages, no extensions.

use anyhow::{Context, Result, bail, ensure};
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    call::CallArgs,
    connect::{Url, connect},
    http::{Body, full, headers, request},
    payload::Payload,
    report::{Called, Seen},
};

const LARGEST: u64 = 64 << 20;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Whether a request asks for a WebSocket.
pub(super) fn is_upgrade(request: &Request<Incoming>) -> bool {
    let asked = request.headers().get(header::UPGRADE);
    asked.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Accepts it: the first message is a report, after that each comes back.
pub(super) fn accept(request: &mut Request<Incoming>, mut seen: Seen) -> Response<Body> {
    let Some(key) = request.headers().get(header::SEC_WEBSOCKET_KEY).cloned() else {
        let mut response = Response::new(full("Sec-WebSocket-Key is missing\n"));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return response;
    };
    "websocket".clone_into(&mut seen.protocol);
    let upgrading = upgrade::on(request);
    tokio::spawn(async move {
        let result = async {
            let mut stream = TokioIo::new(upgrading.await?);
            write(&mut stream, 1, seen.json().as_bytes(), None).await?;
            echo(&mut stream, &mut seen).await
        };
        if let Err(error) = result.await {
            seen.error = Some(format!("{error:#}"));
        }
        seen.log();
    });
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let own = response.headers_mut();
    own.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    own.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Ok(proof) = HeaderValue::from_str(&proof(key.as_bytes())) {
        own.insert(header::SEC_WEBSOCKET_ACCEPT, proof);
    }
    response
}

async fn echo(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), seen: &mut Seen) -> Result<()> {
    loop {
        let (kind, message) = read(stream).await?;
        match kind {
            CLOSE => return write(stream, CLOSE, &message, None).await,
            PING => write(stream, PONG, &message, None).await?,
            PONG => {}
            _ => {
                seen.bytes += message.len() as u64;
                write(stream, kind, &message, None).await?;
            }
        }
    }
}

/// Calls: opens one, sends a message, takes it back, closes.
pub(super) async fn call(url: &Url, args: &CallArgs, called: &mut Called) -> Result<()> {
    let stream = TokioIo::new(connect(&url.authority, args.timeout(), called).await?);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
        .await
        .context("HTTP/1.1")?;
    tokio::spawn(connection.with_upgrades());
    let mut nonce = [0; 16];
    super::payload::Random::new().fill(&mut nonce);
    let key = base64(&nonce);
    let request = request(url, &args.without_body(), false)?
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key)
        .body(full(""))
        .context("the request can't be sent")?;
    let response = sender.send_request(request).await.context("request")?;
    called.status = Some(response.status().as_u16());
    called.headers = headers(response.headers());
    ensure!(
        response.status() == StatusCode::SWITCHING_PROTOCOLS,
        "status {}",
        response.status()
    );
    let given = response
        .headers()
        .get(header::SEC_WEBSOCKET_ACCEPT)
        .map(|value| value.as_bytes().to_vec());
    ensure!(
        given == Some(proof(key.as_bytes()).into_bytes()),
        "the server's proof is wrong"
    );
    let mut stream = TokioIo::new(upgrade::on(response).await.context("upgrade")?);
    let (_, report) = read(&mut stream).await?;
    called.take(&report);
    let payload = Payload::new(args.body.as_deref(), args.bytes).all();
    write(&mut stream, BINARY, &payload, Some(nonce[..4].try_into()?)).await?;
    called.bytes_sent = payload.len() as u64;
    let (_, echoed) = read(&mut stream).await?;
    called.bytes_received = echoed.len() as u64;
    called.hash_matches = Some(echoed == payload);
    write(&mut stream, CLOSE, &1000_u16.to_be_bytes(), Some([0; 4])).await?;
    ensure!(echoed == payload, "what came back is not what was sent");
    Ok(())
}

async fn write(stream: &mut (impl AsyncWrite + Unpin), kind: u8, message: &[u8], mask: Option<[u8; 4]>) -> Result<()> {
    let masked = if mask.is_some() { 0x80 } else { 0 };
    let mut frame = vec![0x80 | kind];
    match message.len() {
        length @ ..126 => frame.push(masked | length as u8),
        length @ 126..=0xffff => {
            frame.push(masked | 126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(masked | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    let mask = mask.unwrap_or_default();
    if masked != 0 {
        frame.extend_from_slice(&mask);
    }
    frame.extend(message.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    stream.write_all(&frame).await.context("send")?;
    stream.flush().await.context("send")
}

/// A whole message: its kind and content.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<(u8, Vec<u8>)> {
    let (mut kind, mut message) = (0, Vec::new());
    loop {
        let (first, second) = (stream.read_u8().await?, stream.read_u8().await?);
        let length = match second & 0x7f {
            126 => u64::from(stream.read_u16().await?),
            127 => stream.read_u64().await?,
            short => u64::from(short),
        };
        if length + message.len() as u64 > LARGEST {
            bail!("the message is too long");
        }
        let mut mask = [0; 4];
        if second & 0x80 != 0 {
            stream.read_exact(&mut mask).await?;
        }
        let at = message.len();
        message.resize(at + usize::try_from(length)?, 0);
        stream.read_exact(&mut message[at..]).await?;
        for (byte, mask) in message[at..].iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        // A continuation has kind 0.
        if first & 0x0f != 0 {
            kind = first & 0x0f;
        }
        if first & 0x80 != 0 {
            return Ok((kind, message));
        }
    }
}

fn proof(key: &[u8]) -> String {
    let salted = [key, b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    base64(digest(&SHA1_FOR_LEGACY_USE_ONLY, &salted).as_ref())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for index in 0..4 {
            let digit = (bits >> (18 - 6 * index)) & 0x3f;
            text.push(if index <= chunk.len() {
                char::from(DIGITS[digit as usize])
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proof_is_that_of_the_rfc() {
        assert_eq!(proof(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn base64_is_padded() {
        let of = |text: &str| base64(text.as_bytes());
        assert_eq!(
            [of(""), of("f"), of("fo"), of("foo"), of("foob")],
            ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]
        );
    }

    #[tokio::test]
    async fn a_message_reads_back() {
        for length in [0, 125, 126, 70_000] {
            let mut bytes = Vec::new();
            write(&mut bytes, BINARY, &vec![3; length], Some([1, 2, 3, 4]))
                .await
                .unwrap();
            assert_eq!(read(&mut &bytes[..]).await.unwrap(), (BINARY, vec![3; length]));
        }
    }
}
