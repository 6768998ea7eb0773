//! Bytes to send, and their hash.

use aws_lc_rs::digest::{Context, SHA256};

/// Bytes that no compression and no confusion of offsets leaves as they are: a xorshift generator.
pub(super) struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        Self(time.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32) | 1)
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// What is sent: given text, or random bytes.
pub(super) enum Payload {
    Text(Vec<u8>, usize),
    Random(Random, u64),
}

impl Payload {
    pub fn new(text: Option<&str>, random: Option<u64>) -> Self {
        match random {
            Some(count) => Self::Random(Random::new(), count),
            None => Self::Text(text.unwrap_or_default().as_bytes().to_vec(), 0),
        }
    }

    /// The next bytes, as many as fit; none at the end.
    pub fn next(&mut self, buffer: &mut [u8]) -> usize {
        match self {
            Self::Text(text, at) => {
                let count = buffer.len().min(text.len() - *at);
                buffer[..count].copy_from_slice(&text[*at..*at + count]);
                *at += count;
                count
            }
            Self::Random(random, left) => {
                let count = buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                random.fill(&mut buffer[..count]);
                *left -= count as u64;
                count
            }
        }
    }

    /// All of it.
    pub fn all(mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = [0; 64 << 10];
        loop {
            match self.next(&mut buffer) {
                0 => return all,
                count => all.extend_from_slice(&buffer[..count]),
            }
        }
    }
}

/// A running SHA-256.
pub(super) struct Hash(Context, pub u64);

impl Hash {
    pub fn new() -> Self {
        Self(Context::new(&SHA256), 0)
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
        self.1 += bytes.len() as u64;
    }

    pub fn hex(self) -> String {
        self.0
            .finish()
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_as_many_bytes_as_asked() {
        assert_eq!(Payload::new(None, Some(100_001)).all().len(), 100_001);
        assert_eq!(Payload::new(Some("abc"), None).all(), b"abc");
        assert_ne!(Payload::new(None, Some(16)).all(), [0; 16]);
    }

    #[test]
    fn the_hash_is_sha256() {
        let mut hash = Hash::new();
        hash.update(b"a");
        hash.update(b"bc");
        assert!(hash.hex().starts_with("ba7816bf"));
    }
}
