//! What root may do in a pod: Docker's default set without MKNOD (there is no device cgroup here), and NET_ADMIN, so
//! that a pod is as hostile as a mesh must expect it to be: raw sockets, its own routes and interfaces, any socket mark.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};

const POD: [Capability; 14] = [
    Capability::CAP_AUDIT_WRITE,
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_NET_RAW,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
    Capability::CAP_SYS_CHROOT,
];

/// Bounds this process and all that it becomes to a pod's capabilities.
pub(crate) fn bound() -> Result<()> {
    let allowed: CapsHashSet = POD.into_iter().collect();
    for capability in caps::runtime::thread_all_supported() {
        if !allowed.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).with_context(|| format!("cannot give up {capability}"))?;
        }
    }
    // Ambient ones go with the inheritable ones.
    let sets = [
        (CapSet::Inheritable, CapsHashSet::new()),
        (CapSet::Effective, allowed.clone()),
        (CapSet::Permitted, allowed),
    ];
    for (set, capabilities) in sets {
        caps::set(None, set, &capabilities).with_context(|| format!("cannot set the {set:?} capabilities"))?;
    }
    Ok(())
}
