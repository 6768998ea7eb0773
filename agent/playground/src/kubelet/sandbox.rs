//! A pod's namespaces and its first process.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::Mutex,
};

use anyhow::{Context, Result, bail};

use super::pod::Run;
use crate::{
    launch::spawn_first,
    layout::pod_veth,
    netns,
    network::{POD_SYSCTLS, pod_link_plan, pod_plan},
    process::Process,
};

/// A pod's namespaces, held by its first process.
pub(super) struct Sandbox {
    pub pause: Process,
    child: Mutex<Child>,
}

impl Sandbox {
    /// Makes the pod's network and process namespace, in place of whatever was there under its name.
    pub fn create(run: &Run) -> Result<Self> {
        run.cgroup.remove()?;
        run.cgroup.create()?;
        let metadata = &run.desired.pod.metadata;
        if !run.desired.pod.spec.host_network {
            let addresses = &run.desired.addresses;
            let veth = pod_veth(&metadata.namespace, &metadata.name);
            // A namespace lives on while anybody has a socket in it, and so does the link that leads there.
            netns::delete_link(&veth);
            netns::delete(&run.netns)?;
            netns::create(&run.netns)?;
            netns::sysctl(&run.netns, POD_SYSCTLS)?;
            // The kubelet is in the node's namespace, and so is what `ip` makes here.
            netns::batch(None, &pod_link_plan(&veth, &run.netns, &run.node.addresses, addresses))
                .context("cannot make the pod's link")?;
            netns::batch(Some(&run.netns), &pod_plan(addresses)).context("cannot set up the pod's link")?;
        }
        let mut command = Command::new(&run.node.binary);
        command.args(["playground", "pause", "--cgroup"]).arg(&run.cgroup.0);
        command.args(["--netns", &run.netns]);
        let hostname = run.desired.pod.spec.hostname.as_deref().unwrap_or(&metadata.name);
        // The kernel's limit is 64.
        command.args(["--hostname", &hostname[..hostname.len().min(63)]]);
        command
            .arg("--hosts")
            .arg(run.layout.hosts())
            .arg("--resolv-conf")
            .arg(run.layout.resolv_conf());
        command
            .arg("--binary")
            .arg(&run.node.binary)
            .arg("--hide")
            .arg(&run.node.state_directory);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env_clear();
        let mut child = spawn_first(command).context("cannot start the pod's first process")?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            // An error here ends as one that said nothing.
            let _ = BufReader::new(stdout).read_line(&mut said);
        }
        let process = i32::try_from(child.id()).ok().and_then(Process::of);
        match process.filter(|_| said == "ready\n") {
            Some(pause) => Ok(Self {
                pause,
                child: Mutex::new(child),
            }),
            None => {
                let mut why = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    let _ = stderr.read_to_string(&mut why);
                }
                let _ = child.wait();
                bail!("the pod's first process does not start: {}", why.trim());
            }
        }
    }

    /// Whether the pod's first process still runs.
    pub fn is_alive(&self) -> bool {
        let mut child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        matches!(child.try_wait(), Ok(None))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // It is ours until it was waited for, so its number is nobody else's.
        let _ = child.kill();
        let _ = child.wait();
    }
}
