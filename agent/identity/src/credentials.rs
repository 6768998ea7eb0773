//! One identity's key, chain and roots, and the TLS configurations made of them.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use model::{Identity, TrustDomain};
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    Clock, Issued,
    peer::{PeerIdentityError, certificate_identity},
    tls::{ClientVerifier, PROVIDER, ServerVerifier},
    trust::{Roots, Trust},
};

/// Why what an authority handed out is not used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CredentialsError {
    /// There is no leaf, or it cannot be parsed.
    #[error("the certificate is malformed")]
    Malformed,
    /// Its name is not an identity.
    #[error("the certificate has no usable name: {0}")]
    Name(#[from] PeerIdentityError),
    /// It was made out to somebody else.
    #[error("the certificate is made out to {found}, asked for {asked}")]
    OtherIdentity {
        /// Whose it is.
        found: Identity,
        /// Whose it should be.
        asked: Identity,
    },
    /// It is already over.
    #[error("the certificate is already expired")]
    Expired,
    /// The key does not belong to it, a root is unusable, ...
    #[error("the certificate cannot be used: {0}")]
    Unusable(Arc<str>),
}

/// One identity's key, certificate chain and trusted roots. Immutable: a rotation makes a new one, with another serial.
pub struct Credentials {
    identity: Identity,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    roots: Arc<Roots>,
    key: Arc<SingleCertAndKey>,
    server: Arc<ServerConfig>,
    clock: Clock,
}

impl Credentials {
    /// Checks what an authority handed out for `identity`, and makes it usable. Peers must be of `trust_domain`, and under
    /// the roots that came with it.
    pub fn new(
        identity: Identity,
        trust_domain: &TrustDomain,
        issued: Issued,
        clock: &Clock,
    ) -> Result<Self, CredentialsError> {
        Self::under(identity, &Trust::from(trust_domain.clone()), issued, clock)
    }

    /// Likewise, with peers judged by `trust`: its domains, and its bundle as well as the roots that came.
    pub fn under(identity: Identity, trust: &Trust, issued: Issued, clock: &Clock) -> Result<Self, CredentialsError> {
        let unusable = |error: &dyn fmt::Display| CredentialsError::Unusable(error.to_string().into());
        let leaf = issued.chain.first().ok_or(CredentialsError::Malformed)?;
        let found = certificate_identity(leaf)?;
        if found != identity {
            return Err(CredentialsError::OtherIdentity { found, asked: identity });
        }
        let (serial, not_before, not_after) = validity(leaf)?;
        if not_after <= clock.now() {
            return Err(CredentialsError::Expired);
        }
        let roots = Arc::new(Roots::new(issued.roots, trust.clone()).map_err(|error| unusable(&error))?);
        let key = CertifiedKey::from_der(issued.chain, issued.key, &PROVIDER).map_err(|error| unusable(&error))?;
        let key = Arc::new(SingleCertAndKey::from(key));
        let verifier = ClientVerifier { roots: roots.clone() };
        let server = server_config(verifier, key.clone(), clock);
        Ok(Self {
            identity,
            serial,
            not_before,
            not_after,
            roots,
            key,
            server: Arc::new(server),
            clock: clock.clone(),
        })
    }

    /// Whose they are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The certificate's serial number, in hexadecimal: what tells one rotation from the next.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// When validity begins.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When validity ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Who is trusted.
    pub fn trust(&self) -> &Trust {
        self.roots.trust()
    }

    pub(crate) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Whether these credentials trusted a root of their own that their successor's handshakes do not.
    pub(crate) fn loses_a_root_to(&self, successor: &Self) -> bool {
        self.roots.has_one_that_is_not_in(&successor.roots)
    }

    /// Whether the bundle no longer has the root that the certificate chains to: peers will refuse it.
    pub(crate) fn is_outdated(&self) -> bool {
        !self.roots.own_are_in_bundle()
    }

    /// For accepting tunnels: TLS 1.3, ALPN `h2`, a client certificate of this trust domain or an alias required.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For opening tunnels to a peer that must be one of `expected`: TLS 1.3, ALPN `h2`, no SNI, no resumption.
    pub fn client_config(&self, expected: &[Identity]) -> Arc<ClientConfig> {
        let trust = self.roots.trust();
        let verifier = ServerVerifier {
            roots: self.roots.clone(),
            expected: expected
                .iter()
                .map(|identity| trust.normalize(identity.clone()))
                .collect(),
            algorithms: PROVIDER.signature_verification_algorithms,
        };
        let mut config = ClientConfig::builder_with_details(PROVIDER.clone(), Arc::new(self.clock.clone()))
            .with_protocol_versions(&[&TLS13])
            .expect("the provider's suites are of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.key.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Arc::new(config)
    }

    /// When to fetch the next: after half of the validity, plus up to `jitter` (0 to 1) of a tenth of it.
    pub(crate) fn rotation_due(&self, jitter: f64) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        self.not_before + life / 2 + (life / 10).mul_f64(jitter.clamp(0.0, 1.0))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}

fn server_config(verifier: ClientVerifier, key: Arc<SingleCertAndKey>, clock: &Clock) -> ServerConfig {
    let provider: Arc<CryptoProvider> = PROVIDER.clone();
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider's suites are of TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(key);
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    // A ztunnel offers AES-256 first.
    config.ignore_client_order = true;
    config.enable_secret_extraction = true;
    config
}

pub(crate) fn validity(leaf: &[u8]) -> Result<(String, SystemTime, SystemTime), CredentialsError> {
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_| CredentialsError::Malformed)?;
    let at = |time: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).map_err(|_| CredentialsError::Malformed)?;
        SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .ok_or(CredentialsError::Malformed)
    };
    let validity = leaf.validity();
    let (not_before, not_after) = (at(validity.not_before)?, at(validity.not_after)?);
    if not_after <= not_before {
        return Err(CredentialsError::Malformed);
    }
    Ok((
        leaf.tbs_certificate.raw_serial_as_string().replace(':', ""),
        not_before,
        not_after,
    ))
}
