//! `--from api`: the store and the control plane as processes of the release binary, agents over TLS with tokens of node
//! agents, changes as writes at the API.
//!
//! ```text
//! PATCH ─TLS─► store (durable) ─watch─► control: index, cache ─TLS─► agents: decode, acknowledge ─► control: in force
//! ▲ the clock starts                                                                                the clock stops ▲
//! ```
//! A change is in force at the last agent when all have decoded it and the control plane has the last acknowledgement,
//! which its metrics say. At a hundred changes a second the time is that of the last agent alone: the control plane's
//! count is of states, of which one has several changes.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    Options,
    child::{Agents, BOUND},
    cluster::{self, Changes},
    measure::{Process, quantile},
    roles::{self, Control, Role},
    say,
    world::World,
};

/// How many changes those that are away miss.
const MISSED: usize = 10;

struct Cluster {
    world: World,
    store: Role,
    control: Control,
    roots: PathBuf,
    tokens: PathBuf,
    changes: Changes,
}

/// Measures it all.
pub async fn run(options: &Options) -> Result<()> {
    let until = tokio::time::Instant::now() + options.bound();
    let cluster = tokio::time::timeout_at(until, Cluster::start(options)).await;
    let cluster = cluster.context("the cluster is not there in time")??;
    cluster.one_agent().await?;
    for count in &options.agents {
        match tokio::time::timeout_at(until, cluster.measure(*count, options)).await {
            Ok(measured) => measured.with_context(|| format!("with {count} agents"))?,
            Err(_) => say("not measured for lack of time", *count, json!({"rows": 1})),
        }
    }
    drop(cluster);
    let data = options.directory.as_deref().context("no --directory")?.join("data");
    std::fs::remove_dir_all(&data).with_context(|| format!("remove {}", data.display()))
}

impl Cluster {
    async fn start(options: &Options) -> Result<Self> {
        let binary = options.binary.as_deref().context("no --binary")?;
        let directory = options.directory.as_deref().context("no --directory")?;
        if directory.exists() {
            std::fs::remove_dir_all(directory).with_context(|| format!("empty {}", directory.display()))?;
        }
        std::fs::create_dir_all(directory)?;
        let world = World {
            services: options.services,
        };
        let most = options.agents.iter().copied().max().unwrap_or(1);
        cluster::fill(&directory.join("data"), world, most).await?;
        let (store, kubeconfig) = roles::store(binary, directory).await?;
        let began = Instant::now();
        let control = Control::start(binary, directory, &kubeconfig).await?;
        let seconds = began.elapsed().as_secs_f64();
        say(
            "start",
            0,
            json!({"seconds": seconds, "memory_mib": control.role.process.memory_mib()?,
                "peak_mib": control.role.process.peak_mib()?, "store_memory_mib": store.process.memory_mib()?}),
        );
        let client = control::client(Some(&kubeconfig)).await?;
        let tokens = directory.join("tokens");
        cluster::tokens(&client, most, &tokens).await?;
        Ok(Self {
            roots: cluster::roots(&client, directory.join("roots.pem")).await?,
            changes: Changes::new(client, world),
            world,
            store,
            control,
            tokens,
        })
    }

    async fn arguments(&self) -> Result<Vec<String>> {
        let metrics = self.control.metrics().await?;
        let resources = metrics.value("undercurrent_addresses")? + metrics.value("undercurrent_policies")?;
        let control = format!("https://{}", self.control.xds);
        let roots = self.roots.display().to_string();
        let arguments = [
            "--control",
            &control,
            "--roots",
            &roots,
            "--resources",
            &resources.to_string(),
        ];
        Ok(arguments.map(str::to_owned).to_vec())
    }

    async fn one_agent(&self) -> Result<()> {
        let mut arguments = self.arguments().await?;
        let tokens = std::fs::read_to_string(&self.tokens)?;
        let token = self.tokens.with_file_name("token");
        std::fs::write(&token, tokens.lines().next().unwrap_or_default())?;
        arguments.extend(["--token".to_owned(), token.display().to_string()]);
        let agent = Agents::start("agent", &arguments).await?;
        say("one agent", 1, agent.first.clone());
        agent.stop().await
    }

    async fn measure(&self, count: usize, options: &Options) -> Result<()> {
        let mut arguments = self.arguments().await?;
        // Those that remember hold a copy of the names each.
        let remember = (500_000 / self.world.pods()).clamp(1, count);
        for (option, value) in [
            ("--count", count.to_string()),
            ("--remember", remember.to_string()),
            ("--tokens", self.tokens.display().to_string()),
        ] {
            arguments.extend([option.to_owned(), value]);
        }
        arguments.push("--tell".to_owned());
        if count * self.world.pods() > 2_000_000 {
            arguments.push("--light".to_owned());
        }
        let control = &self.control.role.process;
        let cpu = control.cpu_seconds()?;
        let mut agents = Agents::start("agents", &arguments).await?;
        let mut first = agents.first.clone();
        self.settled(count).await?;
        first["cpu_seconds"] = json!(control.cpu_seconds()? - cpu);
        first["memory_mib"] = json!(control.memory_mib()?);
        first["peak_mib"] = json!(control.peak_mib()?);
        say("first synchronisation", count, first);
        // With a thousand agents a change keeps both processors busy for a while: half as many are as good.
        let changes = if count > 100 {
            options.changes / 2
        } else {
            options.changes
        };
        let single = self.single(&mut agents, count, changes.max(1)).await?;
        say("one change", count, single);
        say(
            "100 changes a second",
            count,
            self.steady(&mut agents, options.seconds).await?,
        );
        self.settled(count).await?;
        say("reconnect, nothing changed", count, agents.again().await?);
        self.settled(count).await?;
        agents.leave().await?;
        self.settled(count - remember).await?;
        self.missed(count - remember).await?;
        say("reconnect, ten changed", count, agents.again().await?);
        self.settled(count).await?;
        agents.stop().await?;
        self.settled(0).await
    }

