//! What is read of a certificate signing request (PKCS #10, RFC 2986): its public key, and nothing else.
//!
//! Names, extensions and attributes in it are not even looked at: who the certificate is for follows from who asked.
//! Refused: what is too large, is no PEM or no request (`malformed_requests_are_refused`), is not signed by its own key
//! (`a_request_of_another_key_is_refused`), or has a weak or unusual key (`weak_keys_are_refused`).

use rcgen::SubjectPublicKeyInfo;
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{
        OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION, OID_SIG_ED25519,
    },
    prelude::FromDer,
    public_key::PublicKey,
    x509::SubjectPublicKeyInfo as ParsedKey,
};

/// The largest request that is read, in bytes of PEM: an RSA key of 8,192 bits with room for a few names.
pub const MAX_BYTES: usize = 16 * 1024;
/// The bits of the largest RSA key: larger ones cost time to check and bring nothing.
const MAX_RSA_BITS: usize = 8192;
const MIN_RSA_BITS: usize = 2048;

/// Why a request is refused; the caller can do something about each.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Over [`MAX_BYTES`].
    #[error("the certificate signing request has {0} bytes; at most {MAX_BYTES} are read")]
    TooLarge(usize),
    /// No single PEM section `CERTIFICATE REQUEST`.
    #[error("the certificate signing request is not one PEM section CERTIFICATE REQUEST: {0}")]
    Pem(String),
    /// Not PKCS #10.
    #[error("the certificate signing request is not PKCS #10: {0}")]
    Malformed(String),
    /// Whoever made it does not hold the key.
    #[error("the certificate signing request is not signed by its own key: {0}")]
    Signature(String),
    /// A signature by SHA-1 or older.
    #[error("the certificate signing request is signed with a broken hash; use SHA-256 or better")]
    WeakHash,
    /// Too short.
    #[error("the RSA key has {0} bits; between {MIN_RSA_BITS} and {MAX_RSA_BITS} are accepted")]
    RsaSize(usize),
    /// Neither ECDSA on P-256 or P-384, nor RSA, nor Ed25519.
    #[error("keys of kind {0} are not accepted; use ECDSA on P-256 or P-384, RSA or Ed25519")]
    KeyKind(String),
}

/// Checks a request; answers the key that the certificate will be for.
pub fn check(pem: &str) -> Result<SubjectPublicKeyInfo, CsrError> {
    if pem.len() > MAX_BYTES {
        return Err(CsrError::TooLarge(pem.len()));
    }
    let (after, section) =
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|error| CsrError::Pem(error.to_string()))?;
    if !matches!(
        section.label.as_str(),
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST"
    ) {
        return Err(CsrError::Pem(format!("it is {}", section.label)));
    }
    if !after.iter().all(u8::is_ascii_whitespace) {
        return Err(CsrError::Pem("something follows it".into()));
    }
    let (rest, request) = X509CertificationRequest::from_der(&section.contents)
        .map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed("something follows it".into()));
    }
    check_key(&request.certification_request_info.subject_pki)?;
    check_hash(&request)?;
    request
        .verify_signature()
        .map_err(|error| CsrError::Signature(error.to_string()))?;
    SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
        .map_err(|error| CsrError::Malformed(error.to_string()))
}

fn check_key(key: &ParsedKey<'_>) -> Result<(), CsrError> {
    let kind = &key.algorithm.algorithm;
    if *kind == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
        return match curve {
            Some(curve) if curve == OID_EC_P256 || curve == OID_NIST_EC_P384 => Ok(()),
            Some(curve) => Err(CsrError::KeyKind(format!("ECDSA on the curve {curve}"))),
            None => Err(CsrError::KeyKind("ECDSA on a curve without a name".into())),
        };
    }
    if *kind == OID_PKCS1_RSAENCRYPTION {
        return check_rsa(key);
    }
    if *kind == OID_SIG_ED25519 {
        return Ok(());
    }
    Err(CsrError::KeyKind(kind.to_id_string()))
}

