//! The roles of the release binary, as processes: the store and the control plane. They end with this one.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
};

use crate::{child::BOUND, measure::Process};

/// A role that runs. Its log is beside its data.
pub struct Role {
    child: Child,
    name: &'static str,
    log: PathBuf,
    /// What it costs.
    pub process: Process,
}

impl Role {
    fn start(binary: &Path, name: &'static str, directory: &Path, arguments: &[String]) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut command = Command::new(binary);
        command.arg(name).args(arguments).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command
            .spawn()
            .with_context(|| format!("start {} {name}", binary.display()))?;
        Ok(Self {
            process: Process::of(&child)?,
            child,
            name,
            log,
        })
    }

    fn check(&mut self) -> Result<()> {
        let ended = self.child.try_wait()?;
        ensure!(
            ended.is_none(),
            "{} ended; its log is {}",
            self.name,
            self.log.display()
        );
        Ok(())
    }

    /// Until it is ready, looking every now and then.
    async fn until<F: Future<Output = Result<bool>>>(&mut self, mut ready: impl FnMut() -> F) -> Result<()> {
        let look = async {
            while !ready().await? {
                self.check()?;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        let waited = tokio::time::timeout(BOUND, look).await;
        waited.with_context(|| format!("{} is not ready", self.name))?
    }
}

/// The store on this directory's data, and the administrator's kubeconfig.
pub async fn store(binary: &Path, directory: &Path) -> Result<(Role, PathBuf)> {
    let kubeconfig = directory.join("kubeconfig");
    let mut arguments = ["--listen", "127.0.0.1:0"].map(str::to_owned).to_vec();
    for (option, path) in [("--data", directory.join("data")), ("--kubeconfig", kubeconfig.clone())] {
        arguments.extend([option.to_owned(), path.display().to_string()]);
    }
    let mut role = Role::start(binary, "store", directory, &arguments)?;
    role.until(|| std::future::ready(Ok(kubeconfig.exists()))).await?;
    Ok((role, kubeconfig))
}

/// The control plane.
pub struct Control {
    /// Its process.
    pub role: Role,
    /// xDS over TLS.
    pub xds: SocketAddr,
    monitoring: SocketAddr,
}

impl Control {
    /// Starts it, and waits until it serves.
    pub async fn start(binary: &Path, directory: &Path, kubeconfig: &Path) -> Result<Self> {
        let (xds, monitoring) = (free_port()?, free_port()?);
        let mut arguments = ["--cert-names", "127.0.0.1"].map(str::to_owned).to_vec();
        for (option, value) in [
            ("--xds", xds.to_string()),
            ("--monitoring", monitoring.to_string()),
            ("--kubeconfig", kubeconfig.display().to_string()),
        ] {
            arguments.extend([option.to_owned(), value]);
        }
        let mut role = Role::start(binary, "control", directory, &arguments)?;
        let ready = || async { Ok(get(monitoring, "/readyz").await.is_ok_and(|(status, _)| status == 200)) };
        role.until(ready).await?;
        Ok(Self { role, xds, monitoring })
    }

    /// Its metrics now.
    pub async fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics(get(self.monitoring, "/metrics").await?.1))
    }

    /// What it says of its inputs and clients.
    pub async fn syncz(&self) -> Result<serde_json::Value> {
        let (_, text) = get(self.monitoring, "/debug/syncz").await?;
        Ok(serde_json::from_str(&text)?)
    }
}

/// A page of metrics.
pub struct Metrics(String);

impl Metrics {
    /// The value of one that has no labels.
    pub fn value(&self, name: &str) -> Result<f64> {
        let line = self.0.lines().find_map(|line| {
            let (key, value) = line.split_once(' ')?;
            (key.strip_suffix("_total").unwrap_or(key) == name).then_some(value)
        });
        Ok(line.with_context(|| format!("there is no metric {name}"))?.parse()?)
    }
}

/// A port that nothing uses; that nothing takes it until it is used is not certain, but likely.
fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}
