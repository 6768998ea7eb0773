//! From one way of capture to the other on a live node: what the other left is taken over pod by pod. And the rules that
//! eBPF needs for what machines inside a pod open, which no hook sees.
//!
//! ```text
//! to eBPF:     hooks stand in the pod ─► no rule redirects any more ─► guard ─► the last redirected connection ends: no rule
//! to iptables: rules stand in the pod ─► its connects pass the hooks ─► guard, hooks and settings go ─► all pods: no pin
//! ```
//! At every moment one of the two captures what the pod opens; while both stand eBPF comes first, since it rewrites
//! before the rules see a packet. What meets the step between two is refused, or served, but never let past.
//! Connections that do not pass the agent live on, as do those that an agent of the former way still carries (see
//! [`FormerHooks::end_of`]).
//!
//! Under failure: a pod that can't be captured the new way stays captured the old way, and is tried again; the old way's
//! pins go when no pod is in trouble. Pins of another layout can't be taken over: refused, `undercurrent uninstall` helps.

use std::{fs, path::Path};

use abi::{Pod, Restore};
use aya::maps::{HashMap, Map, MapData};
use model::PodSettings;

use super::{
    conntrack,
    node::{clean, families, redirected, routed},
    plan::{Family, Rules},
    program::Iptables,
};
use crate::{
    diag,
    error::{CaptureError, Tried, map_error},
    netns::Netns,
    pins::{self, Pins},
    plan::Addresses,
    pod::put_back,
    routes::{self, CONNECTION_MARK},
    uninstall,
};

/// What a capture by iptables left, for the capture by eBPF.
#[derive(Default)]
pub(crate) struct FormerRules {
    /// Found when it is first needed.
    iptables: Option<Iptables>,
    /// Pods whose redirected connections have not all ended.
    draining: Vec<Netns>,
}

impl FormerRules {
    /// Whether there are any in a pod. A pod that hides them keeps them, to its own harm.
    pub(crate) fn are_in(netns: &Netns) -> Result<bool, CaptureError> {
        routed(netns)
    }

    /// Removes what captures new connections. What the old ones need goes with the last of them, by [`Self::drain`]. The
    /// mark and the route are Istio's, too: without chains of ours they are not.
    pub(crate) fn remove_redirects(&mut self, home: &Netns, netns: &Netns) -> Result<(), CaptureError> {
        let iptables = self.iptables(home)?;
        let mut ours = false;
        for family in families(netns) {
            let saved = iptables.saved(netns, family, None)?;
            ours |= saved.removal().is_some();
            if let Some(removal) = saved.removal_of_redirects() {
                iptables.restore(netns, family, &removal)?;
            }
        }
        self.draining.retain(|other| other.cookie() != netns.cookie());
        if ours {
            self.draining.push(netns.clone());
        }
        Ok(())
    }

    /// Removes what is not needed any more; says of how many pods.
    pub(crate) fn drain(&mut self, home: &Netns) -> usize {
        let Some(iptables) = &self.iptables else { return 0 };
        let before = self.draining.len();
        self.draining.retain(|netns| {
            let ended = redirected(home, netns).and_then(|left| match left.is_empty() {
                true => clean(iptables, netns).map(|()| true),
                false => Ok(false),
            });
            // One that can't be looked at is gone.
            !ended.unwrap_or(true)
        });
        before - self.draining.len()
    }

