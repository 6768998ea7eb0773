//! Istio's labels of a connection, and how they are written. A missing value is `unknown`.

use std::{fmt, fmt::Write as _, sync::Arc};

use model::{Identity, Service, Workload};
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder, LabelValueEncoder};

use crate::Direction;

/// How a connection ended, as `response_flags` says it: ztunnel's words where it has one, else Envoy's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ResponseFlag {
    /// By its two ends: closed or reset by one of them.
    None,
    /// A policy denied it, or no longer allows it.
    Deny,
    /// The destination could not be connected to.
    Connect,
    /// No TLS came of it: certificates, identities, versions.
    TlsFailure,
    /// TLS did, HTTP/2 did not.
    H2HandshakeFailure,
    /// Nobody answered at the HBONE port: most often a NetworkPolicy.
    NetworkPolicy,
    /// The pod has no certificate.
    IdentityError,
    /// There is no way to the destination (Envoy's NR).
    NoRoute,
    /// The service has no healthy endpoint (Envoy's UH).
    NoHealthyUpstream,
    /// The peer's request can't be served here (Envoy's DPE).
    DownstreamProtocolError,
    /// The peer went away before it was answered (Envoy's DC).
    DownstreamTermination,
    /// The tunnel or the other side's socket failed (Envoy's UC).
    UpstreamTermination,
    /// This proxy ended it: the pod is gone, or the proxy is ending (Envoy's LR).
    LocalReset,
}

impl ResponseFlag {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::NoRoute,
        Self::NoHealthyUpstream,
        Self::DownstreamProtocolError,
        Self::DownstreamTermination,
        Self::UpstreamTermination,
        Self::LocalReset,
    ];

    /// Its word in metrics and log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::NoRoute => "NR",
            Self::NoHealthyUpstream => "UH",
            Self::DownstreamProtocolError => "DPE",
            Self::DownstreamTermination => "DC",
            Self::UpstreamTermination => "UC",
            Self::LocalReset => "LR",
        }
    }

    /// Whether the connection counts as failed.
    pub fn is_failure(self) -> bool {
        self != Self::None
    }
}

/// What a connection is counted under, as the hot path has it: references, compared by address.
#[derive(Clone, Copy)]
pub struct Traffic<'a> {
    /// Which end of it this node is.
    pub reporter: Direction,
    /// Who opened it.
    pub source: Option<&'a Arc<Workload>>,
    /// To whom.
    pub destination: Option<&'a Arc<Workload>>,
    /// The service that was dialled.
    pub service: Option<&'a Arc<Service>>,
    /// Who the other side is, where that is proved or demanded by mutual TLS; none in plaintext.
    pub peer: Option<&'a Identity>,
}

/// One side, as labels.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct PartyLabels {
    workload: Arc<str>,
    canonical_service: Arc<str>,
    canonical_revision: Arc<str>,
    namespace: Arc<str>,
    cluster: Arc<str>,
    region: Arc<str>,
    zone: Arc<str>,
}

impl From<&Arc<Workload>> for PartyLabels {
    fn from(workload: &Arc<Workload>) -> Self {
        Self {
            workload: match workload.workload_name.is_empty() {
                true => workload.name.clone(),
                false => workload.workload_name.clone(),
            },
            canonical_service: workload.canonical_name.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            namespace: workload.namespace.clone(),
            cluster: workload.cluster_id.clone(),
            region: workload.locality.region.clone(),
            zone: workload.locality.zone.clone(),
        }
    }
}

/// The labels of a series but for `response_flags`. Of a pod they have no more than its Deployment: a rollout makes no new
/// series.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Labels {
    pub reporter: Reporter,
    pub parties: Parties,
}

/// Which end reports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Reporter {
    Source,
    Destination,
}

/// Who talks to whom.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Parties {
    Known(Box<KnownParties>),
    /// What came when there were too many series: each label says so.
    Overflow,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct KnownParties {
    source: Option<PartyLabels>,
    source_principal: Option<Identity>,
    destination: Option<PartyLabels>,
    destination_principal: Option<Identity>,
    /// Host name, name and namespace.
    service: Option<(Arc<str>, Arc<str>, Arc<str>)>,
}

impl From<Direction> for Reporter {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Self::Source,
            Direction::Inbound => Self::Destination,
        }
    }
}

