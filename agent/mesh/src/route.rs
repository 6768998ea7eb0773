//! Where to? From the address that an application dialled to the way there.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use model::{NamespacedName, OriginalDst, Service, TunnelProtocol, Workload, WorkloadUid};

use crate::Snapshot;

/// The port of every HBONE listener.
pub const HBONE_PORT: u16 = 15008;

/// The way to a destination.
#[derive(Clone, Debug, PartialEq)]
pub enum Route {
    /// Through HBONE to a workload of the mesh.
    Tunnel {
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled, if it was one.
        service: Option<Arc<Service>>,
        /// The workload's address and the application's port: the CONNECT's authority.
        target: SocketAddr,
        /// Where the workload's HBONE listener is.
        hbone: SocketAddr,
    },
    /// In plaintext to a workload that is known and not in the mesh.
    Plaintext {
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled, if it was one.
        service: Option<Arc<Service>>,
        /// The workload's address and port.
        target: SocketAddr,
    },
    /// In plaintext to somewhere the mesh knows nothing of.
    Passthrough {
        /// The address that was dialled.
        target: SocketAddr,
    },
    /// Nowhere.
    Refused {
        /// Why.
        reason: RefuseReason,
    },
}

/// Why a connection has no way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefuseReason {
    /// Nothing is known of the mesh yet: the way might have to be encrypted.
    NoKnowledge,
    /// The service has no such port.
    NoSuchPort(NamespacedName, u16),
    /// The service has no healthy endpoint (left) with an address that can be reached.
    NoHealthyEndpoint(NamespacedName),
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKnowledge => f.write_str("nothing is known of the mesh yet"),
            Self::NoSuchPort(service, port) => write!(f, "service {service} has no port {port}"),
            Self::NoHealthyEndpoint(service) => write!(f, "service {service} has no healthy endpoint"),
        }
    }
}

impl Snapshot {
    /// The way from a workload of this node to what it dialled. `random` picks among a service's endpoints; those in
    /// `tried` failed already and are passed over.
    pub fn resolve(&self, dialled: OriginalDst, random: u64, tried: &[WorkloadUid]) -> Route {
        if !self.ready() {
            return Route::Refused {
                reason: RefuseReason::NoKnowledge,
            };
        }
        let target = model::canonical_socket(dialled.0);
        if let Some(workload) = self.workload_by_ip(target.ip()) {
            return to_workload(workload.clone(), None, target);
        }
        match self.service_by_vip(target.ip()) {
            Some(service) => self.to_service(service, target, random, tried),
            None => Route::Passthrough { target },
        }
    }

    fn to_service(&self, service: &Arc<Service>, dialled: SocketAddr, random: u64, tried: &[WorkloadUid]) -> Route {
        let key = service.key();
        if !service.ports.contains_key(&dialled.port()) {
            return Route::Refused {
                reason: RefuseReason::NoSuchPort(key, dialled.port()),
            };
        }
        let candidates: Vec<(&Arc<Workload>, SocketAddr)> = self
            .endpoints(&key)
            .iter()
            .filter(|workload| !tried.contains(&workload.uid))
            .filter_map(|workload| Some((workload, endpoint_address(workload, service, &key, dialled)?)))
            .collect();
        if candidates.is_empty() {
            return Route::Refused {
                reason: RefuseReason::NoHealthyEndpoint(key),
            };
        }
        let (workload, target) = candidates[(random % candidates.len() as u64) as usize];
        to_workload(workload.clone(), Some(service.clone()), target)
    }
}

/// The endpoint's own port map goes before the service's; its address of the family that was dialled goes first.
fn endpoint_address(
    workload: &Workload,
    service: &Service,
    key: &NamespacedName,
    dialled: SocketAddr,
) -> Option<SocketAddr> {
    let ports = workload.services.get(key)?;
    let port = *ports
        .get(&dialled.port())
        .or_else(|| service.ports.get(&dialled.port()))?;
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == dialled.is_ipv4();
    let ip = workload
        .workload_ips
        .iter()
        .find(same_family)
        .or_else(|| workload.workload_ips.first())?;
    Some(SocketAddr::new(*ip, port))
}

