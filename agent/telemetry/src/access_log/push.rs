//! The values of a line, written without `fmt` where that is most of what a line costs: it was a third of the instructions
//! that an agent spends on a short connection.
//!
//! Whatever is written is byte by byte what `Display` and `{:?}` would write (`values_are_written_as_std_writes_them`).

use std::{
    cell::RefCell,
    fmt::{Display, Write as _},
    net::SocketAddr,
    time::SystemTime,
};

use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};

const TO_THE_SECOND: &[BorrowedFormatItem<'_>] = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]");

thread_local! {
    /// The second that was written last, and how.
    static SECOND: RefCell<(i64, String)> = const { RefCell::new((i64::MIN, String::new())) };
}

/// As RFC 3339, with microseconds.
pub(super) fn push_timestamp(line: &mut String, now: SystemTime) {
    let now = OffsetDateTime::from(now);
    SECOND.with_borrow_mut(|(second, written)| {
        if *second != now.unix_timestamp() {
            *second = now.unix_timestamp();
            *written = now.format(TO_THE_SECOND).unwrap_or_else(|_| "-".to_owned());
        }
        line.push_str(written);
    });
    line.push('.');
    push_number(line, now.microsecond().into(), 6);
    line.push('Z');
}

/// In decimal, with at least so many digits.
pub(super) fn push_number(line: &mut String, mut number: u64, digits: usize) {
    let mut text = [b'0'; 20];
    let mut start = text.len();
    while number > 0 {
        start -= 1;
        text[start] = b'0' + (number % 10) as u8;
        number /= 10;
    }
    start = start.min(text.len() - digits);
    line.push_str(std::str::from_utf8(&text[start..]).unwrap_or_default());
}

pub(super) fn push_address(line: &mut String, address: SocketAddr) {
    let SocketAddr::V4(address) = address else {
        write_shown(line, &address);
        return;
    };
    for (octet, after) in address.ip().octets().into_iter().zip([".", ".", ".", ":"]) {
        push_number(line, octet.into(), 1);
        line.push_str(after);
    }
    push_number(line, address.port().into(), 1);
}

/// As `{:?}` of a text: quoted and escaped, so that nothing in a name can forge a field or a line.
pub(super) fn push_quoted(line: &mut String, text: &str) {
    if !is_plain(text) {
        return write_escaped(line, text);
    }
    line.push('"');
    line.push_str(text);
    line.push('"');
}

/// The same of what has no text yet.
pub(super) fn push_shown(line: &mut String, shown: &dyn Display) {
    let start = line.len();
    line.push('"');
    write_shown(line, shown);
    if is_plain(&line[start + 1..]) {
        return line.push('"');
    }
    let text = line.split_off(start + 1);
    line.truncate(start);
    write_escaped(line, &text);
}

/// As a JSON string.
pub(super) fn push_json(line: &mut String, text: &str) {
    match is_plain(text) {
        true => push_quoted(line, text),
        // A text is always a JSON string.
        false => line.push_str(&serde_json::to_string(text).unwrap_or_default()),
    }
}

/// Whether nothing in it has to be escaped, neither here nor in JSON.
fn is_plain(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\'))
}

fn write_shown(line: &mut String, shown: &dyn Display) {
    write!(line, "{shown}").expect("writing to a String does not fail");
}

fn write_escaped(line: &mut String, text: &str) {
    write!(line, "{text:?}").expect("writing to a String does not fail");
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, time::Duration};

    use proptest::prelude::*;

    use super::*;

    fn written(push: impl FnOnce(&mut String)) -> String {
        let mut line = "before".to_owned();
        push(&mut line);
        line.split_off("before".len())
    }

    proptest! {
        #[test]
        fn values_are_written_as_std_writes_them(
            text in any::<String>(),
            ascii in "[ -~]*",
            number: u64,
            ip: IpAddr,
            port: u16,
        ) {
            for text in [text, ascii] {
                prop_assert_eq!(written(|line| push_quoted(line, &text)), format!("{text:?}"));
                prop_assert_eq!(written(|line| push_shown(line, &text)), format!("{text:?}"));
                let json: String = serde_json::from_str(&written(|line| push_json(line, &text))).unwrap();
                prop_assert_eq!(json, text);
            }
            prop_assert_eq!(written(|line| push_number(line, number, 1)), number.to_string());
            let address = SocketAddr::new(ip, port);
            prop_assert_eq!(written(|line| push_address(line, address)), address.to_string());
        }

        #[test]
        fn times_are_written_as_the_format_says(seconds in 0..4_000_000_000_u64, micros in 0..1_000_000_u64) {
            const WHOLE: &[BorrowedFormatItem<'_>] =
                format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros);
            let expected = OffsetDateTime::from(now).format(WHOLE).unwrap();
            // The second time by what was kept of the first.
            for _ in 0..2 {
                prop_assert_eq!(written(|line| push_timestamp(line, now)), expected.clone());
            }
        }
    }
}
