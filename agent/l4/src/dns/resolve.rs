//! What the mesh knows of a host name: pure, one snapshot.
//!
//! ```text
//! web               ─► web.<own namespace>.svc.<domain>      asked with a final dot, or by a resolver without search
//! web.shop[.svc]    ─► web.shop.svc.<domain>
//! x.<search domain> ─► x, and what it stands for if it has two labels or three   the answer begins with a CNAME
//! then each of these: services of exactly this name; pods of a headless one; then the longest wildcard
//! ```
//! The order is ztunnel's. As there, what the mesh can not answer is the name server's: an unknown name, a service
//! without addresses outside the cluster's domain. A name that is known and has no address of the family that was asked
//! for is answered with nothing, not refused (`a_known_name_without_the_family_is_answered_with_nothing`).
//!
//! A pod of a headless service is found under its own name (that of a StatefulSet's pod is its host name) and under its
//! address written with dashes. A headless service without endpoints is the name server's: the mesh does not know
//! what stands behind it (`what_the_mesh_does_not_know_is_the_name_servers`).

use std::net::IpAddr;

use mesh::Snapshot;
use model::{HealthPolicy, IpFamilies, Service, Workload, canonical_ip};

use super::message::{Answer, Question};

/// Addresses of an answer. A message holds a few thousand; who has more endpoints gets some of them, others each time.
const ADDRESSES: usize = 1024;

/// What is answered, and under which host name the addresses are known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// For the client.
    pub answer: Answer,
    /// The host as the mesh has it, or as it was asked where that is a wildcard.
    pub host: String,
}

/// A name that the asked one may stand for.
struct Alias {
    host: String,
    /// Whether a search domain was taken off.
    stripped: bool,
}

/// Looks a name up for a pod. `domain` is the cluster's. None: the name server is to answer.
pub fn resolve(
    snapshot: &Snapshot,
    client: &Workload,
    domain: &str,
    question: &Question,
    random: &mut dyn FnMut() -> u64,
) -> Option<Resolved> {
    if !snapshot.ready() {
        return None;
    }
    let aliases = aliases(&question.host, &client.namespace, domain);
    let exact = aliases.iter().find_map(|alias| {
        let known = known(snapshot, client, domain, &alias.host)?;
        Some((alias, known))
    });
    let (alias, addresses) = match exact {
        Some((alias, addresses)) => (alias, addresses?),
        None => aliases.iter().find_map(|alias| {
            let service = snapshot.service_by_wildcard(&alias.host, &client.namespace)?;
            Some((alias, virtual_addresses(snapshot, service)?))
        })?,
    };
    let mut addresses: Vec<IpAddr> = addresses.into_iter().filter(|ip| question.family.has(ip)).collect();
    shuffle(&mut addresses, random);
    addresses.truncate(ADDRESSES);
    Some(Resolved {
        answer: Answer {
            canonical: alias.stripped.then(|| alias.host.clone()),
            addresses,
        },
        host: alias.host.clone(),
    })
}

/// What a name may stand for, the likeliest first.
fn aliases(name: &str, namespace: &str, domain: &str) -> Vec<Alias> {
    let mut aliases = Vec::new();
    let mut add = |host: String, stripped| aliases.push(Alias { host, stripped });
    add(name.to_owned(), false);
    let labels = |name: &str| name.split('.').count();
    if labels(name) == 1 {
        add(format!("{name}.{namespace}.svc.{domain}"), false);
    } else if let Some(host) = of_cluster(name, domain) {
        add(host, false);
    }
    // The whole search list of a pod's resolv.conf. The node's own domains in it are not known here.
    let search = [
        format!("{namespace}.svc.{domain}"),
        format!("svc.{domain}"),
        domain.to_owned(),
    ];
    for suffix in &search {
        let Some(stripped) = name.strip_suffix(&**suffix).and_then(|rest| rest.strip_suffix('.')) else {
            continue;
        };
        add(stripped.to_owned(), true);
        if let Some(host) = of_cluster(stripped, domain) {
            add(host, true);
        }
    }
    aliases
}

