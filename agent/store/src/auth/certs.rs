//! The store's own certificate authority: who the server is, and who its administrator is.
//!
//! Does not know HTTP or objects. One file, `pki/ca.pem`, holds the authority's key and certificate, so that the two
//! can't disagree; it is written whole (`a_half_written_authority_is_named`), readable by its owner only, and made at
//! the first start. The serving certificate and each kubeconfig's client certificate are made anew from it and kept
//! nowhere: a restart changes neither whom clients trust nor whom the server trusts
//! (`certificates_of_before_a_restart_are_still_good`).
//!
//! Clients and the server have the same authority; the extended key usage tells them apart.

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use time::OffsetDateTime;

/// How long what is made here is valid: there is no rotation but a new data directory.
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far back validity begins, for clients whose clocks are behind.
const BACKDATED: Duration = Duration::from_secs(3600);
/// Names that the server always has, besides the given ones.
const NAMES: &[&str] = &[
    "localhost",
    "127.0.0.1",
    "::1",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file under the data directory could not be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file of keys is not what was written once.
    #[error(
        "{}: {reason}; put a copy back, or remove it to start with a new one (what was issued before is then void)",
        path.display()
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A name for the server that no certificate can have.
    #[error("{name:?} can't be a name of the server: {reason}")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The cryptography library refused.
    #[error("cannot make a certificate: {0}")]
    Make(String),
}

impl From<rcgen::Error> for CertificateError {
    fn from(error: rcgen::Error) -> Self {
        Self::Make(error.to_string())
    }
}

impl From<rustls::Error> for CertificateError {
    fn from(error: rustls::Error) -> Self {
        Self::Make(error.to_string())
    }
}

/// The authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// A certificate and its key.
pub struct Pair {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key, PKCS #8.
    pub key: Vec<u8>,
}

impl Authority {
    /// The authority of this data directory; made if there is none.
    pub fn open(directory: &Path) -> Result<Self, CertificateError> {
        let path = directory.join("pki/ca.pem");
        let text = read_or_create(&path, new_authority)?;
        let damaged = |reason: String| CertificateError::Damaged {
            path: path.clone(),
            reason,
        };
        let key = KeyPair::from_pem(&text).map_err(|error| damaged(format!("its key can't be read ({error})")))?;
        let certificate = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|error| damaged(format!("its certificate can't be read ({error})")))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| damaged(format!("its certificate can't be used ({error})")))?;
        Ok(Self { issuer, certificate })
    }

    /// The authority's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The authority's certificate as PEM.
    pub fn certificate_pem(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// A certificate for the server under its constant names and these.
    pub fn serving(&self, names: &[String]) -> Result<Pair, CertificateError> {
        let mut all: Vec<String> = NAMES.iter().map(|name| (*name).to_owned()).collect();
        for name in names {
            CertificateParams::new(vec![name.clone()]).map_err(|error| CertificateError::Name {
                name: name.clone(),
                reason: error.to_string(),
            })?;
            if !all.contains(name) {
                all.push(name.clone());
            }
        }
        let mut leaf = CertificateParams::new(all)?;
        leaf.distinguished_name = subject("kube-apiserver", None);
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(leaf)
    }

    /// A certificate for a client: `name` is the user, `group` its group.
    pub fn client(&self, name: &str, group: &str) -> Result<Pair, CertificateError> {
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = subject(name, Some(group));
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(leaf)
    }

    fn sign(&self, mut leaf: CertificateParams) -> Result<Pair, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        valid_from_now(&mut leaf);
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.use_authority_key_identifier_extension = true;
        Ok(Pair {
            certificate: leaf.signed_by(&key, &self.issuer)?.der().clone(),
            key: key.serialize_der(),
        })
    }

    /// What the server speaks: TLS 1.3 and 1.2, HTTP/2 and HTTP/1.1, and client certificates of this authority if the
    /// client has one.
    pub fn server_config(&self, names: &[String]) -> Result<ServerConfig, CertificateError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|error| CertificateError::Make(error.to_string()))?;
        let serving = self.serving(names)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_client_cert_verifier(clients)
            .with_single_cert(
                vec![serving.certificate],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(serving.key)),
            )?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// A key for signing tokens, made if there is none: PEM, PKCS #8, P-256.
pub fn token_key(directory: &Path) -> Result<KeyPair, CertificateError> {
    let path = directory.join("pki/service-account.key");
    let text = read_or_create(&path, || {
        Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem())
    })?;
    KeyPair::from_pem_and_sign_algo(&text, &PKCS_ECDSA_P256_SHA256).map_err(|error| CertificateError::Damaged {
        path,
        reason: format!("the key that signs service-account tokens can't be read ({error})"),
    })
}

/// DER in its PEM coat.
pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, next) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = next;
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

fn new_authority() -> Result<String, CertificateError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut authority = CertificateParams::default();
    authority.distinguished_name = subject("undercurrent-store-ca", None);
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_from_now(&mut authority);
    let certificate = authority.self_signed(&key)?;
    Ok(format!(
        "{}{}",
        key.serialize_pem(),
        pem("CERTIFICATE", certificate.der())
    ))
}

fn valid_from_now(certificate: &mut CertificateParams) {
    let now = OffsetDateTime::now_utc();
    certificate.not_before = now - BACKDATED;
    certificate.not_after = now + LIFETIME;
}

fn subject(name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject.push(DnType::CommonName, name);
    subject
}

/// The file's text; if there is no such file, what `make` makes is put there first, whole or not at all.
fn read_or_create(
    path: &Path,
    make: impl FnOnce() -> Result<String, CertificateError>,
) -> Result<String, CertificateError> {
    let failed = |error| CertificateError::File {
        path: path.to_owned(),
        error,
    };
    match fs::read_to_string(path) {
        Ok(text) => return Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let text = make()?;
    let write = || -> std::io::Result<()> {
        let parent = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent)?;
        let half = path.with_extension("new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&half)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&half, path)?;
        fs::File::open(parent)?.sync_all()
    };
    write().map_err(failed)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_of_before_a_restart_are_still_good() {
        let directory = tempfile::tempdir().unwrap();
        let first = Authority::open(directory.path()).unwrap();
        let second = Authority::open(directory.path()).unwrap();
        assert_eq!(first.certificate(), second.certificate());
        let key = |key: KeyPair| key.serialize_der();
        assert_eq!(
            key(token_key(directory.path()).unwrap()),
            key(token_key(directory.path()).unwrap())
        );
    }

    #[test]
    fn a_half_written_authority_is_named() {
        let directory = tempfile::tempdir().unwrap();
        Authority::open(directory.path()).unwrap();
        let path = directory.path().join("pki/ca.pem");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        let error = Authority::open(directory.path()).err().unwrap().to_string();
        assert!(
            error.contains("pki/ca.pem") && error.contains("put a copy back"),
            "{error}"
        );
    }

    #[test]
    fn keys_are_readable_by_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        Authority::open(directory.path()).unwrap();
        let mode = fs::metadata(directory.path().join("pki/ca.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_name_that_no_certificate_can_have_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(directory.path()).unwrap();
        let error = authority.serving(&["größe".to_owned()]).err().unwrap().to_string();
        assert!(error.contains("größe"), "{error}");
        assert!(
            authority
                .serving(&["store.example".to_owned(), "10.0.0.1".to_owned()])
                .is_ok()
        );
    }
}
