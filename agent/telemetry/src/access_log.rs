//! One line for each connection, when it ends, and if it is wished another when it opens: Istio's names, text or JSON.
//!
//! ```text
//! shard ─ record() ─► buffer (bounded) ─► one writer thread ─► stdout     at most 20 writes a second
//! ```
//! [`AccessLog::record`] never blocks and never waits for the output: what does not fit into the buffer is dropped,
//! counted, and the number is written once there is room (`a_full_buffer_drops_and_says_so`).

mod push;

use std::{
    fmt::Display,
    io::Write,
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{ResponseFlag, TraceId};
use model::{Identity, Workload};
use push::{push_address, push_json, push_number, push_quoted, push_shown, push_timestamp};

/// How a line is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// `time level access connection complete key=value …`
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Which way a connection went, seen from the pod whose agent writes the line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The pod opened it.
    Outbound,
    /// It was opened to the pod.
    Inbound,
}

impl Direction {
    /// `outbound` or `inbound`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// One side of a connection.
#[derive(Clone, Copy, Default)]
pub struct Party<'a> {
    /// Its address, as this agent saw it.
    pub address: Option<SocketAddr>,
    /// Its workload, where it is known.
    pub workload: Option<&'a Workload>,
    /// The identity that it proved, or that was demanded of it.
    pub identity: Option<&'a Identity>,
}

/// A connection that ended, or never came to be.
pub struct ConnectionRecord<'a> {
    /// Which way it went.
    pub direction: Direction,
    /// Who opened it.
    pub source: Party<'a>,
    /// To whom.
    pub destination: Party<'a>,
    /// The CONNECT's target, where it went through a tunnel.
    pub hbone_target: Option<SocketAddr>,
    /// The host name of the service that was dialled.
    pub service: Option<&'a str>,
    /// Bytes that the pod of this agent sent: outbound, from the client; inbound, from the server.
    pub bytes_sent: u64,
    /// Bytes that the pod of this agent received.
    pub bytes_received: u64,
    /// From accept to the end of both directions.
    pub duration: Duration,
    /// What decided that it may, or may not, be.
    pub rule: Option<&'a dyn Display>,
    /// What policies in dry run would have made of it; none where none of them concerns it.
    pub dry_run: Option<&'a dyn Display>,
    /// How it ended, in a word.
    pub flag: ResponseFlag,
    /// The trace that both ends' lines share, where it went through a tunnel.
    pub trace: Option<TraceId>,
    /// What went wrong and whose fault it is; none for a connection that ended well.
    pub error: Option<&'a dyn Display>,
}

/// What happened to the connection that a line is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Event {
    Opened,
    Complete,
}

impl Event {
    fn message(self) -> &'static str {
        match self {
            Self::Opened => "connection opened",
            Self::Complete => "connection complete",
        }
    }
}

/// Where the lines go. Cheap to clone, shared by all shards.
#[derive(Clone)]
pub struct AccessLog {
    shared: Option<Arc<Shared>>,
    format: Format,
    opening: bool,
}

struct Shared {
    state: Mutex<Buffer>,
    wake: Condvar,
    capacity: usize,
    dropped: AtomicU64,
    dropped_total: AtomicU64,
}

#[derive(Default)]
struct Buffer {
    lines: Vec<u8>,
    /// Set while the writer sleeps and needs a wake-up for the next line.
    idle: bool,
    writing: bool,
    closed: bool,
}

const CAPACITY_BYTES: usize = 4 << 20;
const BATCH: Duration = Duration::from_millis(50);

impl AccessLog {
    /// A log that writes nothing and costs nothing.
    pub fn off() -> Self {
        Self {
            shared: None,
            format: Format::Text,
            opening: false,
        }
    }

    /// A log to `out`, by a thread of its own. At most 4 MiB wait; more is dropped and counted.
    pub fn start(out: impl Write + Send + 'static, format: Format) -> std::io::Result<Self> {
        Self::with_capacity(out, format, CAPACITY_BYTES)
    }

