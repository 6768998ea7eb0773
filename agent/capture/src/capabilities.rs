//! What this kernel can do, hook by hook, found out by asking it and not by its version.

use std::fmt;

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_program_supported},
};

/// Whether a hook is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// It is.
    Available,
    /// It is not.
    Unsupported {
        /// What the kernel lacks.
        feature: &'static str,
        /// The first kernel that has it.
        needs_kernel: &'static str,
    },
    /// It could not be found out, usually for want of rights.
    Unknown {
        /// What the kernel said.
        error: String,
    },
}

/// A hook that capture needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// Its name.
    pub name: &'static str,
    /// What capture does with it.
    pub purpose: &'static str,
    /// Whether it is there.
    pub support: Support,
}

/// What this kernel can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// All of these are needed for eBPF capture.
    pub hooks: Vec<Hook>,
    /// Whether tc programs can ask for the network namespace of a packet's socket: the proof of probes is then also
    /// bound to the node's own namespace. Wanted, not needed (kernel 6.15).
    pub tc_netns_cookie: bool,
}

impl Capabilities {
    /// What is missing for eBPF capture, hook by hook.
    pub fn lacking(&self) -> Vec<String> {
        let missing = self.hooks.iter().filter(|hook| hook.support != Support::Available);
        missing
            .map(|hook| format!("{} ({})", hook.name, hook.detail()))
            .collect()
    }

    /// Whether eBPF capture can stand here.
    pub fn can_capture(&self) -> bool {
        self.hooks.iter().all(|hook| hook.support == Support::Available)
    }
}

impl Hook {
    /// What is done with it, and why that can't be.
    pub fn detail(&self) -> String {
        match &self.support {
            Support::Available => self.purpose.to_owned(),
            Support::Unsupported { feature, needs_kernel } => {
                format!("{}: unsupported: {feature}, needs kernel {needs_kernel}", self.purpose)
            }
            Support::Unknown { error } => format!("{}: unknown: {error}", self.purpose),
        }
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for hook in &self.hooks {
            write!(f, "{:<14} {:<52} ", hook.name, hook.purpose)?;
            match &hook.support {
                Support::Available => writeln!(f, "available")?,
                Support::Unsupported { feature, needs_kernel } => {
                    writeln!(f, "unsupported: {feature}, needs kernel {needs_kernel}")?;
                }
                Support::Unknown { error } => writeln!(f, "unknown: {error}")?,
            }
        }
        Ok(())
    }
}

/// Asks the kernel. Needs CAP_BPF and CAP_NET_ADMIN, in practice root.
pub fn probe() -> Capabilities {
    let connect = ProgramType::CgroupSockAddr;
    let classifier = ProgramType::SchedClassifier;
    let hooks = vec![
        hook("connect4/6", "sends the pods' connections to the agent", || {
            helper(
                connect,
                BpfHelper::BPF_FUNC_get_netns_cookie,
                "bpf_get_netns_cookie for connect",
                "5.7",
            )?;
            helper(
                connect,
                BpfHelper::BPF_FUNC_set_retval,
                "bpf_set_retval for connect",
                "5.18",
            )
        }),
        hook(
            "getpeername4/6",
            "shows applications the peer that they dialled",
            || {
                // Loaded for connect; the same kernel brought its attach type and the helper asked for above.
                program(connect, "cgroup/getpeername", "5.8")
            },
        ),
        hook("sock_ops", "remembers where connections were meant to go", || {
            helper(
                ProgramType::SockOps,
                BpfHelper::BPF_FUNC_get_netns_cookie,
                "bpf_get_netns_cookie for sock_ops",
                "5.15",
            )
        }),
        hook("sk_lookup", "gives connections to the agent's listeners", || {
            helper(
                ProgramType::SkLookup,
                BpfHelper::BPF_FUNC_sk_assign,
                "sk_lookup programs",
                "5.9",
            )
        }),
        hook("tcx egress", "proves that a probe comes from the host", || {
            helper(
                classifier,
                BpfHelper::BPF_FUNC_skb_ancestor_cgroup_id,
                "bpf_skb_ancestor_cgroup_id",
                "4.19",
            )?;
            tcx()
        }),
        hook("tcx ingress", "lets out no TCP but the agent's", || {
            helper(
                classifier,
                BpfHelper::BPF_FUNC_skb_cgroup_id,
                "bpf_skb_cgroup_id",
                "4.18",
            )?;
            tcx()
        }),
    ];
    Capabilities {
        hooks,
        tc_netns_cookie: is_helper_supported(classifier, BpfHelper::BPF_FUNC_get_netns_cookie).unwrap_or(false),
    }
}

fn hook(name: &'static str, purpose: &'static str, ask: impl FnOnce() -> Result<(), Support>) -> Hook {
    Hook {
        name,
        purpose,
        support: ask().err().unwrap_or(Support::Available),
    }
}

fn verdict(
    answer: Result<bool, aya::programs::ProgramError>,
    feature: &'static str,
    needs_kernel: &'static str,
) -> Result<(), Support> {
    match answer {
        Ok(true) => Ok(()),
        Ok(false) => Err(Support::Unsupported { feature, needs_kernel }),
        Err(error) => Err(Support::Unknown {
            error: error.to_string(),
        }),
    }
}

fn program(kind: ProgramType, feature: &'static str, needs_kernel: &'static str) -> Result<(), Support> {
    verdict(is_program_supported(kind), feature, needs_kernel)
}

fn helper(
    kind: ProgramType,
    helper: BpfHelper,
    feature: &'static str,
    needs_kernel: &'static str,
) -> Result<(), Support> {
    verdict(is_helper_supported(kind, helper), feature, needs_kernel)
}

/// tcx has no program type of its own: whether it can be queried tells.
fn tcx() -> Result<(), Support> {
    match crate::sys::tcx_query() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Support::Unsupported {
            feature: "tcx links",
            needs_kernel: "6.6",
        }),
        Err(error) => Err(Support::Unknown {
            error: error.to_string(),
        }),
    }
}
