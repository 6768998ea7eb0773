//! The whole server: engine, controllers and HTTP.
//!
//! ```text
//! start: open the directory ─► the objects that every cluster has ─► HTTP ─► controllers
//! stop:  HTTP drains ─► controllers end ─► the engine closes with its last handle
//! ```

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use ipnet::IpNet;

use crate::{
    controllers::{Controllers, bootstrap},
    engine::{ApiError, Engine, OpenError, Settings},
    http::{self, Front, FrontError},
};

/// What a server is told at start.
#[derive(Debug)]
pub struct Config {
    /// Where everything is kept; made if it is not there.
    pub directory: PathBuf,
    /// Where to listen.
    pub listeners: Vec<TcpListener>,
    /// Names of the server besides `localhost` and `kubernetes.default.svc`: DNS names and addresses.
    pub names: Vec<String>,
    /// Where service addresses are taken from; the defaults of [`Settings`] if it is empty.
    pub service_cidrs: Vec<IpNet>,
}

/// Why a server can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The objects.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Keys, certificates or listeners.
    #[error(transparent)]
    Front(#[from] FrontError),
    /// The objects that every cluster has.
    #[error("cannot make the first objects: {0}")]
    Bootstrap(#[from] ApiError),
}

/// A running server.
pub struct Server {
    front: Front,
    controllers: Controllers,
    engine: Engine,
}

impl Server {
    /// Starts; needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`StartError`] says which file or listener, what is the matter, and what to do.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let mut settings = Settings::default();
        if !config.service_cidrs.is_empty() {
            settings.service_cidrs = config.service_cidrs;
        }
        let engine = Engine::open_with(&config.directory, settings)?;
        let addresses: Vec<SocketAddr> = config
            .listeners
            .iter()
            .filter_map(|one| one.local_addr().ok())
            .collect();
        bootstrap(&engine, &addresses).await?;
        let front = http::Config {
            directory: config.directory,
            listeners: config.listeners,
            names: config.names,
            limits: http::Limits::default(),
        };
        let front = Front::start(front, engine.clone())?;
        let controllers = Controllers::start(&engine, front.ca_pem());
        Ok(Self {
            front,
            controllers,
            engine,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        self.front.addresses()
    }

    /// What it answers from.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// A kubeconfig for the administrator of the server at this URL.
    pub fn kubeconfig(&self, url: &str) -> String {
        self.front.kubeconfig(url)
    }

    /// Ends watches, finishes what is under way, and closes.
    pub async fn stop(self) {
        self.front.stop().await;
        self.controllers.stop().await;
    }
}
