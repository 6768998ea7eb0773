//! What a person changes with kubectl while pods run: who is in the mesh, and who may talk to whom.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use system_tests::{Background, Kubectl, Mesh, Pod, kubectl::is_captured, machine, scenarios, wait};

scenarios![
    a_label_takes_a_running_pod_into_the_mesh_and_refuses_nobody,
    a_pod_that_leaves_and_comes_back_keeps_its_connections,
    an_agent_that_takes_over_serves_a_pod_until_it_has_left,
    a_label_lets_a_running_pod_out_of_the_mesh,
    a_bad_policy_says_why_and_the_good_ones_work,
    strict_and_allow_are_in_force_as_kubectl_says,
];

const NAME: &str = "joiner";

fn joiner(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("apps", NAME)
}

fn clients(mesh: &Mesh) -> [Pod<'_>; 2] {
    [mesh.pod("apps", "client"), mesh.pod("outside", "client")]
}

/// A server that is out of the mesh by a label of its own.
fn plain_server() -> String {
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: {NAME}, namespace: apps, labels: {{app: {NAME}, istio.io/dataplane-mode: none}}}}
spec:
  nodeName: node-2
  containers:
  - name: server
    command: [{python}, {scripts}/server.py]
    readinessProbe: {{tcpSocket: {{port: 8001}}, periodSeconds: 1}}
"#,
        python = machine::python(),
        scripts = machine::scripts().display(),
    )
}

fn label(kubectl: &Kubectl, mode: &str) -> Result<String> {
    let label = format!("istio.io/dataplane-mode={mode}");
    kubectl.says(&["label", "pod", "-n", "apps", NAME, "--overwrite", &label])
}

/// What the API says of the pod, and what its agent does. Whoever says `enabled` is captured: read in the order in which
/// the one must not be ahead of the other.
fn annotated(mesh: &Mesh, kubectl: &Kubectl, comes: bool) -> Result<bool> {
    let captured = || -> Result<bool> {
        let pods = mesh.node("node-2").status()?.pods;
        Ok(pods
            .iter()
            .any(|pod| pod.namespace == "apps" && pod.name == NAME && pod.captured))
    };
    let said = || Ok::<_, anyhow::Error>(is_captured(&kubectl.get(&["pod", "-n", "apps", NAME])?));
    let (said, captured) = if comes {
        let said = said()?;
        (said, captured()?)
    } else {
        let captured = captured()?;
        (said()?, captured)
    };
    ensure!(captured || !said, "it says that its capture stands, and it does not");
    Ok(said)
}

fn storms(mesh: &Mesh) -> Result<Vec<(String, Background)>> {
    let address = joiner(mesh).v4()?.to_string();
    let start = |from: Pod<'_>| Ok((from.key(), start_storm(from, &address)?));
    clients(mesh).into_iter().map(start).collect()
}

fn start_storm(from: Pod<'_>, address: &str) -> Result<Background> {
    let storm = from.start("client.py", &["storm", address, "8001", "80", "lB1-"])?;
    storm.next()?;
    Ok(storm)
}

fn failures(storms: Vec<(String, Background)>) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for (from, storm) in storms {
        let result = storm.finish()?;
        let good = result["good"].as_array().map_or(0, Vec::len);
        ensure!(good > 0, "{from}: {result}");
        let failed = result["failures"].as_object().context("no account of the failures")?;
        all.extend((!failed.is_empty()).then(|| format!("{from}: beside {good} good ones {failed:?}")));
    }
    Ok(all)
}

/// Until its connections arrive as those of the client's identity.
fn until_identified(mesh: &Mesh) -> Result<String> {
    let log = mesh.node("node-2").access_log()?;
    let from = "src.identity=\"spiffe://cluster.local/ns/apps/sa/client\"";
    log.line_with(&["direction=\"inbound\"", NAME, from])
}

fn a_label_takes_a_running_pod_into_the_mesh_and_refuses_nobody(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a label takes a pod in")? else {
        return Ok(());
    };
    kubectl.apply(&plain_server())?;
    kubectl.says(&[
        "wait",
        "-n",
        "apps",
        "pod/joiner",
        "--for=condition=Ready",
        "--timeout=30s",
    ])?;
    ensure!(!annotated(mesh, &kubectl, true)?, "it is in the mesh already");
    let storms = storms(mesh)?;
    label(&kubectl, "ambient")?;
    wait::until_true("it says that it is captured", || annotated(mesh, &kubectl, true))?;
    until_identified(mesh)?;
    let failures = failures(storms)?;
    ensure!(failures.is_empty(), "while it joined: {failures:?}");
    Ok(())
}