/// `name.namespace` or `name.namespace.svc` in full.
fn of_cluster(name: &str, domain: &str) -> Option<String> {
    let mut labels = name.split('.');
    match (labels.next(), labels.next(), labels.next(), labels.next()) {
        (Some(_), Some(_), None, _) => Some(format!("{name}.svc.{domain}")),
        (Some(_), Some(_), Some("svc"), None) => Some(format!("{name}.{domain}")),
        _ => None,
    }
}

/// The addresses of a name that is known; of one that is known and is the name server's to answer: none. The outer none:
/// it is not known.
fn known(snapshot: &Snapshot, client: &Workload, domain: &str, host: &str) -> Option<Option<Vec<IpAddr>>> {
    if let Some(service) = snapshot.service_by_host(host, &client.namespace) {
        let addresses = match is_headless(service, domain) {
            true => pod_addresses(snapshot, service, |_| true),
            false => virtual_addresses(snapshot, service),
        };
        return Some(addresses);
    }
    let (pod, parent) = host.split_once('.')?;
    let service = snapshot.service_by_host(parent, &client.namespace)?;
    if !is_headless(service, domain) {
        return None;
    }
    let is_meant = |workload: &Workload| {
        let dashed = |ip: &IpAddr| canonical_ip(*ip).to_string().replace(['.', ':'], "-") == pod;
        *workload.name == *pod || workload.workload_ips.iter().any(dashed)
    };
    pod_addresses(snapshot, service, is_meant).map(Some)
}

fn is_headless(service: &Service, domain: &str) -> bool {
    let in_cluster = || service.hostname.strip_suffix(domain)?.strip_suffix(".svc.");
    service.vips.is_empty() && in_cluster().is_some()
}

/// Those of the node's network; ranges are not addresses to be dialled. None: there is none.
fn virtual_addresses(snapshot: &Snapshot, service: &Service) -> Option<Vec<IpAddr>> {
    let is_whole = |length: u8, ip: &IpAddr| length == if ip.is_ipv4() { 32 } else { 128 };
    let own = service.vips.iter().filter(|vip| vip.network == *snapshot.network());
    let whole = own.filter(|vip| vip.length.is_none_or(|length| is_whole(length, &vip.address)));
    let addresses: Vec<IpAddr> = whole.map(|vip| canonical_ip(vip.address)).collect();
    (!addresses.is_empty()).then_some(addresses)
}

/// The addresses of a headless service's pods, of the families that it says. None: there is none.
fn pod_addresses(snapshot: &Snapshot, service: &Service, is_meant: impl Fn(&Workload) -> bool) -> Option<Vec<IpAddr>> {
    let key = service.key();
    let all = service
        .load_balancing
        .as_ref()
        .is_some_and(|balancing| balancing.health_policy == HealthPolicy::AllowAll);
    let unready = all.then(|| snapshot.unhealthy_endpoints(&key).iter());
    let endpoints = snapshot.endpoints(&key).iter().chain(unready.into_iter().flatten());
    let here = endpoints.filter(|workload| workload.network == *snapshot.network() && is_meant(workload));
    let addresses: Vec<IpAddr> = here
        .flat_map(|workload| workload.workload_ips.iter().map(|ip| canonical_ip(*ip)))
        .filter(|ip| is_listed(service, ip))
        .collect();
    (!addresses.is_empty()).then_some(addresses)
}

/// Whether the cluster's own DNS would tell of such an address: an application that it does not send there may not listen
/// there.
fn is_listed(service: &Service, ip: &IpAddr) -> bool {
    match service.ip_families {
        IpFamilies::V4Only => ip.is_ipv4(),
        IpFamilies::V6Only => ip.is_ipv6(),
        IpFamilies::Automatic | IpFamilies::Dual => true,
    }
}

fn shuffle(addresses: &mut [IpAddr], random: &mut dyn FnMut() -> u64) {
    for last in (1..addresses.len()).rev() {
        let other = random() % (last as u64 + 1);
        addresses.swap(last, other as usize);
    }
}

#[cfg(test)]
mod tests {
    use mesh::Contents;
    use model::{HealthStatus, LoadBalancing, NetworkAddress, PortMap, Visibility};

    use super::{super::message::Family, *};
    use crate::testing::workload;

    fn service(name: &str, namespace: &str, host: &str, vips: &[&str]) -> Service {
        Service {
            name: name.into(),
            namespace: namespace.into(),
            hostname: host.into(),
            vips: vips.iter().map(|vip| vip.parse::<NetworkAddress>().unwrap()).collect(),
            ..Service::default()
        }
    }

