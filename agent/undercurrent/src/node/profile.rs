//! Where the CPU goes, and what memory is used for.
//!
//! CPU: by samples at SIGPROF for as long as somebody asked, one at a time, in pprof's own form; nothing runs otherwise.
//! Code of libc is not unwound from, since a handler there could wait for a lock that it interrupted.
//!
//! The heap: by samples of what is allocated in the same way ([`heap`]), and what is in use of it at the end. And what the
//! kernel says of the process's memory, by kind.

use std::{collections::HashMap, fs, time::Duration};

use pprof::{ProfilerGuardBuilder, Report};
use prost::Message;

/// Samples in a second of CPU time; not a round number, so that what happens regularly is not hit always or never.
const FREQUENCY: i32 = 99;

/// What is in the names of frames that every allocation has, which are among the first of a stack.
const ALLOCATOR: [&str; 4] = ["heap::", "backtrace::", "__rust_", "alloc::alloc::"];
const OWN: usize = 16;

/// Samples the process for a while.
pub async fn cpu(during: Duration) -> Result<Vec<u8>, String> {
    let sampling = ProfilerGuardBuilder::default()
        .frequency(FREQUENCY)
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()
        .map_err(|error| format!("the CPU can't be profiled now (is another profile being taken?): {error}"))?;
    tokio::time::sleep(during).await;
    // Finding the symbols' names takes long, and other things have to go on.
    let written = tokio::task::spawn_blocking(move || {
        let report = sampling.report().build();
        report.map(|report| encode(&report, during).encode_to_vec())
    });
    match written.await {
        Ok(Ok(profile)) => Ok(profile),
        Ok(Err(error)) => Err(format!("the samples can't be read: {error}")),
        Err(error) => Err(format!("the samples can't be read: {error}")),
    }
}

/// Who allocated what, of what was allocated for a while and is in use at its end.
pub async fn heap(during: Duration) -> Result<Vec<u8>, String> {
    let sampling = heap::Sampling::start().ok_or("the heap can't be profiled now: another profile is being taken")?;
    tokio::time::sleep(during).await;
    let written = tokio::task::spawn_blocking(move || {
        let (samples, dropped) = sampling.end();
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "a profile of the heap has not all samples: there were too many"
            );
        }
        encode_heap(samples, during).encode_to_vec()
    });
    written
        .await
        .map_err(|error| format!("the samples can't be read: {error}"))
}

/// What memory is used for.
pub fn memory() -> String {
    let mut text =
        String::from("# The kernel's view of the process's memory; for who allocates, see /debug/pprof/heap.\n");
    for (title, file) in [
        ("status", "/proc/self/status"),
        ("all mappings together", "/proc/self/smaps_rollup"),
    ] {
        let content = fs::read_to_string(file).unwrap_or_else(|error| format!("{file}: {error}\n"));
        let lines = content
            .lines()
            .filter(|line| line.ends_with(" kB") || line.starts_with("Threads"));
        text.push_str(&format!("\n# {title}\n"));
        lines.for_each(|line| text.push_str(&format!("{line}\n")));
    }
    text
}

/// <https://github.com/google/pprof/blob/main/proto/profile.proto>, as far as it is used.
#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

/// Texts, each once; the first is empty, as the format demands.
struct Texts(Vec<String>, HashMap<String, i64>);

impl Texts {
    fn index(&mut self, text: String) -> i64 {
        let next = self.0.len() as i64;
        let index = *self.1.entry(text.clone()).or_insert(next);
        if index == next {
            self.0.push(text);
        }
        index
    }
}

/// A profile as it is put together.
struct Encoder {
    texts: Texts,
    profile: Profile,
    known: HashMap<(i64, i64, i64), u64>,
}

impl Encoder {
    fn new() -> Self {
        Self {
            texts: Texts(vec![String::new()], HashMap::from([(String::new(), 0)])),
            profile: Profile::default(),
            known: HashMap::new(),
        }
    }

    /// The number of a place in the code.
    fn location(&mut self, name: String, file: String, line: i64) -> u64 {
        let (name, filename) = (self.texts.index(name), self.texts.index(file));
        let next = self.known.len() as u64 + 1;
        let id = *self.known.entry((name, filename, line)).or_insert(next);
        if id == next {
            self.profile.function.push(Function { id, name, filename });
            let line = vec![Line { function_id: id, line }];
            self.profile.location.push(Location { id, line });
        }
        id
    }

    fn add(&mut self, location_id: Vec<u64>, first: i64, second: i64) {
        let value = vec![first, second];
        self.profile.sample.push(Sample { location_id, value });
    }

    fn kind(&mut self, kind: &str, unit: &str) -> ValueType {
        ValueType {
            kind: self.texts.index(kind.to_owned()),
            unit: self.texts.index(unit.to_owned()),
        }
    }

    /// With the kinds and units of both values.
    fn finish(mut self, first: (&str, &str), second: (&str, &str), period: i64, during: Duration) -> Profile {
        let (first, second) = (self.kind(first.0, first.1), self.kind(second.0, second.1));
        self.profile.sample_type = vec![first, second.clone()];
        self.profile.period_type = Some(second);
        self.profile.period = period;
        self.profile.duration_nanos = i64::try_from(during.as_nanos()).unwrap_or(i64::MAX);
        self.profile.string_table = self.texts.0;
        self.profile
    }
}

