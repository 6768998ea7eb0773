//! What is compared: a way from a client's pod to a server's, and the processes that make it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};

use super::lab::{Lab, PORT, Pair};
use super::process::in_namespace;

/// How long anything may take to become ready.
pub const START: Duration = Duration::from_secs(20);

/// Process ids of the proxies on the client's and on the server's side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sides {
    /// Where the client is.
    pub client: Vec<u32>,
    /// Where the server is.
    pub server: Vec<u32>,
}

/// One of the things compared.
pub trait Contender {
    /// A short name, also of its namespace.
    fn name(&self) -> &str;
    /// What it is and how it is set up, for the report.
    fn about(&self) -> String;
    /// Its pods.
    fn pair(&self) -> Pair {
        Pair::new(self.name(), false)
    }
    /// Pods on the same nodes, and behind the same proxies where those are the node's, to be noisy.
    fn neighbour(&self) -> Option<Pair> {
        None
    }
    /// Starts what is needed in the running lab.
    fn start(&mut self, lab: &Lab) -> Result<()>;
    /// What a pair's client dials.
    fn target(&self, lab: &Lab, pair: &Pair) -> Result<SocketAddr> {
        Ok(SocketAddr::new(lab.address(&pair.server())?, PORT))
    }
    /// The proxies' processes; none for no mesh.
    fn sides(&self) -> Result<Sides>;
    /// Starts one more proxy, in a namespace of its own, and waits until it says that it is ready.
    fn time_to_ready(&self, lab: &Lab) -> Result<Option<Duration>>;
}

/// Pods that are not in the mesh.
pub struct NoMesh;

impl Contender for NoMesh {
    fn name(&self) -> &str {
        "no-mesh"
    }

    fn about(&self) -> String {
        "the same pods and links, not opted in, plaintext".to_owned()
    }

    fn neighbour(&self) -> Option<Pair> {
        Some(Pair::new("no-mesh-noisy", false).nice())
    }

    fn start(&mut self, _: &Lab) -> Result<()> {
        Ok(())
    }

    fn sides(&self) -> Result<Sides> {
        Ok(Sides::default())
    }

    fn time_to_ready(&self, _: &Lab) -> Result<Option<Duration>> {
        Ok(None)
    }
}

/// This project's node agents, as the playground starts them.
pub struct Undercurrent;

impl Contender for Undercurrent {
    fn name(&self) -> &str {
        "undercurrent"
    }

    fn about(&self) -> String {
        "the playground's node agents: eBPF capture, HBONE over mTLS, access log and policy on, as by default"
            .to_owned()
    }

    fn pair(&self) -> Pair {
        Pair::new(self.name(), true)
    }

    fn neighbour(&self) -> Option<Pair> {
        Some(Pair::new("noisy", true).nice())
    }

    fn start(&mut self, _: &Lab) -> Result<()> {
        let sides = self.sides()?;
        if sides.client.is_empty() || sides.server.is_empty() {
            bail!("no node agent runs in uc-node-1 and uc-node-2");
        }
        Ok(())
    }

    fn sides(&self) -> Result<Sides> {
        let agent = |words: &[String]| words.get(1).is_some_and(|word| word == "node");
        Ok(Sides {
            client: in_namespace("uc-node-1", agent)?,
            server: in_namespace("uc-node-2", agent)?,
        })
    }

    fn time_to_ready(&self, lab: &Lab) -> Result<Option<Duration>> {
        super::agent::time_to_ready(lab, START).map(Some)
    }
}
