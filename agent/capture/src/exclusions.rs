//! What of a pod is not captured, as the kernel's programs have it: flags, ports and ranges.
//!
//! A pod without exclusions has neither entries nor flags, and costs a test of its flags at each connect.
//!
//! While exclusions change the pod is captured wholly, so that no half of them is ever in force. Connections that are
//! not excluded any more are reset. The maps full: the pod stays wholly captured, and the error says so.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
};

use abi::{
    Address, BYPASSES_INBOUND, EXCLUDES_INBOUND, EXCLUDES_OUTBOUND, EXCLUDES_PORTS, EXCLUDES_RANGES, EXCLUDES_THE_REST,
    Endpoint, ExcludedPort, ExcludedRange, Flow, Pod, REROUTES,
};
use ipnet::IpNet;
use model::PodSettings;

use crate::{diag, error::CaptureError, netns::Netns, node::Inner, plan::PodPlan};

/// All flags that are about exclusions.
const FLAGS: u32 =
    EXCLUDES_PORTS | EXCLUDES_RANGES | EXCLUDES_THE_REST | EXCLUDES_OUTBOUND | EXCLUDES_INBOUND | BYPASSES_INBOUND;

/// A pod's entries in `EXCLUDED_PORTS` and `EXCLUDED_RANGES`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Entries {
    /// By port, and whether it is the pod's own.
    pub(crate) ports: BTreeSet<(u16, bool)>,
    /// By address and length of its prefix: whether it is excluded.
    pub(crate) ranges: BTreeMap<(IpAddr, u8), bool>,
}

/// The key of a range in the kernel's map: the length of its prefix, and what it is the prefix of.
pub(crate) fn range_key(cookie: u64, (ip, length): (IpAddr, u8)) -> (u32, ExcludedRange) {
    let before = ExcludedRange::COOKIE_BITS + if ip.is_ipv4() { 96 } else { 0 };
    (
        before + u32::from(length),
        ExcludedRange::new(cookie, Address::from_ip(ip)),
    )
}

/// A key as it came from the map.
pub(crate) fn range_of(bits: u32, key: &ExcludedRange) -> (IpAddr, u8) {
    let ip = key.address.to_ip();
    let before = ExcludedRange::COOKIE_BITS + if ip.is_ipv4() { 96 } else { 0 };
    (ip, u8::try_from(bits.saturating_sub(before)).unwrap_or(u8::MAX))
}

/// A key of a port.
pub(crate) fn port_key(cookie: u64, (port, inbound): (u16, bool)) -> ExcludedPort {
    ExcludedPort::new(cookie, port, inbound)
}

impl Entries {
    /// The verdict of each range is that for its addresses that no longer range holds: what an excluded range holds is
    /// excluded, however long the others are.
    pub(crate) fn of(settings: &PodSettings) -> Self {
        let exclusions = &settings.exclusions;
        let outbound = exclusions.outbound_ports.iter().map(|port| (*port, false));
        let inbound = exclusions.inbound_ports.iter().map(|port| (*port, true));
        let excluded = |range: &IpNet| exclusions.outbound_ranges.iter().any(|outer| outer.contains(range));
        let ranges = exclusions.outbound_ranges.iter();
        let all = ranges.chain(exclusions.only_outbound_ranges.iter().flatten());
        Self {
            ports: outbound.chain(inbound).collect(),
            ranges: all
                .map(|range| ((range.network(), range.prefix_len()), excluded(range)))
                .collect(),
        }
    }
}

/// The flags of a pod's entry in `PODS`.
pub(crate) fn pod_flags(settings: &PodSettings) -> u32 {
    let entries = Entries::of(settings);
    let has = |inbound| entries.ports.iter().any(|(_, of_pod)| *of_pod == inbound);
    let flag = |is: bool, flag| if is { flag } else { 0 };
    flag(has(false), EXCLUDES_PORTS)
        | flag(!entries.ranges.is_empty(), EXCLUDES_RANGES)
        | flag(settings.exclusions.only_outbound_ranges.is_some(), EXCLUDES_THE_REST)
        | flag(has(true), EXCLUDES_INBOUND)
        | flag(settings.bypass_inbound, BYPASSES_INBOUND)
        | flag(!settings.virtual_interfaces.is_empty(), REROUTES)
}

/// The flags of its entries in `INTERFACES`.
pub(crate) fn interface_flags(settings: &PodSettings) -> u32 {
    let flags = pod_flags(settings);
    let outbound = flags & (EXCLUDES_PORTS | EXCLUDES_RANGES | EXCLUDES_THE_REST) != 0;
    flags & (EXCLUDES_INBOUND | BYPASSES_INBOUND) | if outbound { EXCLUDES_OUTBOUND } else { 0 }
}

impl Inner {
    /// Sets the pod's entry and its exclusions; whether those were others before. The guard must know of new ones, and
    /// still of former ones. `known`: this agent has set the same ones before, which saves looking.
    pub(crate) fn set_pod_and_exclusions(
        &mut self,
        cookie: u64,
        pod: &Pod,
        settings: &PodSettings,
        known: bool,
    ) -> Result<bool, CaptureError> {
        let entries = Entries::of(settings);
        let before = self.maps.pod(cookie).map_or(0, |before| before.flags & FLAGS);
        let same_flags = before == pod.flags & FLAGS;
        let changed = !same_flags || (!known && self.maps.exclusions(cookie) != entries);
        if changed {
            let wholly = Pod {
                flags: pod.flags & !FLAGS,
                ..*pod
            };
            self.maps.set_pod(cookie, &wholly)?;
            self.maps.set_exclusions(cookie, &entries)?;
        }
        self.maps.set_pod(cookie, pod)?;
        Ok(changed)
    }