fn until_captured(mesh: &Mesh, kubectl: &Kubectl, captured: bool) -> Result<()> {
    label(kubectl, if captured { "ambient" } else { "none" })?;
    wait::until_true(&format!("its capture stands: {captured}"), || {
        let pods = mesh.node("node-2").status()?.pods;
        let is = pods.iter().any(|pod| pod.name == NAME && pod.captured);
        Ok(is == captured && annotated(mesh, kubectl, captured)? == captured)
    })
}

/// After the scenario above.
fn a_pod_that_leaves_and_comes_back_keeps_its_connections(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a pod that comes back")? else {
        return Ok(());
    };
    let address = joiner(mesh).v4()?.to_string();
    let mut talks = Vec::new();
    let mut talk = |from: Pod<'_>, to: &str| -> Result<()> {
        let talk = from.start("client.py", &["talk", to, "8001"])?;
        talk.next()?;
        talks.push((from.key(), talk));
        Ok(())
    };
    let storms = storms(mesh)?;
    for captured in [true, false, true, false, true] {
        until_captured(mesh, &kubectl, captured)?;
        for from in clients(mesh) {
            talk(from, &address)?;
        }
    }
    let failures = failures(storms)?;
    ensure!(failures.is_empty(), "while it left and came back: {failures:?}");
    for (from, talk) in talks {
        let result = talk.finish()?;
        ensure!(result["end"] == "eof", "{from}: {result}");
    }
    Ok(())
}

/// With the control plane away a pod that leaves is captured for some seconds more, and its agent is replaced in these. After
/// the scenario above.
fn an_agent_that_takes_over_serves_a_pod_until_it_has_left(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "an upgrade while a pod leaves")? else {
        return Ok(());
    };
    // A machine that is busy may take longer than the pod stays.
    for _ in 0..3 {
        mesh.kill_control()?;
        let replaced = replaced_while_it_leaves(mesh, &kubectl);
        mesh.start_control()?;
        until_captured(mesh, &kubectl, true)?;
        if replaced? {
            return Ok(());
        }
    }
    bail!("it had always left before its agent was replaced")
}

/// Whether it was still there for its new agent.
fn replaced_while_it_leaves(mesh: &Mesh, kubectl: &Kubectl) -> Result<bool> {
    let address = joiner(mesh).v4()?.to_string();
    let is_captured = || -> Result<bool> {
        let pods = mesh.node("node-2").status()?.pods;
        Ok(pods.iter().any(|pod| pod.name == NAME && pod.captured))
    };
    let [client, outside] = clients(mesh);
    let storm = start_storm(outside, &address)?;
    let said = mesh.node("node-2").agent_log()?;
    label(kubectl, "none")?;
    said.line_with(&["it leaves the mesh", NAME])?;
    mesh.playground(&["upgrade", "node-2"])?;
    // Who hears of nothing goes on by tunnels.
    let tunnelled = client.client(&["echo", &address, "8001"])?;
    let was_there = is_captured()?;
    wait::until_true("its capture is gone", || Ok(!is_captured()?))?;
    let failures = failures(vec![(outside.key(), storm)])?;
    ensure!(failures.is_empty(), "while its agent was replaced: {failures:?}");
    ensure!(tunnelled["same"] == true || !was_there, "by a tunnel: {tunnelled}");
    Ok(was_there)
}

/// After the scenarios above.
fn a_label_lets_a_running_pod_out_of_the_mesh(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a label lets a pod out")? else {
        return Ok(());
    };
    let storms = storms(mesh)?;
    label(&kubectl, "none")?;
    wait::until_true("it no longer says that it is captured", || {
        Ok(!annotated(mesh, &kubectl, false)?)
    })?;
    wait::until_true("its capture is gone", || {
        let pods = mesh.node("node-2").status()?.pods;
        Ok(!pods.iter().any(|pod| pod.name == NAME && pod.captured))
    })?;
    let log = mesh.node("node-1").access_log()?;
    wait::until_true("it is reached in clear", || {
        let plain = |line: &String| line.contains("src.workload=\"client\"") && !line.contains("dst.identity");
        Ok(log.lines()?.iter().any(plain))
    })?;
    let failures = failures(storms)?;
    ensure!(failures.is_empty(), "while it left: {failures:?}");
    kubectl.says(&["delete", "pod", "-n", "apps", NAME]).map(drop)
}

