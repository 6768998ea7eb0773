//! The authority in force: signs, and tells what to trust. Where it comes from is [`super::secrets`]'s business.
//!
//! The signing key is reached from here only, by [`super::leaf`]. Before the first state is in force there is nothing:
//! requests are refused as unavailable, and the control plane is not ready.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use identity::Clock;
use model::Identity;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;

use super::{
    csr::{self, CsrError},
    leaf::{self, Lifetimes, SignError},
    pem,
    queue::{Full, Queue},
    rotation::State,
};

/// A certificate, as it is handed out.
#[derive(Debug)]
pub struct Issued {
    /// PEM: the leaf, its issuers, and last all roots in one element, as istiod does and ztunnel expects.
    pub chain: Vec<String>,
    /// In hex.
    pub serial: String,
    /// When it ends.
    pub not_after: SystemTime,
}

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The request.
    #[error(transparent)]
    Request(#[from] CsrError),
    /// Too many at once.
    #[error("{0}; try again later")]
    Busy(#[from] Full),
    /// Displaced from the line by others who had less.
    #[error("more callers wait than there is room for; try again later")]
    Displaced,
    /// There is no authority yet.
    #[error("the certificate authority has no usable signing certificate yet; see the control plane's log")]
    NotReady,
    /// Our own trouble.
    #[error(transparent)]
    Sign(#[from] SignError),
}

struct InForce {
    state: State,
    intermediates: Vec<String>,
    bundle: Arc<str>,
}

/// Signs with what is in force. One for the process.
pub struct Authority {
    in_force: ArcSwapOption<InForce>,
    bundle: watch::Sender<Option<Arc<str>>>,
    /// Counts what was put in force; the server's own certificate follows it.
    generation: watch::Sender<u64>,
    queue: Queue,
    lifetimes: Lifetimes,
    clock: Clock,
}

impl Authority {
    /// One without anything in force.
    pub fn new(queue: Queue, lifetimes: Lifetimes, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            in_force: ArcSwapOption::empty(),
            bundle: watch::Sender::new(None),
            generation: watch::Sender::new(0),
            queue,
            lifetimes,
            clock,
        })
    }

    /// Puts a state in force.
    pub(super) fn put(&self, state: State) {
        let bundle: Arc<str> = pem::encode_all(&state.bundle()).into();
        let in_force = InForce {
            intermediates: state.signing.intermediates().map(pem::encode).collect(),
            bundle: bundle.clone(),
            state,
        };
        self.in_force.store(Some(Arc::new(in_force)));
        self.bundle
            .send_if_modified(|before| before.replace(bundle.clone()) != Some(bundle));
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// What is in force, for the next step.
    pub(super) fn state(&self) -> Option<State> {
        self.in_force.load().as_ref().map(|in_force| in_force.state.clone())
    }

    /// The clock that validity is measured with.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Whether anything can be signed.
    pub fn is_ready(&self) -> bool {
        self.in_force.load().is_some()
    }

    /// The roots to trust (PEM), now and whenever they change; none before the first.
    pub fn bundle(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.bundle.subscribe()
    }

    /// Changes whenever something else is in force.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Requests that wait for a thread.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// When the signing chain ends.
    pub fn signer_not_after(&self) -> Option<SystemTime> {
        self.in_force
            .load()
            .as_ref()
            .map(|in_force| in_force.state.signing.not_after())
    }

    /// Checks a request and signs; in line with the caller's other requests.
    pub async fn issue(
        &self,
        caller: &Arc<str>,
        request: String,
        identity: Identity,
        seconds: i64,
    ) -> Result<Issued, IssueError> {
        if request.len() > csr::MAX_BYTES {
            return Err(CsrError::TooLarge(request.len()).into());
        }
        let in_force = self.in_force.load_full().ok_or(IssueError::NotReady)?;
        let lifetime = self.lifetimes.of_request(seconds);
        let clock = self.clock.clone();
        let signed = self.queue.submit(caller, move || -> Result<Issued, IssueError> {
            let key = csr::check(&request)?;
            let leaf = leaf::sign(&in_force.state.signing, &key, &identity, lifetime, clock.now())?;
            let mut chain = Vec::with_capacity(in_force.intermediates.len() + 2);
            chain.push(pem::encode(&leaf.certificate));
            chain.extend(in_force.intermediates.iter().cloned());
            chain.push(in_force.bundle.to_string());
            Ok(Issued {
                chain,
                serial: leaf.serial,
                not_after: leaf.not_after,
            })
        })?;
        signed.await.map_err(|_| IssueError::Displaced)?
    }

    /// A key and certificate for the control plane's own server, and when it is to be replaced.
    pub fn server_certificate(&self, names: &[String]) -> Result<(CertifiedKey, SystemTime), IssueError> {
        let in_force = self.in_force.load_full().ok_or(IssueError::NotReady)?;
        let signing = &in_force.state.signing;
        let (now, lifetime) = (self.clock.now(), Duration::from_secs(24 * 3600));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(SignError::from)?;
        let leaf = leaf::sign_server(signing, &key, names, lifetime, now)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der)
            .map_err(|_| SignError::Library(rcgen::Error::CouldNotParseKeyPair))?;
        let mut chain = vec![leaf.certificate];
        chain.extend(signing.intermediates().cloned());
        let half = leaf.not_after.duration_since(now).unwrap_or_default() / 2;
        Ok((CertifiedKey::new(chain, key), now + half))
    }
}