fn to_workload(workload: Arc<Workload>, service: Option<Arc<Service>>, target: SocketAddr) -> Route {
    match workload.protocol {
        TunnelProtocol::Hbone => {
            let hbone = SocketAddr::new(target.ip(), HBONE_PORT);
            Route::Tunnel {
                workload,
                service,
                target,
                hbone,
            }
        }
        TunnelProtocol::None => Route::Plaintext {
            workload,
            service,
            target,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::static_file;

    const FILE: &str = r#"
workloads:
- {uid: c//v1/Pod/shop/a, name: a, namespace: shop, workloadIps: ["10.0.0.1", "fd00::1"], protocol: HBONE, node: n1,
   services: {"shop/web.shop.svc.cluster.local": {80: 8080}}}
- {uid: c//v1/Pod/shop/b, name: b, namespace: shop, workloadIps: ["10.0.0.2"], protocol: HBONE, node: n2,
   services: {"shop/web.shop.svc.cluster.local": {80: 9090}}}
- {uid: c//v1/Pod/out/c, name: c, namespace: out, workloadIps: ["10.0.0.3"]}
- {uid: c//v1/Pod/shop/sick, name: sick, namespace: shop, workloadIps: ["10.0.0.4"], protocol: HBONE, status: Unhealthy,
   services: {"shop/web.shop.svc.cluster.local": {80: 8080}, "shop/sick.shop.svc.cluster.local": {80: 8080}}}
services:
- {name: web, namespace: shop, hostname: web.shop.svc.cluster.local, vips: ["/10.96.0.1", "/fd00:96::1"], ports: {80: 8080, 81: 8081}}
- {name: sick, namespace: shop, hostname: sick.shop.svc.cluster.local, vips: ["/10.96.0.2"], ports: {80: 8080}}
"#;

    fn route(dialled: &str, random: u64, tried: &[&str]) -> Route {
        let (contents, rejected) = static_file::parse(FILE).unwrap();
        assert!(rejected.is_empty(), "{rejected:?}");
        let (snapshot, conflicts) = Snapshot::build(contents, 1);
        assert!(conflicts.is_empty());
        let tried: Vec<_> = tried.iter().map(|uid| WorkloadUid((*uid).into())).collect();
        snapshot.resolve(OriginalDst(dialled.parse().unwrap()), random, &tried)
    }

    fn tunnel_target(route: Route) -> String {
        match route {
            Route::Tunnel { target, hbone, .. } => format!("{target} by {hbone}"),
            other => panic!("not a tunnel: {other:?}"),
        }
    }

    #[test]
    fn a_pod_of_the_mesh_is_reached_by_tunnel() {
        assert_eq!(
            tunnel_target(route("10.0.0.2:1234", 0, &[])),
            "10.0.0.2:1234 by 10.0.0.2:15008"
        );
        assert_eq!(
            tunnel_target(route("[::ffff:10.0.0.2]:1234", 0, &[])),
            "10.0.0.2:1234 by 10.0.0.2:15008"
        );
    }

    #[test]
    fn a_service_is_spread_over_its_healthy_endpoints_and_their_ports() {
        assert_eq!(
            tunnel_target(route("10.96.0.1:80", 0, &[])),
            "10.0.0.1:8080 by 10.0.0.1:15008"
        );
        assert_eq!(
            tunnel_target(route("10.96.0.1:80", 1, &[])),
            "10.0.0.2:9090 by 10.0.0.2:15008"
        );
        assert_eq!(
            tunnel_target(route("10.96.0.1:80", 2, &[])),
            "10.0.0.1:8080 by 10.0.0.1:15008"
        );
        assert_eq!(
            tunnel_target(route("10.96.0.1:80", 0, &["c//v1/Pod/shop/a"])),
            "10.0.0.2:9090 by 10.0.0.2:15008"
        );
        assert_eq!(
            tunnel_target(route("[fd00:96::1]:80", 0, &[])),
            "[fd00::1]:8080 by [fd00::1]:15008"
        );
    }

    #[test]
    fn a_service_without_the_port_or_an_endpoint_is_refused() {
        let refused = |dialled, tried: &[&str]| match route(dialled, 0, tried) {
            Route::Refused { reason } => reason.to_string(),
            other => panic!("not refused: {other:?}"),
        };
        assert_eq!(
            refused("10.96.0.1:82", &[]),
            "service shop/web.shop.svc.cluster.local has no port 82"
        );
        assert_eq!(
            refused("10.96.0.2:80", &[]),
            "service shop/sick.shop.svc.cluster.local has no healthy endpoint"
        );
        assert!(refused("10.96.0.1:80", &["c//v1/Pod/shop/a", "c//v1/Pod/shop/b"]).contains("no healthy endpoint"));
    }

    #[test]
    fn what_is_not_in_the_mesh_is_reached_as_it_is() {
        assert!(matches!(route("10.0.0.3:80", 0, &[]), Route::Plaintext { .. }));
        assert!(matches!(route("192.0.2.1:80", 0, &[]), Route::Passthrough { .. }));
    }

    #[test]
    fn before_anything_is_known_nothing_goes_out() {
        let route = Snapshot::default().resolve(OriginalDst("192.0.2.1:80".parse().unwrap()), 0, &[]);
        assert_eq!(
            route,
            Route::Refused {
                reason: RefuseReason::NoKnowledge
            }
        );
    }
}