    fn in_cluster(name: &str, namespace: &str, vips: &[&str]) -> Service {
        service(name, namespace, &format!("{name}.{namespace}.svc.cluster.local"), vips)
    }

    fn endpoint(name: &str, ip: &str, of: &Service, status: HealthStatus) -> Workload {
        Workload {
            services: [(of.key(), PortMap::default())].into_iter().collect(),
            status,
            ..workload(name, "shop", ip)
        }
    }

    fn snapshot() -> std::sync::Arc<Snapshot> {
        let headless = in_cluster("db", "shop", &[]);
        let mut unready = in_cluster("all", "shop", &[]);
        unready.load_balancing = Some(LoadBalancing {
            health_policy: HealthPolicy::AllowAll,
            ..LoadBalancing::default()
        });
        let mut hidden = service("hidden", "bank", "hidden.example.com", &["10.9.0.9"]);
        hidden.visibility = Visibility::Namespace;
        let workloads = vec![
            endpoint("db-0", "10.1.0.1", &headless, HealthStatus::Healthy),
            endpoint("db-1", "10.1.0.2", &headless, HealthStatus::Unhealthy),
            endpoint("all-0", "10.1.0.3", &unready, HealthStatus::Unhealthy),
        ];
        let services = vec![
            in_cluster("web", "shop", &["10.96.0.1", "fd00::1"]),
            in_cluster("only4", "shop", &["10.96.0.2"]),
            in_cluster("empty", "shop", &[]),
            in_cluster("far", "shop", &["elsewhere/10.96.0.3"]),
            service("api", "shop", "api.example.com", &["240.240.0.1"]),
            service("wild", "shop", "*.wild.example.com", &["240.240.0.2"]),
            service("range", "shop", "range.example.com", &["/10.50.0.0/16"]),
            service("none", "shop", "none.example.com", &[]),
            hidden,
            headless,
            unready,
        ];
        let (mut writer, knowledge) = mesh::new();
        let contents = Contents {
            workloads,
            services,
            ..Contents::default()
        };
        assert!(writer.replace(contents, &[]).is_empty());
        knowledge.snapshot()
    }

    /// The canonical name and the addresses, in order; none: the name server's.
    fn ask(snapshot: &Snapshot, namespace: &str, host: &str, family: Family) -> Option<(Option<String>, String)> {
        let client = workload("client", namespace, "10.0.0.1");
        let question = Question {
            host: host.to_owned(),
            family,
        };
        let found = resolve(snapshot, &client, "cluster.local", &question, &mut || 7)?;
        let mut addresses: Vec<_> = found.answer.addresses.iter().map(IpAddr::to_string).collect();
        addresses.sort();
        Some((found.answer.canonical, addresses.join(" ")))
    }

    #[track_caller]
    fn is(snapshot: &Snapshot, host: &str, addresses: &str) {
        assert_eq!(
            ask(snapshot, "shop", host, Family::V4),
            Some((None, addresses.to_owned())),
            "{host}"
        );
    }

    #[test]
    fn a_service_is_found_by_each_of_its_names() {
        let snapshot = snapshot();
        for host in ["web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
            is(&snapshot, host, "10.96.0.1");
        }
        for host in ["web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
            assert!(ask(&snapshot, "bank", host, Family::V4).is_some(), "{host}");
        }
        for host in [
            "web",
            "web.bank",
            "web.svc.cluster.local",
            "web.cluster.local",
            "web.example.com",
            "svc",
        ] {
            assert_eq!(ask(&snapshot, "bank", host, Family::V4), None, "{host}");
        }
        assert_eq!(
            ask(&snapshot, "shop", "web", Family::V6),
            Some((None, "fd00::1".to_owned()))
        );
    }

