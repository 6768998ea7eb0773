//! W3C trace context of a connection: <https://www.w3.org/TR/trace-context/>.
//!
//! A TCP connection has no context of its own, so the client's agent begins a trace for each and tells its peer in the
//! CONNECT's `traceparent`; both ends' log lines carry its id. Deviation: no `tracestate` is sent, since there is nothing
//! to say in it, and the sampled flag is never set, since no spans are exported.

use std::fmt;

/// The id of a trace; never zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TraceId(u128);

impl TraceId {
    /// A new one.
    pub fn new(high: u64, low: u64) -> Self {
        // Zero is invalid.
        Self((u128::from(high) << 64) | u128::from(low | 1))
    }

    /// `00-<trace id>-<parent id>-00`. The parent is the connection at this end.
    pub fn traceparent(self, parent: u64) -> String {
        format!("00-{self}-{:016x}-00", parent | 1)
    }

    /// The trace of a `traceparent` header, in version 00 or a later one; `None` where it is malformed.
    pub fn of_traceparent(header: &str) -> Option<Self> {
        let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut parts = header.splitn(5, '-');
        let [version, trace, parent, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
        let lengths = [version.len(), trace.len(), parent.len(), flags.len()];
        let more = parts.next().is_some();
        if lengths != [2, 32, 16, 2] || ![version, trace, parent, flags].into_iter().all(is_hex) {
            return None;
        }
        if version == "ff" || (version == "00" && more) || parent == "0000000000000000" {
            return None;
        }
        let id = u128::from_str_radix(trace, 16).ok()?;
        (id != 0).then_some(Self(id))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not by `LowerHex`, which is slow for 128 bits: each connection has its trace written four times.
        let mut text = [0; 32];
        for (digit, place) in text.iter_mut().zip((0..32).rev()) {
            *digit = b"0123456789abcdef"[(self.0 >> (4 * place)) as usize & 15];
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_malformed_is_no_trace() {
        let good = "00-ec50774d1b7461a33d83204b87ab2156-1801cc63f96add87-00";
        assert_eq!(
            TraceId::of_traceparent(good).map(|id| id.to_string()),
            Some("ec50774d1b7461a33d83204b87ab2156".to_owned())
        );
        let later = "01-ec50774d1b7461a33d83204b87ab2156-1801cc63f96add87-01-more";
        assert!(TraceId::of_traceparent(later).is_some());
        for bad in [
            "",
            "00",
            "00-ec50774d1b7461a33d83204b87ab2156-1801cc63f96add87-00-more",
            "ff-ec50774d1b7461a33d83204b87ab2156-1801cc63f96add87-00",
            "00-00000000000000000000000000000000-1801cc63f96add87-00",
            "00-ec50774d1b7461a33d83204b87ab2156-0000000000000000-00",
            "00-EC50774D1B7461A33D83204B87AB2156-1801cc63f96add87-00",
            "00-ec50774d1b7461a33d83204b87ab215-1801cc63f96add870-00",
        ] {
            assert_eq!(TraceId::of_traceparent(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_header_names_its_trace(high: u64, low: u64, parent: u64) {
            let id = TraceId::new(high, low);
            let header = id.traceparent(parent);
            prop_assert_eq!(header.len(), 55);
            prop_assert_eq!(TraceId::of_traceparent(&header), Some(id));
        }

        #[test]
        fn any_header_is_survived(header: String) {
            let _ = TraceId::of_traceparent(&header);
        }
    }
}
