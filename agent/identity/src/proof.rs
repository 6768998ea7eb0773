//! What a peer proved itself by, kept for as long as its tunnel lives, so that it can be judged again when a root is
//! no longer trusted.
//!
//! It is judged as of the time when all of its certificates had begun: one that expires under a live tunnel does not end
//! it, only a root that left does (`a_peer_under_a_root_that_left_is_no_longer_trusted`). Costs a signature or two, once for a
//! tunnel and root that left, and nothing while none did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustls::{client::verify_server_cert_signed_by_trust_anchor, server::ParsedCertificate};
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{Credentials, tls::PROVIDER, trust::BuiltRoots};

/// The certificates of a peer that a handshake verified.
#[derive(Debug, Default)]
pub struct Proof {
    /// The peer's own first.
    chain: Vec<CertificateDer<'static>>,
    /// It was good when so many times a root had left.
    good_at: AtomicU64,
}

impl Proof {
    /// Of the certificates that a handshake has just verified.
    pub fn new(certificates: &[CertificateDer<'_>]) -> Self {
        Self {
            chain: certificates.iter().map(|one| one.clone().into_owned()).collect(),
            good_at: AtomicU64::new(0),
        }
    }

    fn chains_to(&self, roots: &BuiltRoots) -> bool {
        let Some((leaf, intermediates)) = self.chain.split_first() else {
            return false;
        };
        let Some(at) = self.valid_at() else { return false };
        // Which of the two ends the peer was does not matter any more.
        let as_client = || roots.clients.verify_client_cert(leaf, intermediates, at).is_ok();
        let as_server = || {
            let leaf = ParsedCertificate::try_from(leaf).ok()?;
            let algorithms = PROVIDER.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&leaf, &roots.store, intermediates, at, algorithms).ok()
        };
        as_client() || as_server().is_some()
    }

    /// When all of the certificates had begun: not after the handshake, and so none of them was over.
    fn valid_at(&self) -> Option<UnixTime> {
        let begins = |certificate: &CertificateDer<'_>| {
            let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
            u64::try_from(parsed.validity().not_before.timestamp()).ok()
        };
        let latest = self
            .chain
            .iter()
            .map(begins)
            .collect::<Option<Vec<_>>>()?
            .into_iter()
            .max()?;
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(latest)))
    }
}

impl Credentials {
    /// Whether a peer that proved itself to these credentials, or to earlier ones of the same identity, would still be let
    /// in: its certificates chain to a root that is trusted now.
    pub fn still_trusts(&self, proof: &Proof) -> bool {
        let left = self.trust().left();
        if proof.good_at.load(Relaxed) == left {
            return true;
        }
        let good = proof.chains_to(&self.roots().current());
        if good {
            proof.good_at.store(left, Relaxed);
        }
        good
    }
}