fn encode(report: &Report, during: Duration) -> Profile {
    let mut encoder = Encoder::new();
    let period = 1_000_000_000 / i64::from(FREQUENCY);
    for (stack, count) in &report.data {
        let symbols = stack.frames.iter().flatten();
        let places = symbols.map(|symbol| (symbol.name(), symbol.filename().into_owned(), symbol.lineno().into()));
        // The thread stands for the root of its stacks.
        let places = places.chain([(stack.thread_name.clone(), String::new(), 0)]);
        let locations = places.map(|(name, file, line)| encoder.location(name, file, line));
        let (locations, count) = (locations.collect(), *count as i64);
        encoder.add(locations, count, count * period);
    }
    encoder.finish(("samples", "count"), ("cpu", "nanoseconds"), period, during)
}

/// Samples with the same stack are one; of a stack the allocator's own frames are left out.
fn encode_heap(samples: Vec<heap::Sample>, during: Duration) -> Profile {
    let mut stacks: HashMap<Vec<usize>, (usize, usize)> = HashMap::new();
    for sample in samples {
        let sum = stacks.entry(sample.stack).or_default();
        *sum = (sum.0 + sample.count, sum.1 + sample.bytes);
    }
    let mut encoder = Encoder::new();
    let mut resolved: HashMap<usize, Vec<(bool, u64)>> = HashMap::new();
    for (stack, (count, bytes)) in stacks {
        let mut frames = Vec::with_capacity(stack.len());
        for address in stack {
            let found = resolved.entry(address);
            frames.extend_from_slice(found.or_insert_with(|| resolve(address, &mut encoder)));
        }
        let own = frames.iter().take(OWN).rposition(|(is_allocators, _)| *is_allocators);
        let locations = frames.iter().skip(own.map_or(0, |last| last + 1));
        encoder.add(
            locations.map(|(_, location)| *location).collect(),
            count as i64,
            bytes as i64,
        );
    }
    let period = heap::INTERVAL as i64;
    encoder.finish(("inuse_objects", "count"), ("inuse_space", "bytes"), period, during)
}

/// The places at an address, the innermost first, and whether they are the allocator's.
fn resolve(address: usize, encoder: &mut Encoder) -> Vec<(bool, u64)> {
    let mut found = Vec::new();
    // What is there is where the call returns to.
    let call = address.saturating_sub(1) as *mut std::ffi::c_void;
    backtrace::resolve(call, |symbol| {
        let name = symbol.name().map(|name| format!("{name:#}"));
        let name = name.unwrap_or_else(|| format!("{address:#x}"));
        let file = symbol.filename().map(|file| file.display().to_string());
        let is_allocators = ALLOCATOR.iter().any(|own| name.contains(own));
        let line = symbol.lineno().unwrap_or(0).into();
        found.push((is_allocators, encoder.location(name, file.unwrap_or_default(), line)));
    });
    found
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[inline(never)]
    fn burn(until: &AtomicBool) -> u64 {
        let mut number = 1u64;
        while !until.load(Ordering::Relaxed) {
            number = std::hint::black_box(number.wrapping_mul(6_364_136_223_846_793_005));
        }
        number
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_burns_is_in_the_profile() {
        static DONE: AtomicBool = AtomicBool::new(false);
        let burning = std::thread::spawn(|| burn(&DONE));
        let profile = cpu(Duration::from_millis(300)).await;
        DONE.store(true, Ordering::Relaxed);
        burning.join().unwrap();
        let profile = Profile::decode(profile.unwrap().as_slice()).unwrap();
        assert_eq!(profile.string_table[0], "");
        assert!(
            profile.string_table.iter().any(|text| text.contains("burn")),
            "{:?}",
            profile.string_table
        );
        for sample in &profile.sample {
            assert!(
                sample
                    .location_id
                    .iter()
                    .all(|id| profile.location.iter().any(|location| location.id == *id))
            );
        }
    }

    #[inline(never)]
    fn hoard() -> Vec<Vec<u8>> {
        (0..100)
            .map(|_| std::hint::black_box(vec![1; heap::INTERVAL]))
            .collect()
    }

    #[test]
    fn what_was_hoarded_is_in_the_profile_under_its_name() {
        let sampling = heap::Sampling::start().unwrap();
        let hoarded = hoard();
        let (samples, _) = sampling.end();
        drop(hoarded);
        let profile = encode_heap(samples, Duration::from_secs(1));
        let is_hoard = |function: &&Function| profile.string_table[function.name as usize].ends_with("hoard");
        let places: Vec<u64> = profile.function.iter().filter(is_hoard).map(|one| one.id).collect();
        let of_hoard = |sample: &&Sample| sample.location_id.iter().any(|id| places.contains(id));
        let samples = profile.sample.iter().filter(of_hoard);
        let bytes: i64 = samples.map(|sample| sample.value[1]).sum();
        assert!(
            bytes >= 100 * heap::INTERVAL as i64,
            "{bytes}: {:?}",
            profile.string_table
        );
    }

    #[test]
    fn memory_is_described() {
        let text = memory();
        assert!(text.contains("VmRSS:") && text.contains("Anonymous:"), "{text}");
    }
}
