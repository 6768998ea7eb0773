//! The client's measurements.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream as BlockingStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::Serialize;

use crate::histogram::Histogram;
use crate::wire::{HELLO, Kind, MAX_MESSAGE};
use crate::{Run, Sizes};

/// What [`bulk`] measured.
#[derive(Serialize)]
pub struct Bulk {
    /// Bytes that the server confirmed.
    pub bytes: u64,
    /// From the first byte to the last confirmation.
    pub seconds: f64,
}

/// What [`requests`] measured.
#[derive(Serialize)]
pub struct Requests {
    /// Requests answered in full.
    pub count: u64,
    /// Connections that failed.
    pub failed: u64,
    /// From the first to the last.
    pub seconds: f64,
    /// Half of them took no longer, microseconds.
    pub p50_us: f64,
    /// 99 of 100 took no longer, microseconds.
    pub p99_us: f64,
}

/// Longest wait for any progress at all: a path that lost a byte must not hang the benchmark.
const STALL: Duration = Duration::from_secs(10);
/// Failed connections in a row after which there is nothing to measure.
const TOO_MANY_FAILURES: u64 = 1000;

/// Uploads on `streams` connections until the time is over, and returns what arrived.
pub fn bulk(run: &Run, streams: usize) -> anyhow::Result<Bulk> {
    const WRITES: usize = 8; // in a row before the next stream gets its turn
    let payload = vec![0x5a; 128 * 1024];
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(64);
    let mut open = Vec::new();
    for at in 0..streams {
        let mut stream = connect_now(run)?;
        stream.write_all(&Kind::Upload.encode())?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        poll.registry().register(&mut stream, Token(at), Interest::WRITABLE)?;
        open.push(stream);
    }
    let start = Instant::now();
    let (mut ready, mut sent): (VecDeque<usize>, u64) = ((0..streams).collect(), 0);
    while start.elapsed() < run.duration() {
        let timeout = if ready.is_empty() { STALL } else { Duration::ZERO };
        poll_once(&mut poll, &mut events, timeout)?;
        if ready.is_empty() && events.is_empty() {
            bail!("nothing was taken for {STALL:?} after {sent} bytes");
        }
        for event in &events {
            if !ready.contains(&event.token().0) {
                ready.push_back(event.token().0);
            }
        }
        for _ in 0..ready.len() {
            let Some(at) = ready.pop_front() else { break };
            let mut blocked = false;
            for _ in 0..WRITES {
                match open[at].write(&payload) {
                    Ok(wrote) => sent += wrote as u64,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        blocked = true;
                        break;
                    }
                    Err(error) => return Err(error).context("upload"),
                }
            }
            if !blocked {
                ready.push_back(at);
            }
        }
    }
    let bytes = confirm(open)?;
    if bytes != sent {
        bail!("{sent} bytes sent, {bytes} arrived");
    }
    Ok(Bulk {
        bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Ends the uploads, and adds up the server's counts.
fn confirm(open: Vec<TcpStream>) -> anyhow::Result<u64> {
    for stream in &open {
        stream.shutdown(Shutdown::Write)?;
    }
    let mut bytes = 0;
    for stream in open {
        let mut stream = BlockingStream::from(stream);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STALL))?;
        let mut count = [0; 8];
        stream.read_exact(&mut count).context("the server's count of bytes")?;
        bytes += u64::from_be_bytes(count);
    }
    Ok(bytes)
}

struct Asker {
    stream: TcpStream,
    since: Instant,
    have: usize,
    asked: bool,
}

/// One request in flight on each of `concurrency` connections; with `fresh`, each on a connection of its own.
pub fn requests(run: &Run, concurrency: usize, sizes: Sizes, fresh: bool) -> anyhow::Result<Requests> {
    let mut requester = Requester::new(sizes, fresh)?;
    let start = Instant::now();
    let mut askers = Vec::new();
    for at in 0..concurrency {
        askers.push(requester.connect(run, at)?);
    }
    let mut events = Events::with_capacity(1024);
    while start.elapsed() < run.duration() && requester.count < run.limit {
        poll_once(&mut requester.poll, &mut events, STALL)?;
        if events.is_empty() {
            bail!("no answer for {STALL:?} after {} requests", requester.count);
        }
        for event in &events {
            let at = event.token().0;
            match requester.turn(&mut askers[at]) {
                Ok(false) => {}
                Ok(true) => askers[at] = requester.connect(run, at)?,
                Err(error) => {
                    requester.failed += 1;
                    if requester.failed > TOO_MANY_FAILURES {
                        return Err(error).context("too many connections failed, the last");
                    }
                    askers[at] = requester.connect(run, at)?;
                }
            }
        }
    }
    Ok(answered(requester.count, requester.failed, start, &requester.times))
}

/// Requests on one kept-alive connection, with a pause before each.
pub fn unhurried(run: &Run, pause: Duration, sizes: Sizes) -> anyhow::Result<Requests> {
    let first = first_request(sizes, false);
    let mut stream = connect_now(run)?;
    stream.set_read_timeout(Some(STALL))?;
    let mut answer = vec![0; sizes.response as usize];
    stream.write_all(&first)?;
    stream.read_exact(&mut answer).context("the first answer")?;
    let (mut times, mut count) = (Histogram::new(), 0u64);
    let start = Instant::now();
    while start.elapsed() < run.duration() && count < run.limit {
        std::thread::sleep(pause);
        // When this process wakes is its own affair.
        let since = Instant::now();
        stream.write_all(&first[HELLO..])?;
        stream.read_exact(&mut answer).context("an answer")?;
        times.record(since.elapsed());
        count += 1;
    }
    Ok(answered(count, 0, start, &times))
}

