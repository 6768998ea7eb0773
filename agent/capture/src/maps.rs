//! The maps that the kernel's programs and the agent share.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use abi::{
    Address, CounterKey, DNS_SLOTS, DnsSlot, Endpoint, ExcludedPort, ExcludedRange, Flow, Interface, ListenerKey,
    OriginalKey, Pod, Reason, Restore,
};
use aya::{
    Ebpf,
    maps::{
        HashMap, IterableMap, LpmTrie, Map, MapData, MapError, PerCpuHashMap, PerCpuValues, SockHash, lpm_trie::Key,
    },
};

use crate::{
    error::{CaptureError, Tried, map_error},
    exclusions::{self, Entries},
    sys,
};

/// All maps of the object that are pinned; its constants and its log are not.
pub(crate) const PINNED: &[&str] = &[
    "PODS",
    "INTERFACES",
    "LISTENERS",
    "DIALLED",
    "ORIGINAL",
    "ADMITTED",
    "PROBES",
    "ASKED",
    "FLOWS",
    "EXCLUDED",
    "EXCLUDED_PORTS",
    "EXCLUDED_RANGES",
    "COUNTERS",
    "RESTORE",
    "DNS_SERVERS",
    "AGENTS",
];

/// In place of an interface's index: all that are gone.
const GONE: u32 = u32::MAX;

/// The maps, as the agent uses them.
pub(crate) struct Maps {
    pods: HashMap<MapData, u64, Pod>,
    interfaces: HashMap<MapData, u32, Interface>,
    listeners: SockHash<MapData, ListenerKey>,
    flows: HashMap<MapData, Flow, u32>,
    probes: HashMap<MapData, Flow, u32>,
    excluded: HashMap<MapData, Flow, u32>,
    excluded_ports: HashMap<MapData, ExcludedPort, u32>,
    excluded_ranges: LpmTrie<MapData, ExcludedRange, u32>,
    counters: PerCpuHashMap<MapData, CounterKey, u64>,
    restore: HashMap<MapData, u64, Restore>,
    agents: HashMap<MapData, u64, u64>,
    name_servers: HashMap<MapData, DnsSlot, Address>,
    lookups: Lookups,
}

/// Of `bpf(2)`: only what is not there.
const BPF_NOEXIST: u64 = 1;

/// What is there already stays.
fn copy<K: aya::Pod, V: aya::Pod>(
    directory: &Path,
    name: &str,
    kind: fn(MapData) -> Map,
    into: &mut HashMap<MapData, K, V>,
) {
    let found = MapData::from_pin(directory.join(name)).map(kind);
    let Some(Ok(from)) = found.ok().map(HashMap::<MapData, K, V>::try_from) else {
        tracing::info!(name, "what a map of another layout holds is not taken over");
        return;
    };
    for (key, value) in from.iter().filter_map(Result::ok) {
        let _ = into.insert(key, value, BPF_NOEXIST);
    }
}

