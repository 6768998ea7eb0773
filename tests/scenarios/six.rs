//! Pods that have IPv6 and nothing else: services, names, policy and `why` as for everybody.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use system_tests::{Api, Capture, Mesh, Pod, netns, scenarios};

scenarios![
    a_pod_with_ipv6_alone_has_no_other_address,
    pods_with_ipv6_alone_reach_each_other_and_those_that_have_both,
    a_service_with_ipv6_alone_is_found_by_its_name,
    policy_holds_over_ipv6_alone_and_why_says_so,
];

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("six", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("six", "server")
}

fn a_pod_with_ipv6_alone_has_no_other_address(mesh: &Mesh) -> Result<()> {
    for pod in [client(mesh), server(mesh)] {
        let said = netns::says(&pod.netns(), "ip", &["-4", "-br", "addr", "show", "dev", "eth0"])?;
        ensure!(said.trim().is_empty(), "{} has IPv4: {said}", pod.key());
        let said = netns::says(&pod.netns(), "ip", &["-6", "-br", "addr", "show", "dev", "eth0"])?;
        ensure!(said.contains(&pod.v6()?.to_string()), "{}: {said}", pod.key());
        let status = Api::of(mesh)?.get(&format!("/api/v1/namespaces/six/pods/{}", pod.name))?["status"].clone();
        ensure!(status["podIPs"] == json!([{"ip": pod.v6()?}]), "{status:#}");
    }
    let result = client(mesh).client(&["connect", &mesh.pod("mesh", "server").v4()?.to_string(), "8001", "2"])?;
    ensure!(result["error"] == "ENETUNREACH", "{result}");
    Ok(())
}

fn pods_with_ipv6_alone_reach_each_other_and_those_that_have_both(mesh: &Mesh) -> Result<()> {
    let (capture, marker) = (Capture::on_fabric()?, "v6-aL0ne-");
    let log = mesh.node("node-1").access_log()?;
    let both = [mesh.pod("mesh", "client"), mesh.pod("mesh", "server")];
    for (from, to) in [
        (client(mesh), server(mesh)),
        (client(mesh), both[1]),
        (both[0], server(mesh)),
    ] {
        let result = from.client(&["echo", &to.v6()?.to_string(), "8001", marker, "100"])?;
        ensure!(result["same"] == true, "{} to {}: {result}", from.key(), to.key());
    }
    let line = log.line_with(&[
        "src.namespace=\"six\"",
        "dst.namespace=\"six\"",
        "direction=\"outbound\"",
    ])?;
    ensure!(line.contains("spiffe://cluster.local/ns/six/sa/default"), "{line}");
    ensure!(
        !capture.stop()?.contain(marker),
        "the marker was on the fabric in clear"
    );
    // What is outside of the mesh, and whoever comes from there.
    let outside = [mesh.pod("outside", "client"), mesh.pod("outside", "server")];
    for (from, to) in [(client(mesh), outside[1]), (outside[0], server(mesh))] {
        let result = from.client(&["echo", &to.v6()?.to_string(), "8001"])?;
        ensure!(result["same"] == true, "{} to {}: {result}", from.key(), to.key());
    }
    Ok(())
}

fn a_service_with_ipv6_alone_is_found_by_its_name(mesh: &Mesh) -> Result<()> {
    let service = Api::of(mesh)?.get("/api/v1/namespaces/six/services/server")?;
    let address = service["spec"]["clusterIP"].as_str().context("no address")?;
    ensure!(address.contains(':'), "{service:#}");
    for name in ["server", "server.six.svc.cluster.local"] {
        let said = client(mesh).exec(&["getent", "ahostsv6", name])?.good()?;
        ensure!(said.starts_with(address), "{name}: {said}");
        let said = client(mesh).exec(&["getent", "ahostsv4", name])?;
        ensure!(
            said.code == Some(2) || said.stdout.contains("::ffff:"),
            "{name} has IPv4: {said:?}"
        );
    }
    for from in [client(mesh), mesh.pod("mesh", "client")] {
        let url = "http://server.six/";
        let said = from
            .exec(&["curl", "-sS", "-m", "10", "-w", "%{http_code}", url])?
            .good()?;
        ensure!(
            said.ends_with("200") && said.contains(&server(mesh).v6()?.to_string()),
            "{}: {said}",
            from.key()
        );
    }
    Ok(())
}

fn policy_holds_over_ipv6_alone_and_why_says_so(mesh: &Mesh) -> Result<()> {
    let api = Api::of(mesh)?;
    let policies = "/apis/security.istio.io/v1/namespaces/six/authorizationpolicies";
    let in_force = || {
        let all = policies.replace("/namespaces/six", "");
        api.until_in_force(&[("AuthorizationPolicy", &all)])
    };
    let echo = |from: Pod<'_>| from.client(&["echo", &server(mesh).v6()?.to_string(), "8001"]);
    let why = |to: &str| mesh.ask(&["why", "six/client", to]);
    for to in ["six/server:8001", "server:80"] {
        let (code, said) = why(to)?;
        ensure!(
            code == Some(0) && said.contains("mutual TLS"),
            "{to} ({code:?}): {said}"
        );
    }
    let block = format!("{}/128", client(mesh).v6()?);
    let rules = json!([{"from": [{"source": {"ipBlocks": [block]}}]}]);
    let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "not-by-ipv6", "namespace": "six"}, "spec": {"action": "DENY", "rules": rules}});
    api.create(policies, &policy)?;
    in_force()?;
    let (refused, other, told) = (
        echo(client(mesh))?,
        echo(mesh.pod("mesh", "client"))?,
        why("six/server:8001")?,
    );
    api.delete(&format!("{policies}/not-by-ipv6"))?;
    in_force()?;
    ensure!(refused["same"] != true, "the client was let in: {refused}");
    ensure!(other["same"] == true, "another one was refused: {other}");
    ensure!(
        told.0 == Some(1) && told.1.contains("not-by-ipv6"),
        "({:?}): {}",
        told.0,
        told.1
    );
    let result = echo(client(mesh))?;
    ensure!(result["same"] == true, "without the policy: {result}");
    Ok(())
}
