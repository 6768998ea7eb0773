//! Where the CPU goes, and what memory is used for.
//!
//! CPU: by samples at SIGPROF for as long as somebody asked, one at a time, in pprof's own form; nothing runs otherwise.
//! Code of libc is not unwound from, since a handler there could wait for a lock that it interrupted.
//!
//! Memory: the C library's allocator keeps no call stacks, so there is no profile of the heap by who allocated; what there is
//! is what the kernel says of the process's memory, by kind.

use std::{collections::HashMap, fs, time::Duration};

use pprof::{ProfilerGuardBuilder, Report};
use prost::Message;

/// Samples in a second of CPU time; not a round number, so that what happens regularly is not hit always or never.
const FREQUENCY: i32 = 99;

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

/// What memory is used for.
pub fn memory() -> String {
    let mut text = String::from(
        "# The kernel's view of the process's memory. The allocator (glibc) keeps no call stacks, so there is no profile of\n\
         # the heap by who allocated.\n",
    );
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

fn encode(report: &Report, during: Duration) -> Profile {
    let mut texts = Texts(vec![String::new()], HashMap::from([(String::new(), 0)]));
    let mut profile = Profile::default();
    let mut known: HashMap<(i64, i64, i64), u64> = HashMap::new();
    let period = 1_000_000_000 / i64::from(FREQUENCY);
    for (stack, count) in &report.data {
        let mut location_id = Vec::new();
        for symbol in stack.frames.iter().flatten() {
            let (name, file) = (texts.index(symbol.name()), texts.index(symbol.filename().into_owned()));
            let line = symbol.lineno().into();
            let next = known.len() as u64 + 1;
            let id = *known.entry((name, file, line)).or_insert(next);
            if id == next {
                profile.function.push(Function {
                    id,
                    name,
                    filename: file,
                });
                let line = vec![Line { function_id: id, line }];
                profile.location.push(Location { id, line });
            }
            location_id.push(id);
        }
        // The thread stands for the root of its stacks.
        let thread = texts.index(stack.thread_name.clone());
        let next = known.len() as u64 + 1;
        let id = *known.entry((thread, 0, 0)).or_insert(next);
        if id == next {
            profile.function.push(Function {
                id,
                name: thread,
                filename: 0,
            });
            let line = vec![Line {
                function_id: id,
                line: 0,
            }];
            profile.location.push(Location { id, line });
        }
        location_id.push(id);
        let count = *count as i64;
        profile.sample.push(Sample {
            location_id,
            value: vec![count, count * period],
        });
    }
    let (samples, count) = (texts.index("samples".to_owned()), texts.index("count".to_owned()));
    let cpu = ValueType {
        kind: texts.index("cpu".to_owned()),
        unit: texts.index("nanoseconds".to_owned()),
    };
    profile.sample_type = vec![
        ValueType {
            kind: samples,
            unit: count,
        },
        cpu.clone(),
    ];
    profile.period_type = Some(cpu);
    profile.period = period;
    profile.duration_nanos = i64::try_from(during.as_nanos()).unwrap_or(i64::MAX);
    profile.string_table = texts.0;
    profile
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

    #[test]
    fn memory_is_described() {
        let text = memory();
        assert!(text.contains("VmRSS:") && text.contains("Anonymous:"), "{text}");
    }
}
