//! The certificate authority of the control plane: Istio's `CreateCertificate`.
//!
//! ```text
//! issue(identity) ─► key (P-256, stays here) ─► CSR ─► CreateCertificate { ImpersonatedIdentity } ─► chain ─► checked
//!                              authorization: Bearer <token file, read now>          roots file, read now ─┘
//! ```
//! Knows nothing of pods, of retries (`identities`), or of how the CA decides.
//!
//! What comes back is used only if its leaf is for exactly the identity that was asked for, is for our key, is not over,
//! and chains to the roots file; else it is [`IssueError::Unusable`] and says why (`tests/ca.rs`). What the answer itself
//! calls a root is not believed. A CA that begins to sign with a new root before this node's roots file has it is refused
//! until the file has followed.
//!
//! See `security/proto/istioca.proto` and `security/pkg/nodeagent/caclient` in istio/istio.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use model::Identity;
use proto::{
    ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    prost_types::{Struct, Value, value::Kind},
};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::{RootCertStore, client::verify_server_cert_signed_by_trust_anchor, server::ParsedCertificate};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject};
use tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    Authority, Clock, IssueError, Issued, Upstream,
    authority::IssueFuture,
    credentials::validity,
    peer::certificate_identity,
    tls::PROVIDER,
    trust::{parse_bundle, store},
};

/// What is asked for; the CA may give less.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than any honest chain.
const MOST_CERTIFICATES: usize = 32;
const LARGEST_ANSWER: usize = 512 << 10;
const LARGEST_TOKEN: usize = 64 << 10;
/// A refusal's text is cut off here.
const LONGEST_REASON: usize = 500;

/// How to ask the CA.
#[derive(Clone, Debug)]
pub struct CaClientConfig {
    /// Where it is; its roots file is also what issued certificates must chain to.
    pub upstream: Upstream,
    /// This node's service-account token (audience `istio-ca`), read for each request since a kubelet replaces it.
    pub token_file: PathBuf,
    /// The cluster's name, by which a CA of several clusters chooses whom to ask about the token; may be empty.
    pub cluster: Arc<str>,
    /// For the validity of what comes.
    pub clock: Clock,
}

/// The client of a certificate authority elsewhere.
pub struct CaClient {
    config: CaClientConfig,
    channel: Channel,
}

impl CaClient {
    /// Nothing is dialled before the first certificate is asked for. Needs a tokio runtime.
    pub fn new(config: CaClientConfig) -> Self {
        let channel = config.upstream.channel();
        Self { config, channel }
    }

    async fn create(&self, identity: &Identity) -> Result<Issued, IssueError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(unusable)?;
        let request = self.request(identity, signing_request(identity, &key)?)?;
        let mut client =
            IstioCertificateServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.create_certificate(request))
            .await
            .map_err(|_| {
                let seconds = CALL_TIMEOUT.as_secs();
                IssueError::Unavailable(format!("{}: no answer within {seconds} s", self.addresses()).into())
            })?
            .map_err(|status| self.classify(&status))?;
        let chain = parse_chain(&answer.into_inner().cert_chain)?;
        let (chain, roots) = self.check(identity, chain)?;
        Ok(Issued {
            chain,
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            roots,
        })
    }

    fn request(&self, identity: &Identity, csr: String) -> Result<Request<IstioCertificateRequest>, IssueError> {
        let impersonated = Value {
            kind: Some(Kind::StringValue(identity.to_string())),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: VALIDITY.as_secs().cast_signed(),
            metadata: Some(Struct {
                fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), impersonated)]),
            }),
        });
        let token = self.token()?;
        let bearer = MetadataValue::try_from(format!("Bearer {token}"))
            .map_err(|_| self.no_token("it holds characters that no token has"))?;
        request.metadata_mut().insert("authorization", bearer);
        if !self.config.cluster.is_empty() {
            let cluster = MetadataValue::try_from(&*self.config.cluster).map_err(unusable)?;
            request.metadata_mut().insert("clusterid", cluster);
        }
        Ok(request)
    }

    fn token(&self) -> Result<String, IssueError> {
        let text = std::fs::read_to_string(&self.config.token_file).map_err(|error| self.no_token(&error))?;
        match text.trim() {
            "" => Err(self.no_token("it is empty")),
            long if long.len() > LARGEST_TOKEN => Err(self.no_token("it is too long")),
            token => Ok(token.to_owned()),
        }
    }

    fn no_token(&self, why: impl fmt::Display) -> IssueError {
        let file = self.config.token_file.display();
        IssueError::Unavailable(format!("this node's token cannot be used: {file}: {why}").into())
    }

    fn addresses(&self) -> String {
        let addresses: Vec<_> = self.config.upstream.addresses.iter().map(ToString::to_string).collect();
        addresses.join(", ")
    }

    /// A refusal is the CA's word on this request; all else may pass.
    fn classify(&self, status: &Status) -> IssueError {
        use std::error::Error as _;
        let mut text: String = status.message().chars().take(LONGEST_REASON).collect();
        let mut cause = status.source();
        while let Some(error) = cause {
            // Some errors repeat their cause.
            let said = error.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            cause = error.source();
        }
        let text = format!("{text} ({:?})", status.code()).into();
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented => IssueError::Refused(text),
            Code::Unauthenticated => IssueError::Unauthenticated(text),
            _ => IssueError::Unavailable(text),
        }
    }

    /// The chain to present, and the roots of ours that it ends in.
    fn check(
        &self,
        identity: &Identity,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), IssueError> {
        let leaf = chain
            .first()
            .ok_or_else(|| unusable("it holds no certificate"))?
            .clone();
        let found = certificate_identity(&leaf).map_err(unusable)?;
        if found != *identity {
            return Err(unusable(format!("it is made out to {found}, asked for {identity}")));
        }
        let mut presented = vec![leaf];
        for certificate in &chain[1..] {
            let (_, parsed) = X509Certificate::from_der(certificate).map_err(unusable)?;
            // Roots end the answer; peers have them, or must not believe ours.
            if parsed.subject() != parsed.issuer() {
                presented.push(certificate.clone());
            }
        }
        let roots = anchors(&self.config.upstream.roots_file, &presented, &self.config.clock)?;
        Ok((presented, roots))
    }
}