fn check_rsa(key: &ParsedKey<'_>) -> Result<(), CsrError> {
    let Ok(PublicKey::RSA(rsa)) = key.parsed() else {
        return Err(CsrError::Malformed("the RSA key cannot be read".into()));
    };
    let bits = rsa.key_size();
    if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
        return Err(CsrError::RsaSize(bits));
    }
    match rsa.try_exponent() {
        Ok(exponent) if exponent >= 3 && exponent % 2 == 1 && exponent <= u64::from(u32::MAX) => Ok(()),
        _ => Err(CsrError::KeyKind("RSA with an unusual exponent".into())),
    }
}

fn check_hash(request: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
    let algorithm = request.signature_algorithm.oid();
    if *algorithm == OID_PKCS1_SHA1WITHRSA || *algorithm == OID_SHA1_WITH_RSA {
        return Err(CsrError::WeakHash);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, PublicKeyData};

    use super::*;

    fn request_of(key: &KeyPair) -> String {
        CertificateParams::new(vec!["ignored.example".into()])
            .unwrap()
            .serialize_request(key)
            .unwrap()
            .pem()
            .unwrap()
    }

    #[test]
    fn usual_keys_are_accepted_and_only_the_key_is_taken() {
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
        ] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let checked = check(&request_of(&key)).unwrap();
            assert_eq!(checked.subject_public_key_info(), key.subject_public_key_info());
        }
    }

    #[test]
    fn weak_keys_are_refused() {
        assert_eq!(
            check(include_str!("testdata/rsa-1024.csr")).unwrap_err(),
            CsrError::RsaSize(1024)
        );
        assert!(matches!(
            check(include_str!("testdata/p224.csr")),
            Err(CsrError::KeyKind(_))
        ));
        assert_eq!(
            check(include_str!("testdata/sha1.csr")).unwrap_err(),
            CsrError::WeakHash
        );
    }

    #[test]
    fn p521_is_not_accepted() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
        assert!(matches!(check(&request_of(&key)), Err(CsrError::KeyKind(_))));
    }

    #[test]
    fn a_request_of_another_key_is_refused() {
        let (_, own) = rustls_pem(&request_of(&KeyPair::generate().unwrap()));
        let other = KeyPair::generate().unwrap().subject_public_key_info();
        let (_, parsed) = X509CertificationRequest::from_der(&own).unwrap();
        let key = parsed.certification_request_info.subject_pki.raw.to_vec();
        let at = own.windows(key.len()).position(|window| window == key).unwrap();
        let mut forged = own.clone();
        forged[at..at + key.len()].copy_from_slice(&other);
        let forged = pem_of(&forged);
        assert!(matches!(check(&forged), Err(CsrError::Signature(_))));
    }

    #[test]
    fn malformed_requests_are_refused() {
        assert!(matches!(check(""), Err(CsrError::Pem(_))));
        assert!(matches!(check(&"x".repeat(MAX_BYTES + 1)), Err(CsrError::TooLarge(_))));
        let good = request_of(&KeyPair::generate().unwrap());
        assert!(matches!(check(&format!("{good}{good}")), Err(CsrError::Pem(_))));
        assert!(matches!(check(&good.replace(" REQUEST", "")), Err(CsrError::Pem(_))));
        assert!(matches!(
            check(&pem_of(&[0x30, 3, 2, 1, 1])),
            Err(CsrError::Malformed(_))
        ));
    }

    fn rustls_pem(text: &str) -> (String, Vec<u8>) {
        let (_, section) = x509_parser::pem::parse_x509_pem(text.as_bytes()).unwrap();
        (section.label, section.contents)
    }

    fn pem_of(der: &[u8]) -> String {
        super::super::pem::encode(&rustls_pki_types::CertificateDer::from(der.to_vec()))
            .replace("CERTIFICATE", "CERTIFICATE REQUEST")
    }

    proptest! {
        #[test]
        fn no_request_panics(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let (_, mut der) = rustls_pem(include_str!("testdata/p256.csr"));
            for (at, byte) in flips {
                let at = at.index(der.len());
                der[at] = byte;
            }
            let _ = check(&pem_of(&der));
        }
    }
}
