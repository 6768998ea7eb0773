//! What a person does with kubectl: workloads come, change, grow and go while they are used, each pod captured before it
//! starts.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{Api, Kubectl, Mesh, Pod, kubectl::is_captured, machine, netns, scenarios, wait};

scenarios![
    an_applied_deployment_is_captured_and_found_by_its_services_name,
    kubectl_shows_where_a_pod_runs_and_what_befell_it,
    a_scaled_deployment_is_served_by_all_of_its_pods,
    a_rollout_fails_no_connection,
    a_deleted_pod_ends_its_connections_and_no_others,
    a_deleted_deployment_leaves_nothing_behind,
    a_pod_does_not_start_before_its_node_has_an_agent,
];

/// What takes as long as the grace of a pod, or as a CNI plugin's patience with an agent that is not there.
const LONGER: Duration = Duration::from_secs(60);

/// A Deployment whose pods answer until the end of their grace, as a server does that lets its clients go in order: who
/// routes to them learns meanwhile that they are on their way out.
fn deployment(replicas: u8, version: &str) -> String {
    format!(
        r#"apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: apps}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web, version: {version}}}}}
    spec:
      terminationGracePeriodSeconds: 10
      containers:
      - name: server
        command: [sh, -c, "trap '' TERM; exec {python} {scripts}/server.py"]
        readinessProbe: {{tcpSocket: {{port: 8001}}, periodSeconds: 1}}
"#,
        python = machine::python(),
        scripts = machine::scripts().display(),
    )
}

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: apps}
spec:
  selector: {app: web}
  ports:
  - {name: echo, port: 80, targetPort: 8001}
  - {name: first, port: 8002}
  - {name: ticks, port: 8013}
";

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("apps", "client")
}

/// Where a Deployment's pods are seen from: a pod of the mesh, and one outside.
fn clients(mesh: &Mesh) -> [Pod<'_>; 2] {
    [client(mesh), mesh.pod("outside", "client")]
}

fn rolled_out(kubectl: &Kubectl) -> Result<String> {
    kubectl.says(&["rollout", "status", "-n", "apps", "deployment/web", "--timeout=50s"])
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The address of the pod that answered.
fn who_answers(from: Pod<'_>, name: &str) -> Result<String> {
    let result = from.client(&["speaks-first", name, "8002"])?;
    let address = result.pointer("/server/local/0").and_then(Value::as_str);
    Ok(address
        .with_context(|| format!("to {}, {name} answered: {result}", from.key()))?
        .trim_start_matches("::ffff:")
        .to_owned())
}

fn an_applied_deployment_is_captured_and_found_by_its_services_name(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "an applied deployment")? else {
        return Ok(());
    };
    let said = kubectl.apply(&(deployment(2, "one") + SERVICE))?;
    ensure!(
        said.contains("deployment.apps/web created") && said.contains("service/web created"),
        "{said}"
    );
    rolled_out(&kubectl)?;
    let pods = kubectl.pods("apps", "app=web")?;
    ensure!(pods.len() == 2, "{pods:?}");
    for pod in &pods {
        // It runs, so the agent had agreed; that peers may tunnel to it is said as soon as it is so.
        kubectl.until("the pod's capture is told", &["pod", "-n", "apps", pod], is_captured)?;
    }
    // Before, a connection may be told of otherwise.
    Api::of(mesh)?.until_in_force(&[
        ("Pod", "/api/v1/pods"),
        ("Service", "/api/v1/services"),
        ("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices"),
    ])?;
    let log = mesh.node("node-1").access_log()?;
    for (from, name) in clients(mesh).into_iter().zip(["web", "web.apps.svc.cluster.local"]) {
        wait::until_true(&format!("{name} answers {}", from.key()), || {
            Ok(from.client(&["echo", name, "80"])?["same"] == true)
        })?;
    }
    let line = log.line_with(&["direction=\"outbound\"", "src.workload=\"client\"", "web"])?;
    ensure!(
        line.contains("dst.identity=\"spiffe://cluster.local/ns/apps/sa/default\""),
        "{line}"
    );
    Ok(())
}

