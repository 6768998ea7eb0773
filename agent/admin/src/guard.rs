//! Who may ask over TCP: a process of this machine that means this agent, and no page in a browser on it. A page of another
//! site can make a browser send requests to 127.0.0.1, but not without `Origin` or `Sec-Fetch-Site` where it matters, and
//! one whose name was made to mean 127.0.0.1 (DNS rebinding) sends that name as `Host`.

use hyper::HeaderMap;

/// Why a request is not answered.
pub(crate) fn refuse(headers: &HeaderMap) -> Option<&'static str> {
    let host = headers.get("host").and_then(|host| host.to_str().ok());
    if !host.is_some_and(is_this_machine) {
        return Some("the Host header names another machine: ask 127.0.0.1 or localhost\n");
    }
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    if headers.contains_key("origin") || site.is_some_and(|site| site != b"none" && site != b"same-origin") {
        return Some("asked by a page of another site\n");
    }
    None
}

fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "localhost" | "127.0.0.1" | "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_and_no_page_may_ask() {
        let refused = |headers: &[(&'static str, &'static str)]| {
            let headers = headers.iter().map(|(name, value)| {
                let value = hyper::header::HeaderValue::from_static(value);
                (hyper::header::HeaderName::from_static(name), value)
            });
            refuse(&headers.collect()).is_some()
        };
        for good in ["localhost:15000", "127.0.0.1:15000", "127.0.0.1", "[::1]:15000"] {
            assert!(!refused(&[("host", good)]), "{good}");
        }
        for bad in [
            "rebound.example:15000",
            "localhost.example",
            "127.0.0.1.example",
            "",
            "10.0.0.1",
        ] {
            assert!(refused(&[("host", bad)]), "{bad}");
        }
        assert!(refused(&[]));
        assert!(refused(&[("host", "localhost"), ("origin", "https://site.example")]));
        assert!(refused(&[("host", "localhost"), ("sec-fetch-site", "cross-site")]));
        assert!(!refused(&[("host", "localhost"), ("sec-fetch-site", "none")]));
    }
}
