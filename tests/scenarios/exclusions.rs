//! What pods are left out of the mesh by their own annotations, and only with their namespace's permission.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{Kubectl, Mesh, Pod, scenarios, wait};

scenarios![
    an_exclusion_needs_permission_and_is_said,
    a_port_is_reached_directly_while_it_is_excluded,
];

const PERMISSION: &str = "undercurrent.io/traffic-exclusions";

/// Sets an annotation, or takes it away (`name-`).
fn annotate(kubectl: &Kubectl, kind: &str, namespace: &str, name: &str, annotation: &str) -> Result<()> {
    let object = format!("{kind}/{name}");
    let namespaced = ["-n", namespace];
    let place: &[&str] = if kind == "namespace" { &[] } else { &namespaced };
    kubectl
        .says(&[&["annotate", &object, "--overwrite", annotation], place].concat())
        .map(drop)
}

/// What the agent of the pod's node says of it.
fn problem(mesh: &Mesh, node: &'static str, pod: &Pod<'_>) -> Result<Option<String>> {
    let status = mesh.node(node).status()?;
    let found = status
        .pods
        .into_iter()
        .find(|one| format!("{}/{}", one.namespace, one.name) == pod.key());
    let found = found.context("the agent does not know the pod")?;
    ensure!(found.captured, "{} is not captured", pod.key());
    Ok(found.problem)
}

fn until_problem(mesh: &Mesh, node: &'static str, pod: &Pod<'_>, expected: Option<&str>) -> Result<()> {
    wait::until_true(&format!("{} has this problem: {expected:?}", pod.key()), || {
        let problem = problem(mesh, node, pod)?;
        Ok(match expected {
            Some(text) => problem.is_some_and(|problem| problem.contains(text)),
            None => problem.is_none(),
        })
    })
}

fn has_event(kubectl: &Kubectl, namespace: &str, reason: &str, text: &str) -> Result<bool> {
    let events = kubectl.get(&["events", "-n", namespace])?;
    let says = |event: &&Value| {
        let note = event["message"].as_str().or(event["note"].as_str()).unwrap_or_default();
        event["reason"] == reason && note.contains(text)
    };
    Ok(events["items"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|event| says(&event)))
}

/// Whether a connection arrives at the server's agent without an identity.
fn arrives_plain(mesh: &Mesh, from: Pod<'_>, address: &str) -> Result<bool> {
    let log = mesh.node("node-2").access_log()?;
    let result = from.client(&["echo", address, "8001"])?;
    ensure!(result["same"] == true, "{}: {result}", from.key());
    let inbound = |line: &&String| line.contains("direction=\"inbound\"") && line.contains(":8001 ");
    let line = wait::until("the server's agent tells of it", || {
        Ok(log.lines()?.iter().find(inbound).cloned())
    })?;
    Ok(!line.contains("src.identity=\"spiffe://"))
}

fn an_exclusion_needs_permission_and_is_said(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "exclusions")? else {
        return Ok(());
    };
    let (client, server) = (mesh.pod("mesh", "client"), mesh.pod("mesh", "server"));
    let address = server.v4()?.to_string();
    let excluded = "traffic.sidecar.istio.io/excludeOutboundPorts";
    ensure!(
        !arrives_plain(mesh, client, &address)?,
        "it is plain without any exclusion"
    );
    annotate(&kubectl, "pod", "mesh", "client", &format!("{excluded}=8001"))?;
    until_problem(mesh, "node-1", &client, Some("not allowed"))?;
    ensure!(!arrives_plain(mesh, client, &address)?, "a pod exempted itself");
    wait::until_true("an Event says so", || {
        has_event(&kubectl, "mesh", "AnnotationIgnored", PERMISSION)
    })?;
    annotate(&kubectl, "namespace", "", "mesh", &format!("{PERMISSION}=outbound"))?;
    until_problem(mesh, "node-1", &client, None)?;
    wait::until_true("it goes past the mesh", || arrives_plain(mesh, client, &address))?;
    // What can't be read excludes nothing.
    annotate(&kubectl, "pod", "mesh", "client", &format!("{excluded}=http"))?;
    until_problem(mesh, "node-1", &client, Some("captured wholly"))?;
    wait::until_true("it is captured again", || Ok(!arrives_plain(mesh, client, &address)?))?;
    annotate(&kubectl, "pod", "mesh", "client", &format!("{excluded}-"))?;
    annotate(&kubectl, "namespace", "", "mesh", &format!("{PERMISSION}-"))?;
    until_problem(mesh, "node-1", &client, None)?;
    ensure!(
        !arrives_plain(mesh, client, &address)?,
        "an exclusion outlives its annotation"
    );
    Ok(())
}

fn a_port_is_reached_directly_while_it_is_excluded(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "an excluded port")? else {
        return Ok(());
    };
    let (strict, outside) = (mesh.pod("strict", "tcp"), mesh.pod("outside", "client"));
    let address = strict.v4()?.to_string();
    let answers = || Ok::<_, anyhow::Error>(outside.client(&["echo", &address, "8001"])?["same"] == true);
    let excluded = "traffic.sidecar.istio.io/excludeInboundPorts";
    ensure!(!answers()?, "STRICT let plaintext in");
    annotate(&kubectl, "namespace", "", "strict", &format!("{PERMISSION}=inbound"))?;
    annotate(&kubectl, "pod", "strict", "tcp", &format!("{excluded}=8001"))?;
    wait::until_true("the port is reached", answers)?;
    let asked = ["why", "outside/client", "strict/tcp:8001"];
    // The agent shows what it has done, a moment after.
    wait::until_true("why says so", || {
        let (code, said) = mesh.ask(&asked)?;
        Ok(code == Some(0) && said.contains(excluded))
    })?;
    let friend = mesh.pod("strict", "client");
    ensure!(
        friend.client(&["echo", &address, "8001"])?["same"] == true,
        "the mesh does not reach it"
    );
    annotate(&kubectl, "pod", "strict", "tcp", &format!("{excluded}-"))?;
    annotate(&kubectl, "namespace", "", "strict", &format!("{PERMISSION}-"))?;
    wait::until_true("the port is refused", || Ok(!answers()?))?;
    wait::until_true("why says so", || {
        let (code, said) = mesh.ask(&asked)?;
        Ok(code == Some(1) && said.contains("PeerAuthentication"))
    })?;
    Ok(())
}