fn kubectl_shows_where_a_pod_runs_and_what_befell_it(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "what kubectl shows")? else {
        return Ok(());
    };
    let said = kubectl.says(&["get", "pods", "-n", "apps", "-o", "wide"])?;
    let address = client(mesh).v4()?.to_string();
    let line = said.lines().find(|line| line.starts_with("client "));
    let line = line.with_context(|| said.clone())?;
    for word in ["1/1", "Running", &address, "node-1"] {
        ensure!(line.split_whitespace().any(|said| said == word), "no {word}: {said}");
    }
    let said = kubectl.says(&["describe", "pod", "-n", "apps", "client"])?;
    for word in [
        "Service Account:",
        "Node:",
        "ambient.istio.io/redirection: enabled",
        &address,
    ] {
        ensure!(said.contains(word), "no {word}: {said}");
    }
    let said = kubectl.says(&["get", "deployments,replicasets,services,endpointslices", "-n", "apps"])?;
    for word in [
        "deployment.apps/web",
        "replicaset.apps/web-",
        "service/web",
        "endpointslice.discovery.k8s.io/web-",
        "2/2",
    ] {
        ensure!(said.contains(word), "no {word}: {said}");
    }
    Ok(())
}

fn served_by(mesh: &Mesh, count: usize) -> Result<()> {
    for from in clients(mesh) {
        let mut seen = BTreeSet::new();
        wait::until_true(&format!("{count} pods answer {}", from.key()), || {
            seen.insert(who_answers(from, "web.apps.svc.cluster.local")?);
            Ok(seen.len() == count)
        })
        .with_context(|| format!("those that answered: {seen:?}"))?;
    }
    Ok(())
}

fn a_scaled_deployment_is_served_by_all_of_its_pods(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a scaled deployment")? else {
        return Ok(());
    };
    kubectl.says(&["scale", "-n", "apps", "deployment/web", "--replicas=4"])?;
    rolled_out(&kubectl)?;
    served_by(mesh, 4)?;
    // Fewer, under load: nobody is sent to those that go.
    under_load(mesh, || {
        kubectl.says(&["scale", "-n", "apps", "deployment/web", "--replicas=2"])?;
        let pods = ["pods", "-n", "apps", "-l", "app=web"];
        kubectl.until_within(LONGER, "two pods are left", &pods, |pods| {
            pods["items"].as_array().is_some_and(|pods| pods.len() == 2)
        })
    })?;
    served_by(mesh, 2)
}

/// New connections to the service all the while, from inside the mesh and from outside: none may fail.
fn under_load<T>(mesh: &Mesh, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = |from: Pod<'_>| from.start("client.py", &["storm", "web.apps.svc.cluster.local", "80", "80", "r0-"]);
    let [inside, outside] = clients(mesh);
    let storms = [(inside.key(), start(inside)?), (outside.key(), start(outside)?)];
    for (_, storm) in &storms {
        storm.next()?;
    }
    let done = work()?;
    for (from, storm) in storms {
        let result = storm.finish()?;
        let good = result["good"].as_array().map_or(0, Vec::len);
        let failures = result["failures"].as_object().context("no account of the failures")?;
        ensure!(
            good > 0 && failures.is_empty(),
            "{from}: of {good} and more, these failed: {failures:?}"
        );
    }
    Ok(done)
}

fn a_rollout_fails_no_connection(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a rollout")? else {
        return Ok(());
    };
    let before = kubectl.pods("apps", "app=web")?;
    under_load(mesh, || {
        kubectl.apply(&(deployment(2, "two") + SERVICE))?;
        rolled_out(&kubectl)?;
        let old = ["pods", "-n", "apps", "-l", "version=one"];
        kubectl.until_within(LONGER, "the old pods are gone", &old, |pods| {
            pods["items"].as_array().is_some_and(Vec::is_empty)
        })
    })?;
    let after = kubectl.pods("apps", "app=web")?;
    ensure!(
        after.len() == 2 && after.iter().all(|pod| !before.contains(pod)),
        "{before:?} became {after:?}"
    );
    served_by(mesh, 2)
}

