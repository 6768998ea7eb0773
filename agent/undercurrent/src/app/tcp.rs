//! TCP: bytes both ways, and every way to end.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, tcp::OwnedReadHalf},
};

use super::{
    call::CallArgs,
    connect::{Url, connect},
    payload::{Hash, Payload},
    report::{Called, Seen},
};

/// What a server does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mode {
    Echo,
    Greet,
    Report,
    Farewell,
    Reset,
    Mute,
    Flood,
}

const BUFFER: usize = 64 << 10;

/// Serves a connection to its end, and logs it.
pub(super) async fn serve(stream: TcpStream, peer: SocketAddr, local: SocketAddr, mode: Mode) {
    let mut seen = Seen::new("tcp", peer, local);
    if let Err(error) = speak(stream, mode, &mut seen).await {
        seen.error = Some(error.to_string());
    }
    seen.log();
}

async fn speak(mut stream: TcpStream, mode: Mode, seen: &mut Seen) -> std::io::Result<()> {
    match mode {
        Mode::Echo => echo(&mut stream, seen).await,
        Mode::Greet => {
            stream.write_all(format!("{}\n", seen.json()).as_bytes()).await?;
            echo(&mut stream, seen).await
        }
        Mode::Report => {
            count(&mut stream, seen).await?;
            stream.write_all(seen.json().as_bytes()).await?;
            stream.shutdown().await
        }
        Mode::Farewell => {
            stream.write_all(seen.json().as_bytes()).await?;
            stream.shutdown().await?;
            count(&mut stream, seen).await
        }
        Mode::Reset => {
            seen.bytes = stream.read(&mut [0; 1]).await? as u64;
            reset(stream)
        }
        Mode::Mute => {
            // Until the peer is gone, which the socket tells without being read.
            stream.ready(tokio::io::Interest::ERROR).await.map(drop)
        }
        Mode::Flood => {
            let block = vec![b'.'; BUFFER];
            loop {
                stream.write_all(&block).await?;
                seen.bytes += block.len() as u64;
            }
        }
    }
}