const POLICIES: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: good, namespace: apps}
spec:
  selector: {matchLabels: {app: joiner}}
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/apps/sa/default]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bad, namespace: apps}
spec:
  selector: {matchLabels: {app: nobody}}
  action: ALLOW
  rules: [{to: [{operation: {methods: [GET]}}]}]
";

/// Nothing of it could be in force.
const HOPELESS: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: hopeless, namespace: apps}
spec: {action: AUDIT, rules: [{}]}
---
";

/// A server in the mesh, and an answer from it.
fn served(mesh: &Mesh, kubectl: &Kubectl) -> Result<String> {
    kubectl.apply(&plain_server().replace("dataplane-mode: none", "dataplane-mode: ambient"))?;
    kubectl.until(
        "the server is captured and ready",
        &["pod", "-n", "apps", NAME],
        |pod| is_captured(pod) && pod["status"]["containerStatuses"][0]["ready"] == true,
    )?;
    let address = joiner(mesh).v4()?.to_string();
    until_answers(mesh.pod("apps", "client"), &address, true)?;
    Ok(address)
}

fn until_answers(from: Pod<'_>, address: &str, expected: bool) -> Result<()> {
    wait::until_true(&format!("{} is answered: {expected}", from.key()), || {
        Ok((from.client(&["echo", address, "8001"])?["same"] == true) == expected)
    })
}

/// The condition that says whether a policy is in force.
fn condition(kubectl: &Kubectl, kind: &str, name: &str, status: &str) -> Result<Value> {
    let is_it = |condition: &&Value| condition["type"] == "ZtunnelAccepted" && condition["status"] == status;
    let find = |object: &Value| {
        let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
        conditions.find(is_it).cloned()
    };
    let what = format!("{kind} {name} says {status}");
    let object = kubectl.until(&what, &[kind, "-n", "apps", name], |object| find(object).is_some())?;
    find(&object).context("it was there")
}

fn a_bad_policy_says_why_and_the_good_ones_work(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a bad policy")? else {
        return Ok(());
    };
    let address = served(mesh, &kubectl)?;
    // What can't be in force at all is not taken, and what stands beside it is.
    let refused = kubectl.apply(&[HOPELESS, POLICIES].concat());
    let refused = refused
        .err()
        .context("a policy that can do nothing was taken")?
        .to_string();
    ensure!(
        refused.contains("spec.action") && refused.contains("AUDIT"),
        "{refused}"
    );
    condition(&kubectl, "authorizationpolicy", "good", "True")?;
    let bad = condition(&kubectl, "authorizationpolicy", "bad", "False")?;
    let message = bad["message"].as_str().unwrap_or_default();
    ensure!(message.contains("methods") && message.contains("L4"), "{bad}");
    let yaml = kubectl.says(&["get", "authorizationpolicy", "-n", "apps", "bad", "-o", "yaml"])?;
    ensure!(yaml.contains("ZtunnelAccepted") && yaml.contains("methods"), "{yaml}");
    until_answers(mesh.pod("apps", "stranger"), &address, false)?;
    until_answers(mesh.pod("apps", "client"), &address, true)?;
    kubectl.with_input(&["delete", "-f", "-"], POLICIES)?;
    until_answers(mesh.pod("apps", "stranger"), &address, true)
}

const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: apps}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-client, namespace: apps}
spec:
  selector: {matchLabels: {app: joiner}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/apps/sa/client]}}]}]
";

fn strict_and_allow_are_in_force_as_kubectl_says(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "strict and allow")? else {
        return Ok(());
    };
    let address = served(mesh, &kubectl)?;
    let [client, outside] = clients(mesh);
    let stranger = mesh.pod("apps", "stranger");
    until_answers(outside, &address, true)?;
    kubectl.apply(STRICT)?;
    condition(&kubectl, "peerauthentication", "default", "True")?;
    condition(&kubectl, "authorizationpolicy", "only-client", "True")?;
    // They say that they are in force: no wait from here on.
    for (from, expected) in [(client, true), (stranger, false), (outside, false)] {
        let result = from.client(&["echo", &address, "8001"])?;
        ensure!((result["same"] == true) == expected, "{}: {result}", from.key());
    }
    kubectl.says(&["delete", "-n", "apps", "authorizationpolicy/only-client"])?;
    until_answers(stranger, &address, true)?;
    ensure!(
        outside.client(&["echo", &address, "8001"])?["same"] != true,
        "STRICT let plaintext in"
    );
    kubectl.says(&["delete", "-n", "apps", "peerauthentication/default"])?;
    until_answers(outside, &address, true)?;
    kubectl.says(&["delete", "pod", "-n", "apps", NAME]).map(drop)
}
