//! Where pods may go outside of the mesh: `outboundTrafficPolicy: REGISTRY_ONLY` holds at the source, and a ServiceEntry
//! opens what it names and nothing beside it.

use anyhow::{Result, ensure};
use system_tests::{Kubectl, Mesh, scenarios, wait};

scenarios![registry_only_refuses_what_nothing_names_and_a_service_entry_opens_that_alone];

const REGISTRY_ONLY: &str = "apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: \"outboundTrafficPolicy: {mode: REGISTRY_ONLY}\"}
";

/// The node's own address is no pod's: to the mesh it is as outside as any.
const ENTRY: &str = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: counters, namespace: mesh}
spec:
  hosts: [counters.example.com]
  addresses: [172.30.0.2]
  resolution: NONE
  location: MESH_EXTERNAL
  ports: [{number: 15020, name: tcp, protocol: TCP}]
";

/// Whether the second node's port answers a pod.
fn answers(mesh: &Mesh, port: u16) -> Result<bool> {
    let url = format!("http://172.30.0.2:{port}/");
    let curl = ["curl", "-s", "--max-time", "10", "-o", "/dev/null", &url];
    Ok(mesh.pod("mesh", "client").exec(&curl)?.code == Some(0))
}

fn until(mesh: &Mesh, port: u16, expected: bool) -> Result<()> {
    let what = format!("the node's port {port} is reached: {expected}");
    wait::until_true(&what, || Ok(answers(mesh, port)? == expected))
}

fn registry_only_refuses_what_nothing_names_and_a_service_entry_opens_that_alone(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "REGISTRY_ONLY")? else {
        return Ok(());
    };
    until(mesh, 15020, true)?;
    let log = mesh.node("node-1").access_log()?;
    kubectl.apply(REGISTRY_ONLY)?;
    until(mesh, 15020, false)?;
    let line = log.line_with(&["error=", "172.30.0.2:15020", "REGISTRY_ONLY"])?;
    ensure!(line.contains("a ServiceEntry that names it"), "{line}");
    let served = mesh
        .pod("mesh", "client")
        .exec(&["curl", "-s", "--max-time", "10", "http://server/"])?;
    ensure!(served.code == Some(0), "what the registry names is refused, too");
    kubectl.apply(ENTRY)?;
    until(mesh, 15020, true)?;
    ensure!(!answers(mesh, 15021)?, "a port that the entry does not name is open");
    kubectl.with_input(&["delete", "-f", "-"], ENTRY)?;
    until(mesh, 15020, false)?;
    // An agent that starts anew knows it from its disk or from the API: at no time it is open.
    mesh.playground(&["restart-agent", "node-1"])?;
    ensure!(!answers(mesh, 15020)?, "after a restart it is open");
    kubectl.with_input(&["delete", "-f", "-"], REGISTRY_ONLY)?;
    until(mesh, 15020, true)
}