impl Maps {
    pub(crate) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        fn map<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, CaptureError> {
            let map = ebpf.take_map(name).ok_or(CaptureError::Missing(name))?;
            T::try_from(map).map_err(map_error(name))
        }
        let name_servers = map(ebpf, "DNS_SERVERS")?;
        let lookups = Lookups::of(&map(ebpf, "ORIGINAL")?, &name_servers)?;
        Ok(Self {
            pods: map(ebpf, "PODS")?,
            interfaces: map(ebpf, "INTERFACES")?,
            listeners: map(ebpf, "LISTENERS")?,
            flows: map(ebpf, "FLOWS")?,
            probes: map(ebpf, "PROBES")?,
            excluded: map(ebpf, "EXCLUDED")?,
            excluded_ports: map(ebpf, "EXCLUDED_PORTS")?,
            excluded_ranges: map(ebpf, "EXCLUDED_RANGES")?,
            counters: map(ebpf, "COUNTERS")?,
            restore: map(ebpf, "RESTORE")?,
            agents: map(ebpf, "AGENTS")?,
            name_servers,
            lookups,
        })
    }

    /// Takes over what is to outlive a change of layouts, from the maps of another: whose sockets are an agent's, which
    /// connections pass, what is to be put back. What itself has another layout stays behind.
    pub(crate) fn take_over(&mut self, directory: &Path) {
        copy(directory, "AGENTS", Map::HashMap, &mut self.agents);
        copy(directory, "RESTORE", Map::HashMap, &mut self.restore);
        copy(directory, "FLOWS", Map::HashMap, &mut self.flows);
        copy(directory, "PROBES", Map::LruHashMap, &mut self.probes);
        copy(directory, "EXCLUDED", Map::LruHashMap, &mut self.excluded);
    }

    pub(crate) fn lookups(&self) -> Lookups {
        self.lookups.clone()
    }

    /// The cgroups of agents, each with its place in their order.
    pub(crate) fn agents(&self) -> Vec<(u64, u64)> {
        self.agents.iter().filter_map(Result::ok).collect()
    }

    pub(crate) fn is_agents(&self, cgroup: u64) -> bool {
        self.agents.get(&cgroup, 0).is_ok()
    }

    pub(crate) fn set_agent(&mut self, cgroup: u64, order: u64) -> Result<(), CaptureError> {
        self.agents.insert(cgroup, order, 0).map_err(map_error("AGENTS"))
    }

    pub(crate) fn remove_agent(&mut self, cgroup: u64) {
        let _ = self.agents.remove(&cgroup);
    }

    pub(crate) fn pod(&self, cookie: u64) -> Option<Pod> {
        self.pods.get(&cookie, 0).ok()
    }

    pub(crate) fn set_pod(&mut self, cookie: u64, pod: &Pod) -> Result<(), CaptureError> {
        self.pods.insert(cookie, pod, 0).map_err(map_error("PODS"))
    }

    pub(crate) fn remove_pod(&mut self, cookie: u64) {
        let _ = self.pods.remove(&cookie);
    }

    pub(crate) fn pod_cookies(&self) -> Vec<u64> {
        self.pods.keys().filter_map(Result::ok).collect()
    }

    pub(crate) fn set_interface(&mut self, index: u32, interface: &Interface) -> Result<(), CaptureError> {
        self.interfaces
            .insert(index, interface, 0)
            .map_err(map_error("INTERFACES"))
    }

    pub(crate) fn interface(&self, index: u32) -> Option<Interface> {
        self.interfaces.get(&index, 0).ok()
    }

    /// Removes the interfaces of a pod, but for those that stay.
    pub(crate) fn remove_interfaces(&mut self, cookie: u64, keep: &[u32]) {
        let gone: Vec<u32> = self
            .interfaces
            .iter()
            .filter_map(Result::ok)
            .filter(|(index, interface)| interface.cookie == cookie && !keep.contains(index))
            .map(|(index, _)| index)
            .collect();
        for index in gone {
            let _ = self.interfaces.remove(&index);
            self.forget_counters(index);
        }
    }

    /// Replaces what another agent may have left there.
    pub(crate) fn set_listener(
        &mut self,
        key: ListenerKey,
        listener: &std::net::TcpListener,
    ) -> Result<(), CaptureError> {
        self.listeners
            .insert(key, listener.as_raw_fd(), 0)
            .map_err(map_error("LISTENERS"))
    }

    pub(crate) fn remove_listener(&mut self, key: &ListenerKey) {
        let _ = self.listeners.remove(key);
    }

    /// Lets a connection live on that is older than the enrolment.
    pub(crate) fn keep_flow(&mut self, flow: Flow) -> Result<(), CaptureError> {
        match self.flows.insert(flow, 0, 1) {
            Err(error) if !is_there(&error) => Err(map_error("FLOWS")(error)),
            _ => Ok(()),
        }
    }

    /// Whether a connection is older than the enrolment.
    pub(crate) fn is_kept(&self, flow: &Flow) -> bool {
        self.flows.get(flow, 0).is_ok()
    }

    /// Whether a process of the host opened a connection.
    pub(crate) fn is_of_host(&self, flow: &Flow) -> bool {
        self.probes.get(flow, 0).is_ok()
    }

    /// Whether a connection came from outside to a port that was excluded.
    pub(crate) fn is_excluded_inbound(&self, flow: &Flow) -> bool {
        self.excluded.get(flow, 0).is_ok()
    }

    /// What is excluded of a pod.
    pub(crate) fn exclusions(&self, cookie: u64) -> Entries {
        let ports = self.excluded_ports.keys().filter_map(Result::ok);
        let ranges = self.excluded_ranges.iter().filter_map(Result::ok);
        Entries {
            ports: ports
                .filter(|key| key.cookie == cookie)
                .map(|key| (key.port, key.inbound == 1))
                .collect(),
            ranges: ranges
                .filter(|(key, _)| key.data().cookie() == cookie)
                .map(|(key, excluded)| (exclusions::range_of(key.prefix_len(), &key.data()), excluded == 1))
                .collect(),
        }
    }

    /// Makes it so.
    pub(crate) fn set_exclusions(&mut self, cookie: u64, wanted: &Entries) -> Result<(), CaptureError> {
        let before = self.exclusions(cookie);
        for port in before.ports.difference(&wanted.ports) {
            let _ = self.excluded_ports.remove(&exclusions::port_key(cookie, *port));
        }
        for range in before.ranges.keys().filter(|range| !wanted.ranges.contains_key(range)) {
            let (bits, key) = exclusions::range_key(cookie, *range);
            let _ = self.excluded_ranges.remove(&Key::new(bits, key));
        }
        for port in wanted.ports.difference(&before.ports) {
            self.excluded_ports
                .insert(exclusions::port_key(cookie, *port), 1, 0)
                .map_err(map_error("EXCLUDED_PORTS"))?;
        }
        for (range, excluded) in &wanted.ranges {
            let (bits, key) = exclusions::range_key(cookie, *range);
            self.excluded_ranges
                .insert(&Key::new(bits, key), u32::from(*excluded), 0)
                .map_err(map_error("EXCLUDED_RANGES"))?;
        }
        Ok(())
    }

    /// Removes the recorded connections of addresses that are not wanted.
    pub(crate) fn remove_flows(&mut self, addresses: &[Address], keep: impl Fn(&Flow) -> bool) {
        let gone: Vec<Flow> = self
            .flows
            .keys()
            .filter_map(Result::ok)
            .filter(|flow| addresses.contains(&flow.pod.address) && !keep(flow))
            .collect();
        for flow in gone {
            let _ = self.flows.remove(&flow);
        }
    }

    /// Forgets which name servers a pod asked.
    pub(crate) fn forget_name_servers(&mut self, cookie: u64) {
        for slot in 0..DNS_SLOTS {
            let _ = self.name_servers.remove(&DnsSlot::new(cookie, slot));
        }
    }

    pub(crate) fn restore(&self, cookie: u64) -> Option<Restore> {
        self.restore.get(&cookie, 0).ok()
    }

    pub(crate) fn set_restore(&mut self, cookie: u64, restore: &Restore) -> Result<(), CaptureError> {
        self.restore.insert(cookie, restore, 0).map_err(map_error("RESTORE"))
    }

    pub(crate) fn remove_restore(&mut self, cookie: u64) {
        let _ = self.restore.remove(&cookie);
    }

    pub(crate) fn restore_cookies(&self) -> Vec<u64> {
        self.restore.keys().filter_map(Result::ok).collect()
    }

    /// The counts by interface (0: not known; [`GONE`]) and reason.
    pub(crate) fn counters(&self) -> BTreeMap<(u32, Reason), u64> {
        self.counters
            .iter()
            .filter_map(Result::ok)
            .filter_map(|(key, values)| Some(((key.ifindex, Reason::from_number(key.reason)?), values.iter().sum())))
            .collect()
    }

    /// What was counted for an interface stays in the node's numbers, which only go up.
    fn forget_counters(&mut self, ifindex: u32) {
        for reason in Reason::ALL {
            let key = |ifindex| CounterKey {
                ifindex,
                reason: *reason as u32,
            };
            let Ok(counted) = self.counters.get(&key(ifindex), 0) else {
                continue;
            };
            let before = self.counters.get(&key(GONE), 0);
            let before = before
                .iter()
                .flat_map(|values| values.iter())
                .chain(std::iter::repeat(&0));
            let sums: Vec<u64> = counted.iter().zip(before).map(|(now, before)| now + before).collect();
            let kept = PerCpuValues::try_from(sums)
                .map_err(MapError::from)
                .and_then(|sums| self.counters.insert(key(GONE), sums, 0));
            if let Err(error) = kept {
                tracing::debug!(%error, ifindex, "the counts of an interface that is gone are lost");
            }
            let _ = self.counters.remove(&key(ifindex));
        }
    }
}

