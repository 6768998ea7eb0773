//! What an authority is made of, checked: the signing certificate and its key, the issuers above it, and whom to trust.
//!
//! In a Secret (Istio's keys): `ca-cert.pem` and `ca-key.pem` sign, `cert-chain.pem` leads up to the root, and
//! `root-cert.pem` has the roots, of which there may be several. A material that is read can be used: the key is the
//! certificate's, the chain leads to one of the roots, and a certificate signed with it is one that peers accept
//! (`broken_material_is_refused_by_the_name_of_its_key`). Knows nothing of where the Secret comes from or what is in force.

use std::{collections::BTreeMap, fmt, sync::Arc, time::SystemTime};

use aws_lc_rs::digest;
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{leaf, pem};

/// The signing certificate.
pub const CERTIFICATE: &str = "ca-cert.pem";
/// Its key, PKCS #8, PKCS #1 or SEC 1.
pub const KEY: &str = "ca-key.pem";
/// The certificates from the signing one up to the root.
pub const CHAIN: &str = "cert-chain.pem";
/// The roots.
pub const ROOTS: &str = "root-cert.pem";

/// The longest chain from a signing certificate to its root, and the most roots that are read.
const MAX_CHAIN: usize = 8;
const MAX_ROOTS: usize = 32;

/// Why a material can't be used: which key of the Secret, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct MaterialError {
    /// The key of the Secret.
    pub key: &'static str,
    /// In words.
    pub problem: String,
}

fn bad<T: fmt::Display>(key: &'static str) -> impl Fn(T) -> MaterialError {
    move |problem| MaterialError {
        key,
        problem: problem.to_string(),
    }
}

/// SHA-256 of a certificate, in hex: names it in states and logs.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    let hash = digest::digest(&digest::SHA256, certificate);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A usable authority. Cheap to clone; its key shows in no log.
#[derive(Clone)]
pub struct Material(Arc<Inner>);

struct Inner {
    key: Box<str>,
    issuer: Issuer<'static, KeyPair>,
    /// The signing certificate first, then its issuers; without the root, unless it is the signing one itself.
    chain: Vec<CertificateDer<'static>>,
    root: CertificateDer<'static>,
    roots: Vec<CertificateDer<'static>>,
    fingerprint: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Material({})", self.fingerprint())
    }
}

/// The same signing certificate over the same roots.
impl PartialEq for Material {
    fn eq(&self, other: &Self) -> bool {
        self.0.fingerprint == other.0.fingerprint && self.0.chain == other.0.chain && self.0.roots == other.0.roots
    }
}

impl Material {
    /// Reads and checks what a Secret holds. Without roots, the signing certificate must be its own.
    pub fn read(values: &BTreeMap<String, Vec<u8>>, now: SystemTime) -> Result<Self, MaterialError> {
        let certificates = certificates(values, CERTIFICATE, MAX_CHAIN)?;
        let signer = certificates
            .first()
            .ok_or_else(|| bad(CERTIFICATE)("no certificate in it"))?;
        let key = text(values, KEY)?;
        let pair = KeyPair::from_pem(key.trim()).map_err(|_| bad(KEY)("no private key in it that can be read"))?;
        check_signer(signer, &pair, now)?;
        let roots = match certificates_or_none(values, ROOTS, MAX_ROOTS)? {
            roots if roots.is_empty() && is_self_signed(signer) => vec![signer.clone()],
            roots if roots.is_empty() => return Err(bad(ROOTS)("no certificate in it")),
            roots => roots,
        };
        let mut issuers = certificates[1..].to_vec();
        issuers.extend(certificates_or_none(values, CHAIN, MAX_CHAIN)?);
        let (chain, root) = chain(signer, &issuers, &roots)?;
        let (not_before, not_after) = validity(chain.iter().chain([&root]))?;
        let issuer = Issuer::from_ca_cert_der(signer, pair).map_err(bad(CERTIFICATE))?;
        let inner = Inner {
            key: key.into(),
            issuer,
            fingerprint: fingerprint(signer),
            chain,
            root,
            roots,
            not_before,
            not_after,
        };
        let material = Self(Arc::new(inner));
        material.check_by_signing(now)?;
        Ok(material)
    }

    /// As a Secret's values, from which [`Material::read`] makes the same.
    pub fn write(&self) -> BTreeMap<String, Vec<u8>> {
        let inner = &*self.0;
        let certificate = inner.chain.first().map(pem::encode).unwrap_or_default();
        BTreeMap::from([
            (CERTIFICATE.into(), certificate.into_bytes()),
            (KEY.into(), inner.key.as_bytes().to_vec()),
            (CHAIN.into(), pem::encode_all(&inner.chain).into_bytes()),
            (ROOTS.into(), pem::encode_all(&inner.roots).into_bytes()),
        ])
    }

