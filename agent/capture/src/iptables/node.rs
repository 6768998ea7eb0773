//! The capture of one node by iptables: its pods, and the state that they are in.
//!
//! Every operation is idempotent and says what should be; what is, is read from the namespaces each time.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use abi::{Address, CAPTURE_PORTS, HBONE_PORT, INBOUND_PORT};
use model::{PodSettings, WorkloadUid};

use super::{
    conntrack,
    plan::{Family, Rules, Saved},
    program::Iptables,
    sockets::{self, IptablesPodHandle},
    takeover::FormerHooks,
};
use crate::{
    DnsQueries, PodListeners, PodSpec,
    diag::{self, TcpSocket},
    dns::DnsSockets,
    error::{CaptureError, Tried},
    interfaces,
    netns::Netns,
    offered::Offered,
    plan::{self, Addresses},
    routes::{self, CONNECTION_MARK},
};

/// The capture of this node by iptables. Dropping it leaves everything as it is: pods stay captured, and what they open
/// is refused until the next agent comes.
#[derive(Clone)]
pub struct IptablesNode(Arc<Mutex<Inner>>);

struct Inner {
    home: Netns,
    iptables: Iptables,
    pods: HashMap<WorkloadUid, PodState>,
    /// The addresses that the node's rules are for.
    probed: BTreeSet<IpAddr>,
    /// What an agent left that captured by eBPF, until all pods are taken over.
    former: Option<FormerHooks>,
    /// What namespaces had right after their rules were made, where iptables prints them in words other than ours.
    printed: HashMap<(u64, Family), Saved>,
    /// Sockets of pods that are yet to be captured.
    offered: HashMap<WorkloadUid, Offered>,
}

struct PodState {
    spec: PodSpec,
    netns: Netns,
    captured: Option<Captured>,
    /// Released, but connections still need a part of what was put into it.
    is_draining: bool,
}

struct Captured {
    settings: PodSettings,
    listeners: Arc<PodListeners>,
    /// Where the agent is, or was just now, its name server.
    dns: Option<DnsSockets>,
    dns_on: bool,
}

impl IptablesNode {
    /// Looks for the programs, and takes over the node's rules from an earlier agent. Must be called in the node's
    /// network namespace. `pin_dir` is where the eBPF capture would be: what it left there is taken over pod by pod.
    pub fn start(pin_dir: &Path) -> Result<Self, CaptureError> {
        let former = FormerHooks::open(pin_dir)?;
        if former.is_some() {
            tracing::info!(pins = %pin_dir.display(), "an agent before this one captured by eBPF: its pods are taken over");
        }
        let home = Netns::own().tried(|| "opening the node's network namespace".into())?;
        let iptables = Iptables::find(&home)?;
        let mut probed = BTreeSet::new();
        for family in families(&home) {
            probed.extend(iptables.saved(&home, family, Some("nat"))?.probed());
        }
        tracing::info!(backend = ?iptables.backend, "capture by iptables stands");
        Ok(Self(Arc::new(Mutex::new(Inner {
            home,
            iptables,
            pods: HashMap::new(),
            probed,
            former,
            printed: HashMap::new(),
            offered: HashMap::new(),
        }))))
    }

    /// A pod exists and is not captured. What an earlier agent left in it is removed; as with [`Self::release`], what
    /// connections need that live through that one goes with the last of them.
    pub async fn know(&self, spec: PodSpec) -> Result<(), CaptureError> {
        self.run(move |inner| inner.know(&spec)).await
    }

    /// Captures a pod. Connections that it already has live on.
    ///
    /// Done again it repairs what is not as it should be, and returns the same listeners.
    pub async fn capture(&self, spec: PodSpec, settings: PodSettings) -> Result<IptablesPodHandle, CaptureError> {
        self.run(move |inner| inner.capture(&spec, &settings)).await
    }

