//! Ends that nobody wished for: a pod that is deleted while it talks, a fabric that loses packets.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use system_tests::{Api, Mesh, Pod, kubectl::is_captured, machine, netns, pod::no_error, scenarios, suite::note, wait};

scenarios![
    a_server_deleted_in_mid_connection_ends_it_at_both_ends_and_leaves_nothing,
    a_client_deleted_in_mid_connection_ends_it_at_both_ends_and_leaves_nothing,
    a_fabric_that_loses_packets_loses_no_bytes_and_no_connections,
];

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

/// A pod that is made to be deleted. It does not end when it is asked to.
struct Doomed<'m> {
    mesh: &'m Mesh,
    api: Api,
    name: &'static str,
    node: &'static str,
    /// The files of its agent before it came.
    files: usize,
}

const PODS: &str = "/api/v1/namespaces/apps/pods";

impl<'m> Doomed<'m> {
    fn on(mesh: &'m Mesh, node: &'static str, name: &'static str) -> Result<Self> {
        let files = mesh.node(node).agent_files()?;
        let api = Api::of(mesh)?;
        let script = machine::scripts().join("server.py").display().to_string();
        let command = format!("trap '' TERM; exec {} {script}", machine::python());
        let container = json!({"name": "server", "command": ["sh", "-c", command],
            "readinessProbe": {"tcpSocket": {"port": 8014}, "periodSeconds": 1}});
        let spec = json!({"nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [container]});
        let metadata = json!({"name": name, "namespace": "apps"});
        api.create(
            PODS,
            &json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}),
        )?;
        let path = format!("{PODS}/{name}");
        wait::until_true("the pod is ready and captured", || {
            let pod = api.get(&path)?;
            Ok(is_captured(&pod) && pod["status"]["containerStatuses"][0]["ready"] == true)
        })?;
        api.until_in_force(&[("Pod", "/api/v1/pods")])?;
        Ok(Self {
            mesh,
            api,
            name,
            node,
            files,
        })
    }

    fn pod(&self) -> Pod<'m> {
        self.mesh.pod("apps", self.name)
    }

    fn delete(&self) -> Result<()> {
        let path = format!("{PODS}/{}", self.name);
        self.api.delete(&path)?;
        wait::until_true("the pod is gone", || Ok(!self.api.is_there(&path)?))
    }

    /// Neither a connection nor a network nor an open file is left of it.
    fn left_nothing(&self, netns: &str) -> Result<()> {
        ensure!(!netns::path(netns).exists(), "its network is still there");
        let node = self.mesh.node(self.node);
        wait::until_true("its agent has forgotten it", || {
            Ok(!node.status()?.pods.iter().any(|pod| pod.name == self.name))
        })?;
        let its = |connection: &Value| {
            let ends = ["sourceWorkload", "destinationWorkload", "pod"].map(|end| connection[end].to_string());
            ends.iter().any(|end| end.contains(&format!("/{}\"", self.name)))
        };
        wait::until_true("no agent has a connection of it", || {
            let (code, said) = self.mesh.ask(&["get", "connections", "-o", "json"])?;
            ensure!(code == Some(0), "{said}");
            let all: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
            Ok(!objects(&all).iter().any(|one| its(one)))
        })?;
        let mut files = 0;
        let waited = wait::until_true("its agent has closed its files", || {
            files = node.agent_files()?;
            Ok(files <= self.files + 2)
        });
        waited.with_context(|| format!("{} before it came, {files} now", self.files))
    }
}

/// Every object that stands anywhere in this.
fn objects(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(all) => all.iter().flat_map(objects).collect(),
        Value::Object(fields) => std::iter::once(value)
            .chain(fields.values().flat_map(objects))
            .collect(),
        _ => Vec::new(),
    }
}

