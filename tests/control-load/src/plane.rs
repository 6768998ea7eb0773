//! `--from index`: the control plane without an API, and what it measures of itself with agents of another process
//! connected, in plaintext. This is the control plane's own work: the API's and TLS's come on top.
//!
//! A change is in force at the last agent when the last agent has acknowledged it: both ends of that time are on one
//! clock. One line of JSON for each measurement.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use control::{
    index::{Config, Index},
    resources::Type,
    xds::{self, Authenticate, Cache, Caller, Discovery},
};
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tasks::drain_channel;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    Options,
    child::{Agents, BOUND},
    measure::{Process, quantile},
    say,
    world::{World, put},
};

/// Everybody is let in: tokens are the API's cost.
struct Everybody;

impl Authenticate for Everybody {
    fn authenticate<'a>(
        &'a self,
        _: &'a http::HeaderMap,
        _: Option<SocketAddr>,
    ) -> BoxFuture<'a, Result<Caller, tonic::Status>> {
        let caller = Caller {
            name: "agent".to_owned(),
        };
        Box::pin(std::future::ready(Ok(caller)))
    }
}

struct Plane {
    world: World,
    index: Index,
    cache: Arc<Cache>,
    discovery: Discovery,
    address: SocketAddr,
    changed: usize,
}

/// Measures it all.
pub async fn run(options: &Options) -> Result<()> {
    let (_trigger, drain) = drain_channel();
    let world = World {
        services: options.services,
    };
    let began = Instant::now();
    let mut index = Index::new(Config::default());
    let cache = Arc::new(Cache::new());
    let mut all = Vec::new();
    for objects in world.objects() {
        all.extend(index.apply(objects.iter().map(put).collect()).changes);
    }
    cache.apply(all);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let discovery = Discovery::start(Arc::clone(&cache), Arc::new(Everybody), xds::Config::default(), drain);
    tokio::spawn(serve(listener, discovery.clone()));
    let mut plane = Plane {
        world,
        index,
        cache,
        discovery,
        address,
        changed: 0,
    };
    say(
        "start",
        0,
        json!({"seconds": began.elapsed().as_secs_f64(), "memory_mib": Process::this().memory_mib()?}),
    );
    let agent = Agents::start("agent", &plane.arguments()).await?;
    say("one agent", 1, agent.first.clone());
    agent.stop().await?;
    for count in &options.agents {
        plane
            .measure(*count, options)
            .await
            .with_context(|| format!("with {count} agents"))?;
    }
    Ok(())
}

async fn serve(listener: TcpListener, discovery: Discovery) -> Result<()> {
    let (connections, incoming) = mpsc::channel(64);
    let accept = async move {
        loop {
            let (stream, peer) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let accepted = Ok::<_, std::io::Error>(xds::Connection::new(stream, peer));
            if connections.send(accepted).await.is_err() {
                return anyhow::Ok(());
            }
        }
    };
    let serve = xds::transport()
        .add_service(discovery)
        .serve_with_incoming(ReceiverStream::new(incoming));
    tokio::try_join!(accept, async { Ok(serve.await?) })?;
    Ok(())
}

impl Plane {
    fn resources(&self) -> usize {
        let state = self.cache.snapshot();
        Type::ALL.iter().map(|type_| state.len(*type_)).sum()
    }