fn a_deleted_pod_ends_its_connections_and_no_others(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a deleted pod")? else {
        return Ok(());
    };
    let pods = kubectl.pods("apps", "app=web")?;
    let [gone, kept] = pods.as_slice() else {
        anyhow::bail!("not two: {pods:?}");
    };
    let watch = |pod: &str| {
        let address = mesh.pod("apps", pod).v4()?.to_string();
        let watcher = client(mesh).start("client.py", &["watch", &address, "8013"])?;
        ensure!(watcher.next()?["first"] == "tick\n", "no connection to {pod}");
        anyhow::Ok(watcher)
    };
    let (ends, mut lives) = (watch(gone)?, watch(kept)?);
    kubectl.says(&["delete", "pod", "-n", "apps", gone])?;
    let end = ends
        .next_within(LONGER)
        .context("a connection to a pod that is gone hangs")?;
    ensure!(end["end"].is_string(), "{end}");
    ensure!(!lives.ended()?, "a connection to another pod ended, too");
    rolled_out(&kubectl)?;
    let after = kubectl.pods("apps", "app=web")?;
    ensure!(
        after.len() == 2 && after.contains(kept) && !after.contains(gone),
        "{pods:?} became {after:?}"
    );
    // The one with the connection that lives is the more loaded of the two.
    let fresh = after.iter().find(|pod| *pod != kept).context("no other")?;
    let addresses = mesh.pod("apps", fresh).addresses()?.map(|address| address.to_string());
    for from in clients(mesh) {
        wait::until_true(&format!("{fresh} answers {}", from.key()), || {
            Ok(addresses.contains(&who_answers(from, "web.apps.svc.cluster.local")?))
        })?;
    }
    Ok(())
}

fn a_deleted_deployment_leaves_nothing_behind(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a deleted deployment")? else {
        return Ok(());
    };
    let spaces: Vec<_> = kubectl.pods("apps", "app=web")?;
    let spaces: Vec<_> = spaces.iter().map(|pod| mesh.pod("apps", pod).netns()).collect();
    kubectl.says(&["delete", "-n", "apps", "deployment/web", "service/web"])?;
    for kind in ["pods", "replicasets", "endpointslices"] {
        let what = format!("no {kind} of it are left");
        kubectl.until_within(LONGER, &what, &[kind, "-n", "apps"], |all| {
            let all = all["items"].as_array().into_iter().flatten();
            all.filter(|one| text(one, "/metadata/name").starts_with("web")).count() == 0
        })?;
    }
    wait::until_true("their networks are gone", || {
        Ok(spaces.iter().all(|space| !netns::path(space).exists()))
    })?;
    for node in ["node-1", "node-2"] {
        wait::until_true(&format!("the agent of {node} has forgotten them"), || {
            let status = mesh.node(node).status()?;
            Ok(!status.pods.iter().any(|pod| pod.name.starts_with("web-")))
        })?;
    }
    wait::until_true("the name leads nowhere", || {
        Ok(client(mesh).client(&["connect", "web", "80", "2"])?["error"].is_string())
    })
}

const LONER: &str = "apiVersion: v1
kind: Pod
metadata: {name: loner, namespace: apps}
spec:
  nodeName: node-2
  containers:
  - {name: idle, command: [sleep, infinity]}
";

fn a_pod_does_not_start_before_its_node_has_an_agent(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a pod without an agent")? else {
        return Ok(());
    };
    mesh.node("node-2").kill_agent()?;
    let applied = kubectl.apply(LONER);
    let args = ["pod", "-n", "apps", "loner"];
    let waits = kubectl.until_within(LONGER, "the pod says what it waits for", &args, |pod| {
        text(pod, "/status/phase") == "Pending" && text(pod, "/status/message").contains("CNI")
    });
    let said = kubectl.says(&["describe", "pod", "-n", "apps", "loner"]);
    mesh.node("node-2").start_agent()?;
    applied?;
    waits?;
    let said = said?;
    ensure!(said.contains("CNI") && said.contains("agent"), "no reason: {said}");
    kubectl.until("the pod runs, and is captured", &args, |pod| {
        text(pod, "/status/phase") == "Running" && is_captured(pod)
    })?;
    kubectl.says(&["delete", "pod", "-n", "apps", "loner"]).map(drop)
}