    #[test]
    fn what_a_search_list_appended_is_taken_off_and_said_by_a_cname() {
        let snapshot = snapshot();
        for (host, canonical, address) in [
            (
                "api.example.com.shop.svc.cluster.local",
                "api.example.com",
                "240.240.0.1",
            ),
            ("api.example.com.cluster.local", "api.example.com", "240.240.0.1"),
            (
                "web.shop.shop.svc.cluster.local",
                "web.shop.svc.cluster.local",
                "10.96.0.1",
            ),
            (
                "web.shop.svc.shop.svc.cluster.local",
                "web.shop.svc.cluster.local",
                "10.96.0.1",
            ),
            (
                "x.wild.example.com.svc.cluster.local",
                "x.wild.example.com",
                "240.240.0.2",
            ),
        ] {
            let expected = Some((Some(canonical.to_owned()), address.to_owned()));
            assert_eq!(ask(&snapshot, "shop", host, Family::V4), expected, "{host}");
        }
    }

    #[test]
    fn a_headless_service_of_one_family_is_its_pods_of_that_family() {
        let mut db = in_cluster("db", "shop", &[]);
        let mut pod = endpoint("db-0", "10.1.0.1", &db, HealthStatus::Healthy);
        pod.workload_ips.push("fd00::1".parse().unwrap());
        for (families, v4, v6) in [
            (IpFamilies::V4Only, "10.1.0.1", ""),
            (IpFamilies::V6Only, "", "fd00::1"),
            (IpFamilies::Dual, "10.1.0.1", "fd00::1"),
            (IpFamilies::Automatic, "10.1.0.1", "fd00::1"),
        ] {
            db.ip_families = families;
            let (mut writer, knowledge) = mesh::new();
            let contents = Contents {
                workloads: vec![pod.clone()],
                services: vec![db.clone()],
                ..Contents::default()
            };
            assert!(writer.replace(contents, &[]).is_empty());
            for (family, expected) in [(Family::V4, v4), (Family::V6, v6)] {
                let found = ask(&knowledge.snapshot(), "shop", "db", family);
                assert_eq!(found, Some((None, expected.to_owned())), "{families:?} {family:?}");
            }
        }
    }

    #[test]
    fn a_headless_service_is_its_pods_and_each_pod_has_a_name() {
        let snapshot = snapshot();
        is(&snapshot, "db", "10.1.0.1");
        is(&snapshot, "db-0.db.shop.svc.cluster.local", "10.1.0.1");
        is(&snapshot, "10-1-0-1.db.shop.svc.cluster.local", "10.1.0.1");
        is(&snapshot, "all", "10.1.0.3");
        assert_eq!(
            ask(&snapshot, "shop", "db-1.db.shop.svc.cluster.local", Family::V4),
            None
        );
        assert_eq!(
            ask(&snapshot, "shop", "web-0.web.shop.svc.cluster.local", Family::V4),
            None
        );
    }

    #[test]
    fn hosts_and_wildcards_of_service_entries() {
        let snapshot = snapshot();
        is(&snapshot, "api.example.com", "240.240.0.1");
        is(&snapshot, "a.b.wild.example.com", "240.240.0.2");
        assert_eq!(ask(&snapshot, "shop", "wild.example.com", Family::V4), None);
        assert_eq!(ask(&snapshot, "shop", "hidden.example.com", Family::V4), None);
        assert!(ask(&snapshot, "bank", "hidden.example.com", Family::V4).is_some());
    }

    #[test]
    fn a_known_name_without_the_family_is_answered_with_nothing() {
        let snapshot = snapshot();
        for host in ["only4", "db", "api.example.com", "a.wild.example.com"] {
            assert_eq!(
                ask(&snapshot, "shop", host, Family::V6),
                Some((None, String::new())),
                "{host}"
            );
        }
    }

    #[test]
    fn what_the_mesh_does_not_know_is_the_name_servers() {
        let snapshot = snapshot();
        for host in [
            "empty",
            "far",
            "range.example.com",
            "none.example.com",
            "example.com",
            "localhost",
        ] {
            assert_eq!(ask(&snapshot, "shop", host, Family::V4), None, "{host}");
        }
        let (_writer, knowledge) = mesh::new();
        assert_eq!(ask(&knowledge.snapshot(), "shop", "web", Family::V4), None);
    }

    #[test]
    fn answers_are_shuffled() {
        let mut addresses: Vec<IpAddr> = (0..8).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        let before = addresses.clone();
        let mut state = 1u64;
        shuffle(&mut addresses, &mut || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        });
        assert_ne!(addresses, before);
        addresses.sort();
        assert_eq!(addresses, before);
    }
}