    /// The signing certificate's fingerprint.
    pub fn fingerprint(&self) -> &str {
        &self.0.fingerprint
    }

    /// Signs; the one way to the key.
    pub(super) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.0.issuer
    }

    /// What follows a leaf up to the root, without it.
    pub fn intermediates(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.0.chain.iter().filter(|certificate| **certificate != self.0.root)
    }

    /// The root that the signing certificate chains to.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.0.root
    }

    /// All roots that are to be trusted along with it.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.0.roots
    }

    /// When the first certificate of the chain, root included, ends.
    pub fn not_after(&self) -> SystemTime {
        self.0.not_after
    }

    /// When the last certificate of the chain began.
    pub fn not_before(&self) -> SystemTime {
        self.0.not_before
    }

    /// Path lengths, name constraints, key usages: a peer would find them, so a certificate is made and looked at.
    fn check_by_signing(&self, now: SystemTime) -> Result<(), MaterialError> {
        let signed = leaf::probe(self, now).map_err(bad(KEY))?;
        let intermediates: Vec<_> = self.intermediates().cloned().collect();
        verify(&signed, &intermediates, std::slice::from_ref(self.root()), now).map_err(|problem| MaterialError {
            key: CERTIFICATE,
            problem: format!("peers would not accept what it signs: {problem}"),
        })
    }
}

/// Checks a leaf as a server of the mesh checks its clients.
pub fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &[CertificateDer<'static>],
    now: SystemTime,
) -> Result<(), String> {
    let mut store = rustls::RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(|error| error.to_string())?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider)
        .build()
        .map_err(|error| error.to_string())?;
    let since = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(|error| error.to_string())?;
    verifier
        .verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(since))
        .map(|_| ())
        .map_err(|error| error.to_string())
}

fn text<'a>(values: &'a BTreeMap<String, Vec<u8>>, key: &'static str) -> Result<&'a str, MaterialError> {
    let value = values.get(key).ok_or_else(|| bad(key)("missing"))?;
    std::str::from_utf8(value).map_err(bad(key))
}

fn certificates(
    values: &BTreeMap<String, Vec<u8>>,
    key: &'static str,
    most: usize,
) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let found = pem::decode_all(text(values, key)?.as_bytes()).map_err(bad(key))?;
    if found.len() > most {
        return Err(bad(key)(format!(
            "{} certificates; at most {most} are read",
            found.len()
        )));
    }
    Ok(found)
}

fn certificates_or_none(
    values: &BTreeMap<String, Vec<u8>>,
    key: &'static str,
    most: usize,
) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    match values.get(key) {
        Some(_) => certificates(values, key, most),
        None => Ok(Vec::new()),
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>, key: &'static str) -> Result<X509Certificate<'a>, MaterialError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(bad(key))?;
    Ok(parsed)
}

fn check_signer(signer: &CertificateDer<'_>, pair: &KeyPair, now: SystemTime) -> Result<(), MaterialError> {
    let parsed = parse(signer, CERTIFICATE)?;
    if !parsed.is_ca() {
        return Err(bad(CERTIFICATE)("it is not one of an authority (basic constraints)"));
    }
    if let Ok(Some(usage)) = parsed.key_usage()
        && !usage.value.key_cert_sign()
    {
        return Err(bad(CERTIFICATE)("it may not sign certificates (key usage)"));
    }
    if parsed.public_key().raw != pair.subject_public_key_info() {
        return Err(bad(KEY)(format!("it is not the key of {CERTIFICATE}")));
    }
    let (from, until) = (
        parsed.validity().not_before.to_datetime(),
        parsed.validity().not_after.to_datetime(),
    );
    let now = OffsetDateTime::from(now);
    if now < from || now >= until {
        return Err(bad(CERTIFICATE)(format!(
            "it is valid from {from} to {until}, and it is {now}"
        )));
    }
    Ok(())
}

fn is_self_signed(certificate: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(certificate)
        .is_ok_and(|(_, parsed)| parsed.subject() == parsed.issuer() && parsed.verify_signature(None).is_ok())
}

