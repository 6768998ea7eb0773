//! Latencies in buckets that are 1.6 % wide: constant memory, no allocation while measuring.

use std::time::Duration;

const STEPS: usize = 64; // buckets in each power of two
const POWERS: usize = 40; // up to 2^40 ns, 18 minutes; longer ones land in the last bucket

/// Counts of durations by size.
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// An empty one.
    pub fn new() -> Self {
        Histogram {
            counts: vec![0; STEPS * POWERS],
            total: 0,
        }
    }

    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[index(nanos)] += 1;
        self.total += 1;
    }

    /// The upper bound of the bucket in which the `quantile` (0 to 1) lies; zero when nothing was counted.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let rank = ((self.total as f64 * quantile).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper(at));
            }
        }
        Duration::ZERO
    }
}

/// Values below `STEPS` have a bucket each; above, the leading bits choose it.
fn index(nanos: u64) -> usize {
    if nanos < STEPS as u64 {
        return nanos as usize;
    }
    let power = 63 - nanos.leading_zeros() as usize; // at least 6
    let step = (nanos >> (power - 6)) as usize - STEPS;
    ((power - 5) * STEPS + step).min(STEPS * POWERS - 1)
}

fn upper(index: usize) -> u64 {
    if index < STEPS {
        return index as u64;
    }
    let (power, step) = (index / STEPS + 5, index % STEPS);
    ((STEPS + step + 1) as u64) << (power - 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_within_two_percent() {
        let mut histogram = Histogram::new();
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        for (quantile, expected) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let got = histogram.quantile(quantile).as_secs_f64() * 1e6;
            assert!((got / expected - 1.0).abs() < 0.02, "{quantile}: {got} for {expected}");
        }
    }

    #[test]
    fn every_bucket_holds_the_value_that_chose_it() {
        for nanos in (0..100_000).chain([1 << 30, (1 << 39) - 1]) {
            let at = index(nanos);
            assert!(
                nanos <= upper(at) && (at == 0 || nanos + 1 >= upper(at - 1)),
                "{nanos} in bucket {at}"
            );
        }
    }

    #[test]
    fn nothing_counted_is_zero_and_the_longest_fits() {
        assert_eq!(Histogram::new().quantile(0.99), Duration::ZERO);
        let mut histogram = Histogram::new();
        histogram.record(Duration::MAX);
        assert!(histogram.quantile(0.5) > Duration::from_secs(60));
    }
}
