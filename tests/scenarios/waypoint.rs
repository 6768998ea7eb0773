//! Waypoints with a real Envoy behind the agent's HBONE (`ambient.istio.io/waypoint-inbound-binding`): traffic goes through
//! it, past it nothing goes, and without it nothing at all. And with an Envoy that speaks HBONE itself.
//!
//! No controller makes waypoints yet, so the scenarios play it: they write the Gateway, its status, its Service and pods.
//! They follow each other on one namespace, and the last one deletes it.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{
    Kubectl, Mesh, Pod,
    forge::{self, Offer, Outcome},
    gate::{self, NAMESPACE, VIP},
    machine, scenarios, suite, wait,
};

scenarios![
    what_is_addressed_to_a_service_goes_through_its_waypoint,
    a_dead_replica_is_passed_over,
    what_is_addressed_to_a_pod_goes_through_the_pods_waypoint_and_past_it_nobody,
    who_opts_out_is_reached_directly,
    an_envoy_that_speaks_hbone_itself_is_a_waypoint,
    a_waypoint_that_is_deleted_is_not_bypassed,
];

/// `kubectl`, where this machine has it and Envoy; with whatever Envoy is to be run as.
fn tools(mesh: &Mesh, scenario: &str) -> Result<Option<(Kubectl, PathBuf)>> {
    match machine::envoy() {
        Ok(envoy) => Ok(Kubectl::of(mesh, scenario)?.map(|kubectl| (kubectl, envoy))),
        Err(why) => suite::part_not_run(scenario, &why).map(|()| None),
    }
}

fn label(kubectl: &Kubectl, kind: &str, name: &str, label: &str) -> Result<()> {
    let arguments = ["label", kind, "-n", NAMESPACE, name, "--overwrite", label];
    kubectl.says(&arguments).map(drop)
}

/// What came back, with its headers in small letters; empty if nothing did.
fn fetch(from: Pod<'_>, url: &str) -> Result<String> {
    let said = from.exec(&["curl", "-s", "-i", "--max-time", "10", "--http1.1", url])?;
    Ok(said.stdout.to_lowercase())
}

/// Which replica an answer went through, by what it says of itself.
fn replica_of(answer: &str) -> Option<&str> {
    let line = answer.lines().find(|line| line.starts_with("x-waypoint:"))?;
    line.split_once(": ").map(|(_, name)| name.trim())
}

/// Whether the server was dialled from where the replica is that says it was there: it tells whom it sees.
fn came_from(mesh: &Mesh, answer: &str) -> Result<bool> {
    let replica = replica_of(answer).context("no replica was there")?;
    let address = mesh.pod(NAMESPACE, replica).v4()?.to_string();
    Ok(answer.lines().last().is_some_and(|body| body.starts_with(&address)))
}

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod(NAMESPACE, "client")
}

fn until(what: &str, from: Pod<'_>, url: &str, holds: impl Fn(&str) -> bool) -> Result<String> {
    let mut last = String::new();
    let found = wait::until(what, || {
        last = fetch(from, url)?;
        Ok(holds(&last).then(|| last.clone()))
    });
    found.with_context(|| format!("{url} answered {last:?}"))
}

fn is_good(answer: &str) -> bool {
    answer.starts_with("http/1.1 200")
}

fn what_is_addressed_to_a_service_goes_through_its_waypoint(mesh: &Mesh) -> Result<()> {
    let Some((kubectl, envoy)) = tools(mesh, "a service's waypoint")? else {
        return Ok(());
    };
    gate::stage(&kubectl, &envoy)?;
    // The service names a waypoint, and there is none yet: that is no way around it.
    let log = mesh.node("node-1").access_log()?;
    until("the service is refused", client(mesh), "http://web/", |answer| {
        answer.is_empty()
    })?;
    log.line_with(&[
        "outbound",
        "has to be reached through Gateway gate/wp",
        "it is not there",
    ])?;
    gate::program(&kubectl, "wp", "service")?;
    let (log, from) = (mesh.node("node-1").access_log()?, client(mesh));
    let answer = until("Envoy was there", from, "http://web/", |answer| {
        replica_of(answer).is_some()
    })?;
    ensure!(is_good(&answer), "{answer}");
    let own = from.v4()?;
    ensure!(
        answer.contains(&format!("x-client: {own}")),
        "it did not see who asked: {answer}"
    );
    log.line_with(&[
        "outbound",
        "dst.service=\"web.gate",
        &format!("dst.hbone_addr={VIP}:80"),
        "sa/wp",
    ])?;
    // The server was dialled by the waypoint, and says by whom.
    ensure!(came_from(mesh, &answer)?, "{answer}");
    // A pod's own address is not the service's.
    let direct = fetch(from, &format!("http://{}:8080/", mesh.pod(NAMESPACE, "web").v4()?))?;
    ensure!(is_good(&direct) && replica_of(&direct).is_none(), "{direct}");
    Ok(())
}

