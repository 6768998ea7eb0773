//! The store role: the embedded Kubernetes-shaped API, for a machine without Kubernetes.
//!
//! Listens where it is told, and on sockets that it inherits (`LISTEN_FDS`, as systemd passes them, so that a restart
//! refuses no connection). SIGTERM ends watches cleanly and finishes what is under way. What the API is, and is not, is
//! said in the crate `store`.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use ::store::{Config, Server};
use anyhow::{Context, bail};
use clap::Args;
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};

use crate::node::logging;

/// Options of `undercurrent store`.
#[derive(Args, Debug)]
pub struct StoreArgs {
    /// Where objects, keys and certificates are kept; made if it is not there.
    #[arg(long, env = "UNDERCURRENT_STORE_DATA", value_name = "DIR")]
    data: PathBuf,
    /// Where to listen; may be given more than once [default: 127.0.0.1:6443, unless sockets are inherited].
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// Where service addresses are taken from: at most one range of each family [default: 10.96.0.0/16 and
    /// fd00:10:96::/112].
    #[arg(long = "service-cidr", value_name = "CIDR")]
    service_cidrs: Vec<IpNet>,
    /// Another name or address in the server's certificate; may be given more than once.
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// Write the administrator's kubeconfig to this file (readable by its owner only).
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The server's URL in that kubeconfig [default: of the first listener].
    #[arg(long, value_name = "URL", requires = "kubeconfig")]
    server: Option<String>,
}

/// Runs the role until it is told to end.
pub fn run(args: StoreArgs) -> anyhow::Result<()> {
    logging::start()?;
    // Before there is another thread: they are taken from the environment.
    let inherited = inherited_listeners().context("cannot use the inherited sockets")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("store")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(args, inherited))
}

async fn serve(args: StoreArgs, mut listeners: Vec<TcpListener>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut wanted = args.listen;
    if wanted.is_empty() && listeners.is_empty() {
        wanted.push(SocketAddr::from(([127, 0, 0, 1], 6443)));
    }
    for address in wanted {
        let listener = TcpListener::bind(address).with_context(|| {
            format!("cannot listen on {address}: choose another with --listen, or end what listens there")
        })?;
        listeners.push(listener);
    }
    let mut names = args.names;
    for listener in &listeners {
        let address = listener.local_addr()?.ip();
        if !address.is_unspecified() {
            names.push(address.to_string());
        }
    }
    let server = Server::start(Config {
        directory: args.data.clone(),
        listeners,
        names,
        service_cidrs: args.service_cidrs,
    })
    .await
    .context("cannot start the store")?;
    for address in server.addresses() {
        tracing::info!(url = url(*address), data = %args.data.display(), "listening");
    }
    if let Some(path) = &args.kubeconfig {
        let url = match (args.server, server.addresses().first()) {
            (Some(url), _) => url,
            (None, Some(address)) => url(*address),
            (None, None) => bail!("there is no listener for the kubeconfig to name"),
        };
        write_kubeconfig(path, &server.kubeconfig(&url))
            .with_context(|| format!("cannot write the kubeconfig {}", path.display()))?;
        tracing::info!(file = %path.display(), server = url, "the administrator's kubeconfig is written");
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "store started");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("told to end: watches end, requests under way are finished");
    server.stop().await;
    Ok(())
}

/// Where a client on this machine reaches a listener.
fn url(address: SocketAddr) -> String {
    let port = address.port();
    match address {
        SocketAddr::V4(address) if address.ip().is_unspecified() => format!("https://127.0.0.1:{port}"),
        SocketAddr::V6(address) if address.ip().is_unspecified() => format!("https://[::1]:{port}"),
        address => format!("https://{address}"),
    }
}

/// It holds a key that may do everything: for its owner only, and whole or not at all.
fn write_kubeconfig(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::create_dir_all(directory)?;
    }
    let half = path.with_extension(format!("{}.new", std::process::id()));
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&half)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| fs::rename(&half, path));
    if written.is_err() {
        // What is half written helps nobody; that it can't be removed either says nothing new.
        let _ = fs::remove_file(&half);
    }
    written
}

/// Sockets that whoever started this process opened for it.
///
/// <https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html>
fn inherited_listeners() -> anyhow::Result<Vec<TcpListener>> {
    let mut inherited = listenfd::ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..inherited.len() {
        let listener = inherited
            .take_tcp_listener(index)
            .with_context(|| format!("socket {index} of LISTEN_FDS"))?;
        listeners.extend(listener);
    }
    Ok(listeners)
}
