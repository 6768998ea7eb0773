//! The lab: the playground's two nodes, with a pair of pods for each contender.
//!
//! Every contender's client is on the first node and its server on the second, joined by the same links, routes and
//! bridge, and every server is the same program: what differs is only what stands between. All load stays inside the
//! namespaces that the playground made.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::step::Steps;
use crate::workspace::Workspace;

/// Where each server listens.
pub const PORT: u16 = 8080;

/// One pod of the lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    namespace: String,
    name: &'static str,
}

impl Pod {
    /// Its network namespace, as `ip netns` knows it.
    pub fn netns(&self) -> String {
        format!("uc-{}-{}", self.namespace, self.name)
    }
}

/// A pair of pods, in a Kubernetes namespace of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    namespace: String,
    opted_in: bool,
    nice: bool,
}

impl Pair {
    /// The pods of a contender; `opted_in` puts them into the mesh.
    pub fn new(contender: &str, opted_in: bool) -> Self {
        Pair {
            namespace: format!("bench-{contender}"),
            opted_in,
            nice: false,
        }
    }

    /// The same, whose server gives way to every other process.
    pub fn nice(self) -> Self {
        Pair { nice: true, ..self }
    }

    /// Where load comes from.
    pub fn client(&self) -> Pod {
        Pod {
            namespace: self.namespace.clone(),
            name: "client",
        }
    }

    /// Where it goes.
    pub fn server(&self) -> Pod {
        Pod {
            namespace: self.namespace.clone(),
            name: "server",
        }
    }
}

/// The running lab; taken down when dropped.
pub struct Lab {
    undercurrent: PathBuf,
    load: PathBuf,
    directory: PathBuf,
}

impl Lab {
    /// Brings up the playground with all pairs, and waits until it is ready.
    pub fn up(workspace: &Workspace, undercurrent: PathBuf, pairs: &[Pair]) -> Result<Self> {
        if Path::new("/run/netns/uc-fabric").exists() {
            bail!("a playground is up, and the lab would replace it: `undercurrent playground down` first");
        }
        let directory = workspace.target("bench/lab");
        let manifests = directory.join("manifests");
        std::fs::create_dir_all(&manifests)?;
        // Pods do not see /tmp and the like, where the checkout may be.
        let load = PathBuf::from("/var/lib/undercurrent/bench/load");
        std::fs::create_dir_all(load.parent().unwrap_or(Path::new("/")))?;
        std::fs::copy(workspace.target("release/load"), &load).context("copying the load generator for the pods")?;
        std::fs::write(manifests.join("bench.yaml"), manifest(pairs, &load.to_string_lossy()))?;
        let lab = Lab {
            undercurrent,
            load,
            directory,
        };
        let mut up = lab.playground(&["up", "--nodes", "2", "--manifests"]);
        up.arg(&manifests);
        Steps::new(workspace).run("bench-up", "bring up the lab: two nodes", &mut up)?;
        Ok(lab)
    }

    /// A file or directory of the lab's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The binary under test.
    pub fn undercurrent(&self) -> &PathBuf {
        &self.undercurrent
    }

    /// The load generator inside a pod.
    pub fn load(&self, pod: &Pod) -> Command {
        let mut command = self.playground(&["exec"]);
        command
            .arg(format!("{}/{}", pod.namespace, pod.name))
            .arg("--")
            .arg(&self.load);
        command
    }

    /// The same, giving way to every other process.
    pub fn nice_load(&self, pod: &Pod) -> Command {
        let load = self.load(pod);
        let mut nice = Command::new("nice");
        nice.args(["-n", "19"]).arg(load.get_program()).args(load.get_args());
        nice
    }

    /// The load generator inside a pod, before every other process.
    pub fn urgent_load(&self, pod: &Pod) -> Command {
        let load = self.load(pod);
        let mut urgent = Command::new("chrt");
        urgent.args(["--rr", "2"]).arg(load.get_program()).args(load.get_args());
        urgent
    }

    /// Has a pod's server go before every other process, until this is dropped.
    pub fn urgent_server(pod: &Pod) -> Result<UrgentServer> {
        let output = Command::new("ip").args(["netns", "pids", &pod.netns()]).output();
        let output = output.context("start ip")?;
        let is_load = |id: &&str| {
            let name = std::fs::read_to_string(format!("/proc/{id}/comm"));
            name.is_ok_and(|name| name.trim() == "load")
        };
        let ids = String::from_utf8_lossy(&output.stdout).into_owned();
        let ids: Vec<String> = ids.split_whitespace().filter(is_load).map(str::to_owned).collect();
        if ids.is_empty() {
            bail!("no server in {}", pod.netns());
        }
        for id in &ids {
            check(Command::new("chrt").args(["--rr", "--pid", "2", id]))?;
        }
        Ok(UrgentServer(ids))
    }

