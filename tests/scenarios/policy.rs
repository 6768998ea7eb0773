//! Policy: what an object says is what happens, also to connections that are already there, and the log says which
//! object it was.

use anyhow::{Context, Result, ensure};
use system_tests::{Kubectl, Mesh, Pod, mesh::Log, scenarios, wait};

scenarios![
    without_policies_everybody_is_let_in,
    strict_refuses_plaintext_and_says_why,
    permissive_lets_plaintext_in,
    only_the_principal_that_is_allowed_is_let_in,
    a_denied_principal_is_refused_and_the_others_are_not,
    a_policy_by_address_judges_the_clients_own_address,
    a_port_may_be_less_strict_than_its_pod,
    a_port_may_be_stricter_than_its_pod,
    a_deny_that_needs_http_denies_whatever_else_it_matches_and_its_status_says_so,
    a_dry_run_is_only_told_of,
    custom_closes_what_it_selects_and_its_status_says_so,
    a_change_of_policy_closes_a_live_connection,
    a_change_of_policy_closes_what_a_former_agent_serves,
    a_policy_that_is_gone_no_longer_refuses,
];

const FILE: &str = "policy.yaml";

/// Everything behind this line is a scenario's own.
const OWN: &str = "# the scenario's own:";

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("policy", "server")
}

/// Replaces the policies that an earlier scenario made.
pub(crate) fn with_policies(mesh: &Mesh, policies: &str) -> Result<()> {
    mesh.change(FILE, |text| {
        let base = text.split(OWN).next().unwrap_or_default().trim_end().to_owned();
        format!("{base}\n{OWN}\n{policies}")
    })
}

pub(crate) fn authorization(name: &str, spec: &str) -> String {
    let head = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n";
    format!("{head}metadata: {{name: {name}, namespace: policy}}\nspec: {spec}\n")
}

pub(crate) fn peer_authentication(mode: &str) -> String {
    let head = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n";
    format!("{head}metadata: {{name: default, namespace: policy}}\nspec: {{mtls: {{mode: {mode}}}}}\n")
}

fn answers(from: Pod<'_>, to: Pod<'_>) -> Result<bool> {
    let mut all = true;
    for address in to.addresses()? {
        all &= from.client(&["echo", &address.to_string(), "8001"])?["same"] == true;
    }
    Ok(all)
}

/// The agents learn of a change by the file: until they have, what was in force is.
fn until_answers(from: Pod<'_>, to: Pod<'_>, expected: bool) -> Result<()> {
    let words = if expected { "is let in" } else { "is refused" };
    wait::until_true(&format!("{} {words} by {}", from.key(), to.key()), || {
        Ok(answers(from, to)? == expected)
    })
}

fn log(mesh: &Mesh) -> Result<Log> {
    mesh.node("node-2").access_log()
}

fn pods(mesh: &Mesh) -> [Pod<'_>; 3] {
    [
        mesh.pod("policy", "friend"),
        mesh.pod("policy", "stranger"),
        mesh.pod("outside", "client"),
    ]
}

fn without_policies_everybody_is_let_in(mesh: &Mesh) -> Result<()> {
    with_policies(mesh, "")?;
    for from in pods(mesh) {
        until_answers(from, server(mesh), true)?;
    }
    Ok(())
}

fn strict_refuses_plaintext_and_says_why(mesh: &Mesh) -> Result<()> {
    let [friend, _, outside] = pods(mesh);
    let log = log(mesh)?;
    with_policies(mesh, &peer_authentication("STRICT"))?;
    until_answers(outside, server(mesh), false)?;
    let line = log.line_with(&["error=", "PeerAuthentication policy/default"])?;
    ensure!(
        line.contains("without an identity") && line.contains("direction=\"inbound\""),
        "{line}"
    );
    until_answers(friend, server(mesh), true)
}

fn permissive_lets_plaintext_in(mesh: &Mesh) -> Result<()> {
    let [friend, _, outside] = pods(mesh);
    with_policies(mesh, &peer_authentication("PERMISSIVE"))?;
    until_answers(outside, server(mesh), true)?;
    until_answers(friend, server(mesh), true)
}

const FRIEND: &str = "cluster.local/ns/policy/sa/friend";

fn only_the_principal_that_is_allowed_is_let_in(mesh: &Mesh) -> Result<()> {
    let [friend, stranger, outside] = pods(mesh);
    let log = log(mesh)?;
    let spec = format!(
        "{{selector: {{matchLabels: {{app: server}}}}, action: ALLOW, rules: [{{from: [{{source: {{principals: [{FRIEND}]}}}}]}}]}}"
    );
    with_policies(mesh, &authorization("only-friend", &spec))?;
    until_answers(stranger, server(mesh), false)?;
    ensure!(
        !answers(outside, server(mesh))?,
        "plaintext has no principal and was let in"
    );
    ensure!(answers(friend, server(mesh))?, "the friend was refused");
    let line = log.line_with(&["error=", "only-friend", "src.workload=\"stranger\""])?;
    ensure!(line.contains("spiffe://cluster.local/ns/policy/sa/stranger"), "{line}");
    log.line_with(&["only-friend", "src.workload=\"friend\"", "rule="])
        .map(drop)
}

