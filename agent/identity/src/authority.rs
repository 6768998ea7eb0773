//! Who signs certificates, seen from this process: give an identity, get a key and its certificate.

use std::{collections::HashSet, future::Future, pin::Pin, sync::Arc};

use model::Identity;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// What an authority hands out.
pub struct Issued {
    /// The leaf first, then the intermediates; without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key, made in this process.
    pub key: PrivateKeyDer<'static>,
    /// Whom to trust: peers must chain to one of these.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IssueError {
    /// The authority did not answer, or not in time; a later try may help.
    #[error("the certificate authority is unavailable: {0}")]
    Unavailable(Arc<str>),
    /// The authority answered with a refusal; only a change of configuration helps.
    #[error("the certificate authority refused: {0}")]
    Refused(Arc<str>),
    /// The authority does not take this node's word for who it is, which says nothing of the identity; another token helps.
    #[error("the certificate authority does not accept this node's token: {0}")]
    Unauthenticated(Arc<str>),
    /// The authority's answer cannot be used.
    #[error("the certificate authority's answer is unusable: {0}")]
    Unusable(Arc<str>),
}

/// What [`Authority::issue`] returns.
pub type IssueFuture<'a> = Pin<Box<dyn Future<Output = Result<Issued, IssueError>> + Send + 'a>>;

/// Signs certificates: a CA in this process, or the client of one elsewhere.
pub trait Authority: Send + Sync + 'static {
    /// Makes a key, and has its certificate for this identity signed.
    ///
    /// The caller checks the answer's name and validity, limits how many run at once, and retries with back-off.
    fn issue<'a>(&'a self, identity: &'a Identity) -> IssueFuture<'a>;

    /// Nobody here is of this identity any more: what was kept of it goes.
    fn forget(&self, _identity: &Identity) {}

    /// Nobody here is of any but these, as is known once a started agent has all its pods.
    fn retain(&self, _identities: &HashSet<Identity>) {}
}