    /// The pod's first IPv4 address that others can reach.
    pub fn address(&self, pod: &Pod) -> Result<IpAddr> {
        let mut ip = Command::new("ip");
        ip.args(["-n", &pod.netns(), "-j", "-4", "addr", "show", "scope", "global"]);
        let output = ip.output().context("start ip")?;
        let links: Vec<Link> = serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "addresses of {}: {}",
                pod.netns(),
                String::from_utf8_lossy(&output.stderr)
            )
        })?;
        let address = links
            .into_iter()
            .flat_map(|link| link.addr_info)
            .find_map(|info| info.local);
        address.with_context(|| format!("{} has no address", pod.netns()))
    }

    fn playground(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.undercurrent);
        command.arg("playground").args(arguments);
        command
    }
}

/// A server that goes before every other process.
pub struct UrgentServer(Vec<String>);

impl Drop for UrgentServer {
    fn drop(&mut self) {
        for id in &self.0 {
            // Gone already, or it stays as it is for the rest of the lab's life.
            let _ = check(Command::new("chrt").args(["--other", "--pid", "0", id]));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let down = self
            .playground(&["down"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !down.is_ok_and(|status| status.success()) {
            crate::step::note("the lab may not be gone: `undercurrent playground down` removes it");
        }
        // A copy: nothing is lost if it stays.
        let _ = self.load.parent().map(std::fs::remove_dir_all);
    }
}

#[derive(Deserialize)]
struct Link {
    #[serde(default)]
    addr_info: Vec<AddressInfo>,
}

#[derive(Deserialize)]
struct AddressInfo {
    local: Option<IpAddr>,
}

/// A program in a network namespace, outside of any pod: where a sidecar's process would be.
pub fn in_netns(netns: &str, program: &str) -> Command {
    // Not `ip netns exec`: it mounts a new /sys, without cgroups and bpffs.
    let mut command = Command::new("nsenter");
    // Thousands of idle connections need as many descriptors as the process may have.
    let raise = "ulimit -n \"$(ulimit -H -n)\"; exec \"$0\" \"$@\"";
    command
        .arg(format!("--net=/run/netns/{netns}"))
        .args(["sh", "-c", raise, program]);
    command
}

/// Runs a short command; its failure is an error with what it said.
pub fn check(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            crate::step::words(command),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// A network namespace with nothing in it but loopback, for measuring starts.
pub struct Scratch(&'static str);

impl Scratch {
    /// Its name.
    pub const NAME: &str = "uc-bench-scratch";

    /// A fresh one.
    pub fn new() -> Result<Self> {
        let scratch = Scratch(Self::NAME);
        let _ = Command::new("ip")
            .args(["netns", "del", Self::NAME])
            .stderr(Stdio::null())
            .status();
        check(Command::new("ip").args(["netns", "add", Self::NAME]))?;
        check(Command::new("ip").args(["-n", Self::NAME, "link", "set", "lo", "up"]))?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", self.0])
            .stderr(Stdio::null())
            .status();
    }
}

/// The Kubernetes objects of the lab.
fn manifest(pairs: &[Pair], load: &str) -> String {
    let mut yaml = String::new();
    for Pair {
        namespace,
        opted_in,
        nice,
    } in pairs
    {
        let labels = if *opted_in {
            "\n  labels: {istio.io/dataplane-mode: ambient}"
        } else {
            ""
        };
        let _ = write!(
            yaml,
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}{labels}\n---\n"
        );
        let nice = if *nice { r#""nice", "-n", "19", "# } else { "" };
        let serve = format!(r#"[{nice}"{load}", "serve", "--listen", "0.0.0.0:{PORT}"]"#);
        for (name, node, command) in [("client", 1, r#"["sleep", "infinity"]"#), ("server", 2, serve.as_str())] {
            let _ = write!(
                yaml,
                "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n---\n\
                 apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  \
                 nodeName: node-{node}\n  serviceAccountName: {name}\n  containers:\n  - name: {name}\n    \
                 image: none\n    command: {command}\n---\n"
            );
        }
    }
    yaml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pair_that_is_opted_in_carries_the_label() {
        let yaml = manifest(&[Pair::new("none", false), Pair::new("undercurrent", true)], "/x/load");
        let documents: Vec<&str> = yaml.split("---\n").collect();
        let labelled: Vec<&&str> = documents
            .iter()
            .filter(|text| text.contains("dataplane-mode"))
            .collect();
        assert_eq!(labelled.len(), 1);
        assert!(labelled[0].contains("name: bench-undercurrent"), "{yaml}");
        assert_eq!(yaml.matches("kind: Pod").count(), 4);
        assert!(
            yaml.contains("nodeName: node-2\n  serviceAccountName: server"),
            "{yaml}"
        );
    }

    #[test]
    fn namespaces_are_named_as_the_playground_names_them() {
        assert_eq!(Pair::new("envoy", false).server().netns(), "uc-bench-envoy-server");
    }
}