    /// Whether the agent is the name server of a captured pod; then these are duplicates of its sockets.
    pub async fn set_dns(&self, uid: &WorkloadUid, on: bool) -> Result<Option<DnsQueries>, CaptureError> {
        let uid = uid.clone();
        self.run(move |inner| inner.set_dns(&uid, on)).await
    }

    /// Ends a pod's capture and removes what was put into it; the pod stays known. Connections that the agent carries go
    /// on, and so does what comes to listeners that are still open: what they need is removed by [`Self::reconcile`] after
    /// the last of them.
    pub async fn release(&self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        let uid = uid.clone();
        self.run(move |inner| inner.release(&uid)).await
    }

    /// A pod is gone. Connections that it still has through the agent are reset.
    pub async fn forget(&self, uid: &WorkloadUid) {
        let uid = uid.clone();
        let forgotten = self.run(move |inner| inner.forget(&uid));
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "forgetting a pod");
        }
    }

    /// Compares what is with what should be, for every captured pod, and repairs it; says what was repaired.
    pub async fn reconcile(&self) -> Result<Vec<String>, CaptureError> {
        self.run(Inner::reconcile).await
    }

    /// Sockets that another process opened in a pod, by what they are for: those that fit are used when the pod is
    /// captured, the others are closed.
    pub fn offer(&self, uid: WorkloadUid, sockets: Vec<(String, OwnedFd)>) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.offered.insert(uid, Offered::new(sockets));
    }

    /// Forgets every pod that this agent was not told of since it started.
    pub async fn forget_untold(&self) -> Result<(), CaptureError> {
        self.run(|inner| {
            inner.offered.clear();
            let captured = inner.pods.values().filter(|pod| pod.captured.is_some());
            inner.probed = captured.flat_map(|pod| pod.spec.addresses.clone()).collect();
            inner.apply_to_node()?;
            inner.former.take().map_or(Ok(()), |former| former.end(&inner.home))
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Inner) -> Result<T, CaptureError> + Send + 'static,
    ) -> Result<T, CaptureError> {
        let inner = self.0.clone();
        // A panic in an operation leaves a state that the next one repairs.
        tokio::task::spawn_blocking(move || operation(&mut inner.lock().unwrap_or_else(PoisonError::into_inner)))
            .await
            .map_err(|_| CaptureError::Cancelled)?
    }
}

/// Removes the capture of a node and of pods, where there is any. To be called in the node's network namespace, when no
/// agent runs. A machine without iptables has none.
pub fn uninstall_iptables(pods: impl IntoIterator<Item = PathBuf>) -> Result<(), CaptureError> {
    let home = Netns::own().tried(|| "opening the node's network namespace".into())?;
    let iptables = match Iptables::find(&home) {
        Err(CaptureError::MissingProgram(_)) => return Ok(()),
        found => found?,
    };
    for path in pods {
        match home.open(&path) {
            Ok(netns) if netns.cookie() != home.cookie() => clean(&iptables, &netns)?,
            _ => tracing::debug!(netns = %path.display(), "a pod is gone: nothing to remove"),
        }
    }
    clean(&iptables, &home)
}

/// The families that a namespace's kernel has.
pub(super) fn families(netns: &Netns) -> Vec<Family> {
    let ip6 = netns.enter(|| Path::new("/proc/sys/net/ipv6").exists()).unwrap_or(true);
    Family::ALL
        .into_iter()
        .filter(|family| ip6 || *family == Family::Ip4)
        .collect()
}

