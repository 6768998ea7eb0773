//! Services and their endpoints, with pods: dead ones, near ones, headless ones, and an address that is given to another.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use system_tests::{Api, Kubectl, Mesh, Pod, kubectl::is_captured, machine, scenarios, suite, wait};

scenarios![
    a_dead_endpoint_is_never_noticed,
    near_endpoints_go_first_and_local_ones_alone,
    a_headless_service_leads_to_its_pods_and_a_named_port_to_each_ones_own,
    a_pod_that_is_given_the_address_of_another_is_reached_at_once,
];

/// A pod that serves, or one that is ready and does not listen.
fn pod(name: &str, app: &str, node: &str, serves: bool) -> String {
    let (command, probe) = match serves {
        true => (
            format!("[{}, {}/server.py]", machine::python(), machine::scripts().display()),
            "readinessProbe: {tcpSocket: {port: 8001}, periodSeconds: 1}",
        ),
        false => ("[sleep, infinity]".to_owned(), ""),
    };
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: apps, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    command: {command}
    ports: [{{name: first, containerPort: 8002}}]
    {probe}
"
    )
}

fn service(name: &str, app: &str, more: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: apps}}
spec:
  selector: {{app: {app}}}
  {more}
  ports:
  - {{name: first, port: 8002, targetPort: first}}
  - {{name: echo, port: 8001}}
"
    )
}

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("apps", "client")
}

/// Applies, and waits until these pods are ready and captured.
fn apply(kubectl: &Kubectl, yaml: &str, pods: &[&str]) -> Result<()> {
    kubectl.apply(yaml)?;
    for pod in pods {
        kubectl.until("the pod is ready and captured", &["pod", "-n", "apps", pod], |pod| {
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            let mut ready = conditions.filter(|one| one["type"] == "Ready" && one["status"] == "True");
            is_captured(pod) && ready.next().is_some()
        })?;
    }
    Ok(())
}

/// The address of the pod that answered; why none did.
fn who_answers(from: Pod<'_>, to: &str) -> Result<String> {
    let result = from.client(&["speaks-first", to, "8002"])?;
    let address = result.pointer("/server/local/0").and_then(|address| address.as_str());
    let address = address.with_context(|| format!("{to} answered {}: {result}", from.key()))?;
    Ok(address.trim_start_matches("::ffff:").to_owned())
}

/// Both addresses of these pods.
fn addresses(mesh: &Mesh, pods: &[&str]) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for pod in pods {
        let [v4, v6] = mesh.pod("apps", pod).addresses()?;
        all.extend([v4.to_string(), v6.to_string()]);
    }
    Ok(all)
}

