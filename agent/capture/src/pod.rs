//! One pod: its capture applied, repaired and taken back.
//!
//! Order matters, so that nothing slips through and nothing is cut off. To capture: what answers need (routes),
//! listeners, the proof of probes, steering (handshakes under way are recorded before it and right after it), the connect
//! hooks; from here on every new connection is captured, so the ones that are still there are older: they are recorded;
//! then the guard. What is recorded once more afterwards are those whose SYN had left before the guard came. To release:
//! the guard first, and back; what answers need stays for as long as the agent has connections in the pod, or listeners
//! (`what_the_agent_carries_outlives_the_release`).

use std::{collections::HashSet, fs, io, os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use abi::{
    Address, CAPTURE_PORTS, DNS, Endpoint, Flow, HBONE_PORT, INBOUND_PORT, ListenerKey, ListenerKind, REROUTES, Restore,
};
use model::{PodSettings, WorkloadUid};
use socket2::SockRef;

use crate::{
    agents::AgentCgroup,
    diag,
    dns::DnsSockets,
    error::{CaptureError, Tried},
    exclusions::Entries,
    hooks::{Hook, attach_steer, attach_tcx},
    interfaces,
    iptables::FormerRules,
    netns::Netns,
    node::{Inner, PodSpec},
    pins,
    plan::{self, Addresses, PodPlan},
    routes::{self, Before},
    sockets::{DnsQueries, Listeners, PodHandle},
};

/// A pod that the agent was told of.
pub(crate) struct PodState {
    pub(crate) spec: PodSpec,
    pub(crate) netns: Netns,
    pub(crate) captured: Option<Captured>,
}

/// What is there while a pod is captured.
pub(crate) struct Captured {
    pub(crate) plan: PodPlan,
    pub(crate) settings: PodSettings,
    pub(crate) listeners: Arc<Listeners>,
    /// Where the agent is its name server.
    pub(crate) dns: Option<DnsSockets>,
}

impl PodState {
    pub(crate) fn known(spec: PodSpec, netns: Netns) -> Self {
        Self {
            spec,
            netns,
            captured: None,
        }
    }

    pub(crate) fn is_captured(&self) -> bool {
        self.captured.is_some()
    }
}

impl Inner {
    pub(crate) fn capture(&mut self, spec: &PodSpec, settings: &PodSettings) -> Result<PodHandle, CaptureError> {
        let netns = self.open_netns(spec)?;
        self.refuse_taken_addresses(spec)?;
        self.forget_former_namespace(spec, netns.cookie());
        let network = interfaces::look(&self.home, &netns)
            .tried(|| format!("looking at the interfaces of {}", spec.netns.display()))?;
        let mut plan = plan::plan(spec, netns.cookie(), &network, settings)?;
        plan.pod.flags |= self.dns_flag(&spec.uid, netns.cookie());
        let listeners = match self.pods.get(&spec.uid).and_then(|pod| pod.captured.as_ref()) {
            Some(captured) => captured.listeners.clone(),
            None => {
                let offered = self.offered.remove(&spec.uid);
                let any = offered.is_some();
                let listeners = Listeners::open(&netns, plan.ip6, offered.unwrap_or_default())
                    .tried(|| format!("listening in {}", spec.netns.display()))?;
                if any {
                    self.enter_openers(&netns, &listeners)?;
                }
                Arc::new(listeners)
            }
        };
        let repaired = self.apply(spec, &netns, &plan, settings, &listeners)?;
        tracing::debug!(pod = %spec.uid, ?repaired, "captured");
        let handle = PodHandle::new(spec.uid.clone(), netns.clone(), self.maps.lookups(), &listeners);
        let dns = self
            .pods
            .get_mut(&spec.uid)
            .and_then(|pod| pod.captured.as_mut()?.dns.take());
        let captured = Captured {
            plan,
            settings: settings.clone(),
            listeners,
            dns,
        };
        let state = PodState {
            spec: spec.clone(),
            netns,
            captured: Some(captured),
        };
        self.pods.insert(spec.uid.clone(), state);
        Ok(handle)
    }

    /// What a listener accepts has the cgroup of the agent that opened it; one that captured by iptables never entered
    /// itself (`from_iptables_to_ebpf_with_its_listeners`).
    fn enter_openers(&mut self, netns: &Netns, listeners: &Listeners) -> Result<(), CaptureError> {
        let cookies: io::Result<Vec<u64>> = listeners
            .iter()
            .map(|(_, listener)| SockRef::from(listener).cookie())
            .collect();
        let cookies = cookies.tried(|| "asking for the cookies of listeners".into())?;
        let listening = diag::list_in(netns, diag::state::LISTEN)?;
        let opened = listening.iter().filter(|socket| cookies.contains(&socket.cookie()));
        for id in opened.filter_map(|socket| socket.cgroup) {
            if !self.maps.is_agents(id) {
                AgentCgroup { id, level: 0 }.enter(&mut self.maps)?;
            }
        }
        Ok(())
    }

    /// Becomes a captured pod's name server, or ends to be it.
    pub(crate) fn set_dns(&mut self, uid: &WorkloadUid, on: bool) -> Result<Option<DnsQueries>, CaptureError> {
        let unknown = || CaptureError::UnknownPod(uid.clone());
        let state = self.pods.get_mut(uid).ok_or_else(unknown)?;
        let captured = state.captured.as_mut().ok_or_else(unknown)?;
        if on && captured.dns.is_none() {
            let own: Vec<_> = addresses(&captured.plan.pod).map(|address| address.to_ip()).collect();
            let sockets = DnsSockets::open(&state.netns, &own);
            captured.dns = Some(sockets.tried(|| format!("opening DNS sockets in {}", state.spec.netns.display()))?);
        } else if !on {
            captured.dns = None;
        }
        let flag = if on { DNS } else { 0 };
        captured.plan.pod.flags = captured.plan.pod.flags & !DNS | flag;
        self.maps.set_pod(state.netns.cookie(), &captured.plan.pod)?;
        let queries = captured.dns.as_ref().map(DnsSockets::duplicate).transpose();
        queries.tried(|| "duplicating DNS sockets".into())
    }

    /// Of a pod that this agent has not captured before, what an earlier agent left holds until [`Self::set_dns`]: else
    /// its queries would pass the agent by in between (`a_successor_leaves_no_gap_in_which_queries_pass_it_by`).
    fn dns_flag(&self, uid: &WorkloadUid, cookie: u64) -> u32 {
        let captured = self.pods.get(uid).and_then(|pod| pod.captured.as_ref());
        let flags = captured.map(|captured| captured.plan.pod.flags);
        let flags = flags.or_else(|| self.maps.pod(cookie).map(|pod| pod.flags));
        flags.unwrap_or(0) & DNS
    }

    /// Makes a plan true; says what was not.
    fn apply(
        &mut self,
        spec: &PodSpec,
        netns: &Netns,
        plan: &PodPlan,
        settings: &PodSettings,
        listeners: &Listeners,
    ) -> Result<Vec<&'static str>, CaptureError> {
        let cookie = netns.cookie();
        self.save_settings(spec, netns)?;
        let mut repaired = netns
            .enter(|| routes::apply(plan.ip4, plan.ip6))
            .and_then(|result| result)
            .tried(|| format!("setting up the routes of {}", spec.netns.display()))?;
        for (kind, listener) in listeners.iter() {
            for address in addresses(&plan.pod) {
                self.maps.set_listener(listener_key(address, kind), listener)?;
            }
        }
        for (index, interface) in &plan.interfaces {
            let interface = self.with_former_flags(*index, interface);
            self.maps.set_interface(*index, &interface)?;
        }
        let directory = self.pins.pod(cookie);
        fs::create_dir_all(&directory).tried(|| format!("creating {}", directory.display()))?;
        for (index, _) in &plan.interfaces {
            if attach_tcx(&directory, Hook::Proof, *index, &self.programs)? {
                repaired.push("proof");
            }
        }
        let guarded = |(index, _): &(u32, _)| Hook::Guard.pin(&directory, *index).exists();
        let was_captured = plan.interfaces.iter().any(guarded);
        if !was_captured {
            self.keep_handshakes(netns, plan)?;
        }
        if attach_steer(&directory, netns, &self.programs)? {
            repaired.push("steer");
        }
        if !was_captured {
            // Those that began between the two.
            self.keep_handshakes(netns, plan)?;
        }
        let reroutes = self.reroutes(cookie);
        let captured = self.pods.get(&spec.uid).and_then(|pod| pod.captured.as_ref());
        let known = captured.is_some_and(|captured| captured.settings == *settings);
        // What is older than the capture is not a former exclusion.
        if self.set_pod_and_exclusions(cookie, &plan.pod, settings, known)? && was_captured {
            self.end_former_exclusions(netns, plan, settings)?;
        }
        for (index, interface) in &plan.interfaces {
            self.maps.set_interface(*index, interface)?;
        }
        let first = self.pods.get(&spec.uid).is_none_or(|pod| !pod.is_captured());
        let had_rules = first && FormerRules::are_in(netns)?;
        if had_rules {
            // What begins from here on is captured by the hooks.
            self.former.remove_redirects(&self.home, netns)?;
            repaired.push("former rules");
        }
        if self.apply_reroutes(netns, Addresses::of(spec)?, settings, listeners, reroutes)? {
            repaired.push("rules of virtual interfaces");
        }
        self.attach_guards(&directory, netns, plan, had_rules, &mut repaired)?;
        self.drop_former_interfaces(&directory, cookie, plan)?;
        Ok(repaired)
    }

    /// Whether there are rules for virtual interfaces in a pod.
    fn reroutes(&self, cookie: u64) -> bool {
        self.maps.pod(cookie).is_some_and(|pod| pod.flags & REROUTES != 0)
    }

    /// The listener and the rules for what comes by the pod's virtual interfaces. `before`: there were some.
    fn apply_reroutes(
        &mut self,
        netns: &Netns,
        addresses: Addresses,
        settings: &PodSettings,
        listeners: &Listeners,
        before: bool,
    ) -> Result<bool, CaptureError> {
        if settings.virtual_interfaces.is_empty() && !before {
            return Ok(false);
        }
        for address in addresses.iter().map(Address::from_ip) {
            let key = listener_key(address, ListenerKind::Rerouted);
            match settings.virtual_interfaces.is_empty() {
                true => self.maps.remove_listener(&key),
                false => self.maps.set_listener(key, listeners.outbound())?,
            }
        }
        self.former.reroute(&self.home, netns, addresses, settings)
    }

    /// Removes the rules for virtual interfaces.
    pub(crate) fn end_reroutes(&mut self, netns: &Netns, addresses: Addresses) -> Result<(), CaptureError> {
        if self.reroutes(netns.cookie()) {
            self.former
                .reroute(&self.home, netns, addresses, &PodSettings::default())?;
        }
        Ok(())
    }

    /// The guard, last, and what lives on in spite of it.
    fn attach_guards(
        &mut self,
        directory: &Path,
        netns: &Netns,
        plan: &PodPlan,
        had_rules: bool,
        repaired: &mut Vec<&'static str>,
    ) -> Result<(), CaptureError> {
        if plan
            .interfaces
            .iter()
            .any(|(index, _)| !Hook::Guard.pin(directory, *index).exists())
        {
            self.keep_connections(netns, plan, had_rules)?;
            for (index, _) in &plan.interfaces {
                attach_tcx(directory, Hook::Guard, *index, &self.programs)?;
            }
            self.keep_connections(netns, plan, had_rules)?;
            repaired.push("guard");
        }
        for (index, _) in &plan.interfaces {
            if attach_tcx(directory, Hook::Guard, *index, &self.programs)? {
                repaired.push("guard");
            }
        }
        Ok(())
    }

    /// Remembers, before anything is changed and only then, what is to be put back.
    fn save_settings(&mut self, spec: &PodSpec, netns: &Netns) -> Result<(), CaptureError> {
        if self.maps.restore(netns.cookie()).is_some() {
            return Ok(());
        }
        let before = netns
            .enter(routes::before)
            .and_then(|result| result)
            .tried(|| format!("reading the settings of {}", spec.netns.display()))?;
        let mut restore = Restore {
            netns: [0; 240],
            tcp_fwmark_accept: before.tcp_fwmark_accept,
            rp_filter_all: if before.rp_filter_all == 1 {
                1
            } else {
                Restore::UNTOUCHED
            },
            fwmark_reflect4: before.fwmark_reflect[0],
            fwmark_reflect6: before.fwmark_reflect[1],
        };
        // A longer path can't be restored after a crash of the agent, only while it runs.
        let path = spec.netns.as_os_str().as_bytes();
        if path.len() < restore.netns.len() {
            restore.netns[..path.len()].copy_from_slice(path);
        }
        self.maps.set_restore(netns.cookie(), &restore)
    }

    /// Whether an agent opened this socket, or the listener that accepted it.
    pub(crate) fn is_an_agents(&self, socket: &diag::TcpSocket) -> bool {
        socket.cgroup.is_some_and(|cgroup| self.maps.is_agents(cgroup))
    }

    fn is_the_pods(&self, socket: &diag::TcpSocket) -> bool {
        !self.is_an_agents(socket) && !socket.is_local()
    }

    /// Records the pod's connections, so that the guard lets them live, and aborts attempts to connect: their SYNs
    /// would be dropped until they time out, and the next try is captured.
    /// Of a pod that rules captured, what they redirected is not let out: nor what may have been, and has lost its other
    /// end.
    fn keep_connections(&mut self, netns: &Netns, plan: &PodPlan, had_rules: bool) -> Result<(), CaptureError> {
        let begun = diag::list_in(netns, diag::state::SYN_SENT)?;
        for socket in begun.iter().filter(|socket| self.is_the_pods(socket)) {
            if let Err(error) = netns.enter(|| diag::destroy(socket)).and_then(|result| result) {
                tracing::debug!(%error, "aborting an attempt to connect");
            }
        }
        let states = if had_rules {
            diag::state::CONNECTED & !diag::state::CLOSE_WAIT
        } else {
            diag::state::CONNECTED
        };
        let connected = diag::list_in(netns, states)?;
        let ends = connected.iter().filter(|_| had_rules);
        let redirected: HashSet<Endpoint> = ends
            .filter(|socket| socket.local.port == CAPTURE_PORTS[0])
            .map(|socket| socket.remote)
            .collect();
        for socket in &connected {
            let own = self.is_the_pods(socket) && addresses(&plan.pod).any(|address| address == socket.local.address);
            if own && !redirected.contains(&socket.local) {
                self.maps.keep_flow(Flow {
                    pod: socket.local,
                    remote: socket.remote,
                })?;
            }
        }
        Ok(())
    }

    /// Records the handshakes from outside that are under way, before anything is steered: they come to the application, and
    /// their other ends may be connected already. And those once more that there are right after it: among these are the
    /// first ones of the agent's own, which the kernel does not tell from others. What is recorded of them has no use, and
    /// goes when they end.
    fn keep_handshakes(&mut self, netns: &Netns, plan: &PodPlan) -> Result<(), CaptureError> {
        let begun = diag::list_in(netns, diag::state::SYN_RECV)?;
        let agents = [CAPTURE_PORTS[0], INBOUND_PORT, HBONE_PORT];
        for socket in &begun {
            let own = addresses(&plan.pod).any(|address| address == socket.local.address);
            if own && !socket.is_local() && !agents.contains(&socket.local.port) {
                self.maps.keep_flow(Flow {
                    pod: socket.local,
                    remote: socket.remote,
                })?;
            }
        }
        Ok(())
    }

    /// Removes what belongs to interfaces that the pod no longer has.
    fn drop_former_interfaces(&mut self, directory: &Path, cookie: u64, plan: &PodPlan) -> Result<(), CaptureError> {
        let keep: Vec<u32> = plan.interfaces.iter().map(|(index, _)| *index).collect();
        for name in pins::names(directory) {
            let former = name.rsplit_once('-').and_then(|(_, index)| index.parse().ok());
            if former.is_some_and(|index: u32| !keep.contains(&index)) {
                pins::detach(&directory.join(&name)).tried(|| format!("detaching {name}"))?;
            }
        }
        self.maps.remove_interfaces(cookie, &keep);
        Ok(())
    }

    pub(crate) fn release(&mut self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        let state = self
            .pods
            .get_mut(uid)
            .ok_or_else(|| CaptureError::UnknownPod(uid.clone()))?;
        // The agent's listeners close when the proxy has closed its duplicates, too; nothing is steered to them then.
        state.captured = None;
        let netns = state.netns.clone();
        let addresses = Addresses::of(&state.spec)?;
        let entry = addresses.entry(0, 0);
        self.end_reroutes(&netns, addresses)?;
        self.detach_pod_as(netns.cookie(), Some(&entry))?;
        self.end_release(&netns)
    }

    pub(crate) fn forget(&mut self, uid: &WorkloadUid) {
        self.offered.remove(uid);
        let Some(state) = self.pods.remove(uid) else {
            return;
        };
        if let Err(error) = self.clear_pod(state.netns.cookie()) {
            tracing::warn!(%error, pod = %uid, "forgetting a pod");
        }
    }

    /// Detaches what is attached for a pod, the guard first, and clears the maps of it. The pod's own entry stays as
    /// it is, and so do the numbers of its name servers: queries under way are answered yet.
    pub(crate) fn detach_pod(&mut self, cookie: u64) -> Result<(), CaptureError> {
        self.detach_pod_as(cookie, None)
    }

    fn detach_pod_as(&mut self, cookie: u64, entry: Option<&abi::Pod>) -> Result<(), CaptureError> {
        let directory = self.pins.pod(cookie);
        let unguard = |prefix: &str| {
            pins::names(&directory)
                .filter(|name| name.starts_with(prefix))
                .try_for_each(|name| pins::detach(&directory.join(&name)))
                .tried(|| format!("detaching {prefix}"))
        };
        unguard("guard")?;
        let before = self.maps.pod(cookie);
        if let Some(entry) = entry {
            self.maps.set_pod(cookie, entry)?;
        }
        pins::detach_all(&directory).tried(|| format!("detaching all of {}", directory.display()))?;
        // One that is not captured may have gone unheard, and another have its address by now.
        let anothers: Vec<Address> = self
            .pods
            .values()
            .filter(|pod| pod.is_captured() && pod.netns.cookie() != cookie)
            .flat_map(|pod| pod.spec.addresses.iter().copied().map(Address::from_ip))
            .collect();
        let mut own: Vec<Address> = before.iter().flat_map(addresses).collect();
        own.retain(|address| !anothers.contains(address));
        self.maps.remove_flows(&own, |_| false);
        for address in own {
            for kind in [
                ListenerKind::Outbound,
                ListenerKind::Inbound,
                ListenerKind::Hbone,
                ListenerKind::Rerouted,
            ] {
                self.maps.remove_listener(&listener_key(address, kind));
            }
        }
        self.maps.remove_interfaces(cookie, &[]);
        self.maps.set_exclusions(cookie, &Entries::default())
    }

    /// Puts back the settings of a pod that is not captured any more, once the agents have no connection in it, and no
    /// listener that one may come to: answers of the application find the way back by them. Until then it is for
    /// [`Self::reconcile`] to ask again.
    pub(crate) fn end_release(&mut self, netns: &Netns) -> Result<(), CaptureError> {
        let Some(restore) = self.maps.restore(netns.cookie()) else {
            return Ok(());
        };
        // A handshake under way has no cgroup, but a listener that has.
        let states = diag::state::CONNECTED | diag::state::SYN_SENT | diag::state::LISTEN;
        let carried = diag::list_in(netns, states)?;
        if carried.iter().any(|socket| self.is_an_agents(socket)) {
            return Ok(());
        }
        put_back(netns, &restore)?;
        self.maps.remove_restore(netns.cookie());
        Ok(())
    }

    pub(crate) fn reconcile(&mut self) -> Vec<String> {
        let captured: Vec<(PodSpec, PodSettings)> = self
            .pods
            .values()
            .filter_map(|pod| Some((pod.spec.clone(), pod.captured.as_ref()?.settings.clone())))
            .collect();
        let mut repaired = Vec::new();
        // Another agent, which has gone again, may have given them its own programs.
        match self.attach_to_cgroups() {
            Ok(true) => repaired.push("the programs of the pods' cgroup".to_owned()),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "attaching programs to cgroups"),
        }
        self.former.drain(&self.home);
        let released: Vec<Netns> = self
            .pods
            .values()
            .filter(|pod| !pod.is_captured())
            .map(|pod| pod.netns.clone())
            .collect();
        for netns in released {
            if let Err(error) = self.end_release(&netns) {
                tracing::warn!(%error, netns = %netns.path().display(), "ending a capture");
            }
        }
        for (spec, settings) in captured {
            match self.reconcile_pod(&spec, &settings) {
                Ok(done) => repaired.extend(done.into_iter().map(|what| format!("{}: {what}", spec.uid))),
                Err(error) => tracing::warn!(%error, pod = %spec.uid, "reconciling"),
            }
        }
        repaired
    }

    fn reconcile_pod(&mut self, spec: &PodSpec, settings: &PodSettings) -> Result<Vec<&'static str>, CaptureError> {
        let Some(state) = self.pods.get(&spec.uid) else {
            return Ok(Vec::new());
        };
        let Some(captured) = &state.captured else {
            return Ok(Vec::new());
        };
        let (netns, listeners) = (state.netns.clone(), captured.listeners.clone());
        let network = interfaces::look(&self.home, &netns)
            .tried(|| format!("looking at the interfaces of {}", spec.netns.display()))?;
        let mut plan = plan::plan(spec, netns.cookie(), &network, settings)?;
        plan.pod.flags |= self.dns_flag(&spec.uid, netns.cookie());
        let repaired = self.apply(spec, &netns, &plan, settings, &listeners)?;
        let alive = diag::list_in(&netns, diag::state::CONNECTED | diag::state::SYN_RECV)?;
        let own: Vec<Address> = addresses(&plan.pod).collect();
        self.maps.remove_flows(&own, |flow| {
            alive
                .iter()
                .any(|socket| socket.local == flow.pod && socket.remote == flow.remote)
        });
        Ok(repaired)
    }
}

/// Puts back the settings that were changed.
pub(crate) fn put_back(netns: &Netns, restore: &Restore) -> Result<(), CaptureError> {
    let before = Before {
        tcp_fwmark_accept: restore.tcp_fwmark_accept,
        rp_filter_all: restore.rp_filter_all,
        fwmark_reflect: [restore.fwmark_reflect4, restore.fwmark_reflect6],
    };
    netns
        .enter(|| routes::remove(before))
        .and_then(|result| result)
        .tried(|| format!("restoring {}", netns.path().display()))
}

fn listener_key(address: Address, kind: ListenerKind) -> ListenerKey {
    ListenerKey {
        address,
        kind: kind as u32,
    }
}

/// The addresses of a pod.
fn addresses(pod: &abi::Pod) -> impl Iterator<Item = Address> + use<> {
    [pod.ip4, pod.ip6].into_iter().filter(|address| !address.is_none())
}