/// Leads from the signing certificate to one of the roots: the chain without the root (unless it signs), and the root.
fn chain(
    signer: &CertificateDer<'static>,
    issuers: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
) -> Result<(Vec<CertificateDer<'static>>, CertificateDer<'static>), MaterialError> {
    let mut chain = vec![signer.clone()];
    if roots.contains(signer) {
        return Ok((chain, signer.clone()));
    }
    for _ in 0..MAX_CHAIN {
        let last = chain.last().unwrap_or(signer).clone();
        let above = parse(&last, CHAIN)?;
        if let Some(root) = roots.iter().find(|root| signed(&above, root)) {
            return Ok((chain, root.clone()));
        }
        let next = issuers
            .iter()
            .find(|issuer| !chain.contains(issuer) && signed(&above, issuer));
        let Some(next) = next else {
            let issuer = above.issuer().to_string();
            return Err(bad(CHAIN)(format!(
                "the issuer \"{issuer}\" is neither in it nor in {ROOTS}"
            )));
        };
        chain.push(next.clone());
    }
    Err(bad(CHAIN)(format!("no root within {MAX_CHAIN} certificates")))
}

fn signed(certificate: &X509Certificate<'_>, by: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(by).is_ok_and(|(_, issuer)| {
        certificate.issuer() == issuer.subject() && certificate.verify_signature(Some(issuer.public_key())).is_ok()
    })
}

fn validity<'a>(
    certificates: impl Iterator<Item = &'a CertificateDer<'static>>,
) -> Result<(SystemTime, SystemTime), MaterialError> {
    let mut bounds: Option<(OffsetDateTime, OffsetDateTime)> = None;
    for certificate in certificates {
        let parsed = parse(certificate, CHAIN)?;
        let (from, until) = (
            parsed.validity().not_before.to_datetime(),
            parsed.validity().not_after.to_datetime(),
        );
        bounds = Some(bounds.map_or((from, until), |(first, last)| (first.max(from), last.min(until))));
    }
    let (from, until) = bounds.ok_or_else(|| bad(CERTIFICATE)("no certificate in it"))?;
    Ok((from.into(), until.into()))
}

#[cfg(test)]
mod tests {
    use super::{super::generate, *};

    fn good() -> BTreeMap<String, Vec<u8>> {
        let now = SystemTime::now();
        let root = generate::root("cluster.local", now).unwrap();
        generate::intermediate(&root, "cluster.local", &[], now).unwrap()
    }

    fn refused(values: &BTreeMap<String, Vec<u8>>) -> &'static str {
        Material::read(values, SystemTime::now()).unwrap_err().key
    }

    #[test]
    fn what_is_written_is_read_back() {
        let material = Material::read(&good(), SystemTime::now()).unwrap();
        let again = Material::read(&material.write(), SystemTime::now()).unwrap();
        assert!(material == again);
        assert_ne!(material.root(), material.intermediates().next().unwrap());
    }

    #[test]
    fn a_root_may_sign_itself_as_with_a_self_signed_istiod() {
        let root = generate::root("cluster.local", SystemTime::now()).unwrap();
        let values = BTreeMap::from([
            (CERTIFICATE.to_owned(), root[generate::ROOT_CERTIFICATE].clone()),
            (KEY.to_owned(), root[generate::ROOT_KEY].clone()),
        ]);
        let material = Material::read(&values, SystemTime::now()).unwrap();
        assert_eq!(material.intermediates().count(), 0);
        assert_eq!(material.roots(), std::slice::from_ref(material.root()));
    }

    #[test]
    fn broken_material_is_refused_by_the_name_of_its_key() {
        let other = good();
        for (key, value, blamed) in [
            (CERTIFICATE, b"".to_vec(), CERTIFICATE),
            (CERTIFICATE, other[CERTIFICATE].clone(), KEY),
            (KEY, b"nonsense".to_vec(), KEY),
            (KEY, other[KEY].clone(), KEY),
            (ROOTS, other[ROOTS].clone(), CHAIN),
            (ROOTS, b"".to_vec(), ROOTS),
            (CHAIN, vec![0xff, 0xfe], CHAIN),
        ] {
            let mut values = good();
            values.insert(key.into(), value);
            assert_eq!(refused(&values), blamed, "{key}");
        }
        let mut missing = good();
        missing.remove(KEY);
        assert_eq!(refused(&missing), KEY);
    }

    #[test]
    fn an_expired_signing_certificate_is_refused() {
        let long_after = SystemTime::now() + std::time::Duration::from_secs(40 * 365 * 86_400);
        assert_eq!(Material::read(&good(), long_after).unwrap_err().key, CERTIFICATE);
    }

    #[test]
    fn a_key_shows_in_no_log() {
        let material = Material::read(&good(), SystemTime::now()).unwrap();
        assert!(format!("{material:?}").len() < 100);
    }
}
