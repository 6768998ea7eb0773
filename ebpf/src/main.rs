//! Undercurrent's programs in the kernel, one file per hook.
//!
//! | file | hook | does |
//! | --- | --- | --- |
//! | `connect` | `cgroup/connect4`, `connect6` on the pods' cgroup | sends a captured pod's connections to the agent |
//! | `sock_ops` | `sock_ops` on the pods' and on the agent's cgroup | remembers where each connection was meant to go, and which ones the agent made |
//! | `getpeername` | `cgroup/getpeername4`, `6` on the pods' cgroup | shows the application the peer it dialled |
//! | `dns` | `cgroup/sendmsg4`, `6`, `recvmsg4`, `6` on the pods' cgroup, and a part of `connect` and `getpeername` | sends what a captured pod asks a name server to the agent |
//! | `sk_lookup` | `sk_lookup` in each captured pod's network namespace | gives new connections to the agent's listeners |
//! | `proof` | tcx egress, host side of the pod's veth | proves that a process of the host, such as the kubelet, opened a connection |
//! | `guard` | tcx ingress, host side of the pod's veth | lets out no TCP but the agent's |
//!
//! `exclusion` is what several of them ask: which connections a pod's settings keep out of the mesh.
//!
//! The guard alone is the security boundary; the other hooks make what it lets through what the application meant.
//! Nothing here is global to the machine: every node agent loads its own programs with its own maps.
#![no_std]
#![no_main]

mod connect;
mod context;
mod dns;
mod exclusion;
mod getpeername;
mod guard;
mod maps;
mod packet;
mod proof;
mod sk_lookup;
mod sock_ops;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers for GPL programs are used (`bpf_skb_cgroup_id` is not, `bpf_sk_assign` and the storages are).
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