/// Whether the namespace that the thread is in has `::1`.
fn has_loopback6() -> bool {
    std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// Removes whatever is ours from a namespace.
pub(super) fn clean(iptables: &Iptables, netns: &Netns) -> Result<(), CaptureError> {
    for family in families(netns) {
        if let Some(removal) = iptables.saved(netns, family, None)?.removal() {
            iptables.restore(netns, family, &removal)?;
        }
    }
    netns
        .enter(|| routes::unroute_marked(CONNECTION_MARK))
        .and_then(|result| result)
        .tried(|| format!("removing the routes of {}", netns.path().display()))
}

impl Inner {
    fn open_netns(&self, spec: &PodSpec) -> Result<Netns, CaptureError> {
        let netns = self
            .home
            .open(&spec.netns)
            .tried(|| format!("opening the network namespace {}", spec.netns.display()))?;
        if netns.cookie() == self.home.cookie() {
            return Err(CaptureError::HostNetwork(spec.netns.clone()));
        }
        // A listener on the same port would be refused by the kernel anyway; this says why.
        let is_taken = |other: &PodState| other.spec.uid != spec.uid && other.captured.is_some();
        for other in self.pods.values().filter(|other| is_taken(other)) {
            if let Some(address) = spec
                .addresses
                .iter()
                .find(|address| other.spec.addresses.contains(address))
            {
                return Err(CaptureError::AddressTaken {
                    address: *address,
                    owner: other.spec.uid.to_string(),
                });
            }
        }
        Ok(netns)
    }

    /// A pod of the same name in another namespace: restarted, and nobody said so.
    fn forget_former_namespace(&mut self, spec: &PodSpec, cookie: u64) -> Result<(), CaptureError> {
        match self.pods.get(&spec.uid) {
            Some(known) if known.netns.cookie() != cookie => self.forget(&spec.uid),
            _ => Ok(()),
        }
    }

    fn know(&mut self, spec: &PodSpec) -> Result<(), CaptureError> {
        let netns = self.open_netns(spec)?;
        self.forget_former_namespace(spec, netns.cookie())?;
        if self.pods.contains_key(&spec.uid) {
            return Ok(());
        }
        // Captured by an earlier agent, but not to be so any more: that one may still carry connections.
        let is_draining = self.remove_redirects(&netns)? || routed(&netns)?;
        if !is_draining {
            self.clear(&netns, &spec.addresses)?;
        }
        self.end_former(spec, &netns, false)?;
        let state = PodState {
            spec: spec.clone(),
            netns,
            captured: None,
            is_draining,
        };
        self.pods.insert(spec.uid.clone(), state);
        self.end_drained(&spec.uid)
    }

    fn capture(&mut self, spec: &PodSpec, settings: &PodSettings) -> Result<IptablesPodHandle, CaptureError> {
        let netns = self.open_netns(spec)?;
        self.forget_former_namespace(spec, netns.cookie())?;
        let listeners = match self.pods.get(&spec.uid).and_then(|pod| pod.captured.as_ref()) {
            Some(captured) => captured.listeners.clone(),
            None => {
                let offered = self.offered.remove(&spec.uid).unwrap_or_default();
                Arc::new(sockets::listen(
                    &netns,
                    families(&netns).contains(&Family::Ip6),
                    offered,
                )?)
            }
        };
        let addresses: Vec<IpAddr> = Addresses::of(spec)?.iter().collect();
        self.check_addresses(spec, &netns)?;
        self.probed.extend(&addresses);
        self.apply_to_node()?;
        let mut repaired = self.apply(spec, &netns, settings)?;
        if self.end_former(spec, &netns, true)? {
            repaired.extend(self.apply(spec, &netns, settings)?);
        }
        let before = self.pods.get_mut(&spec.uid).and_then(|pod| pod.captured.take());
        let (dns, dns_on) = before.map_or((None, false), |before| (before.dns, before.dns_on));
        tracing::debug!(pod = %spec.uid, ?repaired, "captured");
        let handle = IptablesPodHandle::new(spec.uid.clone(), netns.clone(), addresses, &listeners);
        let state = PodState {
            spec: spec.clone(),
            netns,
            captured: Some(Captured {
                settings: settings.clone(),
                listeners,
                dns,
                dns_on,
            }),
            is_draining: false,
        };
        self.pods.insert(spec.uid.clone(), state);
        Ok(handle)
    }

    /// Ends what an agent left in a pod that captured by eBPF; whether one did.
    fn end_former(&mut self, spec: &PodSpec, netns: &Netns, ruled: bool) -> Result<bool, CaptureError> {
        let Some(former) = &mut self.former else {
            return Ok(false);
        };
        former.end_of(netns, &Addresses::of(spec)?.entry(0, 0), ruled)?;
        Ok(true)
    }

    /// Capturing a namespace without the pod's addresses would give it another pod's identity.
    fn check_addresses(&self, spec: &PodSpec, netns: &Netns) -> Result<(), CaptureError> {
        let network = interfaces::look(&self.home, netns)
            .tried(|| format!("looking at the interfaces of {}", spec.netns.display()))?;
        for address in Addresses::of(spec)?.iter() {
            plan::holder(spec, &network, address)?;
        }
        Ok(())
    }

    /// Sockets before rules: what is redirected finds them. Rules before sockets, to end it.
    fn set_dns(&mut self, uid: &WorkloadUid, on: bool) -> Result<Option<DnsQueries>, CaptureError> {
        let unknown = || CaptureError::UnknownPod(uid.clone());
        let home = self.home.clone();
        let state = self.pods.get_mut(uid).ok_or_else(unknown)?;
        let captured = state.captured.as_mut().ok_or_else(unknown)?;
        let (spec, netns) = (state.spec.clone(), state.netns.clone());
        if on && captured.dns.is_none() {
            let asked = netns.enter(conntrack::is_there).and_then(|result| result);
            asked.tried(|| "asking conntrack (is nf_conntrack_netlink there?)".into())?;
            let ip6 = families(&home).contains(&Family::Ip6) && netns.enter(has_loopback6).unwrap_or(false);
            let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
            let sockets = DnsSockets::open_first(&netns, &loopback[..1 + usize::from(ip6)]);
            captured.dns = Some(sockets.tried(|| format!("opening DNS sockets in {}", spec.netns.display()))?);
        }
        captured.dns_on = on && captured.dns.as_ref().is_some_and(|dns| !dns.is_empty());
        let settings = captured.settings.clone();
        self.apply(&spec, &netns, &settings)?;
        let captured = self
            .pods
            .get_mut(uid)
            .and_then(|state| state.captured.as_mut())
            .ok_or_else(unknown)?;
        if !on {
            captured.dns = None;
        }
        let queries = captured.dns.as_ref().map(DnsSockets::duplicate).transpose();
        queries.tried(|| "duplicating DNS sockets".into())
    }

    /// Makes it so in the pod; says what was not. What answers need comes before what redirects.
    fn apply(
        &mut self,
        spec: &PodSpec,
        netns: &Netns,
        settings: &PodSettings,
    ) -> Result<Vec<&'static str>, CaptureError> {
        let addresses = Addresses::of(spec)?;
        let mut repaired = netns
            .enter(|| routes::route_marked(CONNECTION_MARK, addresses.ip4.is_some(), addresses.ip6.is_some()))
            .and_then(|result| result)
            .tried(|| format!("setting up the routes of {}", spec.netns.display()))?;
        let captured = self.pods.get(&spec.uid).and_then(|pod| pod.captured.as_ref());
        let dns = captured.map(|captured| captured.dns_on);
        for family in families(netns) {
            let mut rules = Rules::of_pod(family, settings);
            // What an earlier agent left stays until it is said whether it is to: `Inner::set_dns`.
            if dns.map_or_else(|| Ok(self.iptables.saved(netns, family, None)?.has_dns()), Ok)? {
                rules = rules.with_dns();
            }
            if self.apply_rules(netns, family, None, &rules)? {
                repaired.push("rules");
            }
        }
        Ok(repaired)
    }

    fn apply_to_node(&mut self) -> Result<bool, CaptureError> {
        let home = self.home.clone();
        let mut changed = false;
        for family in families(&home) {
            let rules = Rules::of_node(family, self.probed.iter().copied());
            changed |= self.apply_rules(&home, family, Some("nat"), &rules)?;
        }
        Ok(changed)
    }

    /// Whether anything was to be changed.
    fn apply_rules(
        &mut self,
        netns: &Netns,
        family: Family,
        table: Option<&str>,
        rules: &Rules,
    ) -> Result<bool, CaptureError> {
        let key = (netns.cookie(), family);
        let saved = self.iptables.saved(netns, family, table)?;
        let Some(changes) = rules.changes(&saved) else {
            return Ok(false);
        };
        if self.printed.get(&key) == Some(&saved) {
            return Ok(false);
        }
        self.iptables.restore(netns, family, &changes)?;
        let saved = self.iptables.saved(netns, family, table)?;
        if rules.changes(&saved).is_some() {
            self.printed.insert(key, saved);
        }
        Ok(true)
    }

    fn release(&mut self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        let state = self
            .pods
            .get_mut(uid)
            .ok_or_else(|| CaptureError::UnknownPod(uid.clone()))?;
        state.captured = None;
        state.is_draining = true;
        let netns = state.netns.clone();
        self.remove_redirects(&netns)?;
        self.end_drained(uid)
    }

    /// Removes the rest of what was in a released pod, once nothing needs it any more, nor may come to need it. Nothing is
    /// reset: what lives has its time.
    fn end_drained(&mut self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        let Some(state) = self.pods.get_mut(uid).filter(|state| state.is_draining) else {
            return Ok(());
        };
        if may_be_needed(&self.home, &state.netns)? {
            return Ok(());
        }
        let (netns, addresses) = (state.netns.clone(), state.spec.addresses.clone());
        self.clear(&netns, &addresses)?;
        if let Some(state) = self.pods.get_mut(uid) {
            state.is_draining = false;
        }
        Ok(())
    }

    fn forget(&mut self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        self.offered.remove(uid);
        match self.pods.remove(uid) {
            Some(state) => self.remove_from(&state.netns, &state.spec.addresses),
            None => Ok(()),
        }
    }

    /// Removes what captures new connections; tells whether there was anything. The other rules stay: they hold
    /// conntrack, without which what was redirected would leave the pod as it is, in plaintext.
    fn remove_redirects(&mut self, netns: &Netns) -> Result<bool, CaptureError> {
        let mut removed = false;
        for family in families(netns) {
            if let Some(removal) = self.iptables.saved(netns, family, None)?.removal_of_redirects() {
                self.iptables.restore(netns, family, &removal)?;
                removed = true;
            }
        }
        Ok(removed)
    }

    /// Removes what is in a pod that is gone, and what the node has for it. Connections that need it are reset.
    fn remove_from(&mut self, netns: &Netns, addresses: &[IpAddr]) -> Result<(), CaptureError> {
        if self.remove_redirects(netns)? || routed(netns)? {
            for socket in redirected(&self.home, netns)? {
                // It may have ended by itself meanwhile.
                let _ = netns.enter(|| diag::destroy(&socket));
            }
        }
        self.clear(netns, addresses)
    }

    /// Removes what is in a pod, and what the node has for it.
    fn clear(&mut self, netns: &Netns, addresses: &[IpAddr]) -> Result<(), CaptureError> {
        self.printed.retain(|(cookie, _), _| *cookie != netns.cookie());
        clean(&self.iptables, netns)?;
        let before = self.probed.len();
        // One that is not captured may have gone unheard, and another have its address by now.
        let captured = self.pods.values().filter(|pod| pod.captured.is_some());
        let others: Vec<&IpAddr> = captured
            .filter(|pod| pod.netns.cookie() != netns.cookie())
            .flat_map(|pod| &pod.spec.addresses)
            .collect();
        self.probed
            .retain(|address| !addresses.contains(address) || others.contains(&address));
        if self.probed.len() != before {
            self.apply_to_node()?;
        }
        Ok(())
    }

    fn reconcile(&mut self) -> Result<Vec<String>, CaptureError> {
        let captured: Vec<(PodSpec, Netns, PodSettings)> = self
            .pods
            .values()
            .filter_map(|pod| {
                Some((
                    pod.spec.clone(),
                    pod.netns.clone(),
                    pod.captured.as_ref()?.settings.clone(),
                ))
            })
            .collect();
        let mut repaired = Vec::new();
        if self.apply_to_node()? {
            repaired.push("the node's rules for probes".to_owned());
        }
        for (spec, netns, settings) in captured {
            let checked = self.check_addresses(&spec, &netns);
            let applied = checked.and_then(|()| self.apply(&spec, &netns, &settings));
            match applied.and_then(|done| end_carried(&netns).map(|()| done)) {
                Ok(done) => repaired.extend(done.into_iter().map(|what| format!("{}: {what}", spec.uid))),
                Err(error) => tracing::warn!(%error, pod = %spec.uid, "reconciling"),
            }
        }
        let uids: Vec<WorkloadUid> = self.pods.keys().cloned().collect();
        for uid in uids {
            if let Err(error) = self.end_drained(&uid) {
                tracing::warn!(%error, pod = %uid, "ending a capture");
            }
        }
        Ok(repaired)
    }
}

