//! `cluster` (hidden): what a cluster has besides its nodes: the API, a scheduler, and the controllers that people take
//! for granted.
//!
//! ```text
//!            kubectl, agents, control plane
//!                       │ https
//!   ┌ cluster ──────────▼──────────────────────────────────────────────────────┐
//!   │ store ── watches ──► reconcile: Deployments → ReplicaSets → Pods → a node │
//!   │   ▲                             Services → EndpointSlices, nft, DNS        │──► desired/*.json ──► kubelets
//!   │   └───── statuses ◄──────────── status.json ◄──────────────────────────────│◄── their status.json
//!   └────────────────────────────────────────────────────────────────────────────┘
//! ```
//! One task compares what the API says with what is there, whenever either changes, and writes the difference; it can be
//! ended at any moment and begins again where things are. It listens on loopback, for people, and on the fabric, for the
//! nodes. Deployments and ReplicaSets have controllers here; other workload kinds get an event that says so.

mod api;
mod deployments;
mod dns;
mod events;
mod kubelets;
mod nodes;
mod places;
mod pods;
mod reconcile;
mod services;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use api::{client, service_addresses};
pub(crate) use nodes::{AGENT_ACCOUNT, SYSTEM, agent_pod, is_own};
pub(crate) use places::Places;
pub(crate) use pods::{addresses, is_ready};

use crate::{
    files::write_atomically,
    layout::{CONTROL_NETNS, Layout, control_addresses, service_networks},
    netns,
    state::State,
};

/// The API's port on the fabric.
pub(crate) const API_PORT: u16 = 6443;

/// Options of the hidden `cluster`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ClusterArgs {
    /// The playground's state directory.
    #[arg(long)]
    state_directory: PathBuf,
}

/// Runs `cluster` until it is told to end.
pub(crate) fn run(args: &ClusterArgs) -> Result<()> {
    let layout = Layout::new(args.state_directory.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(serve(&layout))
}

async fn serve(layout: &Layout) -> Result<()> {
    let state = State::expect(layout)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let [fabric, _] = control_addresses();
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, state.api_port));
    let outside = TcpListener::bind(loopback).with_context(|| format!("cannot listen on {loopback}"))?;
    let inside = netns::inside(CONTROL_NETNS, || {
        TcpListener::bind((fabric, API_PORT)).with_context(|| format!("cannot listen on {fabric}:{API_PORT}"))
    })?;
    let server = store::Server::start(store::Config {
        directory: layout.api(),
        listeners: vec![outside, inside],
        names: vec![fabric.to_string(), "kubernetes.default.svc".to_owned()],
        service_cidrs: service_networks(),
    })
    .await
    .context("cannot start the API")?;
    let kubeconfig = server.kubeconfig(&format!("https://{loopback}"));
    write_atomically(&layout.kubeconfig(), &kubeconfig)?;
    let in_cluster = server.kubeconfig(&format!("https://{fabric}:{API_PORT}"));
    let dns = dns::Dns::start().context("cannot start the cluster's name server")?;
    let client = api::client(layout).await?;
    eprintln!("the API answers at https://{loopback}");
    let ended = tokio::select! {
        ended = reconcile::run(layout, state, client, &in_cluster, dns) => ended,
        _ = terminate.recv() => Ok(()),
    };
    server.stop().await;
    ended
}
