//! The capture of one node: its programs, its pods, and the state that both are in.
//!
//! ```text
//!            know                capture
//! (refused) ------> known ---------------------> captured
//!                     ^    <-------------------     |
//!                     |           release           | forget
//!                     +---- forget ---> (refused) <-+
//! ```
//! Every operation is idempotent and says what should be, so that a crash at any point is repaired by doing it again.
//! Operations run one after the other on a blocking thread.

use std::{
    collections::HashMap,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use model::{PodSettings, WorkloadUid};

use crate::{
    agents::{self, AgentCgroup},
    capabilities::Capabilities,
    cgroup::{self, Cgroup},
    counters::{self, GuardCounters},
    error::{CaptureError, Tried},
    hooks,
    iptables::FormerRules,
    kernel_log::KernelLog,
    maps::Maps,
    netns::Netns,
    offered::Offered,
    pins::{self, Pins},
    plan::Addresses,
    pod::PodState,
    programs::{self, Constants, Programs},
    sockets::{DnsQueries, PodHandle},
    sys::{self, AttachType, Attached, Target},
    uninstall,
};

/// What a node's capture is made from.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The node's name; only for the log.
    pub node: String,
    /// Where links and maps are pinned, on bpffs: one directory for each node agent, such as
    /// `/sys/fs/bpf/undercurrent/NODE`.
    pub pin_dir: PathBuf,
    /// The cgroup (version 2) that holds all pods of the node, host-network pods too.
    pub pods_cgroup: PathBuf,
    /// The agent's own cgroup; none: the one that this process is in. Not the root, and not one that holds pods.
    pub agent_cgroup: Option<PathBuf>,
    /// Whether an agent before this one still finishes its connections: it may open more for them until
    /// [`Node::forget_former`].
    pub takes_over: bool,
    /// What the kernel has.
    pub capabilities: Capabilities,
    /// The eBPF object, `ebpf/target/bpfel-unknown-none/release/undercurrent`.
    pub object: &'static [u8],
    /// Whether the programs write to the log ([`Node::kernel_log`]). Off costs nothing: the verifier removes the code.
    pub kernel_log: bool,
}

/// A pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Its name in the mesh.
    pub uid: WorkloadUid,
    /// Its network namespace.
    pub netns: PathBuf,
    /// One address, or one of each family. The namespace must hold them.
    pub addresses: Vec<IpAddr>,
}

/// The capture of this node. Dropping it leaves everything as it is: pods stay captured, and what they send is refused
/// until the next agent comes.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Mutex<Inner>>,
    kernel_log: Arc<Mutex<Option<KernelLog>>>,
}

/// What programs of the node are attached to.
struct Cgroups {
    pods: Cgroup,
    agent: Cgroup,
}

/// What the operations work on.
pub(crate) struct Inner {
    pub(crate) pins: Pins,
    pub(crate) home: Netns,
    cgroups: Cgroups,
    pub(crate) programs: Programs,
    pub(crate) maps: Maps,
    pub(crate) pods: HashMap<WorkloadUid, PodState>,
    /// What an agent left that captured by iptables.
    pub(crate) former: FormerRules,
    /// Sockets of pods that are yet to be captured.
    pub(crate) offered: HashMap<WorkloadUid, Offered>,
}

