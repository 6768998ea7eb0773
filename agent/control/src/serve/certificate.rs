//! The server's own certificate: issued by our authority, replaced at half life and whenever another authority signs.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tasks::{DrainMode, DrainSignal};

use crate::ca::Authority;

const RETRY: Duration = Duration::from_secs(5);

/// What the server shows. Until there is one, handshakes fail.
#[derive(Debug, Default)]
pub struct ServerCertificate(ArcSwapOption<CertifiedKey>);

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

impl ServerCertificate {
    /// For TLS 1.2 and 1.3, with HTTP/2.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.0.load().is_some()
    }

    /// Keeps it fresh until drained.
    pub async fn follow(self: Arc<Self>, authority: Arc<Authority>, names: Vec<String>, mut drain: DrainSignal) {
        let mut generation = authority.generation();
        loop {
            generation.mark_unchanged();
            let wait = self.renew(&authority, &names);
            tokio::select! {
                _ = drain.reached(DrainMode::Immediate) => return,
                changed = generation.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn renew(&self, authority: &Authority, names: &[String]) -> Duration {
        if !authority.is_ready() {
            return RETRY;
        }
        match authority.server_certificate(names) {
            Ok((certificate, until)) => {
                self.0.store(Some(Arc::new(certificate)));
                let now: SystemTime = authority.clock().now();
                until.duration_since(now).unwrap_or_default().max(RETRY)
            }
            Err(error) => {
                tracing::error!(%error, ?names, "the control plane has no certificate for its own server");
                RETRY
            }
        }
    }
}