impl Authority for CaClient {
    fn issue<'a>(&'a self, identity: &'a Identity) -> IssueFuture<'a> {
        Box::pin(self.create(identity))
    }
}

/// Those of the roots file that the chain leads to; an error if there is none.
pub(crate) fn anchors(
    file: &Path,
    chain: &[CertificateDer<'static>],
    clock: &Clock,
) -> Result<Vec<CertificateDer<'static>>, IssueError> {
    let unreadable = |error: &dyn fmt::Display| {
        IssueError::Unavailable(format!("the roots file {}: {error}", file.display()).into())
    };
    let pem = std::fs::read(file).map_err(|error| unreadable(&error))?;
    let bundle = parse_bundle(&pem).map_err(|error| unreadable(&error))?;
    // By a clock that is behind, it begins later; a peer whose clock is right takes it, and by then it is good here, too.
    let begins = chain.iter().map(|one| Ok(validity(one).map_err(unusable)?.1));
    let begins: Vec<SystemTime> = begins.collect::<Result<_, IssueError>>()?;
    let at = begins.into_iter().fold(clock.now(), SystemTime::max);
    let at = at.duration_since(std::time::UNIX_EPOCH);
    let now = UnixTime::since_unix_epoch(at.map_err(unusable)?);
    let leaf = chain.first().ok_or_else(|| unusable("it holds no certificate"))?;
    let leaf = ParsedCertificate::try_from(leaf).map_err(unusable)?;
    let verify = |roots: &RootCertStore| {
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, roots, &chain[1..], now, algorithms)
    };
    let mut anchors = bundle.clone();
    anchors.retain(|root| store(std::slice::from_ref(root)).is_ok_and(|root| verify(&root).is_ok()));
    if anchors.is_empty() {
        let why = store(&bundle).and_then(|roots| verify(&roots));
        let why = why.err().map_or_else(String::new, |error| format!(": {error}"));
        return Err(unusable(format!(
            "it does not chain to the roots in {}{why}",
            file.display()
        )));
    }
    Ok(anchors)
}

pub(crate) fn unusable(why: impl fmt::Display) -> IssueError {
    IssueError::Unusable(why.to_string().into())
}

fn signing_request(identity: &Identity, key: &KeyPair) -> Result<String, IssueError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let name = identity.to_string().try_into().map_err(unusable)?;
    params.subject_alt_names = vec![SanType::URI(name)];
    let request = params.serialize_request(key).map_err(unusable)?;
    request.pem().map_err(unusable)
}

/// Every certificate of every element: the last may be a bundle.
fn parse_chain(elements: &[String]) -> Result<Vec<CertificateDer<'static>>, IssueError> {
    let mut chain = Vec::new();
    for element in elements {
        for certificate in CertificateDer::pem_slice_iter(element.as_bytes()) {
            chain.push(certificate.map_err(unusable)?);
            if chain.len() > MOST_CERTIFICATES {
                return Err(unusable(format!("it holds more than {MOST_CERTIFICATES} certificates")));
            }
        }
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_chain_panics(elements in proptest::collection::vec("(-----BEGIN CERTIFICATE-----\n)?[A-Za-z0-9+/=\n]{0,80}(-----END CERTIFICATE-----\n)?", 0..4)) {
            let _ = parse_chain(&elements);
        }
    }
}