/// Removes what the connections of an agent that captured by eBPF need, once they have ended.
fn end_carried(netns: &Netns) -> Result<(), CaptureError> {
    let end = || {
        let needs_it = |socket: &TcpSocket| socket.is_of_loopback() && !socket.remote.to_socket().is_ipv4();
        if routes::is_carried_routed()? && !diag::list(diag::state::CONNECTED)?.iter().any(needs_it) {
            routes::unroute_carried()?;
        }
        Ok(())
    };
    netns
        .enter(end)
        .and_then(|result: std::io::Result<()>| result)
        .tried(|| format!("removing a route of {}", netns.path().display()))
}

/// Whether answers to the agent are routed back to it.
pub(super) fn routed(netns: &Netns) -> Result<bool, CaptureError> {
    netns
        .enter(|| routes::is_marked_routed(CONNECTION_MARK))
        .and_then(|result| result)
        .tried(|| format!("looking at the routes of {}", netns.path().display()))
}

/// The connections that need the rules: the agent's ends of what was redirected, and of what it dialled from clients'
/// addresses.
pub(super) fn redirected(home: &Netns, netns: &Netns) -> Result<Vec<TcpSocket>, CaptureError> {
    let own = own_addresses(home, netns)?;
    let mut sockets = diag::list_in(netns, diag::state::CONNECTED)?;
    sockets
        .retain(|socket| [CAPTURE_PORTS[0], INBOUND_PORT].contains(&socket.local.port) || is_from_client(socket, &own));
    Ok(sockets)
}