/// What [`sip`] did.
#[derive(Serialize)]
pub struct Sipped {
    /// Bytes that were read.
    pub bytes: u64,
    /// From the first to the last.
    pub seconds: f64,
}

/// On each of so many connections there is always more to read than fits on the way, and every millisecond a little of it is
/// read.
pub fn sip(run: &Run, connections: usize) -> anyhow::Result<Sipped> {
    const SIP: usize = 1024;
    const AHEAD: usize = 256; // responses: 16 MiB, more than the buffers on the way take
    let sizes = Sizes {
        request: 1,
        response: MAX_MESSAGE,
    };
    let mut first = first_request(sizes, false);
    first.resize(HELLO + AHEAD, 0x5a);
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = connect_now(run)?;
        stream.write_all(&first)?;
        stream.set_nonblocking(true)?;
        open.push((stream, 0));
    }
    let start = Instant::now();
    let (mut bytes, mut buffer) = (0, [0; SIP]);
    while start.elapsed() < run.duration() {
        for (stream, have) in &mut open {
            match stream.read(&mut buffer) {
                Ok(0) => bail!("a connection ended after {have} bytes"),
                Ok(read) => {
                    (*have, bytes) = (*have + read, bytes + read as u64);
                    if *have >= MAX_MESSAGE as usize {
                        *have -= MAX_MESSAGE as usize;
                        stream.write_all(&first[HELLO..=HELLO])?;
                    }
                }
                Err(error) if waits(&error) => {}
                Err(error) => return Err(error).context("read"),
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Sipped {
        bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// What opens a connection of requests, with the first of them.
fn first_request(sizes: Sizes, fresh: bool) -> Vec<u8> {
    let hello = Kind::Requests {
        request: sizes.request,
        response: sizes.response,
        close: fresh,
    };
    let mut first = hello.encode().to_vec();
    first.resize(HELLO + sizes.request as usize, 0x5a);
    first
}

fn answered(count: u64, failed: u64, start: Instant, times: &Histogram) -> Requests {
    let micros = |quantile| times.quantile(quantile).as_secs_f64() * 1e6;
    Requests {
        count,
        failed,
        seconds: start.elapsed().as_secs_f64(),
        p50_us: micros(0.5),
        p99_us: micros(0.99),
    }
}

struct Requester {
    poll: Poll,
    first: Vec<u8>,
    response: usize,
    fresh: bool,
    times: Histogram,
    count: u64,
    failed: u64,
    buffer: Vec<u8>,
}

impl Requester {
    fn new(sizes: Sizes, fresh: bool) -> anyhow::Result<Self> {
        Ok(Requester {
            poll: Poll::new()?,
            first: first_request(sizes, fresh),
            response: sizes.response as usize,
            fresh,
            times: Histogram::new(),
            count: 0,
            failed: 0,
            buffer: vec![0; 128 * 1024],
        })
    }

    fn connect(&self, run: &Run, at: usize) -> anyhow::Result<Asker> {
        let since = Instant::now();
        let mut stream = TcpStream::connect(run.target).with_context(|| format!("connect to {}", run.target))?;
        stream.set_nodelay(true)?;
        self.poll
            .registry()
            .register(&mut stream, Token(at), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Asker {
            stream,
            since,
            have: 0,
            asked: false,
        })
    }

    /// Goes on with one connection; true when it is over and another shall take its place.
    fn turn(&mut self, asker: &mut Asker) -> io::Result<bool> {
        if !asker.asked {
            match asker.stream.write(&self.first) {
                Ok(wrote) if wrote == self.first.len() => asker.asked = true,
                Ok(_) => return Err(io::Error::other("a new socket took only a part of the first request")),
                Err(error) if waits(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        loop {
            let read = match asker.stream.read(&mut self.buffer) {
                Ok(0) if self.fresh && asker.have == self.response => return Ok(true),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => read,
                Err(error) if waits(&error) => return Ok(false),
                Err(error) => return Err(error),
            };
            asker.have += read;
            if asker.have == self.response {
                self.count += 1;
                let now = Instant::now();
                self.times.record(now - asker.since);
                if !self.fresh {
                    asker.since = now;
                    asker.have = 0;
                    asker.stream.write_all(&self.first[HELLO..])?;
                    return Ok(false); // the answer raises a new event
                }
            } else if asker.have > self.response {
                return Err(io::Error::other("more bytes than asked for"));
            }
        }
    }
}

fn waits(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected | io::ErrorKind::Interrupted
    )
}

/// Opens `count` connections, each proved by one request, says so, and holds them until stdin ends or time is over.
pub fn idle(run: &Run, count: usize) -> anyhow::Result<()> {
    let sizes = Sizes {
        request: 128,
        response: 128,
    };
    let first = first_request(sizes, false);
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = connect_now(run)?;
        stream.set_read_timeout(Some(STALL))?;
        stream.write_all(&first)?;
        let mut answer = [0; 128];
        stream
            .read_exact(&mut answer)
            .with_context(|| format!("connection {}", held.len()))?;
        held.push(stream);
    }
    println!("{{\"held\":{}}}", held.len());
    let limit = run.duration();
    // The process ends when the time is over, whatever stdin does.
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        std::process::exit(0);
    });
    let mut rest = [0; 64];
    while matches!(io::stdin().read(&mut rest), Ok(1..)) {}
    Ok(())
}

fn connect_now(run: &Run) -> anyhow::Result<BlockingStream> {
    let stream =
        BlockingStream::connect_timeout(&run.target, STALL).with_context(|| format!("connect to {}", run.target))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn poll_once(poll: &mut Poll, events: &mut Events, timeout: Duration) -> io::Result<()> {
    loop {
        match poll.poll(events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