fn is_there(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.kind() == std::io::ErrorKind::AlreadyExists)
}

/// The maps of those who accept and dial: no lock, one system call.
#[derive(Clone)]
pub(crate) struct Lookups(Arc<LookupFds>);

struct LookupFds {
    original: OwnedFd,
    name_servers: OwnedFd,
}

impl Lookups {
    fn of(
        original: &HashMap<MapData, OriginalKey, Endpoint>,
        name_servers: &HashMap<MapData, DnsSlot, Address>,
    ) -> Result<Self, CaptureError> {
        let fd = |map: &MapData| {
            map.fd()
                .as_fd()
                .try_clone_to_owned()
                .tried(|| "duplicating a map's descriptor".into())
        };
        Ok(Self(Arc::new(LookupFds {
            original: fd(original.map())?,
            name_servers: fd(name_servers.map())?,
        })))
    }

    /// Takes the original destination of a connection.
    pub(crate) fn take_original(&self, key: &OriginalKey) -> Option<Endpoint> {
        sys::map_take(&self.0.original, key)
            .inspect_err(|error| tracing::warn!(%error, "looking up an original destination"))
            .ok()
            .flatten()
    }

    /// Which name server a pod's number for it stands for.
    pub(crate) fn name_server(&self, key: &DnsSlot) -> Option<Address> {
        sys::map_get(&self.0.name_servers, key).ok().flatten()
    }
}
