//! Pods, policies and labels change at random while connections are made all the time: none is let in that the objects
//! refuse, none is refused that they let in, none is plaintext that should not be, and whatever failed is told of.
//!
//! ```text
//! chance ─► change ─► API ─► every agent has it ─► next            `oracle`: what the objects said, and since when
//! clients ─► who answered, or how it failed, and when ────────────► `judging` ◄── the agents' access logs
//! ```
//! `UNDERCURRENT_STRESS_SEED` repeats a run's changes, `UNDERCURRENT_STRESS_SECONDS` says how long it lasts.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use system_tests::{
    Api, Background, Capture, Mesh,
    chance::Chance,
    kubectl::is_captured,
    machine,
    oracle::{History, Rules},
    scenarios,
    suite::note,
    wait,
};

mod judging;

use judging::{Attempt, are_explained, judge};

scenarios![random_change_under_load_gives_no_wrong_verdict];

const SPACE: &str = "stress";
/// The namespace that is labelled in and out.
const ROAMING: &str = "roaming";
const SERVERS: [(&str, &str); 2] = [("s0", "node-1"), ("s1", "node-2")];
/// These come and go.
const GUESTS: [(&str, &str); 2] = [("g0", "node-2"), ("g1", "node-1")];
const ROLLED: &str = "web";
/// Seconds that a pod of it serves on once it is deleted: connections that are under way then are to have ended.
const GRACE: u64 = 15;
/// What takes as long as a pod's grace, and what else has its time on a busy machine.
const LONGER: Duration = Duration::from_secs(60);
/// Client, its namespace, its node, and what it sends.
const CLIENTS: [(&str, &str, &str, &str); 4] = [
    ("friend", SPACE, "node-1", "sT8-in-the-mesh-"),
    ("stranger", SPACE, "node-2", "sT8-in-the-mesh-"),
    ("roamer", ROAMING, "node-1", "roams"),
    ("client", "outside", "node-1", "outside"),
];
const POLICIES: &str = "/apis/security.istio.io/v1/namespaces/stress/authorizationpolicies";
const MODES: &str = "/apis/security.istio.io/v1/namespaces/stress/peerauthentications";

/// CLOCK_MONOTONIC in milliseconds, as the scripts have it.
fn now() -> Result<u64> {
    let uptime = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(uptime.tv_sec())? * 1000 + u64::try_from(uptime.tv_nsec())? / 1_000_000)
}

fn number_of(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(variable) else {
        return Ok(None);
    };
    text.parse()
        .map(Some)
        .with_context(|| format!("{variable}={text:?} is no number"))
}

/// The mesh, what is changed in it, and who connects meanwhile.
struct Stress<'m> {
    mesh: &'m Mesh,
    api: Api,
    chance: Chance,
    history: History,
    clients: Vec<(&'static str, Background)>,
    /// The guests that are there.
    guests: BTreeSet<&'static str>,
    attempts: Vec<Attempt>,
    changes: BTreeMap<&'static str, usize>,
}

fn metadata(namespace: &str, name: &str) -> Value {
    json!({"name": name, "namespace": namespace})
}

fn pod_path(namespace: &str, name: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/pods/{name}")
}

fn serving() -> Value {
    let script = machine::scripts().join("server.py").display().to_string();
    let command = format!("trap '' TERM; exec {} {script}", machine::python());
    json!({"name": "server", "command": ["sh", "-c", command],
        "readinessProbe": {"tcpSocket": {"port": 8014}, "periodSeconds": 1}})
}

