//! The cgroups of this node's agents: this one's, and those of agents before it that still finish their connections.
//!
//! ```text
//! PIN_DIR/links/sock_ops_agent-LEVEL-ID   the program on the cgroup of an agent, as long as it counts as one
//! ```
//! An upgrade by a surge has two agents in two cgroups at once, and the guard must let both send. So the pins say who
//! they are: an agent that takes over from a living one loads its programs with the two youngest of those that it finds,
//! beside itself, and takes the others' links down ([`FORMER`]; a third that still drains is cut off). Cgroup ids are not
//! given twice, so that one that ended means nobody (`a_former_agent_passes_the_guard_until_it_is_forgotten`).

use std::{io, path::PathBuf};

use crate::{
    cgroup::Cgroup,
    pins::{self, Pins},
    sys::{self, Attached},
};

const PREFIX: &str = "sock_ops_agent";

/// How many agents before this one may finish their connections.
pub(crate) const FORMER: usize = 2;

/// An agent's cgroup: its id, and its depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AgentCgroup {
    pub(crate) id: u64,
    pub(crate) level: u32,
}

impl AgentCgroup {
    /// Below it are nobody's.
    pub(crate) const NOBODY: Self = Self { id: 0, level: 0 };

    pub(crate) fn of(cgroup: &Cgroup) -> Self {
        Self {
            id: cgroup.id,
            level: cgroup.level,
        }
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

/// Forgets all agents but this one and, where there are to be some, the youngest of those before it, which are returned,
/// the youngest first.
pub(crate) fn keep(pins: &Pins, own: AgentCgroup, at_most: usize) -> io::Result<Vec<AgentCgroup>> {
    let (mut former, mut others): (Vec<(AgentCgroup, PathBuf)>, Vec<PathBuf>) = (Vec::new(), Vec::new());
    for name in pins::names(&pins.links()).filter(|name| name.starts_with(PREFIX)) {
        let path = pins.links().join(&name);
        match AgentCgroup::of_pin(&name) {
            Some(agent) if agent == own => {}
            Some(agent) if hangs_on(&path, agent)? => former.push((agent, path)),
            _ => others.push(path),
        }
    }
    former.sort_by_key(|(agent, _)| std::cmp::Reverse(agent.id));
    let kept = former.iter().take(at_most).map(|(agent, _)| *agent).collect();
    others.extend(former.into_iter().skip(at_most).map(|(_, path)| path));
    others.iter().try_for_each(|path| pins::detach(path))?;
    Ok(kept)
}

fn hangs_on(path: &std::path::Path, agent: AgentCgroup) -> io::Result<bool> {
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