fn a_server_deleted_in_mid_connection_ends_it_at_both_ends_and_leaves_nothing(mesh: &Mesh) -> Result<()> {
    const MANY: usize = 20;
    let logs = ["node-1", "node-2"].map(|node| mesh.node(node).access_log());
    let doomed = Doomed::on(mesh, "node-2", "doomed")?;
    let (address, netns) = (doomed.pod().v4()?.to_string(), doomed.pod().netns());
    let mut crowd = client(mesh).start("crowd.py", &[&address, "8015"])?;
    crowd.say(&format!("add {MANY}"))?;
    let result = crowd.next()?;
    ensure!(result["answered"] == MANY, "{result}");
    let watcher = client(mesh).start("client.py", &["watch", &address, "8013"])?;
    ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    let (_, said) = mesh.ask(&["get", "connections", "-o", "json"])?;
    ensure!(
        said.contains("doomed"),
        "its connections are not listed: what follows shows nothing: {said:.500}"
    );
    doomed.delete()?;
    let end = watcher.next().context("a connection to a pod that is gone hangs")?;
    crowd.say("say")?;
    let result = crowd.next().context("connections to a pod that is gone hang")?;
    ensure!(
        result["answered"] == 0 && result["live"] == 0,
        "somebody else answers: {result}"
    );
    note(&format!("a deleted server's connections: {end}, {result}"));
    for (log, direction) in logs.into_iter().zip(["outbound", "inbound"]) {
        let (log, mut count) = (log?, 0);
        let told = wait::until_true("every connection is told of", || {
            let words = ["dst.workload=\"doomed\"", &format!("direction=\"{direction}\"")];
            let lines = log.lines()?;
            count = lines
                .iter()
                .filter(|line| words.iter().all(|word| line.contains(word)))
                .count();
            Ok(count > MANY)
        });
        told.with_context(|| format!("{direction}: {count} of {}", MANY + 1))?;
    }
    doomed.left_nothing(&netns)?;
    let result = client(mesh).client(&["refused", &address, "8001", "5"])?;
    ensure!(
        result["bytes"].as_u64().unwrap_or(0) == 0,
        "somebody else answers: {result}"
    );
    Ok(())
}

fn a_client_deleted_in_mid_connection_ends_it_at_both_ends_and_leaves_nothing(mesh: &Mesh) -> Result<()> {
    let log = mesh.node("node-2").access_log()?;
    let doomed = Doomed::on(mesh, "node-1", "leaver")?;
    let (address, netns, token) = (server(mesh).v4()?.to_string(), doomed.pod().netns(), "the-client-goes");
    let holder = doomed.pod().start("client.py", &["hold", &address, "8010", token])?;
    ensure!(holder.next()?["peer"].is_array(), "no connection");
    doomed.delete()?;
    let outcome = wait::until("the server sees the end", || {
        let outcome = no_error(client(mesh).client(&["outcome", &address, "8006", token])?)?;
        Ok(outcome.get("end").is_some().then_some(outcome))
    })?;
    note(&format!(
        "a deleted client's connection, at the server: {}",
        outcome["end"]
    ));
    log.line_with(&["src.workload=\"leaver\"", "direction=\"inbound\""])?;
    doomed.left_nothing(&netns)
}

/// Two in a hundred packets that come from the fabric to a node are dropped, until this is.
struct Lossy(&'static str);

impl Lossy {
    fn node(netns: &'static str) -> Result<Self> {
        let this = Self(netns);
        this.nft(&["add", "table", "inet", "lossy"])?;
        let chain = "{ type filter hook prerouting priority -300 ; }";
        this.nft(&["add", "chain", "inet", "lossy", "arriving", chain])?;
        let rule = "iifname eth0 meta l4proto tcp numgen random mod 100 < 2 counter drop";
        this.nft(&["add", "rule", "inet", "lossy", "arriving", rule])?;
        Ok(this)
    }

    fn nft(&self, arguments: &[&str]) -> Result<String> {
        let output = netns::command(self.0, "nft")
            .args(arguments)
            .output()
            .context("cannot run nft")?;
        ensure!(
            output.status.success(),
            "nft: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// How many it were.
    fn dropped(&self) -> Result<u64> {
        let said = self.nft(&["list", "table", "inet", "lossy"])?;
        let count = said
            .split_once("packets ")
            .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        count.with_context(|| format!("no count: {said}"))
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        if let Err(error) = self.nft(&["delete", "table", "inet", "lossy"]) {
            eprintln!("{} goes on losing packets: {error:#}", self.0);
        }
    }
}

fn a_fabric_that_loses_packets_loses_no_bytes_and_no_connections(mesh: &Mesh) -> Result<()> {
    const BULK: &str = "16777216";
    let nodes = [Lossy::node("uc-node-1")?, Lossy::node("uc-node-2")?];
    let (here, there) = (client(mesh), server(mesh));
    for address in there.addresses()? {
        let address = address.to_string();
        let result = here.client(&["bulk", &address, "8003", BULK])?;
        ensure!(
            result == json!({"whole": true, "missing": 0, "peer_whole": true}),
            "{address}: {result}"
        );
        let result = here.client(&["short", &address, "8001", "400", "16"])?;
        ensure!(result == json!({"done": 400, "failures": {}}), "{address}: {result}");
    }
    // Outside of the mesh it is the same, by TCP alone.
    let outside = mesh.pod("outside", "server").v4()?.to_string();
    let result = here.client(&["short", &outside, "8001", "64", "16"])?;
    ensure!(result == json!({"done": 64, "failures": {}}), "{result}");
    let dropped = [nodes[0].dropped()?, nodes[1].dropped()?];
    note(&format!("packets that the fabric lost: {dropped:?}"));
    ensure!(dropped.iter().all(|count| *count > 20), "nothing was lost: {dropped:?}");
    Ok(())
}
