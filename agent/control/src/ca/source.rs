//! What can be wrong with the Secrets of the authority, each by name and with what follows from it.

use super::material::MaterialError;

/// Why the authority can't go on to what is wanted.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A Secret that can't be used; its author has to mend it.
    #[error("Secret {namespace}/{name}, {error}; {consequence}")]
    Unusable {
        /// Where.
        namespace: String,
        /// Which.
        name: &'static str,
        /// What is wrong with it.
        error: MaterialError,
        /// What that means.
        consequence: &'static str,
    },
    /// The API does not answer or refuses.
    #[error("cannot {what} Secret {name}: {error}")]
    Api {
        /// Which operation.
        what: &'static str,
        /// On what.
        name: &'static str,
        /// The answer.
        error: kube::Error,
    },
    /// The API does not answer.
    #[error("the Kubernetes API did not answer in time about the authority's Secrets")]
    Late,
    /// Another replica was faster: look again.
    #[error("Secret {0} was changed meanwhile")]
    Raced(&'static str),
    /// The library.
    #[error("cannot make an authority: {0}")]
    Generate(#[from] rcgen::Error),
    /// The library.
    #[error("cannot write the state: {0}")]
    Encode(#[from] serde_json::Error),
}