impl<'m> Stress<'m> {
    fn stage(mesh: &'m Mesh, seed: u64) -> Result<Self> {
        let api = Api::of(mesh)?;
        for space in [SPACE, ROAMING] {
            let metadata = json!({"name": space, "labels": {"istio.io/dataplane-mode": "ambient"}});
            api.create(
                "/api/v1/namespaces",
                &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}),
            )?;
        }
        let plain = BTreeSet::from(["client".to_owned()]);
        let this = Self {
            mesh,
            api,
            chance: Chance::of(seed),
            history: History::new(
                now()?,
                Rules {
                    plain,
                    ..Rules::default()
                },
            ),
            clients: Vec::new(),
            guests: BTreeSet::new(),
            attempts: Vec::new(),
            changes: BTreeMap::new(),
        };
        for (name, space, node, _) in CLIENTS.into_iter().filter(|(_, space, ..)| *space != "outside") {
            this.create_pod(
                space,
                name,
                node,
                &json!({"name": "idle", "command": ["sleep", "infinity"]}),
            )?;
        }
        for (name, node) in SERVERS {
            this.create_pod(SPACE, name, node, &serving())?;
        }
        this.create_deployment()?;
        for (name, space, ..) in CLIENTS.into_iter().filter(|(_, space, ..)| *space != "outside") {
            this.until_captured(space, name, true)?;
        }
        for (name, _) in SERVERS {
            this.until_captured(SPACE, name, true)?;
        }
        this.until_rolled()?;
        Ok(this)
    }

    fn create_pod(&self, space: &str, name: &str, node: &str, container: &Value) -> Result<()> {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(space, name)});
        let accounts = format!("/api/v1/namespaces/{space}/serviceaccounts");
        if !self.api.is_there(&format!("{accounts}/{name}"))? {
            self.api.create(&accounts, &account)?;
        }
        let mut metadata = metadata(space, name);
        metadata["labels"] = json!({"app": name});
        let spec = json!({"nodeName": node, "serviceAccountName": name, "terminationGracePeriodSeconds": 1,
            "containers": [container]});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        self.api
            .create(&format!("/api/v1/namespaces/{space}/pods"), &pod)
            .map(drop)
    }

    fn create_deployment(&self) -> Result<()> {
        let labels = json!({"app": ROLLED});
        let spec = json!({"replicas": 2, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {"terminationGracePeriodSeconds": GRACE, "containers": [serving()]}}});
        let metadata = metadata(SPACE, ROLLED);
        let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec});
        self.api
            .create("/apis/apps/v1/namespaces/stress/deployments", &deployment)?;
        let spec = json!({"selector": labels, "ports": [{"port": 8014}]});
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
        self.api
            .create("/api/v1/namespaces/stress/services", &service)
            .map(drop)
    }

    fn until_captured(&self, space: &str, name: &str, captured: bool) -> Result<()> {
        let mut last = Value::Null;
        let waited = wait::until_true(&format!("{space}/{name} is ready, captured: {captured}"), || {
            last = self.api.get(&pod_path(space, name))?;
            let ready = last["status"]["containerStatuses"][0]["ready"] == true;
            Ok(ready && is_captured(&last) == captured)
        });
        waited.with_context(|| format!("it is: {last:#}"))
    }

    fn is_rolled(&self) -> Result<bool> {
        let deployment = self.api.get("/apis/apps/v1/namespaces/stress/deployments/web")?;
        let status = &deployment["status"];
        let counts = ["replicas", "updatedReplicas", "availableReplicas"].map(|name| status[name].as_u64());
        Ok(counts == [Some(2); 3] && status["observedGeneration"] == deployment["metadata"]["generation"])
    }

    fn until_rolled(&self) -> Result<()> {
        wait::until_within(LONGER, "the deployment is rolled out", || {
            Ok(self.is_rolled()?.then_some(()))
        })
    }

    /// Starts the clients, once everybody answers.
    fn connect(&mut self, seconds: u64) -> Result<()> {
        self.api
            .until_in_force(&[("Pod", "/api/v1/pods"), ("Service", "/api/v1/services")])?;
        let limit = (seconds + 180).to_string();
        for (name, space, _, marker) in CLIENTS {
            let client = self
                .mesh
                .pod(space, name)
                .start_for(&limit, "load.py", &[marker, "2"])?;
            self.clients.push((name, client));
        }
        self.aim()
    }

    /// Tells the clients whom to dial; returns when none begins to dial anybody else.
    fn aim(&mut self) -> Result<()> {
        let mut targets = vec![json!([ROLLED, "web.stress.svc.cluster.local"]); 4];
        let guests = GUESTS.iter().filter(|(name, _)| self.guests.contains(name));
        for (name, _) in SERVERS.iter().chain(guests) {
            for address in self.mesh.pod(SPACE, name).addresses()? {
                targets.push(json!([name, address]));
            }
        }
        let line = Value::from(targets).to_string();
        for (_, client) in &mut self.clients {
            client.say(&line)?;
        }
        for (name, client) in &self.clients {
            // Attempts, up to the line that says that it has heard.
            while let Some(attempt) = Attempt::of(name, &client.next_line(wait::LONG)?)? {
                self.attempts.push(attempt);
            }
        }
        Ok(())
    }

    /// Takes down what the clients printed.
    fn read(&mut self) -> Result<()> {
        for (name, client) in &mut self.clients {
            while let Some(line) = client.line() {
                self.attempts.extend(Attempt::of(name, &line)?);
            }
        }
        Ok(())
    }

    /// One change, and when every agent has it.
    fn change(&mut self) -> Result<()> {
        let kind = *self
            .chance
            .one_of(&["deny", "deny", "only", "strict", "guest", "guest", "roam", "roll"]);
        *self.changes.entry(kind).or_default() += 1;
        let server = (*self.chance.one_of(&["s0", "s1", "g0", "g1", ROLLED])).to_owned();
        let client = (*self.chance.one_of(&["friend", "stranger", "roamer"])).to_owned();
        match kind {
            "deny" => self.toggle_deny(server, client),
            "only" => self.toggle_only(server, client),
            "strict" => self.toggle_strict(server),
            "guest" => self.come_or_go(),
            "roam" => self.roam(),
            _ => self.roll(),
        }
        .with_context(|| format!("the change {kind}"))
    }

    fn toggle_deny(&mut self, server: String, client: String) -> Result<()> {
        let (name, mut rules) = (format!("deny-{client}-{server}"), self.history.rules());
        let key = (server.clone(), client.clone());
        let is_new = !rules.denied.remove(&key);
        if is_new {
            rules.denied.insert(key);
        }
        let policy = is_new.then(|| authorization(&name, &server, "DENY", &client));
        self.policy_in_force(rules, POLICIES, &name, policy)
    }

    fn toggle_only(&mut self, server: String, client: String) -> Result<()> {
        let (name, mut rules) = (format!("only-{server}"), self.history.rules());
        let is_new = rules.only.remove(&server).is_none();
        if is_new {
            rules.only.insert(server.clone(), client.clone());
        }
        let policy = is_new.then(|| authorization(&name, &server, "ALLOW", &client));
        self.policy_in_force(rules, POLICIES, &name, policy)
    }

    fn toggle_strict(&mut self, server: String) -> Result<()> {
        let (name, mut rules) = (format!("strict-{server}"), self.history.rules());
        let is_new = !rules.strict.remove(&server);
        if is_new {
            rules.strict.insert(server.clone());
        }
        let policy = is_new.then(|| {
            let spec = json!({"selector": {"matchLabels": {"app": server}}, "mtls": {"mode": "STRICT"}});
            json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
                "metadata": metadata(SPACE, &name), "spec": spec})
        });
        self.policy_in_force(rules, MODES, &name, policy)
    }

    /// Makes a policy, or deletes it where there is none to make.
    fn policy_in_force(&mut self, rules: Rules, collection: &str, name: &str, policy: Option<Value>) -> Result<()> {
        self.history.begin(now()?, rules, BTreeSet::new());
        match policy {
            Some(policy) => self.api.create(collection, &policy).map(drop)?,
            None => self.api.delete(&format!("{collection}/{name}"))?,
        }
        let kind = if collection == POLICIES {
            "AuthorizationPolicy"
        } else {
            "PeerAuthentication"
        };
        let all = collection.replace("/namespaces/stress", "");
        self.api.until_in_force(&[(kind, &all)])?;
        self.history.in_force(now()?);
        Ok(())
    }

    fn come_or_go(&mut self) -> Result<()> {
        let (name, node) = *self.chance.one_of(&GUESTS);
        let comes = self.guests.insert(name);
        if !comes {
            self.guests.remove(name);
            self.aim()?;
        }
        let rules = self.history.rules();
        self.history.begin(now()?, rules, BTreeSet::from([name.to_owned()]));
        if comes {
            self.create_pod(SPACE, name, node, &serving())?;
            self.until_captured(SPACE, name, true)?;
        } else {
            self.api.delete(&pod_path(SPACE, name))?;
            wait::until_true("the guest is gone", || {
                Ok(!self.api.is_there(&pod_path(SPACE, name))?)
            })?;
        }
        self.api.until_in_force(&[("Pod", "/api/v1/pods")])?;
        self.history.in_force(now()?);
        if comes {
            self.aim()?;
        }
        Ok(())
    }

    fn roam(&mut self) -> Result<()> {
        let mut rules = self.history.rules();
        let leaves = rules.plain.insert("roamer".to_owned());
        if !leaves {
            rules.plain.remove("roamer");
        }
        self.history.begin(now()?, rules, BTreeSet::from(["roamer".to_owned()]));
        let mode = if leaves { "none" } else { "ambient" };
        let labels = json!({"metadata": {"labels": {"istio.io/dataplane-mode": mode}}});
        self.api.patch("/api/v1/namespaces/roaming", &labels)?;
        self.until_captured(ROAMING, "roamer", !leaves)?;
        self.api
            .until_in_force(&[("Namespace", "/api/v1/namespaces"), ("Pod", "/api/v1/pods")])?;
        // Its agent gives its capture up, or the kernel's last part of it, after it has said so.
        self.until_status(ROAMING, "roamer", !leaves)?;
        self.history.in_force(now()?);
        Ok(())
    }

    fn until_status(&self, space: &str, name: &str, captured: bool) -> Result<()> {
        wait::until_true(&format!("the agent has {space}/{name} captured: {captured}"), || {
            let pods = self.mesh.node("node-1").status()?.pods;
            let its = pods.iter().find(|pod| pod.namespace == space && pod.name == name);
            Ok(its.is_some_and(|pod| pod.captured) == captured)
        })
    }

    /// Begins a rollout, unless one is under way. Nobody may notice.
    fn roll(&mut self) -> Result<()> {
        if !self.is_rolled()? {
            return Ok(());
        }
        let version = json!({"template": {"metadata": {"annotations": {"version": now()?.to_string()}}}});
        let path = "/apis/apps/v1/namespaces/stress/deployments/web";
        self.api.patch(path, &json!({"spec": version})).map(drop)
    }

    /// Ends the clients, and reads the rest of what they have to say.
    fn finish(&mut self) -> Result<()> {
        for (name, client) in std::mem::take(&mut self.clients) {
            for line in client.rest()? {
                self.attempts.extend(Attempt::of(name, &line)?);
            }
        }
        Ok(())
    }

    fn leave(&self) -> Result<()> {
        for space in [SPACE, ROAMING] {
            self.api.delete(&format!("/api/v1/namespaces/{space}"))?;
        }
        for space in [SPACE, ROAMING] {
            let path = format!("/api/v1/namespaces/{space}");
            wait::until_within(LONGER, &format!("{space} is gone"), || {
                Ok((!self.api.is_there(&path)?).then_some(()))
            })?;
        }
        Ok(())
    }
}

