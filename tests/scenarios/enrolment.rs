//! Who is captured, who is not and why, and by which way; changed while pods run.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{Background, Capture, Kubectl, Mesh, Pod, kubectl::is_captured, machine, scenarios, wait};

scenarios![
    who_cannot_be_captured_is_told_why,
    a_pod_of_an_excluded_namespace_is_let_go_and_the_status_says_why,
    a_pod_that_nobody_told_of_is_found_and_captured_when_it_is_labelled,
    a_pod_of_a_namespace_that_the_plugin_leaves_out_connects,
    a_job_is_captured_from_its_first_init_container_and_let_go_at_its_end,
    the_way_of_capture_changes_while_pods_run,
];

fn idle(name: &str, namespace: &str, annotations: &str, spec: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{istio.io/dataplane-mode: ambient}}, annotations: {{{annotations}}}}}
spec: {{nodeName: node-1, {spec} containers: [{{name: idle, command: [sleep, infinity]}}]}}
"#
    )
}

fn who_cannot_be_captured_is_told_why(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "who can't be captured")? else {
        return Ok(());
    };
    let pods = [
        ("with-host-network", "", "hostNetwork: true,", "HostNetworkNotCaptured"),
        (
            "with-sidecar",
            "sidecar.istio.io/status: '{}'",
            "",
            "SidecarNotCaptured",
        ),
    ];
    for (name, annotations, spec, reason) in pods {
        kubectl.apply(&idle(name, "apps", annotations, spec))?;
        kubectl.until(
            &format!("an Event says {reason}"),
            &["events", "-n", "apps"],
            |events| {
                let of_pod = |event: &Value| event["reason"] == reason && event.to_string().contains(name);
                events["items"].as_array().into_iter().flatten().any(of_pod)
            },
        )?;
        let pod = kubectl.get(&["pod", "-n", "apps", name])?;
        ensure!(!is_captured(&pod), "{name} says that it is captured");
        let status = mesh.node("node-1").status()?;
        let captured = status.pods.iter().any(|pod| pod.name == name && pod.captured);
        ensure!(!captured, "{name} is captured");
        kubectl.says(&["delete", "pod", "-n", "apps", name])?;
    }
    Ok(())
}

fn a_pod_of_an_excluded_namespace_is_let_go_and_the_status_says_why(mesh: &Mesh) -> Result<()> {
    let (node, comer) = (mesh.node("node-1"), mesh.pod("late", "comer"));
    let address = mesh.pod("mesh", "server").v4()?.to_string();
    mesh.enrol("comer", true)?;
    let problem = || {
        let pods = node.status()?.pods.into_iter();
        let mut pods = pods.filter(|pod| pod.namespace == "late" && pod.name == "comer");
        let pod = pods.next().context("the agent does not know the pod")?;
        Ok((!pod.captured).then(|| pod.problem.unwrap_or_default()))
    };
    let in_clear = |from: Pod<'_>| {
        let (capture, marker) = (Capture::on_fabric()?, "xN3-excluded-");
        let result = from.client(&["echo", &address, "8001", marker, "100"])?;
        ensure!(result["same"] == true, "{result}");
        capture.stop().map(|packets| packets.contain(marker))
    };
    let excluded = || {
        node.restart_agent(Some(("UNDERCURRENT_EXCLUDE_NAMESPACES", "kube-system,late")))?;
        let why = wait::until("the pod is let go", problem)?;
        ensure!(why.contains("--exclude-namespaces"), "the status says {why:?}");
        ensure!(in_clear(comer)?, "the pod is captured");
        ensure!(
            !in_clear(mesh.pod("mesh", "client"))?,
            "another namespace's pod is not captured"
        );
        Ok(())
    };
    let excluded = excluded();
    node.restart_agent(None)?;
    excluded?;
    wait::until_true("the pod is captured again", || Ok(problem()?.is_none()))?;
    ensure!(!in_clear(comer)?, "the pod is said to be captured and is not");
    mesh.enrol("comer", false)
}

/// As one that ran on the node before it had an agent.
fn a_pod_that_nobody_told_of_is_found_and_captured_when_it_is_labelled(mesh: &Mesh) -> Result<()> {
    let (node, comer) = (mesh.node("node-1"), mesh.pod("late", "comer"));
    let address = mesh.pod("mesh", "server").v4()?.to_string();
    let record = mesh.file("nodes/node-1/agent/pods/late_comer.json");
    let log = node.agent_log()?;
    node.kill_agent()?;
    std::fs::remove_file(&record).with_context(|| format!("cannot remove {}", record.display()))?;
    node.start_agent()?;
    // On a machine that has just been booted it takes longer.
    wait::until_within(wait::LONG * 3, "the pod has a record", || {
        Ok(record.exists().then_some(()))
    })?;
    log.line_with(&["late/comer", "found by its addresses"])?;
    let echo = |marker| {
        let capture = Capture::on_fabric()?;
        let result = comer.client(&["echo", &address, "8001", marker, "100"])?;
        let in_clear = capture.stop()?.contain(marker);
        Ok::<_, anyhow::Error>((result["same"] == true, in_clear))
    };
    wait::until_true("it connects", || Ok(echo("f0uNd-")? == (true, true)))?;
    mesh.enrol("comer", true)?;
    let captured = echo("f0uNd-aNd-eNr0lled-")?;
    ensure!(captured == (true, false), "connected, in clear: {captured:?}");
    mesh.enrol("comer", false)
}

