//! Who is calling, and which identities they may have.
//!
//! ```text
//! Bearer token ──► tokens (TokenReview, cached) ──► service account, bound pod ──► node: that pod's, if it is alive
//! ImpersonatedIdentity ──► node: does a pod of that identity run on the caller's node?   (pods: our view, then the API)
//! ```
//! What a caller says of itself decides nothing: a node is the one that its pod runs on by the API's word, and an identity
//! is given for pods that run there, not for those that somebody names. Fails closed: with the API away, what is not in a
//! cache is refused as unavailable. Knows nothing of certificates or of xDS.

mod node;
mod pods;
mod reviews;
mod tokens;
mod xds;

use std::{fmt, sync::Arc};

use model::NamespacedName;

pub use node::{Authenticator, TrustDomains};
pub use pods::{KubePods, PodFacts, PodView};
pub use reviews::KubeReviews;
pub use tokens::Tokens;

/// Why a caller is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// We don't know who it is; another token may help.
    #[error("{0}")]
    Unauthenticated(Arc<str>),
    /// We know, and it may not.
    #[error("{0}")]
    Denied(Arc<str>),
    /// We can't find out now; later we may.
    #[error("{0}")]
    Unavailable(Arc<str>),
}

impl AuthError {
    /// As the wire says it.
    pub fn status(&self) -> tonic::Status {
        match self {
            Self::Unauthenticated(why) => tonic::Status::unauthenticated(why.as_ref()),
            Self::Denied(why) => tonic::Status::permission_denied(why.as_ref()),
            Self::Unavailable(why) => tonic::Status::unavailable(why.as_ref()),
        }
    }
}

/// The pod that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BoundPod {
    /// Its name, in the service account's namespace.
    pub name: Arc<str>,
    /// Its uid: a pod of the same name that came after it is another one.
    pub uid: Arc<str>,
}

/// Whom a token speaks for, by the word of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenUser {
    /// The service account.
    pub account: NamespacedName,
    /// The pod, if the token is bound to one.
    pub pod: Option<BoundPod>,
}

/// A caller that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its service account.
    pub account: NamespacedName,
    /// The pod that its token is bound to.
    pub pod: Option<BoundPod>,
    /// The node that this pod runs on, if it is a node agent: it may ask for others.
    pub node: Option<Arc<str>>,
}

impl Caller {
    /// One name for each who is to be treated as one: the pod, or else the account.
    pub fn key(&self) -> Arc<str> {
        match &self.pod {
            Some(pod) => pod.uid.clone(),
            None => self.account.to_string().into(),
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.account)?;
        if let Some(pod) = &self.pod {
            write!(f, " (pod {})", pod.name)?;
        }
        Ok(())
    }
}

/// The token of `authorization: Bearer <token>`.
pub fn bearer(metadata: &tonic::metadata::MetadataMap) -> Result<&str, AuthError> {
    let missing =
        || AuthError::Unauthenticated("no token: send `authorization: Bearer <service account token>`".into());
    let header = metadata.get("authorization").ok_or_else(missing)?;
    let header = header.to_str().map_err(|_| missing())?;
    let (scheme, token) = header.split_once(' ').ok_or_else(missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(missing());
    }
    Ok(token.trim())
}
