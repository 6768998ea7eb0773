//! What the index makes and the xDS cache holds: encoded messages with a type, a name and other names.
//!
//! Knows nothing of how a message is made ([`proto`] does) or of who asks for it.

use std::{fmt, sync::Arc};

use bytes::Bytes;

/// The kinds of resources that agents subscribe to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Type {
    /// `istio.workload.Address`: a workload by its uid, a service by `namespace/hostname`; both, too, by `network/ip`.
    Address,
    /// `istio.security.Authorization`, by `namespace/name`.
    Authorization,
}

impl Type {
    /// Every type.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The type URL on the wire.
    pub const fn url(self) -> &'static str {
        match self {
            Self::Address => proto::ADDRESS_TYPE,
            Self::Authorization => proto::AUTHORIZATION_TYPE,
        }
    }

    /// The type of a URL, if we serve it.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|type_| type_.url() == url)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address => "Address",
            Self::Authorization => "Authorization",
        })
    }
}

/// One resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its type.
    pub type_: Type,
    /// Its name, unique in the type.
    pub name: Arc<str>,
    /// Other names by which it may be asked for: `network/ip`.
    pub aliases: Vec<Arc<str>>,
    /// The encoded message, without the `Any` around it.
    pub message: Bytes,
}

/// A step from one state of the mesh to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new, or other than before.
    Put(Resource),
    /// It is gone.
    Remove {
        /// Its type.
        type_: Type,
        /// Its name.
        name: Arc<str>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_found_by_its_url() {
        for type_ in Type::ALL {
            assert_eq!(Type::from_url(type_.url()), Some(type_));
        }
        assert_eq!(
            Type::from_url("type.googleapis.com/envoy.config.cluster.v3.Cluster"),
            None
        );
    }
}
