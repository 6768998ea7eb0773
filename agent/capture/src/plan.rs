//! What should be for a pod, decided from what its network looks like; nothing is done here.

use std::net::IpAddr;

use abi::{Address, CAPTURED, FORBID_NON_TCP};
use model::PodSettings;

use crate::{
    PodSpec,
    error::CaptureError,
    exclusions,
    interfaces::{Interface, Kind, PodNetwork},
};

/// What should be while a pod is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodPlan {
    /// The pod's entry in `PODS`.
    pub(crate) pod: abi::Pod,
    /// The host sides to guard, with their entries in `INTERFACES`; the first is the one that the pod is reached by.
    pub(crate) interfaces: Vec<(u32, abi::Interface)>,
    /// Whether the in-pod route for source addresses is needed for IPv4, for IPv6.
    pub(crate) ip4: bool,
    pub(crate) ip6: bool,
}

/// The one address of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) ip4: Option<IpAddr>,
    pub(crate) ip6: Option<IpAddr>,
}

impl Addresses {
    pub(crate) fn of(spec: &PodSpec) -> Result<Self, CaptureError> {
        let wrong = || CaptureError::Addresses(spec.addresses.clone());
        let one = |is_v4: bool| {
            let mut found = spec
                .addresses
                .iter()
                .map(IpAddr::to_canonical)
                .filter(|ip| ip.is_ipv4() == is_v4);
            let first = found.next();
            if found.next().is_some() {
                Err(wrong())
            } else {
                Ok(first)
            }
        };
        let addresses = Self {
            ip4: one(true)?,
            ip6: one(false)?,
        };
        if addresses.iter().next().is_none() {
            return Err(wrong());
        }
        Ok(addresses)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.ip4.into_iter().chain(self.ip6)
    }

    pub(crate) fn entry(&self, flags: u32, ifindex: u32) -> abi::Pod {
        let word = |ip: Option<IpAddr>| ip.map_or(Address::NONE, Address::from_ip);
        abi::Pod {
            ip4: word(self.ip4),
            ip6: word(self.ip6),
            flags,
            ifindex,
        }
    }
}

/// Plans a pod's capture, or says why it can't be.
pub(crate) fn plan(
    spec: &PodSpec,
    cookie: u64,
    network: &PodNetwork,
    settings: &PodSettings,
) -> Result<PodPlan, CaptureError> {
    let addresses = Addresses::of(spec)?;
    let mut guarded: Vec<u32> = Vec::new();
    for address in addresses.iter() {
        let holder = holder(spec, network, address)?;
        let host_side = network
            .host_sides
            .get(&holder.index)
            .ok_or_else(|| CaptureError::NoVeth {
                netns: spec.netns.clone(),
                interface: holder.name.clone(),
                problem: format!("{:?}, no host side here", holder.kind),
            })?;
        if !guarded.contains(host_side) {
            guarded.push(*host_side);
        }
    }
    for interface in &network.interfaces {
        match network.host_sides.get(&interface.index) {
            Some(host_side) if !guarded.contains(host_side) => guarded.push(*host_side),
            Some(_) => {}
            None if leads_out(interface) => {
                return Err(CaptureError::NoVeth {
                    netns: spec.netns.clone(),
                    interface: interface.name.clone(),
                    problem: format!("{:?}, leads out of the pod past the guard", interface.kind),
                });
            }
            None => {}
        }
    }
    let forbid = if settings.forbid_non_tcp { FORBID_NON_TCP } else { 0 };
    let pod = addresses.entry(CAPTURED | forbid | exclusions::pod_flags(settings), guarded[0]);
    let interface = abi::Interface {
        ip4: pod.ip4,
        ip6: pod.ip6,
        cookie,
        flags: CAPTURED | forbid | exclusions::interface_flags(settings),
        reserved: 0,
    };
    Ok(PodPlan {
        pod,
        interfaces: guarded.into_iter().map(|index| (index, interface)).collect(),
        ip4: addresses.ip4.is_some(),
        ip6: addresses.ip6.is_some(),
    })
}