    fn arguments(&self) -> Vec<String> {
        let resources = self.resources().to_string();
        [
            "--control",
            &format!("http://{}", self.address),
            "--resources",
            &resources,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    async fn measure(&mut self, count: usize, options: &Options) -> Result<()> {
        let mut arguments = self.arguments();
        // Those that remember hold a copy of the names each.
        let remember = (500_000 / self.world.pods()).clamp(1, count);
        let numbers = ["--count", &count.to_string(), "--remember", &remember.to_string()].map(str::to_owned);
        arguments.extend(numbers);
        if count * self.world.pods() > 2_000_000 {
            arguments.push("--light".to_owned());
        }
        let cpu = Process::this().cpu_seconds()?;
        let mut agents = Agents::start("agents", &arguments).await?;
        let mut first = agents.first.clone();
        first["cpu_seconds"] = json!(Process::this().cpu_seconds()? - cpu);
        first["memory_mib"] = json!(Process::this().memory_mib()?);
        first["peak_mib"] = json!(Process::this().peak_mib()?);
        say("first synchronisation", count, first);
        self.settled(count).await?;
        say("one change", count, self.single(count, options.changes).await?);
        say("100 changes a second", count, self.steady(options.seconds).await?);
        self.settled(count).await?;
        let again = agents.again().await?;
        say("reconnect, nothing changed", count, again);
        agents.stop().await
    }

    /// Until every agent has everything.
    async fn settled(&self, count: usize) -> Result<()> {
        let acknowledged = self.discovery.acknowledged();
        let generation = self.cache.snapshot().generation();
        tokio::time::timeout(BOUND, acknowledged.wait_in_force(generation))
            .await
            .context("not settled")?;
        if acknowledged.connected() != count {
            bail!("{} of {count} agents are connected", acknowledged.connected());
        }
        Ok(())
    }

    /// A pod becomes ready, or is no more: one endpoint of one service.
    fn change(&mut self) -> u64 {
        let pods = self.world.pods();
        let (at, ready) = (self.changed * 7919 % pods, self.changed / pods % 2 == 1);
        self.changed += 1;
        let change = put(&self.world.pod(at, ready));
        self.cache.apply(self.index.apply(vec![change]).changes)
    }

    /// One change after the other, each in force everywhere before the next.
    async fn single(&mut self, count: usize, changes: usize) -> Result<Value> {
        let bytes = || self.discovery.acknowledged().counters.bytes.load(Relaxed) as f64;
        let before = bytes();
        let mut times = Vec::new();
        for _ in 0..changes {
            // As after a pause: nothing is being sent.
            tokio::time::sleep(Duration::from_millis(60)).await;
            let began = Instant::now();
            let generation = self.change();
            let in_force = self.discovery.acknowledged().wait_in_force(generation);
            tokio::time::timeout(BOUND, in_force)
                .await
                .context("a change is not in force")?;
            times.push(began.elapsed());
        }
        let bytes = self.discovery.acknowledged().counters.bytes.load(Relaxed) as f64 - before;
        Ok(
            json!({"p50_ms": quantile(&mut times, 0.5), "p99_ms": quantile(&mut times, 0.99),
            "bytes": bytes / (changes * count) as f64}),
        )
    }

    /// A hundred changes a second, whatever becomes of them.
    async fn steady(&mut self, seconds: f64) -> Result<Value> {
        let waiting: Arc<Mutex<VecDeque<(u64, Instant)>>> = Arc::default();
        let mut in_force = self.discovery.acknowledged().in_force();
        let queue = Arc::clone(&waiting);
        let arrivals = tokio::spawn(async move {
            let mut times = Vec::new();
            while in_force.changed().await.is_ok() {
                let generation = *in_force.borrow_and_update();
                let now = Instant::now();
                let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                while let Some((of, began)) = queue.front().copied() {
                    match of {
                        // The end.
                        u64::MAX if queue.len() == 1 => return times,
                        of if of <= generation => times.push(now - began),
                        _ => break,
                    }
                    queue.pop_front();
                }
            }
            times
        });
        let (cpu, responses) = (Process::this().cpu_seconds()?, self.responses());
        let began = Instant::now();
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        let queue = || waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while began.elapsed().as_secs_f64() < seconds {
            ticks.tick().await;
            let began = Instant::now();
            // Held, so that the change is in the queue before it can be in force.
            let mut queue = queue();
            let generation = self.change();
            queue.push_back((generation, began));
        }
        let elapsed = began.elapsed().as_secs_f64();
        let cpu = Process::this().cpu_seconds()? - cpu;
        let responses = self.responses() - responses;
        queue().push_back((u64::MAX, Instant::now()));
        // One more, to wake the other task after the last.
        self.change();
        let mut times = tokio::time::timeout(BOUND, arrivals)
            .await
            .context("the changes are not in force")??;
        Ok(
            json!({"p50_ms": quantile(&mut times, 0.5), "p99_ms": quantile(&mut times, 0.99),
            "cpu_percent": 100.0 * cpu / elapsed, "responses_per_second": responses / elapsed, "changes": times.len()}),
        )
    }

    fn responses(&self) -> f64 {
        self.discovery.acknowledged().counters.responses.load(Relaxed) as f64
    }
}