    /// Until so many agents are connected and have everything.
    async fn settled(&self, count: usize) -> Result<()> {
        let look = async {
            loop {
                let metrics = self.control.metrics().await?;
                let connected = metrics.value("pilot_xds")?;
                if connected == count as f64 && metrics.value("undercurrent_xds_lagging")? == 0.0 {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(BOUND, look).await;
        waited.with_context(|| format!("{count} agents are not up to date"))?
    }

    /// One change after the other, each in force everywhere before the next.
    async fn single(&self, agents: &mut Agents, count: usize, changes: usize) -> Result<Value> {
        let before = self.control.metrics().await?.value("undercurrent_xds_sent_bytes")?;
        let (mut written, mut taken, mut in_force) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..changes {
            // As after a pause: nothing is being sent.
            tokio::time::sleep(Duration::from_millis(60)).await;
            let change = self.changes.next();
            let (began, at) = (Instant::now(), now());
            let write = async {
                change.write().await?;
                anyhow::Ok(began.elapsed())
            };
            let everywhere = async {
                loop {
                    let applied = agents.applied().await?;
                    if applied.name == change.resource {
                        return anyhow::Ok(Duration::from_secs_f64((applied.at - at).max(0.0)));
                    }
                }
            };
            let (write, everywhere) = tokio::try_join!(write, everywhere)?;
            while self.control.metrics().await?.value("undercurrent_xds_lagging")? > 0.0 {}
            in_force.push(began.elapsed());
            written.push(write);
            taken.push(everywhere);
        }
        let bytes = self.control.metrics().await?.value("undercurrent_xds_sent_bytes")? - before;
        Ok(
            json!({"p50_ms": quantile(&mut in_force, 0.5), "p99_ms": quantile(&mut in_force, 0.99),
            "max_ms": quantile(&mut in_force, 1.0),
            "written_p50_ms": quantile(&mut written, 0.5), "written_p99_ms": quantile(&mut written, 0.99),
            "taken_p50_ms": quantile(&mut taken, 0.5), "taken_p99_ms": quantile(&mut taken, 0.99),
            "bytes": bytes / (changes * count) as f64}),
        )
    }

    /// A hundred changes a second, whatever becomes of them.
    async fn steady(&self, agents: &mut Agents, seconds: f64) -> Result<Value> {
        let mut usage = Usage::begin(self).await?;
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        let mut waiting: HashMap<String, f64> = HashMap::new();
        let (mut writes, mut times) = (JoinSet::new(), Vec::new());
        let mut changes = (seconds * 100.0) as usize;
        while changes > 0 || !waiting.is_empty() {
            tokio::select! {
                _ = ticks.tick(), if changes > 0 => {
                    changes -= 1;
                    let change = self.changes.next();
                    waiting.insert(change.resource.clone(), now());
                    writes.spawn(async move { change.write().await });
                    if changes == 0 {
                        usage.end(self).await?;
                    }
                }
                Some(written) = writes.join_next() => {
                    written??;
                }
                applied = agents.applied() => {
                    let applied = applied?;
                    if let Some(began) = waiting.remove(&applied.name) {
                        times.push(Duration::from_secs_f64((applied.at - began).max(0.0)));
                    }
                }
            }
        }
        Ok(
            json!({"p50_ms": quantile(&mut times, 0.5), "p99_ms": quantile(&mut times, 0.99),
            "cpu_percent": usage.control, "store_cpu_percent": usage.store,
            "responses_per_second": usage.responses, "changes": times.len()}),
        )
    }

    /// Changes that only so many agents see: until they have them, or the control plane has.
    async fn missed(&self, by: usize) -> Result<()> {
        let mut revision = 0;
        for _ in 0..MISSED {
            revision = self.changes.next().write().await?;
        }
        let look = async {
            while self.control.syncz().await?["inputs"]["Pod"]["revision"].as_u64() < Some(revision) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        let waited = tokio::time::timeout(BOUND, look).await;
        waited.context("the control plane does not see changes")??;
        self.settled(by).await
    }
}

/// What the roles use over a time: first what they had used before it.
struct Usage {
    began: Instant,
    control: f64,
    store: f64,
    responses: f64,
}

impl Usage {
    async fn begin(cluster: &Cluster) -> Result<Self> {
        Ok(Self {
            began: Instant::now(),
            control: cluster.control.role.process.cpu_seconds()?,
            store: cluster.store.process.cpu_seconds()?,
            responses: responses(cluster).await?,
        })
    }

    /// Of a second, and of a processor in per cent.
    async fn end(&mut self, cluster: &Cluster) -> Result<()> {
        let seconds = self.began.elapsed().as_secs_f64();
        let percent = |process: &Process, before: f64| {
            let used = process.cpu_seconds()? - before;
            anyhow::Ok(100.0 * used / seconds)
        };
        self.control = percent(&cluster.control.role.process, self.control)?;
        self.store = percent(&cluster.store.process, self.store)?;
        self.responses = (responses(cluster).await? - self.responses) / seconds;
        Ok(())
    }
}

async fn responses(cluster: &Cluster) -> Result<f64> {
    cluster.control.metrics().await?.value("pilot_xds_pushes")
}

/// Seconds since 1970, by the clock that other processes have, too.
fn now() -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}