    /// Makes the rules of a pod's virtual interfaces so; whether they were not.
    pub(crate) fn reroute(
        &mut self,
        home: &Netns,
        netns: &Netns,
        addresses: Addresses,
        settings: &PodSettings,
    ) -> Result<bool, CaptureError> {
        let iptables = self.iptables(home)?;
        let mut changed = false;
        for family in families(netns) {
            let own = match family {
                Family::Ip4 => addresses.ip4,
                Family::Ip6 => addresses.ip6,
            };
            let saved = iptables.saved(netns, family, Some("nat"))?;
            if let Some(changes) = Rules::of_reroutes(family, settings, own).changes(&saved) {
                iptables.restore(netns, family, &changes)?;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Removes the node's own rules.
    pub(crate) fn end_on_node(&mut self, home: &Netns) -> Result<(), CaptureError> {
        match self.iptables(home) {
            Err(CaptureError::MissingProgram(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(iptables) => clean(iptables, home),
        }
    }

    fn iptables(&mut self, home: &Netns) -> Result<&Iptables, CaptureError> {
        let found = match self.iptables.take() {
            Some(found) => found,
            None => Iptables::find(home)?,
        };
        Ok(self.iptables.insert(found))
    }
}

/// Tells conntrack of the connections that an agent has into the pod from clients' addresses, or ends them. In the pod's
/// namespace.
fn tell_of_carried(pod: &Pod, ruled: bool) -> std::io::Result<()> {
    let own = [pod.ip4, pod.ip6];
    let mut sockets = diag::list(diag::state::CONNECTED)?;
    sockets.retain(|socket| {
        let is_carried = own.contains(&socket.remote.address) && !own.contains(&socket.local.address);
        is_carried && !socket.is_local()
    });
    if !ruled {
        for socket in sockets {
            // It may have ended by itself meanwhile.
            let _ = diag::destroy(&socket);
        }
        return Ok(());
    }
    if sockets.iter().any(|socket| !socket.remote.to_socket().is_ipv4()) {
        routes::route_carried()?;
    }
    let tell = |socket: &diag::TcpSocket| {
        let (client, server) = (socket.local.to_socket(), socket.remote.to_socket());
        conntrack::tell(client, server, CONNECTION_MARK)
    };
    let untold: Vec<std::io::Error> = sockets.iter().filter_map(|socket| tell(socket).err()).collect();
    if let Some(error) = untold.first() {
        tracing::warn!(
            connections = untold.len(),
            %error,
            "conntrack cannot be told of connections that an agent carries into a pod: those whose client is silent now break"
        );
    }
    Ok(())
}

/// What a capture by eBPF left, for the capture by iptables.
pub(crate) struct FormerHooks {
    pins: Pins,
    pods: HashMap<MapData, u64, Pod>,
    restore: HashMap<MapData, u64, Restore>,
}

impl FormerHooks {
    /// What is pinned there; none where nothing is.
    pub(crate) fn open(pin_dir: &Path) -> Result<Option<Self>, CaptureError> {
        if !fs::read_dir(pin_dir).is_ok_and(|mut entries| entries.next().is_some()) {
            return Ok(None);
        }
        let pins = Pins::existing(pin_dir);
        let map = |name: &'static str| {
            let data = MapData::from_pin(pins.maps().join(name));
            data.map_err(|_| CaptureError::OtherCapture(pin_dir.to_owned()))
        };
        let (pods, restore) = (map("PODS")?, map("RESTORE")?);
        Ok(Some(Self {
            pods: HashMap::try_from(Map::HashMap(pods)).map_err(map_error("PODS"))?,
            restore: HashMap::try_from(Map::HashMap(restore)).map_err(map_error("RESTORE"))?,
            pins,
        }))
    }

    /// Ends the capture of a pod, which rules capture by now or nothing should. Its connects pass the hooks first.
    ///
    /// What the former agent carries into the pod goes on: the application's answers find back by the mark of the
    /// socket until now, and by the connection's from here on. Of one that does not speak conntrack knows nothing, so it is
    /// told. Over IPv6 the agent's own socket, which is of the loopback device, has its way there by a rule that goes, and
    /// gets one of its own (`routes::route_carried`).
    /// Where no rules follow, `ruled` being false, they are reset, which both ends hear of: their answers would leave the pod
    /// in plaintext.
    pub(crate) fn end_of(&mut self, netns: &Netns, pod: &Pod, ruled: bool) -> Result<(), CaptureError> {
        let cookie = netns.cookie();
        self.pods.insert(cookie, pod, 0).map_err(map_error("PODS"))?;
        let directory = self.pins.pod(cookie);
        let mut names: Vec<String> = pins::names(&directory).collect();
        names.sort_by_key(|name| !name.starts_with("guard"));
        for name in names {
            pins::detach(&directory.join(&name)).tried(|| format!("detaching {name}"))?;
        }
        pins::detach_all(&directory).tried(|| format!("detaching all of {}", directory.display()))?;
        if let Ok(restore) = self.restore.get(&cookie, 0) {
            netns
                .enter(|| tell_of_carried(pod, ruled))
                .and_then(|result| result)
                .tried(|| "telling conntrack of connections that are carried into a pod".into())?;
            put_back(netns, &restore)?;
            let _ = self.restore.remove(&cookie);
        }
        Ok(())
    }

    /// Ends all of it, when no pod needs it any more.
    pub(crate) fn end(self, home: &Netns) -> Result<(), CaptureError> {
        uninstall::everything(&self.pins, home, None)
    }
}
