//! The headers of a CONNECT, in ztunnel's form and order: `baggage`, `forwarded`, `traceparent`.
//!
//! Receivers use them for telemetry and never for a decision. Values that would break the form are left out.

use std::{fmt::Write as _, net::SocketAddr};

use model::Workload;

/// `k8s.cluster.name=…,k8s.namespace.name=…,k8s.deployment.name=…,service.name=…,service.version=…`; what is empty is
/// left out. <https://www.w3.org/TR/baggage/>, without percent-encoding, as ztunnel has it.
pub(crate) fn baggage(workload: &Workload) -> String {
    let owner = match &*workload.workload_type {
        "deployment" => "k8s.deployment.name",
        "job" => "k8s.job.name",
        "cronjob" => "k8s.cronjob.name",
        _ => "k8s.pod.name",
    };
    let owner_name = if workload.workload_name.is_empty() {
        &workload.name
    } else {
        &workload.workload_name
    };
    let items = [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (owner, owner_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
    ];
    let mut text = String::with_capacity(192);
    for (name, value) in items {
        if value.is_empty() || !value.bytes().all(is_plain) {
            continue;
        }
        let comma = if text.is_empty() { "" } else { "," };
        write!(text, "{comma}{name}={value}").expect("writing to a String does not fail");
    }
    text
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b',' | b';' | b'=' | b'"' | b'\\')
}

/// `for="10.77.0.1:35930";host=server.default.svc.cluster.local`; the host only if a service was dialled.
pub(crate) fn forwarded(client: SocketAddr, host: Option<&str>) -> String {
    match host.filter(|host| host.bytes().all(is_plain)) {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// The `host` of a `forwarded` header, quoted or not.
pub(crate) fn forwarded_host(forwarded: &str) -> Option<&str> {
    let host = forwarded
        .split(';')
        .find_map(|pair| pair.trim().strip_prefix("host="))?
        .trim_matches('"');
    (!host.is_empty() && host.len() <= 253).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_form_that_ztunnel_sends() {
        let workload: Workload = Workload {
            cluster_id: "Kubernetes".into(),
            workload_name: "client".into(),
            workload_type: "deployment".into(),
            canonical_name: "client".into(),
            canonical_revision: "v1".into(),
            ..crate::testing::workload("client", "default", "10.77.0.1")
        };
        assert_eq!(
            baggage(&workload),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client,service.name=client,\
             service.version=v1"
        );
        let client = "10.77.0.1:35930".parse().unwrap();
        let with_host = forwarded(client, Some("server.default.svc.cluster.local"));
        assert_eq!(
            with_host,
            r#"for="10.77.0.1:35930";host=server.default.svc.cluster.local"#
        );
        assert_eq!(forwarded_host(&with_host), Some("server.default.svc.cluster.local"));
        assert_eq!(forwarded(client, None), r#"for="10.77.0.1:35930""#);
        assert_eq!(forwarded_host(r#"for="10.77.0.1:35930""#), None);
    }

    #[test]
    fn what_would_break_a_header_is_left_out() {
        let workload = Workload {
            canonical_name: "a,b=c".into(),
            workload_name: "x\r\ny".into(),
            ..crate::testing::workload("p", "default", "10.77.0.1")
        };
        assert_eq!(
            baggage(&workload),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default"
        );
    }
}
