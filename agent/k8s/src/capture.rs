//! How a pod is captured: the annotations that say so, and whether they may.
//!
//! What exempts a pod from the mesh needs somebody else's permission, since whoever writes a pod could exempt it: the
//! annotation [`PERMISSION`] of its namespace, else what the node's agent allows everywhere. Without permission, and where
//! a value can't be read, the pod is captured wholly, and a problem says so
//! (`a_value_that_cannot_be_read_excludes_nothing`, `what_is_not_allowed_is_not_done`).
//!
//! Istio's sidecars read the same values (`tools/istio-iptables`); its ambient mode ignores them. Deviations: the
//! permission, which also holds for `bypass-inbound-capture`; and that a bad value spoils all exclusions of its pod.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;
use model::{Exclusions, PodSettings};

use crate::Metadata;

/// On a namespace: which exclusions its pods may ask for: `all`, `none`, `inbound`, `outbound`, or several with commas.
pub const PERMISSION: &str = "undercurrent.io/traffic-exclusions";

const EXCLUDE_RANGES: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";
const INCLUDE_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
const EXCLUDE_OUTBOUND_PORTS: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
/// On a pod: ports of its own that plaintext reaches past the mesh.
pub const EXCLUDE_INBOUND_PORTS: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
/// On a pod: plaintext reaches every port past the mesh.
pub const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";

/// The most ranges, or ports, of one annotation.
const AT_MOST: usize = 64;
/// The most interfaces.
const INTERFACES: usize = 16;
/// The agent's own ports in a pod: outbound, inbound, HBONE, DNS.
const OURS: [u16; 4] = [15001, 15006, 15008, 15053];

/// Which exclusions are allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permission {
    /// Connections that pods open.
    pub outbound: bool,
    /// Connections to pods.
    pub inbound: bool,
}

impl FromStr for Permission {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut permission = Self::default();
        for word in text.split(',').map(str::trim) {
            match word {
                "all" => (permission.outbound, permission.inbound) = (true, true),
                "none" => {}
                "outbound" => permission.outbound = true,
                "inbound" => permission.inbound = true,
                other => return Err(format!("{other:?} is none of all, none, inbound, outbound")),
            }
        }
        Ok(permission)
    }
}

/// How a pod is to be captured, and what of its annotations is not done, and why. `everywhere` is what is allowed where
/// the namespace says nothing. `forbid_non_tcp` is not decided here.
pub fn capture_of(pod: &Metadata, namespace: Option<&Metadata>, everywhere: Permission) -> (PodSettings, Vec<String>) {
    let mut problems = Vec::new();
    let bypass_inbound = flag(pod, BYPASS_INBOUND, &mut problems).unwrap_or_default();
    let mut settings = PodSettings {
        dns_capture: flag(pod, DNS_CAPTURE, &mut problems),
        virtual_interfaces: interfaces(pod, &mut problems),
        ..PodSettings::default()
    };
    let asked = match exclusions(pod) {
        Ok(asked) => asked,
        Err(problem) => {
            problems.push(format!("{problem}: nothing is excluded, the pod is captured wholly"));
            Exclusions::default()
        }
    };
    if asked.is_empty() && !bypass_inbound {
        return (settings, problems);
    }
    let granted = namespace.and_then(|metadata| metadata.annotations.get(PERMISSION));
    let permission = granted.map_or(Ok(everywhere), |text| text.parse());
    let permission = permission.unwrap_or_else(|problem| {
        problems.push(format!(
            "the namespace's annotation {PERMISSION}: {problem}; nothing is allowed"
        ));
        Permission::default()
    });
    let mut refuse = |what: &str, word: &str| {
        problems.push(format!(
            "{what} not allowed, and ignored: it takes the annotation {PERMISSION}: {word} on the namespace, or \
             --allow-exclusions {word} on the node's agent"
        ));
    };
    if permission.outbound {
        settings.exclusions = Exclusions {
            inbound_ports: Vec::new(),
            ..asked.clone()
        };
    } else if (Exclusions {
        inbound_ports: Vec::new(),
        ..asked.clone()
    }) != Exclusions::default()
    {
        refuse("excluding outbound traffic is", "outbound");
    }
    if permission.inbound {
        settings.exclusions.inbound_ports = asked.inbound_ports;
        settings.bypass_inbound = bypass_inbound;
    } else if bypass_inbound || !asked.inbound_ports.is_empty() {
        refuse("excluding inbound traffic is", "inbound");
    }
    (settings, problems)
}