fn a_denied_principal_is_refused_and_the_others_are_not(mesh: &Mesh) -> Result<()> {
    let [friend, stranger, outside] = pods(mesh);
    let (log, clients) = (log(mesh)?, mesh.node("node-1").access_log()?);
    let spec = format!(
        "{{action: DENY, rules: [{{from: [{{source: {{principals: [{FRIEND}]}}}}], to: [{{operation: {{ports: ['8001']}}}}]}}]}}"
    );
    with_policies(mesh, &authorization("not-friend", &spec))?;
    until_answers(friend, server(mesh), false)?;
    ensure!(answers(stranger, server(mesh))?, "the stranger was refused");
    ensure!(answers(outside, server(mesh))?, "plaintext was refused");
    let why = "denied by AuthorizationPolicy policy/not-friend (rules[0])";
    log.line_with(&["error=", why, FRIEND])?;
    // Who asked learns of it, too.
    clients.line_with(&["direction=\"outbound\"", "the peer refused: 401", why])?;
    // Another port is another matter.
    let result = friend.client(&["speaks-first", &server(mesh).v4()?.to_string(), "8002"])?;
    ensure!(result["end"] == "eof" && result["server"].is_object(), "{result}");
    Ok(())
}

/// The address is the pod's own: neither the node's nor the agent's.
fn a_policy_by_address_judges_the_clients_own_address(mesh: &Mesh) -> Result<()> {
    let [friend, stranger, outside] = pods(mesh);
    let blocks: Vec<String> = friend
        .addresses()?
        .iter()
        .map(|address| format!("'{address}'"))
        .collect();
    let spec = format!(
        "{{action: DENY, rules: [{{from: [{{source: {{ipBlocks: [{}]}}}}]}}]}}",
        blocks.join(", ")
    );
    with_policies(mesh, &authorization("not-from-there", &spec))?;
    until_answers(friend, server(mesh), false)?;
    for address in server(mesh).addresses()? {
        let result = friend.client(&["echo", &address.to_string(), "8001"])?;
        ensure!(result["same"] != true, "by {address} the friend was let in");
    }
    ensure!(answers(stranger, server(mesh))?, "the stranger was refused");
    ensure!(answers(outside, server(mesh))?, "plaintext was refused");
    Ok(())
}

fn a_port_may_be_less_strict_than_its_pod(mesh: &Mesh) -> Result<()> {
    let [friend, _, outside] = pods(mesh);
    let head = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n";
    let name = "metadata: {name: one-port, namespace: policy}\n";
    let spec = "spec: {selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {8002: {mode: PERMISSIVE}}}\n";
    with_policies(mesh, &[head, name, spec].concat())?;
    until_answers(outside, server(mesh), false)?;
    ensure!(answers(friend, server(mesh))?, "the friend was refused");
    for address in server(mesh).addresses()? {
        let result = outside.client(&["speaks-first", &address.to_string(), "8002"])?;
        ensure!(result["server"].is_object(), "the open port is closed: {result}");
    }
    Ok(())
}

fn a_port_may_be_stricter_than_its_pod(mesh: &Mesh) -> Result<()> {
    let [friend, _, outside] = pods(mesh);
    let head = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n";
    let name = "metadata: {name: one-port, namespace: policy}\n";
    let spec = "spec: {selector: {matchLabels: {app: server}}, mtls: {mode: DISABLE}, portLevelMtls: {8001: {mode: STRICT}}}\n";
    with_policies(mesh, &[head, name, spec].concat())?;
    until_answers(outside, server(mesh), false)?;
    ensure!(answers(friend, server(mesh))?, "the friend was refused");
    for address in server(mesh).addresses()? {
        let result = outside.client(&["speaks-first", &address.to_string(), "8002"])?;
        ensure!(result["server"].is_object(), "the open port is closed: {result}");
    }
    Ok(())
}

/// Waits until the policy's status has this condition, with these words.
fn until_told(mesh: &Mesh, scenario: &str, name: &str, status: &str, words: &str) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, scenario)? else {
        return Ok(());
    };
    let is_it = |condition: &serde_json::Value| {
        condition["type"] == "ZtunnelAccepted"
            && condition["status"] == status
            && condition["message"]
                .as_str()
                .is_some_and(|message| message.contains(words))
    };
    let object = ["authorizationpolicies.security.istio.io", name, "--namespace", "policy"];
    kubectl.until(&format!("{name} is {status}: {words}"), &object, |found| {
        found["status"]["conditions"]
            .as_array()
            .is_some_and(|conditions| conditions.iter().any(is_it))
    })?;
    Ok(())
}

