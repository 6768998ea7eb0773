//! `istio.v1.auth.IstioCertificateService`: asks who it is, asks whether they may, has it signed, and says so.
//!
//! Each certificate and each refusal is one line of the audit log (target `audit`), with who asked from where, for whom,
//! and the serial or the reason. A refusal tells the caller what to do; where waiting helps, `grpc-retry-pushback-ms` says
//! how long.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use model::Identity;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use proto::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    },
    prost_types::value::Kind,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tonic::{Code, Request, Response, Status};

use super::{
    authority::{Authority, IssueError, Issued},
    csr,
};
use crate::auth::{AuthError, Authenticator, Caller, bearer};

/// For whom a node asks.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// The largest message that is read: a request with its metadata.
const MAX_MESSAGE: usize = csr::MAX_BYTES + 8 * 1024;
/// How long to stay away when too many ask, in milliseconds.
const STAY_AWAY: &str = "2000";

/// What is counted, by istiod's names where it has one.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    requests: Counter,
    issued: Counter,
    unauthenticated: Counter,
    denied: Counter,
    malformed: Counter,
    busy: Counter,
    failed: Counter,
}

impl Counters {
    /// Makes them visible.
    pub fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("citadel_server_csr_count", "Certificate requests", &self.requests),
            (
                "citadel_server_success_cert_issuance_count",
                "Certificates issued",
                &self.issued,
            ),
            (
                "citadel_server_authentication_failure_count",
                "Requests whose caller is not known",
                &self.unauthenticated,
            ),
            (
                "undercurrent_ca_denied_count",
                "Requests for an identity that the caller may not have",
                &self.denied,
            ),
            (
                "citadel_server_csr_parsing_err_count",
                "Requests that are malformed",
                &self.malformed,
            ),
            ("undercurrent_ca_busy_count", "Requests over the bounds", &self.busy),
            (
                "citadel_server_csr_sign_err_count",
                "Requests that failed at the authority",
                &self.failed,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
    }

    fn count(&self, status: &Status) {
        let counter = match status.code() {
            Code::Unauthenticated => &self.unauthenticated,
            Code::PermissionDenied => &self.denied,
            Code::InvalidArgument => &self.malformed,
            Code::ResourceExhausted => &self.busy,
            _ => &self.failed,
        };
        counter.inc();
    }
}

/// The service.
pub struct CertificateService {
    authority: Arc<Authority>,
    authenticator: Arc<Authenticator>,
    counters: Counters,
}

impl CertificateService {
    /// For a tonic router.
    pub fn server(
        authority: Arc<Authority>,
        authenticator: Arc<Authenticator>,
        counters: Counters,
    ) -> IstioCertificateServiceServer<Self> {
        let service = Self {
            authority,
            authenticator,
            counters,
        };
        IstioCertificateServiceServer::new(service).max_decoding_message_size(MAX_MESSAGE)
    }

    async fn issue(&self, request: Request<IstioCertificateRequest>, entry: &mut Entry) -> Result<Issued, Status> {
        let token = bearer(request.metadata()).map_err(|error| error.status())?.to_owned();
        let request = request.into_inner();
        entry.asked = impersonated(&request).map_err(|error| error.status())?;
        let caller = self
            .authenticator
            .caller(&token)
            .await
            .map_err(|error| error.status())?;
        let key = caller.key();
        entry.caller = Some(caller.clone());
        let identity = self.authenticator.identity(&caller, entry.asked.as_deref()).await;
        let identity = identity.map_err(|error| error.status())?;
        entry.identity = Some(identity.clone());
        let issued = self
            .authority
            .issue(&key, request.csr, identity, request.validity_duration)
            .await;
        issued.map_err(|error| status(&error))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.counters.requests.inc();
        let mut entry = Entry {
            peer: request
                .extensions()
                .get::<crate::xds::Peer>()
                .map(crate::xds::Peer::address),
            ..Entry::default()
        };
        match self.issue(request, &mut entry).await {
            Ok(issued) => {
                self.counters.issued.inc();
                entry.issued(&issued);
                Ok(Response::new(IstioCertificateResponse {
                    cert_chain: issued.chain,
                }))
            }
            Err(status) => {
                self.counters.count(&status);
                entry.refused(&status);
                Err(status)
            }
        }
    }
}

/// The identity that a request is for, if it names one.
fn impersonated(request: &IstioCertificateRequest) -> Result<Option<String>, AuthError> {
    let Some(metadata) = &request.metadata else {
        return Ok(None);
    };
    match metadata.fields.get(IMPERSONATED).map(|value| &value.kind) {
        None => Ok(None),
        Some(Some(Kind::StringValue(identity))) if identity.is_empty() => Ok(None),
        Some(Some(Kind::StringValue(identity))) => Ok(Some(identity.clone())),
        Some(_) => Err(AuthError::Denied(format!("{IMPERSONATED} must be a string").into())),
    }
}

fn status(error: &IssueError) -> Status {
    let text = error.to_string();
    match error {
        IssueError::Request(_) => Status::invalid_argument(text),
        IssueError::Busy(_) | IssueError::Displaced => {
            let mut status = Status::resource_exhausted(text);
            let wait = tonic::metadata::MetadataValue::from_static(STAY_AWAY);
            status.metadata_mut().insert("grpc-retry-pushback-ms", wait);
            status
        }
        IssueError::NotReady => Status::unavailable(text),
        IssueError::Sign(_) => Status::internal(text),
    }
}

/// A line of the audit log, as it comes to be known.
#[derive(Default)]
struct Entry {
    peer: Option<SocketAddr>,
    caller: Option<Caller>,
    asked: Option<String>,
    identity: Option<Identity>,
}

impl Entry {
    fn issued(&self, issued: &Issued) {
        let identity = self.identity.as_ref().map(ToString::to_string).unwrap_or_default();
        tracing::info!(
            target: "audit",
            caller = self.caller(),
            peer = self.peer(),
            node = self.node(),
            identity,
            serial = issued.serial,
            not_after = rfc3339(issued.not_after),
            "certificate issued"
        );
    }

    fn refused(&self, status: &Status) {
        tracing::warn!(
            target: "audit",
            caller = self.caller(),
            peer = self.peer(),
            node = self.node(),
            // What a caller wrote: without control characters, and not endless.
            identity = self.asked.as_deref().map(|asked| format!("{asked:.300?}")).unwrap_or_default(),
            code = ?status.code(),
            reason = status.message(),
            "certificate refused"
        );
    }

    fn caller(&self) -> String {
        self.caller
            .as_ref()
            .map_or_else(|| "unknown".into(), ToString::to_string)
    }

    fn peer(&self) -> String {
        self.peer.map_or_else(|| "unknown".into(), |peer| peer.to_string())
    }

    fn node(&self) -> &str {
        self.caller
            .as_ref()
            .and_then(|caller| caller.node.as_deref())
            .unwrap_or_default()
    }
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}