fn a_dead_replica_is_passed_over(mesh: &Mesh) -> Result<()> {
    let Some((kubectl, envoy)) = tools(mesh, "a dead replica")? else {
        return Ok(());
    };
    let from = client(mesh);
    for replica in ["wp-1", "wp-2"] {
        until(&format!("{replica} takes its share"), from, "http://web/", |answer| {
            replica_of(answer) == Some(replica)
        })?;
    }
    // Gone while everybody still counts on it: not one request may notice.
    kubectl.says(&[
        "delete",
        "pod",
        "-n",
        NAMESPACE,
        "wp-1",
        "--grace-period=0",
        "--force",
        "--wait=false",
    ])?;
    for _ in 0..30 {
        let answer = fetch(from, "http://web/")?;
        ensure!(is_good(&answer) && replica_of(&answer).is_some(), "{answer:?}");
    }
    kubectl.says(&["wait", "-n", NAMESPACE, "pod/wp-1", "--for=delete", "--timeout=50s"])?;
    gate::apply(&kubectl, &[gate::replica(&envoy, "wp-1", "node-1")])?;
    until("wp-1 is back", from, "http://web/", |answer| {
        replica_of(answer) == Some("wp-1")
    })
    .map(drop)
}

fn what_is_addressed_to_a_pod_goes_through_the_pods_waypoint_and_past_it_nobody(mesh: &Mesh) -> Result<()> {
    let Some((kubectl, _)) = tools(mesh, "a pod's waypoint")? else {
        return Ok(());
    };
    let address = mesh.pod(NAMESPACE, "web").v4()?;
    let (url, outside) = (format!("http://{address}:8080/"), mesh.pod("outside", "client"));
    until("the pod answers the world", outside, &url, is_good)?;
    label(&kubectl, "pod", "web", "istio.io/use-waypoint=wp")?;
    gate::program(&kubectl, "wp", "all")?;
    let log = mesh.node("node-1").access_log()?;
    let through = |answer: &str| is_good(answer) && replica_of(answer).is_some();
    until("Envoy was there", client(mesh), &url, through)?;
    log.line_with(&[
        "outbound",
        &format!("dst.hbone_addr={address}:8080"),
        "dst.workload=\"wp-",
    ])?;
    until("its service, too", client(mesh), "http://web/", through)?;
    // Who is in no mesh has no agent that would hand it over; the server's does not let it in.
    let log = mesh.node("node-2").access_log()?;
    until("nobody gets past the waypoint", outside, &url, |answer| {
        answer.is_empty()
    })?;
    log.line_with(&[
        "inbound",
        "the workload is behind waypoint gate/wp.gate.svc",
        "takes only what comes through it",
        "plaintext",
    ])?;
    // Nor a peer of the mesh whose agent knows of no waypoint. Whoever proves to be the waypoint is let in.
    let (hbone, target) = (SocketAddr::new(address, 15008), format!("{address}:8080"));
    for (account, status) in [("client", 401), ("wp", 200)] {
        let offer = Offer::of(mesh, &format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{account}"))?;
        let outcome = forge::connect(&outside.netns(), hbone, offer, &target, &[])?;
        ensure!(outcome == Outcome::Status(status), "as {account}: {outcome:?}");
    }
    // The kubelet's probes are nobody's traffic.
    let ready = |pod: &Value| pod["status"]["containerStatuses"][0]["ready"] == true;
    kubectl
        .until("the pod is ready", &["pod", "-n", NAMESPACE, "web"], ready)
        .map(drop)
}

fn who_opts_out_is_reached_directly(mesh: &Mesh) -> Result<()> {
    let Some((kubectl, _)) = tools(mesh, "an opt-out")? else {
        return Ok(());
    };
    // The namespace's choice, and a pod and a service that choose otherwise.
    kubectl.says(&["label", "namespace", NAMESPACE, "istio.io/use-waypoint=wp"])?;
    let url = format!("http://{}:8080/", mesh.pod(NAMESPACE, "web").v4()?);
    let direct = |answer: &str| is_good(answer) && replica_of(answer).is_none();
    label(&kubectl, "pod", "web", "istio.io/use-waypoint=none")?;
    until("the pod is reached directly", client(mesh), &url, direct)?;
    until("from outside, too", mesh.pod("outside", "client"), &url, direct)?;
    let through = fetch(client(mesh), "http://web/")?;
    ensure!(replica_of(&through).is_some(), "the service did not opt out: {through}");
    label(&kubectl, "service", "web", "istio.io/use-waypoint=none")?;
    until("the service is reached directly", client(mesh), "http://web/", direct)?;
    for kind in ["pod", "service"] {
        kubectl.says(&["label", kind, "-n", NAMESPACE, "web", "istio.io/use-waypoint-"])?;
    }
    let through = |answer: &str| is_good(answer) && replica_of(answer).is_some();
    until("what the namespace says holds", client(mesh), &url, through)?;
    until("for the service, too", client(mesh), "http://web/", through).map(drop)
}

fn an_envoy_that_speaks_hbone_itself_is_a_waypoint(mesh: &Mesh) -> Result<()> {
    let Some((kubectl, envoy)) = tools(mesh, "an Envoy with HBONE of its own")? else {
        return Ok(());
    };
    let address = mesh.pod(NAMESPACE, "web").v4()?.to_string();
    let certificates = machine::scripts().join("own");
    forge::write_certificates(
        mesh,
        &format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/own"),
        &certificates,
    )?;
    gate::stage_native(&kubectl, &envoy, &certificates, &address)?;
    gate::program(&kubectl, "own", "all")?;
    for kind in ["pod", "service"] {
        label(&kubectl, kind, "web", "istio.io/use-waypoint=own")?;
    }
    for url in ["http://web/".to_owned(), format!("http://{address}:8080/")] {
        let through = |answer: &str| is_good(answer) && replica_of(answer) == Some("own-1");
        let answer = until("the other Envoy was there", client(mesh), &url, through)?;
        ensure!(came_from(mesh, &answer)?, "{answer}");
    }
    // It dials by HBONE, too, and is let in as what it is; the waypoint of before is none any more.
    let offer = Offer::of(mesh, &format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/wp"))?;
    let (hbone, target) = (format!("{address}:15008").parse()?, format!("{address}:8080"));
    let outcome = forge::connect(&mesh.pod("outside", "client").netns(), hbone, offer, &target, &[])?;
    ensure!(outcome == Outcome::Status(401), "{outcome:?}");
    for kind in ["pod", "service"] {
        kubectl.says(&["label", kind, "-n", NAMESPACE, "web", "istio.io/use-waypoint-"])?;
    }
    let back = |answer: &str| is_good(answer) && replica_of(answer).is_some_and(|name| name.starts_with("wp-"));
    until(
        "the namespace's waypoint has it again",
        client(mesh),
        "http://web/",
        back,
    )
    .map(drop)
}

fn a_waypoint_that_is_deleted_is_not_bypassed(mesh: &Mesh) -> Result<()> {
    let Some((kubectl, _)) = tools(mesh, "a deleted waypoint")? else {
        return Ok(());
    };
    let address = mesh.pod(NAMESPACE, "web").v4()?;
    // First its replicas, then the Gateway.
    let log = mesh.node("node-1").access_log()?;
    kubectl.says(&[
        "delete",
        "pod",
        "-n",
        NAMESPACE,
        "wp-1",
        "wp-2",
        "--grace-period=0",
        "--force",
    ])?;
    let refused = |answer: &str| answer.is_empty();
    until("nobody is left to hand over to", client(mesh), "http://web/", refused)?;
    wait::until_true("that is what the log says", || {
        fetch(client(mesh), "http://web/")?;
        Ok(log
            .lines()?
            .iter()
            .any(|line| line.contains("service gate/wp.gate.svc.cluster.local has no healthy endpoint")))
    })?;
    kubectl.says(&["delete", "gateways.gateway.networking.k8s.io", "-n", NAMESPACE, "wp"])?;
    for url in ["http://web/".to_owned(), format!("http://{address}:8080/")] {
        wait::until_true(&format!("{url} is refused for want of the Gateway"), || {
            let answer = fetch(client(mesh), &url)?;
            ensure!(answer.is_empty(), "{url} was answered past the waypoint: {answer}");
            let named = |line: &String| line.contains("through Gateway gate/wp") && line.contains("it is not there");
            Ok(log.lines()?.iter().any(named))
        })?;
    }
    kubectl
        .says(&["delete", "namespace", NAMESPACE, "--wait=true"])
        .map(drop)
}