impl Node {
    /// Loads the programs, or takes over from an earlier agent: pinned maps are kept, pinned links get the new programs
    /// one by one and never let anything past in between, and what belongs to pods that are gone is removed.
    ///
    /// Must be called in the node's network namespace, and by a process in the agent's cgroup.
    pub fn start(config: NodeConfig) -> Result<Self, CaptureError> {
        if !config.capabilities.can_capture() {
            return Err(CaptureError::Unsupported(config.capabilities));
        }
        cgroup::require_first_namespace()?;
        let pins = Pins::prepare(&config.pin_dir)?;
        let pods = Cgroup::open(&config.pods_cgroup)?;
        let agent = match &config.agent_cgroup {
            Some(path) => Cgroup::open(path)?,
            None => Cgroup::own()?,
        };
        if agent.contains(&pods) {
            return Err(CaptureError::Cgroup {
                path: agent.path,
                problem: "is the agent's and holds the pods: they would be exempt as it is".into(),
            });
        }
        let home = Netns::own().tried(|| "opening the node's network namespace".into())?;
        let own = AgentCgroup::of(&agent);
        let constants = Constants {
            agent: own,
            pods: &pods,
            node_cookie: if config.capabilities.tc_netns_cookie {
                home.cookie()
            } else {
                0
            },
            log_level: if config.kernel_log { KernelLog::LEVEL } else { 0 },
        };
        let (programs, mut maps, mut ebpf) = programs::load(config.object, &pins, &constants)?;
        let kernel_log = config.kernel_log.then(|| KernelLog::of(&mut ebpf)).transpose()?;
        // Host-network pods are in the pods' cgroup and in the node's namespace.
        let nobody = Addresses { ip4: None, ip6: None };
        maps.set_pod(home.cookie(), &nobody.entry(0, 0))?;
        let others = pins.other_versions();
        for directory in &others {
            tracing::info!(maps = %directory.display(), "an agent before this one had other layouts: what can be is taken over");
            maps.take_over(directory);
        }
        own.enter(&mut maps)?;
        agents::end_links(&pins, own, config.takes_over).tried(|| "looking for agents before this one".into())?;
        let mut inner = Inner {
            pins,
            home,
            cgroups: Cgroups { pods, agent },
            programs,
            maps,
            pods: HashMap::new(),
            former: FormerRules::default(),
            offered: HashMap::new(),
        };
        inner.attach_to_cgroups()?;
        inner.adopt_pods()?;
        sys::return_free_memory();
        tracing::info!(node = config.node, pins = %config.pin_dir.display(), "capture stands");
        Ok(Self {
            inner: Arc::new(Mutex::new(inner)),
            kernel_log: Arc::new(Mutex::new(kernel_log)),
        })
    }

    /// A pod exists and is not captured: its connections pass. Of a captured pod this says nothing new.
    pub async fn know(&self, spec: PodSpec) -> Result<(), CaptureError> {
        self.run(move |inner| inner.know(&spec)).await
    }

    /// Captures a pod. Connections that it already has live on; connection attempts under way are aborted, to be tried
    /// again through the mesh.
    ///
    /// Done again it repairs what is not as it should be, and returns the same listeners.
    pub async fn capture(&self, spec: PodSpec, settings: PodSettings) -> Result<PodHandle, CaptureError> {
        self.run(move |inner| inner.capture(&spec, &settings)).await
    }

    /// Whether the agent is the name server of a captured pod; then these are duplicates of its sockets, by the number of
    /// the name server that each stands for. A pod is captured without.
    pub async fn set_dns(&self, uid: &WorkloadUid, on: bool) -> Result<Option<DnsQueries>, CaptureError> {
        let uid = uid.clone();
        self.run(move |inner| inner.set_dns(&uid, on)).await
    }

    /// Ends a pod's capture and puts back what was changed in it; the pod stays known. What the agent's connections in it need
    /// stays until the last of them has ended, no listener of the agent is left, and [`Self::reconcile`] has seen it.
    pub async fn release(&self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        let uid = uid.clone();
        self.run(move |inner| inner.release(&uid)).await
    }

    /// A pod is gone.
    pub async fn forget(&self, uid: &WorkloadUid) {
        let uid = uid.clone();
        let forgotten = self.run(move |inner| {
            inner.forget(&uid);
            Ok(())
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "forgetting a pod");
        }
    }

    /// Compares what is with what should be, for every captured pod, and repairs it; says what was repaired. To be
    /// called now and then: a pod can spoil the rules in its own namespace.
    pub async fn reconcile(&self) -> Result<Vec<String>, CaptureError> {
        self.run(|inner| Ok(inner.reconcile())).await
    }

    /// Sockets that another process opened in a pod, by what they are for: those that fit are used when the pod is
    /// captured, the others are closed.
    pub fn offer(&self, uid: WorkloadUid, sockets: Vec<(String, OwnedFd)>) {
        lock(&self.inner).offered.insert(uid, Offered::new(sockets));
    }