fn a_pod_of_a_namespace_that_the_plugin_leaves_out_connects(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a pod of kube-system")? else {
        return Ok(());
    };
    let address = mesh.pod("mesh", "server").v4()?.to_string();
    kubectl.apply(&idle("left-out", "kube-system", "", ""))?;
    kubectl.until("it runs", &["pod", "-n", "kube-system", "left-out"], |pod| {
        pod["status"]["phase"] == "Running"
    })?;
    let left_out = mesh.pod("kube-system", "left-out");
    wait::until_true("it connects", || {
        Ok(left_out.client(&["echo", &address, "8001"])?["same"] == true)
    })?;
    let known = |pod: &admin::PodStatus| pod.namespace == "kube-system" && pod.name == "left-out";
    let pod = wait::until("the agent knows it", || {
        Ok(mesh.node("node-1").status()?.pods.into_iter().find(known))
    })?;
    ensure!(!pod.captured, "it is captured");
    kubectl.says(&["delete", "pod", "-n", "kube-system", "left-out"])?;
    wait::until_true("the agent has forgotten it", || {
        Ok(!mesh.node("node-1").status()?.pods.iter().any(known))
    })
}

fn a_job_is_captured_from_its_first_init_container_and_let_go_at_its_end(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a job")? else {
        return Ok(());
    };
    let address = mesh.pod("mesh", "server").v4()?.to_string();
    let (python, scripts) = (machine::python(), machine::scripts());
    let ask = format!("[{python}, {}/client.py, echo, {address}, '8001']", scripts.display());
    let log = mesh.node("node-2").access_log()?;
    kubectl.apply(&format!(
        r"apiVersion: v1
kind: Pod
metadata: {{name: once, namespace: apps, labels: {{istio.io/dataplane-mode: ambient}}}}
spec:
  nodeName: node-1
  restartPolicy: Never
  serviceAccountName: client
  initContainers: [{{name: first, command: {ask}}}]
  containers: [{{name: main, command: {ask}}}]
"
    ))?;
    kubectl.until("it has succeeded", &["pod", "-n", "apps", "once"], |pod| {
        pod["status"]["phase"] == "Succeeded"
    })?;
    let of_pod = |line: &&String| {
        line.contains("direction=\"inbound\"")
            && line.contains("src.identity=\"spiffe://cluster.local/ns/apps/sa/client\"")
    };
    wait::until_true("both containers came with their identity", || {
        Ok(log.lines()?.iter().filter(of_pod).count() >= 2)
    })?;
    wait::until_true("it is not captured any more", || {
        let said = is_captured(&kubectl.get(&["pod", "-n", "apps", "once"])?);
        let status = mesh.node("node-1").status()?;
        Ok(!said && !status.pods.iter().any(|pod| pod.name == "once" && pod.captured))
    })?;
    kubectl.says(&["delete", "pod", "-n", "apps", "once"]).map(drop)
}

fn ways(mesh: &Mesh) -> Result<Vec<String>> {
    ["node-1", "node-2"]
        .into_iter()
        .map(|node| Ok(mesh.node(node).status()?.capture.mode))
        .collect()
}

/// Every connection meanwhile carries a marker that must not be seen between the nodes, and most of them succeed.
fn switch(mesh: &Mesh, way: &str) -> Result<()> {
    let marker = "wAy0fCaPtUrE-";
    let packets = Capture::on_fabric()?;
    let address = mesh.pod("mesh", "server").v4()?.to_string();
    let storm: Background =
        mesh.pod("mesh", "client")
            .start_for("130", "client.py", &["storm", &address, "8001", "100", marker])?;
    storm.next()?;
    mesh.capture_by(way)?;
    ensure!(ways(mesh)? == [way, way], "{:?}", ways(mesh)?);
    let after = mesh.pod("mesh", "client").client(&["echo", &address, "8001"])?;
    ensure!(after["same"] == true, "after the change to {way}: {after}");
    let result = storm.finish()?;
    let good = result["good"].as_array().map_or(0, Vec::len);
    ensure!(good > 0, "{result}");
    let packets = packets.stop()?;
    ensure!(
        !packets.contain(marker),
        "a connection went past the mesh while it changed to {way}"
    );
    Ok(())
}

fn the_way_of_capture_changes_while_pods_run(mesh: &Mesh) -> Result<()> {
    let was = ways(mesh)?.into_iter().next().context("no node")?;
    let other = if was == "ebpf" { "iptables" } else { "ebpf" };
    switch(mesh, other)?;
    let strict = mesh.pod("strict", "tcp").v4()?.to_string();
    let refused = mesh.pod("outside", "client").client(&["echo", &strict, "8001"])?;
    ensure!(
        refused["same"] != true,
        "STRICT let plaintext in after the change to {other}"
    );
    switch(mesh, &was)
}