    /// What the interfaces of a plan are to have while exclusions change: new flags beside the former.
    pub(crate) fn with_former_flags(&self, index: u32, interface: &abi::Interface) -> abi::Interface {
        let former = self
            .maps
            .interface(index)
            .filter(|former| former.cookie == interface.cookie);
        abi::Interface {
            flags: interface.flags | former.map_or(0, |former| former.flags & FLAGS),
            ..*interface
        }
    }

    /// Resets connections that were excluded, and are not any more. Not those that pass by other rules: the host's, those
    /// from before the enrolment, and what the agent carries, whose other end in the pod is the agent's.
    pub(crate) fn end_former_exclusions(
        &self,
        netns: &Netns,
        plan: &PodPlan,
        settings: &PodSettings,
    ) -> Result<(), CaptureError> {
        let connected = diag::list_in(netns, diag::state::CONNECTED)?;
        let served: HashSet<u16> = diag::list_in(netns, diag::state::LISTEN)?
            .iter()
            .map(|socket| socket.local.port)
            .collect();
        let (agents, pods): (Vec<_>, Vec<_>) = connected.iter().partition(|socket| self.is_an_agents(socket));
        let carried: HashSet<Flow> = agents.iter().map(|socket| flow(socket.remote, socket.local)).collect();
        for socket in pods {
            let own = [plan.pod.ip4, plan.pod.ip6].contains(&socket.local.address);
            let flow = flow(socket.local, socket.remote);
            let passes = || carried.contains(&flow) || self.maps.is_kept(&flow) || self.maps.is_of_host(&flow);
            if !own || socket.is_local() || passes() {
                continue;
            }
            let came = self.maps.is_excluded_inbound(&flow) || served.contains(&socket.local.port);
            let remote = socket.remote.to_socket();
            let still = match came {
                true => settings.excludes_inbound(socket.local.port),
                false => settings.exclusions.excludes_outbound(remote.ip(), remote.port()),
            };
            if still {
                continue;
            }
            if let Err(error) = netns.enter(|| diag::destroy(socket)).and_then(|result| result) {
                tracing::debug!(%error, "resetting a connection that is not excluded any more");
            }
        }
        Ok(())
    }
}

fn flow(pod: Endpoint, remote: Endpoint) -> Flow {
    Flow { pod, remote }
}

#[cfg(test)]
mod tests {
    use model::Exclusions;

    use super::*;

    fn settings(excluded: &[&str], only: Option<&[&str]>) -> PodSettings {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        PodSettings {
            exclusions: Exclusions {
                outbound_ranges: nets(excluded),
                only_outbound_ranges: only.map(nets),
                ..Exclusions::default()
            },
            ..PodSettings::default()
        }
    }

    /// What the kernel does with the entries.
    fn looked_up(settings: &PodSettings, ip: IpAddr) -> bool {
        let entries = Entries::of(settings);
        let holds = |network: &IpAddr, length: u8| IpNet::new(*network, length).unwrap().contains(&ip);
        let found = entries
            .ranges
            .iter()
            .filter(|((network, length), _)| holds(network, *length))
            .max_by_key(|((_, length), _)| *length);
        found.map_or(pod_flags(settings) & EXCLUDES_THE_REST != 0, |(_, excluded)| *excluded)
    }

    #[test]
    fn the_longest_prefix_says_what_the_settings_say() {
        for settings in [
            settings(&["10.0.0.0/8", "10.1.0.0/16"], None),
            settings(&["10.0.0.0/8"], Some(&["10.1.0.0/16", "192.168.0.0/16"])),
            settings(&["10.1.0.0/16", "fd00::/8"], Some(&["10.0.0.0/8", "fd01::/16"])),
            settings(&["0.0.0.0/0"], None),
            settings(&[], Some(&[])),
            settings(&[], None),
        ] {
            for ip in ["10.1.2.3", "10.2.0.1", "192.168.0.1", "8.8.8.8", "fd01::1", "fe00::1"] {
                let ip: IpAddr = ip.parse().unwrap();
                let expected = settings.exclusions.excludes_outbound(ip, 80);
                assert_eq!(looked_up(&settings, ip), expected, "{ip} in {settings:?}");
            }
        }
    }

    #[test]
    fn keys_read_back_and_no_exclusions_mean_no_flags() {
        for range in [
            ("10.0.0.0", 8),
            ("0.0.0.0", 0),
            ("fd00::", 8),
            ("::", 0),
            ("10.0.0.1", 32),
        ] {
            let range = (range.0.parse().unwrap(), range.1);
            let (bits, key) = range_key(7 << 40, range);
            assert_eq!(range_of(bits, &key), range);
            assert_eq!(key.cookie(), 7 << 40);
        }
        assert_eq!(pod_flags(&PodSettings::default()), 0);
        assert_eq!(interface_flags(&PodSettings::default()), 0);
    }
}