    /// The agents before this one have ended: their connections to applications are not recorded any more.
    pub async fn forget_former(&self) -> Result<(), CaptureError> {
        self.run(|inner| {
            agents::end_links(&inner.pins, AgentCgroup::of(&inner.cgroups.agent), false)
                .tried(|| "forgetting the agents before this one".into())
        })
        .await
    }

    /// Forgets every pod that this agent was not told of since it started. To be called when it has been told all:
    /// pods may have gone while no agent ran.
    pub async fn forget_untold(&self) -> Result<(), CaptureError> {
        self.run(|inner| {
            inner.forget_untold();
            inner.former.end_on_node(&inner.home)
        })
        .await
    }

    /// What the hooks decided since they were pinned.
    pub fn counters(&self) -> GuardCounters {
        let inner = lock(&self.inner);
        counters::gather(&inner.maps, &inner.pods)
    }

    /// The log of the programs, once, if it was asked for: somebody must run it.
    pub fn kernel_log(&self) -> Option<KernelLog> {
        self.kernel_log.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Ends all capture and leaves nothing: no link, no pin, no rule, no route, no changed setting.
    pub async fn uninstall(self) -> Result<(), CaptureError> {
        self.run(|inner| {
            inner.pods.clear();
            uninstall::everything(&inner.pins, &inner.home, Some(&mut inner.maps))
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Inner) -> Result<T, CaptureError> + Send + 'static,
    ) -> Result<T, CaptureError> {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || operation(&mut lock(&inner)))
            .await
            .map_err(|_| CaptureError::Cancelled)?
    }
}

/// A panic in an operation leaves a state that the next one repairs.
fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Connects last: what they rewrite to must be recorded from the first one on. Whether one was not there.
    pub(crate) fn attach_to_cgroups(&self) -> Result<bool, CaptureError> {
        let (pins, programs) = (&self.pins, &self.programs);
        let Cgroups { pods, agent } = &self.cgroups;
        let mut fresh = false;
        let agents_link = AgentCgroup::of(agent).pin();
        let links = [
            ("sock_ops_pods", &programs.sock_ops_pods, AttachType::SockOps, pods),
            (&*agents_link, &programs.sock_ops_agent, AttachType::SockOps, agent),
            ("getpeername4", &programs.getpeername4, AttachType::GetPeerName4, pods),
            ("getpeername6", &programs.getpeername6, AttachType::GetPeerName6, pods),
            ("recvmsg4", &programs.recvmsg4, AttachType::RecvMsg4, pods),
            ("recvmsg6", &programs.recvmsg6, AttachType::RecvMsg6, pods),
            ("sendmsg4", &programs.sendmsg4, AttachType::SendMsg4, pods),
            ("sendmsg6", &programs.sendmsg6, AttachType::SendMsg6, pods),
            ("connect4", &programs.connect4, AttachType::Connect4, pods),
            ("connect6", &programs.connect6, AttachType::Connect6, pods),
        ];
        for (name, program, kind, cgroup) in links {
            let target = Target::File(std::os::fd::AsFd::as_fd(&cgroup.file));
            let path: &Path = &pins.links().join(name);
            fresh |= pins::attach(path, program, target, kind, Attached::Cgroup(cgroup.id))
                .tried(|| format!("attaching {name} to the cgroup {}", cgroup.path.display()))?;
        }
        Ok(fresh)
    }

