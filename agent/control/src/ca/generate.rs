//! Makes an authority where the user gave none: a root, and an intermediate that signs.
//!
//! The two keys are kept apart. The root's is in the Secret `undercurrent-ca-root`, which is read only to make an
//! intermediate; what signs every day is in `istio-ca-secret`, and an intermediate that leaked is replaced without anybody
//! learning a new root. ECDSA P-256; a root lasts ten years, an intermediate one.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    leaf,
    material::{CERTIFICATE, CHAIN, KEY, MaterialError, ROOTS},
    pem,
};

/// The root's certificate, in the Secret of the root.
pub const ROOT_CERTIFICATE: &str = "root-cert.pem";
/// The root's key, in the Secret of the root.
pub const ROOT_KEY: &str = "root-key.pem";

/// How long a root is valid.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How long an intermediate is valid.
pub const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(365 * 86_400);

type Values = BTreeMap<String, Vec<u8>>;

/// Makes a root: the values of its Secret.
pub fn root(trust_domain: &str, now: SystemTime) -> Result<Values, rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = authority(trust_domain, "root", now, ROOT_LIFETIME);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key)?;
    Ok(BTreeMap::from([
        (ROOT_CERTIFICATE.into(), certificate.pem().into_bytes()),
        (ROOT_KEY.into(), key.serialize_pem().into_bytes()),
    ]))
}

/// Makes an intermediate below a root: the values of `istio-ca-secret`. `others` are roots to be trusted as well.
pub fn intermediate(
    root: &Values,
    trust_domain: &str,
    others: &[CertificateDer<'static>],
    now: SystemTime,
) -> Result<Values, MaterialError> {
    let failed = |problem: String| MaterialError {
        key: ROOT_CERTIFICATE,
        problem,
    };
    let (certificate, issuer) = read_root(root)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| failed(error.to_string()))?;
    let mut params = authority(trust_domain, "intermediate", now, INTERMEDIATE_LIFETIME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    params.not_after = params.not_after.min(root_not_after(root)?.into());
    let signed = params
        .signed_by(&key, &issuer)
        .map_err(|error| failed(error.to_string()))?;
    let mut roots = vec![certificate.clone()];
    roots.extend(others.iter().filter(|other| **other != certificate).cloned());
    Ok(BTreeMap::from([
        (CERTIFICATE.into(), signed.pem().into_bytes()),
        (KEY.into(), key.serialize_pem().into_bytes()),
        (CHAIN.into(), signed.pem().into_bytes()),
        (ROOTS.into(), pem::encode_all(&roots).into_bytes()),
    ]))
}

/// When a root ends.
pub fn root_not_after(root: &Values) -> Result<SystemTime, MaterialError> {
    let certificate = root_certificate(root)?;
    let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|error| MaterialError {
        key: ROOT_CERTIFICATE,
        problem: error.to_string(),
    })?;
    Ok(parsed.validity().not_after.to_datetime().into())
}

/// The certificate of a root's Secret.
pub fn root_certificate(root: &Values) -> Result<CertificateDer<'static>, MaterialError> {
    let failed = |problem: String| MaterialError {
        key: ROOT_CERTIFICATE,
        problem,
    };
    let text = root.get(ROOT_CERTIFICATE).ok_or_else(|| failed("missing".into()))?;
    let mut found = pem::decode_all(text).map_err(failed)?;
    match found.len() {
        1 => Ok(found.remove(0)),
        count => Err(failed(format!("{count} certificates where one belongs"))),
    }
}

fn read_root(root: &Values) -> Result<(CertificateDer<'static>, Issuer<'static, KeyPair>), MaterialError> {
    let failed = |problem: String| MaterialError { key: ROOT_KEY, problem };
    let certificate = root_certificate(root)?;
    let key = root.get(ROOT_KEY).ok_or_else(|| failed("missing".into()))?;
    let key = std::str::from_utf8(key).map_err(|error| failed(error.to_string()))?;
    let pair = KeyPair::from_pem(key).map_err(|_| failed("no private key in it that can be read".into()))?;
    let issuer = Issuer::from_ca_cert_der(&certificate, pair).map_err(|error| failed(error.to_string()))?;
    Ok((certificate, issuer))
}

fn authority(trust_domain: &str, role: &str, now: SystemTime, lifetime: Duration) -> CertificateParams {
    let now = OffsetDateTime::from(now);
    let mut params = CertificateParams::default();
    let serial = leaf::serial();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    // Each with a name of its own: two roots of one name would be mistaken for one another when a chain is built.
    let name = format!(
        "Undercurrent {role} {:02x}{:02x}{:02x}{:02x}",
        serial[1], serial[2], serial[3], serial[4]
    );
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = now - leaf::BACKDATED;
    params.not_after = now + lifetime;
    params
}
