//! Maps and constants, shared by the hooks. All maps are pinned by the agent; the constants are set when it loads.

use abi::{
    Address, CounterKey, Dialled, DnsSlot, Endpoint, ExcludedPort, ExcludedRange, Flow, Interface, ListenerKey,
    OriginalKey, Pod, Reason, Restore,
};
use aya_ebpf::{
    Global,
    bindings::{__sk_buff, BPF_ANY, BPF_F_NO_PREALLOC},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id,
    },
    macros::{btf_map, map},
    maps::{HashMap, LpmTrie, LruHashMap, PerCpuHashMap, SockHash},
};

/// The pods of the node, by the cookie of their network namespace. Who is not here may not connect.
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);

/// The host sides of the captured pods' veths, by interface index.
#[map]
pub static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);

/// The agent's listeners in the pods.
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(16384, 0);

/// Where a socket's application wanted to go. Lives and dies with the socket.
#[btf_map]
pub static DIALLED: SkStorage<Dialled> = SkStorage::new();

/// The same, as the agent can find it when it accepts. It takes the entry; the LRU is for those it never accepts.
#[map]
pub static ORIGINAL: LruHashMap<OriginalKey, Endpoint> = LruHashMap::with_max_entries(32768, 0);

/// Connections that the agent opened inside a pod to the pod's application, from the client's address.
#[map]
pub static ADMITTED: LruHashMap<Flow, u32> = LruHashMap::with_max_entries(32768, 0);

/// Connections that processes of the host opened to a pod, until the application's socket has them in its storage.
#[map]
pub static PROBES: LruHashMap<Flow, u32> = LruHashMap::with_max_entries(8192, 0);

/// UDP of the agent's from inside pods that may have none, and when that was (nanoseconds of the kernel's monotonic clock):
/// so that the answers reach it.
#[map]
pub static ASKED: LruHashMap<Flow, u64> = LruHashMap::with_max_entries(16384, 0);

/// Connections from outside to an excluded port of a pod, until the application's socket has them in its storage.
#[map]
pub static EXCLUDED: LruHashMap<Flow, u32> = LruHashMap::with_max_entries(32768, 0);

/// Ports that are not captured.
#[map]
pub static EXCLUDED_PORTS: HashMap<ExcludedPort, u32> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);

/// Which destinations are not captured.
#[map]
pub static EXCLUDED_RANGES: LpmTrie<ExcludedRange, u32> = LpmTrie::with_max_entries(65536, BPF_F_NO_PREALLOC);

/// Connections that are older than their pod's enrolment.
#[map]
pub static FLOWS: HashMap<Flow, u32> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);

/// What the hooks decided, by reason.
#[map]
pub static COUNTERS: PerCpuHashMap<CounterKey, u64> = PerCpuHashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);

/// The name servers that captured pods ask. An entry stays until its pod is gone.
#[map]
pub static DNS_SERVERS: HashMap<DnsSlot, Address> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);

/// What is to be put back when a pod is released; only user space uses it.
#[map]
pub static RESTORE: HashMap<u64, Restore> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);

/// The cgroups of this node's agents, by id, in the order of the values. A socket keeps the cgroup of the process that
/// opened it, and what a listener accepts has the listener's: so those of agents that have ended stay.
#[map]
pub static AGENTS: HashMap<u64, u64> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// The id of the agent's cgroup, and its depth.
#[unsafe(no_mangle)]
static AGENT_CGROUP: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static AGENT_LEVEL: Global<i32> = Global::new(0);

/// The id of the cgroup of all pods, and its depth.
#[unsafe(no_mangle)]
static PODS_CGROUP: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static PODS_LEVEL: Global<i32> = Global::new(0);

/// The cookie of the node's network namespace; 0 where the kernel has no `bpf_get_netns_cookie` for tc (before 6.15).
#[unsafe(no_mangle)]
pub static NODE_COOKIE: Global<u64> = Global::new(0);

/// Whether this process is an agent's.
#[inline(always)]
pub fn is_agents_process() -> bool {
    // SAFETY: helpers without memory arguments.
    unsafe {
        bpf_get_current_ancestor_cgroup_id(AGENT_LEVEL.load()) == AGENT_CGROUP.load()
            || is_agents_cgroup(bpf_get_current_cgroup_id())
    }
}

/// Whether an agent's socket sent this packet.
///
/// # Safety
/// The pointer must be to a valid context.
#[inline(always)]
pub unsafe fn is_agents_packet(skb: *mut __sk_buff) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        bpf_skb_ancestor_cgroup_id(skb, AGENT_LEVEL.load()) == AGENT_CGROUP.load()
            || is_agents_cgroup(bpf_skb_cgroup_id(skb))
    }
}

#[inline(always)]
fn is_agents_cgroup(id: u64) -> bool {
    // SAFETY: only the presence matters.
    unsafe { AGENTS.get(&id).is_some() }
}

/// The id and the depth of the pods' cgroup.
#[inline(always)]
pub fn pods_cgroup() -> (u64, i32) {
    (PODS_CGROUP.load(), PODS_LEVEL.load())
}

/// Counts a decision. `ifindex` is 0 where the hook can't know the pod.
#[inline(always)]
pub fn count(ifindex: u32, reason: Reason) {
    add(ifindex, reason, 1);
}

/// Counts several.
#[inline(always)]
pub fn add(ifindex: u32, reason: Reason, number: u64) {
    let key = CounterKey {
        ifindex,
        reason: reason as u32,
    };
    if let Some(counter) = COUNTERS.get_ptr_mut(&key) {
        // SAFETY: the pointer is to this CPU's value; an interrupt between load and store may lose one count.
        unsafe { *counter += number };
    } else {
        let _ = COUNTERS.insert(&key, &number, u64::from(BPF_ANY));
    }
}