impl From<&Traffic<'_>> for Labels {
    fn from(traffic: &Traffic<'_>) -> Self {
        let peer = traffic.peer.cloned();
        let own = |workload: Option<&Arc<Workload>>| peer.as_ref().and(workload.map(|workload| workload.identity()));
        let (source_principal, destination_principal) = match traffic.reporter {
            Direction::Outbound => (own(traffic.source), peer.clone()),
            Direction::Inbound => (peer.clone(), own(traffic.destination)),
        };
        let service = traffic.service.map(|service| {
            (
                service.hostname.clone(),
                service.name.clone(),
                service.namespace.clone(),
            )
        });
        Self {
            reporter: traffic.reporter.into(),
            parties: Parties::Known(Box::new(KnownParties {
                source: traffic.source.map(PartyLabels::from),
                source_principal,
                destination: traffic.destination.map(PartyLabels::from),
                destination_principal,
                service,
            })),
        }
    }
}

/// Writes `(name, value)`; an empty value is `unknown`.
fn label(encoder: &mut LabelSetEncoder<'_>, names: [&str; 2], value: &dyn fmt::Display) -> fmt::Result {
    struct OrUnknown<'a, 'b>(&'a mut LabelValueEncoder<'b>, bool);
    impl fmt::Write for OrUnknown<'_, '_> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.1 |= !text.is_empty();
            self.0.write_str(text)
        }
    }
    let mut label = encoder.encode_label();
    let mut key = label.encode_label_key()?;
    names.iter().try_for_each(|part| key.write_str(part))?;
    let mut text = key.encode_label_value()?;
    let mut checked = OrUnknown(&mut text, false);
    write!(checked, "{value}")?;
    if !checked.1 {
        text.write_str("unknown")?;
    }
    text.finish()
}

/// A [`Labels`] with or without its flag, as it is written.
#[derive(Debug)]
pub(super) struct Written<'a>(pub &'a Labels, pub ResponseFlag);

impl EncodeLabelSet for Written<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let reporter = match self.0.reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        };
        label(encoder, ["", "reporter"], &reporter)?;
        let mutual_tls = match &self.0.parties {
            Parties::Known(known) => known.encode(encoder)?,
            Parties::Overflow => {
                overflowed(encoder)?;
                false
            }
        };
        label(encoder, ["", "request_protocol"], &"tcp")?;
        label(encoder, ["", "response_flags"], &self.1.as_str())?;
        let security = if mutual_tls { "mutual_tls" } else { "unknown" };
        label(encoder, ["", "connection_security_policy"], &security)
    }
}

const PARTY: [&str; 10] = [
    "workload",
    "canonical_service",
    "canonical_revision",
    "workload_namespace",
    "principal",
    "app",
    "version",
    "cluster",
    "region",
    "zone",
];
const SERVICE: [&str; 3] = ["service", "service_name", "service_namespace"];

impl KnownParties {
    /// Tells whether it is mutual TLS.
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<bool, fmt::Error> {
        party(encoder, "source_", self.source.as_ref(), self.source_principal.as_ref())?;
        let (destination, principal) = (self.destination.as_ref(), self.destination_principal.as_ref());
        party(encoder, "destination_", destination, principal)?;
        let texts = self
            .service
            .as_ref()
            .map_or([""; 3], |(host, name, namespace)| [host, name, namespace]);
        for (name, text) in SERVICE.into_iter().zip(texts) {
            label(encoder, ["destination_", name], &text)?;
        }
        Ok(self.source_principal.is_some() || self.destination_principal.is_some())
    }
}

fn party(
    encoder: &mut LabelSetEncoder<'_>,
    side: &str,
    party: Option<&PartyLabels>,
    principal: Option<&Identity>,
) -> fmt::Result {
    let text = |of: fn(&PartyLabels) -> &Arc<str>| party.map_or("", |party| &**of(party));
    let principal: &dyn fmt::Display = match &principal {
        Some(identity) => identity,
        None => &"",
    };
    let service = text(|party| &party.canonical_service);
    let revision = text(|party| &party.canonical_revision);
    let values: [&dyn fmt::Display; 10] = [
        &text(|party| &party.workload),
        &service,
        // As Istio has it, where nothing names a revision.
        &if party.is_some() && revision.is_empty() {
            "latest"
        } else {
            revision
        },
        &text(|party| &party.namespace),
        principal,
        &service,
        &revision,
        &text(|party| &party.cluster),
        &text(|party| &party.region),
        &text(|party| &party.zone),
    ];
    PARTY
        .iter()
        .zip(values)
        .try_for_each(|(name, value)| label(encoder, [side, name], value))
}

fn overflowed(encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
    for side in ["source_", "destination_"] {
        PARTY
            .iter()
            .try_for_each(|name| label(encoder, [side, name], &"overflow"))?;
    }
    SERVICE
        .iter()
        .try_for_each(|name| label(encoder, ["destination_", name], &"overflow"))
}