fn authorization(name: &str, server: &str, action: &str, client: &str) -> Value {
    let space = if client == "roamer" { ROAMING } else { SPACE };
    let principal = format!("cluster.local/ns/{space}/sa/{client}");
    let rules = json!([{"from": [{"source": {"principals": [principal]}}]}]);
    let spec = json!({"selector": {"matchLabels": {"app": server}}, "action": action, "rules": rules});
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata(SPACE, name),
        "spec": spec})
}

fn random_change_under_load_gives_no_wrong_verdict(mesh: &Mesh) -> Result<()> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let seed = number_of("UNDERCURRENT_STRESS_SEED")?.unwrap_or(since_1970.as_secs());
    let seconds = number_of("UNDERCURRENT_STRESS_SECONDS")?.unwrap_or(20);
    println!("UNDERCURRENT_STRESS_SEED={seed} UNDERCURRENT_STRESS_SECONDS={seconds}");
    stressed(mesh, seed, seconds).with_context(|| format!("UNDERCURRENT_STRESS_SEED={seed}"))
}

fn stressed(mesh: &Mesh, seed: u64, seconds: u64) -> Result<()> {
    let nodes = ["node-1", "node-2"].map(|name| mesh.node(name));
    let mut stress = Stress::stage(mesh, seed)?;
    let of_agents = [nodes[0].agent_log()?, nodes[1].agent_log()?];
    let (logs, capture) = ([nodes[0].access_log()?, nodes[1].access_log()?], Capture::on_fabric()?);
    stress.connect(seconds)?;
    let before = nodes.map(|node| (node.agent_rss().unwrap_or(0), node.agent_files().unwrap_or(0)));
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        stress.change()?;
        stress.read()?;
    }
    stress.until_rolled()?;
    stress.finish()?;
    ensure!(
        !capture.stop()?.contain("sT8-in-the-mesh-"),
        "the marker of the mesh was on the fabric in clear"
    );
    let failed = judge(&stress.history, &stress.attempts)?;
    are_explained(&stress.history, &stress.attempts, &failed, &logs)?;
    for line in of_agents.iter().flat_map(|log| log.lines().unwrap_or_default()) {
        // Who comes and goes was never outside of the mesh.
        let is_wrong = ["panicked", "StartedWithoutMesh"]
            .iter()
            .any(|word| line.contains(word));
        ensure!(!is_wrong, "an agent says: {line}");
    }
    for node in nodes {
        ensure!(
            node.status()?.access_log_dropped == 0,
            "{} dropped lines of its log",
            node.name
        );
    }
    let after = nodes.map(|node| (node.agent_rss().unwrap_or(0), node.agent_files().unwrap_or(0)));
    note(&format!(
        "stress, seed {seed}: {} states in {seconds} s ({:?}), {} connections, {} of them refused or in between; KiB and \
         files of the agents {before:?} -> {after:?}",
        stress.history.len(),
        stress.changes,
        stress.attempts.len(),
        failed.len()
    ));
    ensure!(
        stress.attempts.len() > 100,
        "only {} connections",
        stress.attempts.len()
    );
    ensure!(!failed.is_empty(), "nothing was refused: this shows nothing");
    stress.leave()
}
