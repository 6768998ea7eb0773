//! What the demo and the system tests need from this machine beyond programs: rights and kernel features.
//!
//! Which eBPF hook the kernel lacks is the agent's to say (it probes at start); this finds what would stop it before.

use std::path::Path;

use crate::setup::machine::is_root;

/// What is missing for namespaces, cgroups and eBPF; empty when all is there. Each line stands for itself.
pub fn missing() -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    missing_in(
        is_root(),
        Path::new("/sys/kernel/btf/vmlinux").exists(),
        &mounts,
        Path::new("/proc/self/ns/net").exists(),
    )
}

fn missing_in(root: bool, btf: bool, mounts: &str, namespaces: bool) -> Vec<String> {
    let mut missing = Vec::new();
    if !root {
        missing.push("root: network namespaces, cgroups and eBPF are made with root's rights".to_owned());
    }
    if !btf {
        missing.push("the kernel's type information (/sys/kernel/btf/vmlinux; CONFIG_DEBUG_INFO_BTF)".to_owned());
    }
    if !mounts.lines().any(|mount| mount.split(' ').nth(2) == Some("cgroup2")) {
        missing.push("a mounted cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup/unified)".to_owned());
    }
    if !namespaces {
        missing.push("network namespaces (CONFIG_NET_NS)".to_owned());
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn a_machine_with_everything_misses_nothing() {
        assert_eq!(missing_in(true, true, HYBRID, true), Vec::<String>::new());
    }

    #[test]
    fn each_thing_missing_is_named() {
        let missing = missing_in(false, false, "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n", true);
        assert_eq!(missing.len(), 3, "{missing:?}");
        assert!(missing[0].starts_with("root"));
    }
}