fn a_deny_that_needs_http_denies_whatever_else_it_matches_and_its_status_says_so(mesh: &Mesh) -> Result<()> {
    let [friend, stranger, _] = pods(mesh);
    let spec = format!(
        "{{action: DENY, rules: [{{from: [{{source: {{principals: [{FRIEND}]}}}}], to: [{{operation: {{methods: [GET]}}}}]}}]}}"
    );
    with_policies(mesh, &authorization("no-get", &spec))?;
    until_answers(friend, server(mesh), false)?;
    ensure!(answers(stranger, server(mesh))?, "the stranger was refused");
    let words = "spec.rules[0].to[0].operation.methods: not supported: it can't be checked at L4, so this rule denies";
    until_told(mesh, "policy::a_deny_that_needs_http", "no-get", "False", words)
}

fn a_dry_run_is_only_told_of(mesh: &Mesh) -> Result<()> {
    let [friend, _, outside] = pods(mesh);
    let log = log(mesh)?;
    let policy = authorization("rehearsed", "{action: DENY, rules: [{}]}");
    let annotated = policy.replace(
        "{name: rehearsed,",
        "{name: rehearsed, annotations: {istio.io/dry-run: 'true'},",
    );
    with_policies(mesh, &annotated)?;
    let told = "dry_run=\"denied by AuthorizationPolicy policy/rehearsed (rules[0], which matches everything)";
    wait::until_true("the dry run is told of", || {
        for from in [friend, outside] {
            ensure!(answers(from, server(mesh))?, "{} was refused by a dry run", from.key());
        }
        Ok(log.lines()?.iter().any(|line| line.contains(told)))
    })?;
    until_told(
        mesh,
        "policy::a_dry_run_is_only_told_of",
        "rehearsed",
        "True",
        "never enforced",
    )
}

fn custom_closes_what_it_selects_and_its_status_says_so(mesh: &Mesh) -> Result<()> {
    let spec = "{selector: {matchLabels: {app: server}}, action: CUSTOM, provider: {name: external}, rules: [{}]}";
    with_policies(mesh, &authorization("ask-somebody", spec))?;
    for from in pods(mesh) {
        until_answers(from, server(mesh), false)?;
    }
    let words = "spec.action: not supported: CUSTOM";
    until_told(mesh, "policy::custom_closes", "ask-somebody", "False", words)
}

fn a_change_of_policy_closes_a_live_connection(mesh: &Mesh) -> Result<()> {
    let [friend, stranger, outside] = pods(mesh);
    with_policies(mesh, "")?;
    for from in [friend, stranger, outside] {
        until_answers(from, server(mesh), true)?;
    }
    let log = log(mesh)?;
    let address = server(mesh).v4()?.to_string();
    let watch = |from: Pod<'_>| from.start("client.py", &["watch", &address, "8013"]);
    let (mut kept, closed, plain) = (watch(friend)?, watch(stranger)?, watch(outside)?);
    for watcher in [&kept, &closed, &plain] {
        ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    }
    let spec = format!("{{action: ALLOW, rules: [{{from: [{{source: {{principals: [{FRIEND}]}}}}]}}]}}");
    with_policies(mesh, &authorization("friend-only-now", &spec))?;
    for watcher in [closed, plain] {
        let end = watcher.next().context("the connection lives on")?;
        ensure!(end["end"].is_string(), "{end}");
    }
    log.line_with(&["no longer allowed", "friend-only-now", "src.workload=\"stranger\""])?;
    ensure!(!kept.ended()?, "the connection that is still allowed was closed, too");
    ensure!(answers(friend, server(mesh))?, "the friend was refused");
    Ok(())
}

/// An agent that was upgraded away keeps its connections for as long as they live: no longer than they are allowed.
fn a_change_of_policy_closes_what_a_former_agent_serves(mesh: &Mesh) -> Result<()> {
    let [friend, stranger, _] = pods(mesh);
    with_policies(mesh, "")?;
    until_answers(stranger, server(mesh), true)?;
    let log = log(mesh)?;
    let address = server(mesh).v4()?.to_string();
    let watch = |from: Pod<'_>| from.start("client.py", &["watch", &address, "8013"]);
    let (mut kept, closed) = (watch(friend)?, watch(stranger)?);
    for watcher in [&kept, &closed] {
        ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    }
    let former = mesh.node("node-2").agent_pid()?;
    mesh.playground(&["upgrade", "node-2"])?;
    ensure!(mesh.node("node-2").agent_pid()? != former, "the same process answers");
    let spec = format!("{{action: ALLOW, rules: [{{from: [{{source: {{principals: [{FRIEND}]}}}}]}}]}}");
    with_policies(mesh, &authorization("friend-only-since", &spec))?;
    let end = closed.next().context("the connection lives on")?;
    ensure!(end["end"].is_string(), "{end}");
    log.line_with(&["no longer allowed", "friend-only-since", "src.workload=\"stranger\""])?;
    ensure!(!kept.ended()?, "the connection that is still allowed was closed, too");
    ensure!(
        std::path::Path::new(&format!("/proc/{former}/fd/0")).exists(),
        "the former agent did not wait for the connection that is allowed"
    );
    Ok(())
}

fn a_policy_that_is_gone_no_longer_refuses(mesh: &Mesh) -> Result<()> {
    with_policies(mesh, "")?;
    for from in pods(mesh) {
        until_answers(from, server(mesh), true)?;
    }
    Ok(())
}
