//! The cgroups of this node's agents: this one's, and those of agents before it.
//!
//! ```text
//! AGENTS                                  the cgroups whose processes and sockets count as an agent's, in their order
//! PIN_DIR/links/sock_ops_agent-LEVEL-ID   the program on the cgroup of an agent that may still open connections
//! ```
//! An upgrade by a surge has two agents in two cgroups at once, and the guard must let both send. And a socket keeps the
//! cgroup of the process that opened it: a listener that was handed over has its first opener's for ever, and so has all
//! that it accepts. So an id, once entered, stays (`what_a_former_agents_listener_accepts_passes_the_guard`): it is never
//! given twice, and when its cgroup is gone nobody can get into it. Only where there are too many, those entered first
//! are removed ([`MOST`]). The link is taken down when the agent has ended.

use std::{io, path::Path};

use crate::{
    cgroup::Cgroup,
    error::CaptureError,
    maps::Maps,
    pins::{self, Pins},
    sys::{self, Attached},
};

const PREFIX: &str = "sock_ops_agent";

/// Cgroups of agents that are kept, of the 4,096 that the map could hold: one more for each agent that ran in another.
const MOST: usize = 4000;

/// An agent's cgroup: its id, and its depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AgentCgroup {
    pub(crate) id: u64,
    pub(crate) level: u32,
}

impl AgentCgroup {
    pub(crate) fn of(cgroup: &Cgroup) -> Self {
        Self {
            id: cgroup.id,
            level: cgroup.level,
        }
    }

    /// Enters it as the youngest.
    pub(crate) fn enter(self, maps: &mut Maps) -> Result<(), CaptureError> {
        let mut entered = maps.agents();
        entered.retain(|(id, _)| *id != self.id);
        entered.sort_by_key(|(_, order)| *order);
        let youngest = entered.last().map_or(0, |(_, order)| *order);
        for (id, _) in &entered[..entered.len().saturating_sub(MOST)] {
            maps.remove_agent(*id);
        }
        maps.set_agent(self.id, youngest + 1)
    }

    /// The name of its link.
    pub(crate) fn pin(self) -> String {
        format!("{PREFIX}-{}-{}", self.level, self.id)
    }

    fn of_pin(name: &str) -> Option<Self> {
        let (level, id) = name.strip_prefix(PREFIX)?.strip_prefix('-')?.split_once('-')?;
        Some(Self {
            id: id.parse().ok()?,
            level: level.parse().ok()?,
        })
    }
}

/// Takes down the links of agents that have ended: of all but this one, or but those that still finish their connections.
pub(crate) fn end_links(pins: &Pins, own: AgentCgroup, others_live: bool) -> io::Result<()> {
    for name in pins::names(&pins.links()).filter(|name| name.starts_with(PREFIX)) {
        let path = pins.links().join(&name);
        let stays = match AgentCgroup::of_pin(&name) {
            Some(agent) => agent == own || (others_live && hangs_on(&path, agent)?),
            None => false,
        };
        if !stays {
            pins::detach(&path)?;
        }
    }
    Ok(())
}

fn hangs_on(path: &Path, agent: AgentCgroup) -> io::Result<bool> {
    Ok(match sys::pinned(path)? {
        Some(link) => sys::link_attached(&link)? == Attached::Cgroup(agent.id),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_names_its_cgroup() {
        let agent = AgentCgroup { id: 71_234, level: 3 };
        assert_eq!(AgentCgroup::of_pin(&agent.pin()), Some(agent));
        for other in [
            "sock_ops_agent",
            "sock_ops_agent-3",
            "sock_ops_agent-x-1",
            "sock_ops_pods",
        ] {
            assert_eq!(AgentCgroup::of_pin(other), None, "{other}");
        }
    }
}