fn flag(pod: &Metadata, name: &str, problems: &mut Vec<String>) -> Option<bool> {
    let text = pod.annotations.get(name)?;
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "t" => Some(true),
        "false" | "0" | "f" => Some(false),
        _ => {
            problems.push(format!("{name}: {text:?} is neither true nor false, and ignored"));
            None
        }
    }
}

fn interfaces(pod: &Metadata, problems: &mut Vec<String>) -> Vec<String> {
    let text = pod.annotations.get(VIRTUAL_INTERFACES).map_or("", String::as_str);
    let mut names: Vec<String> = words(text).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    let bad = names.iter().find(|name| !is_interface(name));
    let problem = match bad {
        Some(name) => format!("{name:?} is not the name of a virtual interface"),
        None if names.len() > INTERFACES => format!("more than {INTERFACES} interfaces"),
        None => return names,
    };
    problems.push(format!("{VIRTUAL_INTERFACES}: {problem}; nothing is rerouted"));
    Vec::new()
}

/// A name that the kernel takes and iptables does not read as a pattern; not the loopback device.
fn is_interface(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@');
    (1..16).contains(&name.len())
        && name.chars().all(allowed)
        && !matches!(name, "." | ".." | "lo")
        && !name.starts_with('-')
}

fn exclusions(pod: &Metadata) -> Result<Exclusions, String> {
    let value = |name: &str| pod.annotations.get(name).map(String::as_str);
    let only = value(INCLUDE_RANGES).filter(|text| !words(text).any(|word| word == "*"));
    let ports = |name: &'static str| match value(name) {
        None => Ok(Vec::new()),
        Some(text) => list(name, text, |word| word.parse().ok().filter(|port| *port != 0)),
    };
    let exclusions = Exclusions {
        outbound_ranges: list(EXCLUDE_RANGES, value(EXCLUDE_RANGES).unwrap_or_default(), range)?,
        only_outbound_ranges: only.map(|text| list(INCLUDE_RANGES, text, range)).transpose()?,
        outbound_ports: ports(EXCLUDE_OUTBOUND_PORTS)?,
        inbound_ports: ports(EXCLUDE_INBOUND_PORTS)?,
    };
    match exclusions.inbound_ports.iter().find(|port| OURS.contains(port)) {
        Some(port) => Err(format!("{EXCLUDE_INBOUND_PORTS}: {port} is the mesh's own")),
        None => Ok(exclusions),
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty())
}

