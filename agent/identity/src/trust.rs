//! Whom this node trusts: the trust domain and its aliases, and the bundle of roots, which may change while connections run.
//!
//! ```text
//! roots file ─► Trust (bundle, generation) ─┬─► Roots of each Credentials: rebuilt at the next handshake
//! --trust-domain, aliases ──────────────────┘   Identities: what no longer chains to the bundle is fetched anew
//! ```
//! Does not know certificates' names (`peer`) or who issues them (`authority`).
//!
//! Invariants:
//! - a handshake that begins after the bundle changed is judged by the new one, without new certificates
//!   (`a_changed_bundle_counts_for_the_next_handshake_in_both_directions`);
//! - a bundle that can't be read or has no certificate changes nothing (`a_bundle_without_a_certificate_changes_nothing`);
//! - the root that a node's own certificate chains to stays trusted until that certificate is replaced: removing a root
//!   makes the certificates under it fetched anew at once.
//!
//! Aliases: a peer of an alias domain is accepted, and is compared in policies and with what was dialled as if it were of
//! the mesh's own domain (Istio's `trustDomainAliases`). Its namespace and service account are believed as they stand.

use std::{
    collections::BTreeSet,
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use model::{Identity, TrustDomain};
use rustls::{
    RootCertStore,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::watch;

use crate::tls::PROVIDER;

/// How often a followed file is looked at. A ConfigMap takes up to a minute to arrive anyway.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// More than any rotation needs; a bundle beyond it is refused.
const MOST_ROOTS: usize = 256;

/// Why a bundle is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// It can't be read.
    #[error("the roots file {path} cannot be read: {error}")]
    Unreadable {
        /// Which file.
        path: String,
        /// What the kernel says.
        error: String,
    },
    /// It is not PEM, or a certificate in it is none.
    #[error("a root certificate cannot be parsed: {0}")]
    Malformed(String),
    /// It is empty.
    #[error("there is no root certificate in it")]
    Empty,
    /// It has more than [`MOST_ROOTS`].
    #[error("it has more than {MOST_ROOTS} root certificates")]
    TooMany,
}

/// Whom this node trusts. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Trust(Arc<Inner>);

struct Inner {
    own: TrustDomain,
    aliases: Arc<[TrustDomain]>,
    bundle: ArcSwap<Bundle>,
    changed: watch::Sender<u64>,
    /// How many times a root left.
    left: watch::Sender<u64>,
}

#[derive(Default)]
struct Bundle {
    generation: u64,
    roots: Vec<CertificateDer<'static>>,
}

impl Trust {
    /// Peers of `own` and of `aliases`; no roots but those that come with certificates, until there is a bundle.
    pub fn new(own: TrustDomain, aliases: impl IntoIterator<Item = TrustDomain>) -> Self {
        Self(Arc::new(Inner {
            own,
            aliases: aliases.into_iter().collect::<BTreeSet<_>>().into_iter().collect(),
            bundle: ArcSwap::default(),
            changed: watch::Sender::new(0),
            left: watch::Sender::new(0),
        }))
    }

    /// The mesh's own trust domain.
    pub fn own(&self) -> &TrustDomain {
        &self.0.own
    }

    /// The domains that count as the mesh's own; they do not change while the process runs.
    pub fn aliases(&self) -> Arc<[TrustDomain]> {
        self.0.aliases.clone()
    }

    /// Whether peers of this domain may be let in.
    pub fn accepts(&self, domain: &TrustDomain) -> bool {
        *domain == self.0.own || self.0.aliases.contains(domain)
    }

    /// The identity as policies see it: an alias domain's as one of the mesh's own.
    pub fn normalize(&self, mut identity: Identity) -> Identity {
        if self.0.aliases.contains(&identity.trust_domain) {
            identity.trust_domain = self.0.own.clone();
        }
        identity
    }

    /// Takes over a bundle (PEM, one certificate or more); whether it is another than before.
    pub fn set_bundle(&self, pem: &[u8]) -> Result<bool, BundleError> {
        let roots = parse_bundle(pem)?;
        let before = self.0.bundle.load();
        if before.roots == roots {
            return Ok(false);
        }
        let generation = before.generation + 1;
        let one_left = before.roots.iter().any(|root| !roots.contains(root));
        self.0.bundle.store(Arc::new(Bundle { generation, roots }));
        self.0.changed.send_replace(generation);
        if one_left {
            self.distrust();
        }
        Ok(true)
    }

    /// Takes over the bundle in a file.
    pub fn read_bundle(&self, path: &Path) -> Result<bool, BundleError> {
        let pem = std::fs::read(path).map_err(|error| BundleError::Unreadable {
            path: path.display().to_string(),
            error: error.to_string(),
        })?;
        self.set_bundle(&pem)
    }

    /// Takes over the bundle in a file whenever it changes, until dropped. What can't be used changes nothing and is said
    /// once.
    pub async fn follow_bundle(&self, path: &Path) {
        let mut said = None;
        loop {
            match self.read_bundle(path) {
                Ok(changed) => {
                    if changed {
                        tracing::info!(file = %path.display(), roots = self.bundle().len(), "the roots changed");
                    }
                    said = None;
                }
                Err(error) if said.as_ref() != Some(&error) => {
                    tracing::error!(file = %path.display(), %error, "the roots stay as they were");
                    said = Some(error);
                }
                Err(_said_already) => {}
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The roots of the bundle; none before there is one.
    pub fn bundle(&self) -> Vec<CertificateDer<'static>> {
        self.0.bundle.load().roots.clone()
    }

    /// Wakes when a root is no longer trusted, so that what chains to it has to be looked at again; counts these times.
    pub fn root_left(&self) -> watch::Receiver<u64> {
        self.0.left.subscribe()
    }

    /// Whether no root ever left, so that whoever was let in once still would be.
    pub fn has_lost_none(&self) -> bool {
        self.left() == 0
    }

    /// A root left.
    pub(crate) fn distrust(&self) {
        self.0.left.send_modify(|left| *left += 1);
    }

    /// How many times a root left.
    pub(crate) fn left(&self) -> u64 {
        *self.0.left.borrow()
    }

    /// Wakes when the bundle changes.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }
}

impl From<TrustDomain> for Trust {
    fn from(own: TrustDomain) -> Self {
        Self::new(own, [])
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("own", &self.0.own)
            .field("aliases", &self.0.aliases)
            .finish_non_exhaustive()
    }
}

/// The certificates of a bundle: at least one, each one usable as a root.
pub(crate) fn parse_bundle(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    let roots = CertificateDer::pem_slice_iter(pem)
        .take(MOST_ROOTS + 1)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| BundleError::Malformed(error.to_string()))?;
    if roots.is_empty() {
        return Err(BundleError::Empty);
    }
    if roots.len() > MOST_ROOTS {
        return Err(BundleError::TooMany);
    }
    store(&roots).map_err(|error| BundleError::Malformed(error.to_string()))?;
    Ok(roots)
}

pub(crate) fn store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(store)
}

/// The roots of one certificate's handshakes: its own and the bundle's, as that is when a handshake begins.
pub(crate) struct Roots {
    own: Vec<CertificateDer<'static>>,
    trust: Trust,
    built: ArcSwap<BuiltRoots>,
    building: Mutex<()>,
}

/// Roots in the form that verification wants.
pub(crate) struct BuiltRoots {
    generation: u64,
    pub(crate) store: Arc<RootCertStore>,
    pub(crate) clients: Arc<dyn ClientCertVerifier>,
}

impl Roots {
    pub(crate) fn new(own: Vec<CertificateDer<'static>>, trust: Trust) -> Result<Self, String> {
        let built = build(&own, &trust)?;
        Ok(Self {
            own,
            trust,
            built: ArcSwap::from_pointee(built),
            building: Mutex::default(),
        })
    }

    pub(crate) fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Whether the bundle, where there is one, still has the root of the certificate itself.
    pub(crate) fn own_are_in_bundle(&self) -> bool {
        let bundle = self.trust.0.bundle.load();
        bundle.roots.is_empty() || self.own.iter().all(|root| bundle.roots.contains(root))
    }

    pub(crate) fn has_one_that_is_not_in(&self, other: &Self) -> bool {
        let bundle = self.trust.0.bundle.load();
        let there = |root| other.own.contains(root) || bundle.roots.contains(root);
        self.own.iter().any(|root| !there(root))
    }

    pub(crate) fn current(&self) -> Arc<BuiltRoots> {
        let built = self.built.load_full();
        if built.generation == self.trust.0.bundle.load().generation {
            return built;
        }
        let _alone = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        match build(&self.own, &self.trust) {
            Ok(built) => self.built.store(Arc::new(built)),
            // Can't be: a bundle is checked before it is taken over.
            Err(error) => tracing::error!(error, "the new roots cannot be used"),
        }
        self.built.load_full()
    }
}

fn build(own: &[CertificateDer<'static>], trust: &Trust) -> Result<BuiltRoots, String> {
    let bundle = trust.0.bundle.load();
    let mut roots = own.to_vec();
    roots.extend(bundle.roots.iter().filter(|root| !own.contains(root)).cloned());
    let store = Arc::new(store(&roots).map_err(|error| error.to_string())?);
    let clients = WebPkiClientVerifier::builder_with_provider(store.clone(), PROVIDER.clone())
        .clear_root_hint_subjects()
        .build()
        .map_err(|error| error.to_string())?;
    Ok(BuiltRoots {
        generation: bundle.generation,
        store,
        clients,
    })
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots")
            .field("own", &self.own.len())
            .field("trust", &self.trust)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate_root;

    #[test]
    fn a_bundle_without_a_certificate_changes_nothing() {
        let trust = Trust::from(TrustDomain::default());
        let (root, _) = generate_root(&TrustDomain::default()).unwrap();
        assert_eq!(trust.set_bundle(root.as_bytes()), Ok(true));
        assert_eq!(trust.set_bundle(root.as_bytes()), Ok(false));
        for bad in [
            "",
            "nonsense",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            assert!(trust.set_bundle(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(matches!(
            trust.read_bundle(Path::new("/nowhere/roots.pem")),
            Err(BundleError::Unreadable { .. })
        ));
        assert_eq!(trust.bundle().len(), 1);
        assert_eq!(
            trust.set_bundle(root.repeat(MOST_ROOTS + 1).as_bytes()),
            Err(BundleError::TooMany)
        );
    }

    #[test]
    fn an_alias_is_the_own_domain_and_a_stranger_stays_one() {
        let trust = Trust::new(TrustDomain::default(), [TrustDomain::new("old.example")]);
        let parse = |text: &str| text.parse::<Identity>().unwrap();
        let own = "spiffe://cluster.local/ns/a/sa/b";
        assert_eq!(trust.normalize(parse("spiffe://old.example/ns/a/sa/b")), parse(own));
        assert_eq!(trust.normalize(parse(own)), parse(own));
        let stranger = parse("spiffe://else.where/ns/a/sa/b");
        assert_eq!(trust.normalize(stranger.clone()), stranger);
        assert!(trust.accepts(&TrustDomain::new("old.example")) && !trust.accepts(&stranger.trust_domain));
    }
}
