//! Reading the identity out of a peer's certificate.

use model::{Identity, TrustDomain};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Names listed in an error are cut off after this many, and each after [`LONGEST_NAME`] characters.
const MOST_NAMES: usize = 4;
const LONGEST_NAME: usize = 256;

/// Why a certificate does not say who the peer is, or says that it is the wrong one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdentityError {
    /// There is none.
    #[error("the peer sent no certificate")]
    NoCertificate,
    /// It cannot be parsed.
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// It has no SPIFFE name of Istio's form.
    #[error("the peer's certificate names no identity (spiffe://<trust domain>/ns/<namespace>/sa/<service account>), only: [{}]", .0.join(", "))]
    NotAnIdentity(Vec<String>),
    /// It has more than one.
    #[error("the peer's certificate names several identities: [{}]", .0.join(", "))]
    Several(Vec<String>),
    /// Another trust domain's.
    #[error("the peer is of another trust domain: {found}, this mesh is {own}")]
    OtherTrustDomain {
        /// Who the peer says it is.
        found: Identity,
        /// The trust domain of this mesh.
        own: TrustDomain,
    },
    /// Not the one that was dialled.
    #[error("the peer is {found}, expected {}", .expected.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "))]
    Unexpected {
        /// Who the peer says it is.
        found: Identity,
        /// Whom we wanted.
        expected: Vec<Identity>,
    },
}

/// The identity in the first of these certificates, which a handshake must have verified.
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Result<Identity, PeerIdentityError> {
    let leaf = certificates.first().ok_or(PeerIdentityError::NoCertificate)?;
    certificate_identity(leaf)
}

pub(crate) fn certificate_identity(certificate: &[u8]) -> Result<Identity, PeerIdentityError> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| PeerIdentityError::Malformed)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| PeerIdentityError::Malformed)?;
    let uris = names.iter().flat_map(|extension| &extension.value.general_names);
    let uris = uris.filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    only_identity(uris)
}

fn only_identity<'a>(uris: impl Iterator<Item = &'a str> + Clone) -> Result<Identity, PeerIdentityError> {
    let mut identities = uris.clone().filter_map(|uri| uri.parse::<Identity>().ok());
    let listed = || {
        let shortened = |uri: &str| uri.chars().take(LONGEST_NAME).collect();
        uris.take(MOST_NAMES).map(shortened).collect()
    };
    match (identities.next(), identities.next()) {
        (Some(identity), None) => Ok(identity),
        (None, _) => Err(PeerIdentityError::NotAnIdentity(listed())),
        (Some(_), Some(_)) => Err(PeerIdentityError::Several(listed())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_identity_is_needed() {
        let one = ["spiffe://td/ns/a/sa/b", "https://example.com"];
        assert_eq!(
            only_identity(one.into_iter()).unwrap().to_string(),
            "spiffe://td/ns/a/sa/b"
        );
        let none = ["spiffe://td/a/b"];
        assert_eq!(
            only_identity(none.into_iter()),
            Err(PeerIdentityError::NotAnIdentity(vec!["spiffe://td/a/b".into()]))
        );
        let two = ["spiffe://td/ns/a/sa/b", "spiffe://td/ns/a/sa/c"];
        assert!(matches!(
            only_identity(two.into_iter()),
            Err(PeerIdentityError::Several(_))
        ));
        assert_eq!(peer_identity(&[]), Err(PeerIdentityError::NoCertificate));
        assert_eq!(
            peer_identity(&[CertificateDer::from(vec![0x30, 0x80])]),
            Err(PeerIdentityError::Malformed)
        );
    }
}

#[cfg(test)]
mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = certificate_identity(&bytes);
        }

        #[test]
        fn a_certificate_with_a_few_wrong_bytes_never_panics(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6)) {
            static VALID: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
                let (root, key) = crate::generate_root(&TrustDomain::default()).unwrap();
                crate::LocalAuthority::from_pem(&root, &key).unwrap().root().to_vec()
            });
            let mut bytes = VALID.clone();
            for (at, byte) in changes {
                let length = bytes.len();
                bytes[at % length] = byte;
            }
            let _ = certificate_identity(&bytes);
        }
    }
}