/// A sorted list, of as many as are allowed.
fn list<T: Ord>(name: &str, text: &str, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, String> {
    let mut found = Vec::new();
    for word in words(text) {
        found.push(read(word).ok_or_else(|| format!("{name}: {word:?} can't be read"))?);
        if found.len() > AT_MOST {
            return Err(format!("{name}: more than {AT_MOST} values"));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// A range, or one address; IPv4 also where it is written as IPv6.
fn range(word: &str) -> Option<IpNet> {
    let net = match word.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => IpNet::from(word.parse::<IpAddr>().ok()?.to_canonical()),
    };
    match (net.addr().to_canonical(), net.prefix_len()) {
        (IpAddr::V4(ip), length) if net.addr().is_ipv6() => {
            let length = length.checked_sub(96)?;
            Some(IpNet::new(ip.into(), length).ok()?.trunc())
        }
        _ => Some(net.trunc()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn annotated(annotations: &[(&str, &str)]) -> Metadata {
        let mut metadata = Metadata::default();
        let pairs = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        metadata.annotations.extend(pairs);
        metadata
    }

    const ALL: Permission = Permission {
        outbound: true,
        inbound: true,
    };

    #[test]
    fn annotations_are_read_as_istio_writes_them() {
        let pod = annotated(&[
            (EXCLUDE_RANGES, "10.1.2.3/8, 192.168.0.1,::ffff:172.16.0.0/108,fd00::/8"),
            (EXCLUDE_OUTBOUND_PORTS, "5432, 3306,5432"),
            (EXCLUDE_INBOUND_PORTS, "9090"),
            (INCLUDE_RANGES, "*"),
            (DNS_CAPTURE, "false"),
            (VIRTUAL_INTERFACES, "docker0,br-1"),
        ]);
        let (settings, problems) = capture_of(&pod, None, ALL);
        assert_eq!(problems, Vec::<String>::new());
        let text: Vec<String> = settings
            .exclusions
            .outbound_ranges
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(text, ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.1/32", "fd00::/8"]);
        assert_eq!(settings.exclusions.outbound_ports, [3306, 5432]);
        assert_eq!(settings.exclusions.inbound_ports, [9090]);
        assert_eq!(settings.exclusions.only_outbound_ranges, None);
        assert_eq!(settings.dns_capture, Some(false));
        assert_eq!(settings.virtual_interfaces, ["br-1", "docker0"]);
    }

    #[test]
    fn an_empty_list_of_what_is_captured_captures_nothing() {
        let (settings, problems) = capture_of(&annotated(&[(INCLUDE_RANGES, "")]), None, ALL);
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(settings.exclusions.only_outbound_ranges, Some(Vec::new()));
    }

    #[test]
    fn a_value_that_cannot_be_read_excludes_nothing() {
        let many = (1..=65).map(|port| port.to_string()).collect::<Vec<_>>().join(",");
        for (name, value) in [
            (EXCLUDE_RANGES, "10.0.0.0/33"),
            (EXCLUDE_RANGES, "*"),
            (INCLUDE_RANGES, "everything"),
            (EXCLUDE_OUTBOUND_PORTS, "http"),
            (EXCLUDE_OUTBOUND_PORTS, "70000"),
            (EXCLUDE_OUTBOUND_PORTS, "0"),
            (EXCLUDE_OUTBOUND_PORTS, &many),
            (EXCLUDE_INBOUND_PORTS, "15008"),
        ] {
            let other = if name == EXCLUDE_INBOUND_PORTS {
                (EXCLUDE_OUTBOUND_PORTS, "80")
            } else {
                (EXCLUDE_INBOUND_PORTS, "80")
            };
            let (settings, problems) = capture_of(&annotated(&[(name, value), other]), None, ALL);
            assert_eq!(settings, PodSettings::default(), "{name}: {value}");
            assert_eq!(problems.len(), 1, "{name}: {value}: {problems:?}");
            assert!(
                problems[0].contains(name) && problems[0].contains("wholly"),
                "{problems:?}"
            );
        }
        for bad in ["lo", "eth+", "a name", "../x", "-i", "sixteencharacters"] {
            let (settings, problems) = capture_of(&annotated(&[(VIRTUAL_INTERFACES, bad)]), None, ALL);
            assert_eq!((settings, problems.len()), (PodSettings::default(), 1), "{bad}");
        }
    }

    #[test]
    fn what_is_not_allowed_is_not_done() {
        let pod = annotated(&[
            (EXCLUDE_OUTBOUND_PORTS, "80"),
            (EXCLUDE_INBOUND_PORTS, "81"),
            (BYPASS_INBOUND, "true"),
        ]);
        for (namespace, everywhere, outbound, inbound, said) in [
            (None, Permission::default(), false, false, 2),
            (None, ALL, true, true, 0),
            (Some("none"), ALL, false, false, 2),
            (Some("outbound"), Permission::default(), true, false, 1),
            (Some("inbound"), Permission::default(), false, true, 1),
            (Some("inbound, outbound"), Permission::default(), true, true, 0),
            (Some("all"), Permission::default(), true, true, 0),
            (Some("yes"), ALL, false, false, 3),
        ] {
            let namespace = namespace.map(|value| annotated(&[(PERMISSION, value)]));
            let (settings, problems) = capture_of(&pod, namespace.as_ref(), everywhere);
            assert_eq!(
                !settings.exclusions.outbound_ports.is_empty(),
                outbound,
                "{namespace:?}"
            );
            assert_eq!(!settings.exclusions.inbound_ports.is_empty(), inbound, "{namespace:?}");
            assert_eq!(settings.bypass_inbound, inbound, "{namespace:?}");
            assert_eq!(problems.len(), said, "{namespace:?}: {problems:?}");
        }
        // Who asks for nothing is told nothing.
        let (_, problems) = capture_of(&Metadata::default(), Some(&annotated(&[(PERMISSION, "yes")])), ALL);
        assert_eq!(problems, Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}", ports in "[0-9,: ]{0,20}") {
            let pod = annotated(&[
                (EXCLUDE_RANGES, text.as_str()),
                (INCLUDE_RANGES, text.as_str()),
                (EXCLUDE_OUTBOUND_PORTS, ports.as_str()),
                (VIRTUAL_INTERFACES, text.as_str()),
                (BYPASS_INBOUND, text.as_str()),
            ]);
            let (settings, problems) = capture_of(&pod, None, ALL);
            for range in &settings.exclusions.outbound_ranges {
                prop_assert_eq!(range.trunc(), *range);
                prop_assert!(settings.exclusions.excludes_outbound(range.addr(), 1));
            }
            let nothing = settings.exclusions.is_empty();
            let asked = words(&text).next().is_some() || words(&ports).next().is_some();
            prop_assert!(!nothing || !problems.is_empty() || !asked || words(&text).any(|word| word == "*"));
        }
    }
}