async fn echo(stream: &mut TcpStream, seen: &mut Seen) -> std::io::Result<()> {
    let mut hash = Hash::new();
    let mut buffer = vec![0; BUFFER];
    let result = loop {
        match stream.read(&mut buffer).await {
            Ok(0) => break stream.shutdown().await,
            Ok(count) => {
                hash.update(&buffer[..count]);
                if let Err(error) = stream.write_all(&buffer[..count]).await {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    seen.bytes = hash.1;
    seen.sha256 = Some(hash.hex());
    result
}

async fn count(stream: &mut TcpStream, seen: &mut Seen) -> std::io::Result<()> {
    let mut hash = Hash::new();
    let mut buffer = vec![0; BUFFER];
    let result = loop {
        match stream.read(&mut buffer).await {
            Ok(0) => break Ok(()),
            Ok(count) => hash.update(&buffer[..count]),
            Err(error) => break Err(error),
        }
    };
    seen.bytes = hash.1;
    seen.sha256 = Some(hash.hex());
    result
}

/// Closes with a RST.
fn reset(stream: TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}

/// Calls: sends and receives at once.
pub(super) async fn call(url: &Url, args: &CallArgs, called: &mut Called) -> Result<()> {
    let mut stream = connect(&url.authority, args.timeout(), called).await?;
    if args.server_first {
        let line = read_line(&mut stream, args.timeout()).await?;
        called.bytes_received += line.len() as u64;
        called.take(&line);
    }
    if args.wait_for_end_first {
        let mut first = Vec::new();
        let read = stream.read_to_end(&mut first);
        tokio::time::timeout(args.timeout(), read)
            .await
            .context("no end of the server's data in time")??;
        called.bytes_received += first.len() as u64;
        called.take(&first);
    }
    if args.never_read {
        return never_read(&mut stream, args, called).await;
    }
    // Where nothing is sent, the connection's end is what tells whether there was one.
    let half_close = args.half_close || (args.payload_length() == 0 && args.hold.is_none() && !args.reset);
    let mut payload = Payload::new(args.body.as_deref(), args.bytes);
    let (reader, mut writer) = stream.into_split();
    let expected = (!half_close).then_some(args.payload_length());
    let reading = tokio::spawn(receive(reader, expected, args.bytes.is_some(), args.timeout()));
    let mut sent = Hash::new();
    let mut buffer = vec![0; args.chunk.unwrap_or(BUFFER).max(1)];
    loop {
        let count = payload.next(&mut buffer);
        if count == 0 {
            break;
        }
        sent.update(&buffer[..count]);
        writer.write_all(&buffer[..count]).await.context("send")?;
    }
    called.bytes_sent = sent.1;
    if half_close {
        writer.shutdown().await.context("shut down the sending side")?;
    }
    if args.reset {
        reading.abort();
        let _ = reading.await;
        return socket2::SockRef::from(writer.as_ref())
            .set_linger(Some(Duration::ZERO))
            .context("set SO_LINGER");
    }
    let received = reading.await.context("the reader ended")?;
    called.bytes_received += received.count;
    if received.count > 0 && (args.bytes.is_none() || received.count < BUFFER as u64) {
        called.take(&received.head);
    }
    if let Some(error) = received.error {
        return Err(error);
    }
    if args.bytes.is_some() && !args.wait_for_end_first {
        // An echo has the hash of what was sent; a server in report mode tells the one that it saw.
        let sent = sent.hex();
        let reported = called.server.as_ref().and_then(|seen| seen.sha256.as_ref());
        let matches = received.hash == sent || reported == Some(&sent);
        called.hash_matches = Some(matches);
        if matches {
            called.received = None;
        } else {
            bail!("what came back is not what was sent");
        }
    }
    if let Some(seconds) = args.hold {
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    }
    Ok(())
}

/// Writes without reading until nothing more is taken for a second: what is under way must be bounded.
async fn never_read(stream: &mut TcpStream, args: &CallArgs, called: &mut Called) -> Result<()> {
    let mut payload = Payload::new(args.body.as_deref(), Some(args.bytes.unwrap_or(u64::MAX)));
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = payload.next(&mut buffer);
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match tokio::time::timeout(Duration::from_secs(1), stream.write(rest)).await {
                Ok(written) => {
                    let written = written.context("send")?;
                    called.bytes_sent += written as u64;
                    rest = &rest[written..];
                }
                Err(_) => {
                    tokio::time::sleep(Duration::from_secs_f64(args.hold.unwrap_or(0.0))).await;
                    return Ok(());
                }
            }
        }
        if count == 0 {
            return Ok(());
        }
    }
}

async fn read_line(stream: &mut TcpStream, timeout: Duration) -> Result<Vec<u8>> {
    let read = async {
        let mut line = Vec::new();
        // Byte by byte: what follows the line is not for us.
        while line.last() != Some(&b'\n') && line.len() < BUFFER {
            line.push(stream.read_u8().await.context("the server's first line")?);
        }
        Ok(line)
    };
    tokio::time::timeout(timeout, read)
        .await
        .context("the server does not speak first")?
}

struct Received {
    count: u64,
    hash: String,
    /// The first bytes.
    head: Vec<u8>,
    error: Option<anyhow::Error>,
}

/// Reads as many bytes as are expected, or to the end.
async fn receive(mut reader: OwnedReadHalf, expected: Option<u64>, hashed: bool, idle: Duration) -> Received {
    let mut hash = Hash::new();
    let mut head = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let mut error = None;
    while expected.is_none_or(|expected| hash.1 < expected) {
        match tokio::time::timeout(idle, reader.read(&mut buffer)).await {
            Ok(Ok(0)) if expected.is_some() => {
                error = Some(anyhow::anyhow!("the connection ended after {} bytes", hash.1));
                break;
            }
            Ok(Ok(0)) => break,
            Ok(Ok(count)) => {
                hash.update(&buffer[..count]);
                let room = BUFFER.saturating_sub(head.len()).min(count);
                head.extend_from_slice(&buffer[..room]);
            }
            Ok(Err(failed)) => {
                error = Some(anyhow::Error::new(failed).context("receive"));
                break;
            }
            Err(_) => {
                error = Some(anyhow::anyhow!("nothing came for {} s", idle.as_secs_f32()));
                break;
            }
        }
    }
    Received {
        count: hash.1,
        hash: if hashed { hash.hex() } else { String::new() },
        head,
        error,
    }
}