    fn with_capacity(out: impl Write + Send + 'static, format: Format, capacity: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(Buffer::default()),
            wake: Condvar::new(),
            capacity,
            dropped: AtomicU64::new(0),
            dropped_total: AtomicU64::new(0),
        });
        let writer = shared.clone();
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || writer.run(out))?;
        Ok(Self {
            shared: Some(shared),
            format,
            opening: false,
        })
    }

    /// Whether anything is written; a caller may spare itself the gathering.
    pub fn is_on(&self) -> bool {
        self.shared.is_some()
    }

    /// With a line for each connection's opening, too.
    pub fn with_opening(mut self, opening: bool) -> Self {
        self.opening = opening;
        self
    }

    /// Whether openings are written.
    pub fn tells_opening(&self) -> bool {
        self.opening && self.is_on()
    }

    /// Takes a line over. Never blocks on the output.
    pub fn record(&self, record: &ConnectionRecord<'_>) {
        self.write(record, Event::Complete);
    }

    /// Takes the line of a connection over that just came to be, if those are wished.
    pub fn opened(&self, record: &ConnectionRecord<'_>) {
        if self.opening {
            self.write(record, Event::Opened);
        }
    }

    fn write(&self, record: &ConnectionRecord<'_>, event: Event) {
        let Some(shared) = &self.shared else { return };
        let now = SystemTime::now();
        let mut line = String::with_capacity(640);
        match self.format {
            Format::Text => write_text(&mut line, now, record, event),
            Format::Json => write_json(&mut line, now, record, event),
        }
        shared.push(line.as_bytes());
    }

    /// How many lines were dropped since the start because the output was too slow.
    pub fn dropped(&self) -> u64 {
        self.shared
            .as_ref()
            .map_or(0, |shared| shared.dropped_total.load(Ordering::Relaxed))
    }

    /// Waits until all lines so far were written, at most this long; nothing is lost at a regular end.
    pub fn flush(&self, at_most: Duration) {
        let Some(shared) = &self.shared else { return };
        let mut state = shared.lock();
        state.closed = true;
        shared.wake.notify_all();
        let unwritten = |state: &mut Buffer| !state.lines.is_empty() || state.writing;
        let (mut state, _) = shared
            .wake
            .wait_timeout_while(state, at_most, unwritten)
            .unwrap_or_else(PoisonError::into_inner);
        state.closed = false;
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Buffer> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.lines.len() + line.len() > self.capacity {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            self.dropped_total.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.lines.extend_from_slice(line);
        if std::mem::take(&mut state.idle) {
            self.wake.notify_all();
        }
    }

    /// Takes what has gathered, writes it, lets more gather for a moment. Ends when no handle is left.
    fn run(self: Arc<Self>, mut out: impl Write) {
        let mut taken = Vec::new();
        while self.take(&mut taken) {
            let lost = self.dropped.swap(0, Ordering::Relaxed);
            if lost > 0 {
                let _ = writeln!(out, "access log: {lost} lines dropped, since the output was too slow");
            }
            // A closed output must not stop the traffic: the lines are lost, as they would be on a full disk.
            let _ = out.write_all(&taken).and_then(|()| out.flush());
            taken.clear();
            let mut state = self.lock();
            state.writing = false;
            self.wake.notify_all();
            let pause = |state: &mut Buffer| !state.closed;
            drop(
                self.wake
                    .wait_timeout_while(state, BATCH, pause)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    fn take(self: &Arc<Self>, taken: &mut Vec<u8>) -> bool {
        let mut state = self.lock();
        while state.lines.is_empty() {
            state.idle = true;
            // Wakes now and then to see whether anybody is left who could write.
            let (woken, _) = self
                .wake
                .wait_timeout(state, Duration::from_secs(5))
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if state.lines.is_empty() && Arc::strong_count(self) == 1 {
                return false;
            }
        }
        state.idle = false;
        state.writing = true;
        std::mem::swap(&mut state.lines, taken);
        true
    }
}

fn write_text(line: &mut String, now: SystemTime, record: &ConnectionRecord<'_>, event: Event) {
    push_timestamp(line, now);
    line.push_str(match record.error {
        Some(_) => "\terror\taccess\t",
        None => "\tinfo\taccess\t",
    });
    line.push_str(event.message());
    let mut separator = '\t';
    each_field(record, event, |name, value| {
        line.push(std::mem::replace(&mut separator, ' '));
        line.push_str(name);
        line.push('=');
        match value {
            Value::Text(text) => push_quoted(line, text),
            Value::Shown(shown) => push_shown(line, shown),
            Value::Address(address) => push_address(line, address),
            Value::Number(number) => push_number(line, number, 1),
        }
    });
    line.push('\n');
}

fn write_json(line: &mut String, now: SystemTime, record: &ConnectionRecord<'_>, event: Event) {
    line.push_str(r#"{"time":""#);
    push_timestamp(line, now);
    line.push_str(match record.error {
        Some(_) => r#"","level":"error","scope":"access","message":""#,
        None => r#"","level":"info","scope":"access","message":""#,
    });
    line.push_str(event.message());
    line.push('"');
    each_field(record, event, |name, value| {
        line.push_str(",\"");
        line.push_str(name);
        line.push_str("\":");
        match value {
            Value::Text(text) => push_json(line, text),
            Value::Shown(shown) => push_json(line, &shown.to_string()),
            Value::Number(number) => push_number(line, number, 1),
            Value::Address(address) => {
                line.push('"');
                push_address(line, address);
                line.push('"');
            }
        }
    });
    line.push_str("}\n");
}

/// A text that may hold anything and is quoted, or a number or address that needs no quotes in text.
enum Value<'a> {
    Text(&'a str),
    /// Text, too.
    Shown(&'a dyn Display),
    Address(SocketAddr),
    Number(u64),
}

/// The names and order of ztunnel's access log; `response_flags`, `trace_id`, `rule` and `dry_run` beside them are ours.
fn each_field(record: &ConnectionRecord<'_>, event: Event, mut field: impl FnMut(&'static str, Value<'_>)) {
    let source = [
        "src.addr",
        "src.workload",
        "src.namespace",
        "src.identity",
        "src.cluster",
    ];
    party(&mut field, source, &record.source);
    if let Some(address) = record.destination.address {
        field("dst.addr", Value::Address(address));
    }
    if let Some(target) = record.hbone_target {
        field("dst.hbone_addr", Value::Address(target));
    }
    if let Some(service) = record.service {
        field("dst.service", Value::Text(service));
    }
    let destination = Party {
        address: None,
        ..record.destination
    };
    party(
        &mut field,
        [
            "dst.addr",
            "dst.workload",
            "dst.namespace",
            "dst.identity",
            "dst.cluster",
        ],
        &destination,
    );
    field("direction", Value::Text(record.direction.as_str()));
    if event == Event::Complete {
        field("bytes_sent", Value::Number(record.bytes_sent));
        field("bytes_recv", Value::Number(record.bytes_received));
        let milliseconds = u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX);
        let mut duration = String::with_capacity(24);
        push_number(&mut duration, milliseconds, 1);
        duration.push_str("ms");
        field("duration", Value::Text(&duration));
        field("response_flags", Value::Text(record.flag.as_str()));
    }
    if let Some(trace) = &record.trace {
        field("trace_id", Value::Shown(trace));
    }
    for (name, shown) in [
        ("rule", record.rule),
        ("dry_run", record.dry_run),
        ("error", record.error),
    ] {
        if let Some(shown) = shown {
            field(name, Value::Shown(shown));
        }
    }
}

fn party(
    field: &mut impl FnMut(&'static str, Value<'_>),
    [addr, workload, namespace, identity, cluster]: [&'static str; 5],
    party: &Party<'_>,
) {
    if let Some(address) = party.address {
        field(addr, Value::Address(address));
    }
    if let Some(known) = party.workload {
        field(workload, Value::Text(&known.name));
        field(namespace, Value::Text(&known.namespace));
    }
    if let Some(known) = party.identity {
        field(identity, Value::Shown(known));
    }
    if let Some(known) = party.workload {
        field(cluster, Value::Text(&known.cluster_id));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Hands each write over and waits to be let go on.
    struct Out(mpsc::SyncSender<Vec<u8>>);

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn record<'a>(identity: &'a Identity, error: Option<&'a dyn Display>) -> ConnectionRecord<'a> {
        ConnectionRecord {
            direction: Direction::Inbound,
            source: Party {
                address: Some("10.0.0.1:4000".parse().unwrap()),
                workload: None,
                identity: Some(identity),
            },
            destination: Party {
                address: Some("10.0.0.2:15008".parse().unwrap()),
                ..Party::default()
            },
            hbone_target: Some("10.0.0.2:80".parse().unwrap()),
            service: Some("web.shop"),
            bytes_sent: 12,
            bytes_received: 34,
            duration: Duration::from_millis(56),
            rule: None,
            dry_run: None,
            flag: ResponseFlag::None,
            trace: TraceId::of_traceparent("00-ec50774d1b7461a33d83204b87ab2156-1801cc63f96add87-00"),
            error,
        }
    }

    fn line(format: Format, error: Option<&dyn Display>) -> String {
        line_of(format, error, Event::Complete)
    }

    fn line_of(format: Format, error: Option<&dyn Display>, event: Event) -> String {
        let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let mut line = String::new();
        let record = record(&identity, error);
        match format {
            Format::Text => write_text(&mut line, SystemTime::UNIX_EPOCH, &record, event),
            Format::Json => write_json(&mut line, SystemTime::UNIX_EPOCH, &record, event),
        }
        line
    }

    #[test]
    fn a_line_has_istios_names() {
        assert_eq!(
            line(Format::Text, None),
            "1970-01-01T00:00:00.000000Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:4000 \
             src.identity=\"spiffe://td/ns/a/sa/b\" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 \
             dst.service=\"web.shop\" direction=\"inbound\" bytes_sent=12 bytes_recv=34 duration=\"56ms\" \
             response_flags=\"-\" trace_id=\"ec50774d1b7461a33d83204b87ab2156\"\n"
        );
        assert_eq!(
            line_of(Format::Text, None, Event::Opened),
            "1970-01-01T00:00:00.000000Z\tinfo\taccess\tconnection opened\tsrc.addr=10.0.0.1:4000 \
             src.identity=\"spiffe://td/ns/a/sa/b\" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 \
             dst.service=\"web.shop\" direction=\"inbound\" trace_id=\"ec50774d1b7461a33d83204b87ab2156\"\n"
        );
    }

    #[test]
    fn nothing_in_a_text_can_forge_a_field_or_a_line() {
        let error: &dyn Display = &"bad\" src.identity=\"x\"\nforged";
        let text = line(Format::Text, Some(error));
        assert!(
            text.ends_with("error=\"bad\\\" src.identity=\\\"x\\\"\\nforged\"\n"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&line(Format::Json, Some(error))).unwrap();
        assert_eq!(json["error"], "bad\" src.identity=\"x\"\nforged");
        assert_eq!(json["bytes_sent"], 12);
    }

    #[test]
    fn a_full_buffer_drops_and_says_so() {
        let (sender, receiver) = mpsc::sync_channel(0);
        let log = AccessLog::with_capacity(Out(sender), Format::Text, 4096).unwrap();
        let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
        for _ in 0..100 {
            log.record(&record(&identity, None));
        }
        assert!(log.dropped() > 0);
        let mut written = String::new();
        while !written.contains("lines dropped") {
            written.push_str(&String::from_utf8(receiver.recv().unwrap()).unwrap());
            log.record(&record(&identity, None));
        }
    }
}