/// Whether a connection of the agent needs the rules, or one may come that will: in a tunnel its peer opens streams until
/// it has heard, each of which is dialled from the client's address, and a listener accepts until the proxy has closed it,
/// which is after the release.
fn may_be_needed(home: &Netns, netns: &Netns) -> Result<bool, CaptureError> {
    let own = own_addresses(home, netns)?;
    let states = diag::state::CONNECTED | diag::state::SYN_SENT | diag::state::LISTEN;
    Ok(diag::list_in(netns, states)?.iter().any(|socket| {
        [CAPTURE_PORTS[0], INBOUND_PORT, HBONE_PORT].contains(&socket.local.port) || is_from_client(socket, &own)
    }))
}

fn own_addresses(home: &Netns, netns: &Netns) -> Result<Vec<Address>, CaptureError> {
    let network =
        interfaces::look(home, netns).tried(|| format!("looking at the interfaces of {}", netns.path().display()))?;
    let interfaces = network.interfaces.iter();
    Ok(interfaces
        .flat_map(|interface| interface.addresses.iter().copied().map(Address::from_ip))
        .collect())
}

/// Whether the agent dialled the application from a client's address, which is none of the pod's own.
fn is_from_client(socket: &TcpSocket, own: &[Address]) -> bool {
    !own.contains(&socket.local.address) && own.contains(&socket.remote.address)
}