    fn know(&mut self, spec: &PodSpec) -> Result<(), CaptureError> {
        let netns = self.open_netns(spec)?;
        self.refuse_taken_addresses(spec)?;
        let cookie = netns.cookie();
        let captured = self
            .pods
            .get(&spec.uid)
            .is_some_and(|known| known.netns.cookie() == cookie && known.is_captured());
        if captured {
            return Ok(());
        }
        self.end_reroutes(&netns, Addresses::of(spec)?)?;
        // Captured by an earlier agent, but not to be so any more.
        if self.pins.pod(cookie).exists() || self.maps.restore(cookie).is_some() {
            self.detach_pod(cookie)?;
            self.end_release(&netns)?;
        }
        if FormerRules::are_in(&netns)? {
            self.former.remove_redirects(&self.home, &netns)?;
        }
        let entry = Addresses::of(spec)?.entry(0, 0);
        self.maps.set_pod(cookie, &entry)?;
        self.forget_former_namespace(spec, cookie);
        self.pods.insert(spec.uid.clone(), PodState::known(spec.clone(), netns));
        Ok(())
    }

    /// A pod of the same name in another namespace: restarted, and nobody said so.
    pub(crate) fn forget_former_namespace(&mut self, spec: &PodSpec, cookie: u64) {
        if self
            .pods
            .get(&spec.uid)
            .is_some_and(|known| known.netns.cookie() != cookie)
        {
            self.forget(&spec.uid);
        }
    }

    pub(crate) fn open_netns(&self, spec: &PodSpec) -> Result<Netns, CaptureError> {
        let netns = self
            .home
            .open(&spec.netns)
            .tried(|| format!("opening the network namespace {}", spec.netns.display()))?;
        if netns.cookie() == self.home.cookie() {
            return Err(CaptureError::HostNetwork(spec.netns.clone()));
        }
        Ok(netns)
    }

    /// The address is the key by which `sk_lookup` finds a pod's listeners.
    pub(crate) fn refuse_taken_addresses(&self, spec: &PodSpec) -> Result<(), CaptureError> {
        let mut others = self
            .pods
            .values()
            .filter(|other| other.spec.uid != spec.uid && other.is_captured());
        let taken = others.find_map(|other| {
            let address = spec
                .addresses
                .iter()
                .find(|address| other.spec.addresses.contains(address))?;
            Some((*address, other.spec.uid.to_string()))
        });
        match taken {
            Some((address, owner)) => Err(CaptureError::AddressTaken { address, owner }),
            None => Ok(()),
        }
    }

    /// Gives the pinned links of all pods the new programs, and clears away what belongs to pods that are gone. One that
    /// lives and is only half captured stays so, and refuses connections, until the agent is told of it.
    fn adopt_pods(&mut self) -> Result<(), CaptureError> {
        for cookie in self.pins.pod_cookies() {
            let captured =
                hooks::adopt(&self.pins, &self.programs, cookie).tried(|| "adopting a pod's links".into())?;
            let lives = || uninstall::living(&self.home, cookie, &self.maps.restore(cookie)?);
            if !captured && lives().is_none() {
                tracing::info!(cookie, "a captured pod is gone");
                self.clear_pod(cookie)?;
            }
        }
        Ok(())
    }

    fn forget_untold(&mut self) {
        self.offered.clear();
        // Not before: had this agent ended half way, the one before it would have gone on with them.
        self.pins
            .other_versions()
            .iter()
            .for_each(|directory| pins::remove_tree(directory));
        let told: Vec<u64> = self.pods.values().map(|pod| pod.netns.cookie()).collect();
        let untold = |cookie: &u64| *cookie != self.home.cookie() && !told.contains(cookie);
        let mut gone: Vec<u64> = self.maps.pod_cookies();
        gone.extend(self.pins.pod_cookies());
        gone.extend(self.maps.restore_cookies());
        gone.retain(untold);
        for cookie in gone {
            if let Err(error) = self.clear_pod(cookie) {
                tracing::warn!(%error, cookie, "forgetting a pod that this agent was not told of");
            }
        }
    }

    /// Takes all traces of a pod away.
    pub(crate) fn clear_pod(&mut self, cookie: u64) -> Result<(), CaptureError> {
        self.detach_pod(cookie)?;
        if let Some(restore) = self.maps.restore(cookie) {
            uninstall::restore_pod(&self.home, cookie, &restore);
            self.maps.remove_restore(cookie);
        }
        self.maps.forget_name_servers(cookie);
        self.maps.remove_pod(cookie);
        Ok(())
    }
}