/// Of whose addresses were those that answered, once the mesh is as it should be.
fn until_answered_by(mesh: &Mesh, to: &str, pods: &[&str]) -> Result<()> {
    let expected = addresses(mesh, pods)?;
    wait::until_true(&format!("{to} leads to {pods:?} alone"), || {
        for _ in 0..5 {
            let Ok(answered) = who_answers(client(mesh), to) else {
                return Ok(false);
            };
            if !expected.contains(&answered) {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

fn a_dead_endpoint_is_never_noticed(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a dead endpoint")? else {
        return Ok(());
    };
    let yaml = pod("half-good", "half", "node-2", true) + &pod("half-deaf", "half", "node-1", false);
    apply(
        &kubectl,
        &(yaml + &service("half", "half", "")),
        &["half-good", "half-deaf"],
    )?;
    until_answered_by(mesh, "half", &["half-good"])?;
    let storm = client(mesh).start("client.py", &["storm", "half", "8001", "80", "r0-"])?;
    storm.next()?;
    let good = addresses(mesh, &["half-good"])?;
    for _ in 0..20 {
        let answered = who_answers(client(mesh), "half")?;
        ensure!(good.contains(&answered), "{answered} answered");
    }
    let result = storm.finish()?;
    let count = result["good"].as_array().map_or(0, Vec::len);
    let failures = result["failures"].as_object().context("no account of the failures")?;
    ensure!(
        count > 0 && failures.is_empty(),
        "of {count} and more, these failed: {failures:?}"
    );
    kubectl
        .says(&["delete", "-n", "apps", "pod/half-good", "pod/half-deaf", "service/half"])
        .map(drop)
}

fn near_endpoints_go_first_and_local_ones_alone(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "near endpoints")? else {
        return Ok(());
    };
    let yaml = pod("pair-here", "pair", "node-1", true)
        + &pod("pair-there", "pair", "node-2", true)
        + &service("pair-local", "pair", "internalTrafficPolicy: Local")
        + &service("pair-near", "pair", "trafficDistribution: PreferSameNode");
    apply(&kubectl, &yaml, &["pair-here", "pair-there"])?;
    for name in ["pair-local", "pair-near"] {
        until_answered_by(mesh, name, &["pair-here"])?;
    }
    kubectl.says(&["delete", "-n", "apps", "pod/pair-here"])?;
    until_answered_by(mesh, "pair-near", &["pair-there"])?;
    wait::until_true("nobody is local", || {
        Ok(client(mesh).client(&["connect", "pair-local", "8002", "2"])?["error"].is_string())
    })?;
    kubectl
        .says(&[
            "delete",
            "-n",
            "apps",
            "pod/pair-there",
            "service/pair-local",
            "service/pair-near",
        ])
        .map(drop)
}

fn a_headless_service_leads_to_its_pods_and_a_named_port_to_each_ones_own(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a headless service")? else {
        return Ok(());
    };
    let other = pod("head-other", "head", "node-2", true).replace("containerPort: 8002", "containerPort: 8001");
    let yaml = pod("head-one", "head", "node-2", true)
        + &other
        + &service("head", "head", "clusterIP: None")
        + &service("named", "head", "");
    apply(&kubectl, &yaml, &["head-one", "head-other"])?;
    let log = mesh.node("node-1").access_log()?;
    until_answered_by(mesh, "head", &["head-one", "head-other"])?;
    let line = log.line_with(&["direction=\"outbound\"", "dst.workload=\"head-"])?;
    ensure!(line.contains("dst.hbone_addr="), "not by tunnel: {line}");
    // The other one calls the port so that echoes what it gets.
    let (mut first, mut echoes) = (false, false);
    wait::until_true("each answers on the port that it calls so", || {
        let result = client(mesh).client(&["echo", "named", "8002"])?;
        match result["same"] == true {
            true => echoes = true,
            false => first |= result["end"].is_string(),
        }
        Ok(first && echoes)
    })?;
    kubectl
        .says(&[
            "delete",
            "-n",
            "apps",
            "pod/head-one",
            "pod/head-other",
            "service/head",
            "service/named",
        ])
        .map(drop)
}

fn a_pod_that_is_given_the_address_of_another_is_reached_at_once(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "an address that is given to another")? else {
        return Ok(());
    };
    apply(&kubectl, &pod("heir-one", "heir", "node-2", true), &["heir-one"])?;
    let address = mesh.pod("apps", "heir-one").v4()?.to_string();
    ensure!(
        who_answers(client(mesh), &address)? == address,
        "somebody else answered"
    );
    kubectl.says(&["delete", "-n", "apps", "pod/heir-one"])?;
    // Of the same service account, and so of the same identity.
    apply(&kubectl, &pod("heir-two", "heir", "node-2", true), &["heir-two"])?;
    let of_heir = mesh.pod("apps", "heir-two").v4()?.to_string();
    Api::of(mesh)?.until_in_force(&[("Pod", "/api/v1/pods")])?;
    let log = mesh.node("node-1").access_log()?;
    ensure!(
        who_answers(client(mesh), &of_heir)? == of_heir,
        "somebody else answered"
    );
    let line = log.line_with(&["direction=\"outbound\"", "src.workload=\"client\"", &of_heir])?;
    ensure!(
        line.contains("dst.workload=\"heir-two\"") && !line.contains("error="),
        "{line}"
    );
    kubectl.says(&["delete", "-n", "apps", "pod/heir-two"])?;
    match of_heir == address {
        true => Ok(()),
        false => suite::part_not_run("an address that is given to another", "the address was not given again"),
    }
}
