//! Why a CONNECT was denied, from the agent that denied it to the log of the one that asked.
//!
//! A header of ours on a refusal: other peers neither send nor read it. It goes to a peer that proved who it is, and from there
//! into a log, never to an application. What comes is not believed to be more than text: it is short and printable, or left out
//! (`only_short_printable_text_passes`).

use http::{HeaderName, HeaderValue};

pub(crate) const HEADER: HeaderName = HeaderName::from_static("x-undercurrent-denied");

/// The longest reason, in bytes.
pub const LONGEST_REASON: usize = 512;

pub(crate) fn to_header(reason: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(reason)
        .ok()
        .filter(|value| from_header(value).is_some())
}

pub(crate) fn from_header(value: &HeaderValue) -> Option<&str> {
    let text = value.to_str().ok()?;
    let is_printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    (is_printable && !text.is_empty() && text.len() <= LONGEST_REASON).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_short_printable_text_passes() {
        let passed = |text: &str| to_header(text).and_then(|value| from_header(&value).map(str::to_owned));
        assert_eq!(passed("denied by x").as_deref(), Some("denied by x"));
        for bad in ["", "a\nb", "a\tb", "\u{e9}", &"x".repeat(LONGEST_REASON + 1)] {
            assert_eq!(passed(bad), None, "{bad:?}");
        }
        assert_eq!(from_header(&HeaderValue::from_bytes(b"a\xffb").unwrap()), None);
    }
}
