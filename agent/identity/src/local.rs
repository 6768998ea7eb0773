//! A certificate authority in this process, from a CA certificate and key: for a mesh without a control plane.

use std::time::Duration;

use model::{Identity, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use time::OffsetDateTime;

use crate::{Authority, Clock, IssueError, Issued, authority::IssueFuture};

/// How long a leaf is valid, as Istio's.
const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How far back its validity begins, for peers whose clocks are behind.
const BACKDATED: Duration = Duration::from_secs(120);
/// How long a generated root is valid.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why there is no local authority.
#[derive(Debug, thiserror::Error)]
pub enum LocalAuthorityError {
    /// The certificate file has none, or a broken one.
    #[error("the CA certificate cannot be read: {0}")]
    Certificate(String),
    /// The key file has none, or one of an unknown kind.
    #[error("the CA key cannot be read: {0}")]
    Key(String),
    /// The key does not belong to the certificate.
    #[error("the CA key does not belong to the CA certificate")]
    Mismatch,
    /// The certificate is a leaf.
    #[error("the CA certificate is not one of an authority (basic constraints)")]
    NotAnAuthority,
    /// Making a key or a certificate failed.
    #[error("cannot make a root: {0}")]
    Generate(String),
}

/// A certificate authority in this process: 24 h certificates, backdated by two minutes, never outliving the CA's own.
pub struct LocalAuthority {
    issuer: Issuer<'static, KeyPair>,
    /// What follows the leaf: the signing certificate unless it is the root, and its issuers.
    intermediates: Vec<CertificateDer<'static>>,
    root: CertificateDer<'static>,
    not_after: OffsetDateTime,
    lifetime: Duration,
    clock: Clock,
}

impl LocalAuthority {
    /// From PEM texts: the signing certificate (followed by its issuers up to the root, if it is not the root itself)
    /// and its PKCS#8 key.
    pub fn from_pem(certificates: &str, key: &str) -> Result<Self, LocalAuthorityError> {
        let mut chain = CertificateDer::pem_slice_iter(certificates.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| LocalAuthorityError::Certificate(error.to_string()))?;
        let key = KeyPair::from_pem(key).map_err(|error| LocalAuthorityError::Key(error.to_string()))?;
        let signer = chain
            .first()
            .ok_or_else(|| LocalAuthorityError::Certificate("no certificate in it".into()))?;
        let not_after = check_signer(signer, &key)?;
        let issuer = Issuer::from_ca_cert_der(signer, key)
            .map_err(|error| LocalAuthorityError::Certificate(error.to_string()))?;
        let root = chain.pop().ok_or(LocalAuthorityError::NotAnAuthority)?;
        Ok(Self {
            issuer,
            intermediates: chain,
            root,
            not_after,
            lifetime: LEAF_LIFETIME,
            clock: Clock::system(),
        })
    }

    /// With another lifetime of leaves than 24 hours.
    pub fn with_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// With another clock than the system's.
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// The root's certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    fn sign(&self, identity: &Identity) -> Result<Issued, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let now = OffsetDateTime::from(self.clock.now());
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = rcgen::DistinguishedName::new();
        leaf.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        leaf.not_before = now - BACKDATED;
        leaf.not_after = (now + self.lifetime).min(self.not_after);
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        leaf.use_authority_key_identifier_extension = true;
        let certificate = leaf.signed_by(&key, &self.issuer)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.intermediates.iter().cloned());
        Ok(Issued {
            chain,
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            roots: vec![self.root.clone()],
        })
    }
}

impl Authority for LocalAuthority {
    fn issue<'a>(&'a self, identity: &'a Identity) -> IssueFuture<'a> {
        let issued = self
            .sign(identity)
            .map_err(|error| IssueError::Unusable(error.to_string().into()));
        Box::pin(std::future::ready(issued))
    }
}

/// Checks that this certificate can sign with this key; answers how long.
fn check_signer(signer: &CertificateDer<'_>, key: &KeyPair) -> Result<OffsetDateTime, LocalAuthorityError> {
    use rcgen::PublicKeyData;
    let (_, certificate) = x509_parser::parse_x509_certificate(signer)
        .map_err(|error| LocalAuthorityError::Certificate(error.to_string()))?;
    if !certificate.is_ca() {
        return Err(LocalAuthorityError::NotAnAuthority);
    }
    if certificate.public_key().raw != key.subject_public_key_info() {
        return Err(LocalAuthorityError::Mismatch);
    }
    Ok(certificate.validity().not_after.to_datetime())
}

/// Makes a self-signed root for a trust domain: (certificate, key), both PEM. P-256, ten years.
pub fn generate_root(trust_domain: &TrustDomain) -> Result<(String, String), LocalAuthorityError> {
    let generate = || -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let now = OffsetDateTime::now_utc();
        let mut root = CertificateParams::default();
        root.distinguished_name = rcgen::DistinguishedName::new();
        root.distinguished_name
            .push(DnType::OrganizationName, trust_domain.as_str());
        root.distinguished_name.push(DnType::CommonName, "Undercurrent root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        root.not_before = now - BACKDATED;
        root.not_after = now + ROOT_LIFETIME;
        let certificate = root.self_signed(&key)?;
        Ok((certificate.pem(), key.serialize_pem()))
    };
    generate().map_err(|error| LocalAuthorityError::Generate(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_another_root_is_refused() {
        let domain = TrustDomain::default();
        let (certificate, key) = generate_root(&domain).unwrap();
        let (_, other) = generate_root(&domain).unwrap();
        assert!(LocalAuthority::from_pem(&certificate, &key).is_ok());
        assert!(matches!(
            LocalAuthority::from_pem(&certificate, &other),
            Err(LocalAuthorityError::Mismatch)
        ));
        assert!(LocalAuthority::from_pem("", &key).is_err());
        assert!(LocalAuthority::from_pem(&certificate, "").is_err());
    }
}