/// The interface that holds an address. None: this is not the pod's namespace.
pub(crate) fn holder<'a>(
    spec: &PodSpec,
    network: &'a PodNetwork,
    address: IpAddr,
) -> Result<&'a Interface, CaptureError> {
    network
        .interfaces
        .iter()
        .find(|interface| interface.addresses.contains(&address))
        .ok_or_else(|| CaptureError::AddressNotThere {
            netns: spec.netns.clone(),
            missing: address,
        })
}

/// Whether packets can leave the pod here without crossing a veth that ends on the node: a physical device, or a child
/// (macvlan, ipvlan, VLAN) of a device in another namespace. Veths to elsewhere are the pod's own nested namespaces,
/// whose packets come back through the pod.
fn leads_out(interface: &Interface) -> bool {
    match interface.kind {
        Kind::Loopback | Kind::Veth => false,
        Kind::Physical => true,
        Kind::Virtual => interface.link_netns.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use model::WorkloadUid;

    use super::*;

    fn forbidding() -> PodSettings {
        PodSettings {
            forbid_non_tcp: true,
            ..PodSettings::default()
        }
    }

    fn spec(addresses: &[&str]) -> PodSpec {
        PodSpec {
            uid: WorkloadUid::of_pod("c", "ns", "pod"),
            netns: "/run/netns/pod".into(),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    fn interface(index: u32, kind: Kind, link_netns: Option<i32>, addresses: &[&str]) -> Interface {
        Interface {
            index,
            name: format!("eth{index}"),
            kind,
            link: link_netns.map(|_| index + 100),
            link_netns,
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    fn network(interfaces: Vec<Interface>, host_sides: &[(u32, u32)]) -> PodNetwork {
        PodNetwork {
            interfaces,
            host_sides: host_sides.iter().copied().collect::<HashMap<_, _>>(),
        }
    }

    #[test]
    fn every_veth_that_ends_on_the_node_is_guarded() {
        let network = network(
            vec![
                interface(1, Kind::Loopback, None, &["127.0.0.1"]),
                interface(2, Kind::Veth, Some(0), &["10.0.0.1", "fd00::1"]),
                interface(3, Kind::Veth, Some(0), &["192.168.0.1"]),
                interface(4, Kind::Veth, Some(1), &[]),
                interface(5, Kind::Virtual, None, &["172.17.0.1"]),
            ],
            &[(2, 102), (3, 103)],
        );
        let plan = plan(&spec(&["10.0.0.1", "fd00::1"]), 7, &network, &forbidding()).unwrap();
        assert_eq!(
            plan.interfaces.iter().map(|(index, _)| *index).collect::<Vec<_>>(),
            [102, 103]
        );
        assert_eq!(plan.pod.flags, CAPTURED | FORBID_NON_TCP);
        assert_eq!(plan.pod.ifindex, 102);
        assert!(plan.ip4 && plan.ip6);
    }

    #[test]
    fn a_namespace_without_the_pods_address_is_refused() {
        let network = network(vec![interface(2, Kind::Veth, Some(0), &["10.0.0.2"])], &[(2, 102)]);
        let error = plan(&spec(&["10.0.0.1"]), 7, &network, &PodSettings::default()).unwrap_err();
        assert!(matches!(error, CaptureError::AddressNotThere { .. }), "{error}");
    }

    #[test]
    fn a_way_out_past_the_guard_is_refused() {
        for kind in [Kind::Physical, Kind::Virtual] {
            let network = network(
                vec![
                    interface(2, Kind::Veth, Some(0), &["10.0.0.1"]),
                    interface(3, kind, Some(0), &[]),
                ],
                &[(2, 102)],
            );
            let error = plan(&spec(&["10.0.0.1"]), 7, &network, &PodSettings::default()).unwrap_err();
            assert!(matches!(error, CaptureError::NoVeth { .. }), "{error}");
        }
    }

    #[test]
    fn two_addresses_of_a_family_are_refused() {
        let network = network(vec![], &[]);
        for addresses in [&["10.0.0.1", "10.0.0.2"][..], &[]] {
            let error = plan(&spec(addresses), 7, &network, &PodSettings::default()).unwrap_err();
            assert!(matches!(error, CaptureError::Addresses(_)), "{error}");
        }
    }
}
