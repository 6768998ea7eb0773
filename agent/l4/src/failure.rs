//! Why a connection did not come to be, or was ended by other than its two ends. The texts name culprit and cause, since
//! they stand in the access log.

use std::{io, net::SocketAddr};

use mesh::RefuseReason;
use model::{Authority, Identity, WorkloadUid};
use policy::Reason;
use telemetry::ResponseFlag;

use crate::{
    descriptors::{OutOfDescriptors, are_exhausted},
    lookup::LookupError,
    relay::{End, RelayError},
    socket::ConnectError,
};

/// Why a connection did not come to be, or was ended by other than its two ends.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Nobody captured it: the capture port itself was dialled.
    #[error("the client dialled the capture port itself: refused, since it has no original destination")]
    NotCaptured,
    /// It would come back to this proxy.
    #[error("the client dialled {0}, a port of the mesh's own proxy: refused, since it would go round in circles")]
    Loop(SocketAddr),
    /// The pod is not (or no longer) known.
    #[error("nothing is known of workload {0} (yet): refused, since it might have to be encrypted or denied")]
    UnknownWorkload(WorkloadUid),
    /// There is no way to the destination.
    #[error("no way to the destination: {0}")]
    NoRoute(RefuseReason),
    /// The pod has no certificate.
    #[error("no certificate for the pod: {0}")]
    NoCredentials(String),
    /// A policy denied it.
    #[error("connection closed due to policy rejection: {0}")]
    Denied(Reason),
    /// It was allowed once.
    #[error("closed: no longer allowed: {0}")]
    NoLongerAllowed(Reason),
    /// The peer's certificate chains to no root that is trusted now.
    #[error("closed: {0} proved itself under a root that is no longer trusted")]
    NoLongerTrusted(String),
    /// The pod is not who it was when the connection began.
    #[error("closed: the pod was {was} when the connection began and is {now} now")]
    OtherIdentity {
        /// Who it was.
        was: Identity,
        /// Who it is.
        now: Identity,
    },
    /// The registry named its destination once.
    #[error("closed: no longer in the registry: {0}")]
    NoLongerRegistered(RefuseReason),
    /// The destination could not be connected to.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// The destination has only a name, and nobody knows its address.
    #[error("{0}")]
    Lookup(#[from] LookupError),
    /// The tunnel to the peer did not come to be.
    #[error("{0}")]
    Open(#[from] hbone::OpenError),
    /// A peer's tunnel failed.
    #[error("{0}")]
    Tunnel(#[from] hbone::TunnelError),
    /// The CONNECT can't be read.
    #[error("the peer's CONNECT is malformed: {0}")]
    BadRequest(String),
    /// The CONNECT is for somebody else.
    #[error("the peer asked for {asked}, which is not this pod ({own})")]
    NotThisPod {
        /// What it asked for.
        asked: Authority,
        /// The address it asked at.
        own: SocketAddr,
    },
    /// The CONNECT is for a port that this pod does not have.
    #[error("the peer asked for {0}, which this pod does not serve")]
    NotServed(Authority),
    /// The CONNECT is for something that is not behind this waypoint.
    #[error(
        "the peer asked this waypoint for {0}, which is not behind it as far as is known here: refused, since it would be \
         reached with the waypoint's identity"
    )]
    NotBehind(Authority),
    /// A waypoint that the agent can't hand anything to.
    #[error(
        "the peer asked this waypoint for {0}: its pod is captured, so it has to speak HBONE itself \
         (networking.istio.io/tunnel: http, outside the mesh) or its Gateway has to say where it takes a PROXY header \
         (ambient.istio.io/waypoint-inbound-binding)"
    )]
    NoBinding(Authority),
    /// Plaintext for the port that believes what a header says.
    #[error("{0} takes PROXY headers from the mesh alone: refused, since whoever reaches it could claim any identity")]
    ProxyPort(SocketAddr),
    /// One end of the relay failed.
    #[error("{0}")]
    Relay(String),
    /// One end reset it.
    #[error("reset by the {0}")]
    Reset(&'static str),
    /// The relay between application and tunnel failed.
    #[error("{0}")]
    Stream(hbone::RelayError),
    /// The peer no longer wants an answer.
    #[error("the peer gave the request up before it was answered")]
    GivenUp,
    /// The pod is gone.
    #[error("closed: the pod was removed from the proxy")]
    PodRemoved,
    /// The proxy ends.
    #[error("closed: the proxy is shutting down and its time to drain is over")]
    Drained,
    /// Connections have all the descriptors that they may.
    #[error("refused: {0}")]
    Exhausted(#[from] OutOfDescriptors),
    /// Our bug.
    #[error("closed: the proxy failed (a bug; its log has the backtrace)")]
    Panicked,
}

/// What kind of failure it was, for counters: few, fixed names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureKind {
    /// By policy.
    Denied,
    /// By policy, while it was live.
    NoLongerAllowed,
    /// Not captured, or a loop.
    Misdirected,
    /// Nothing known, or no way.
    NoRoute,
    /// No certificate, or another identity than at the beginning.
    Identity,
    /// The destination could not be connected to.
    Connect,
    /// The tunnel did not come to be or failed.
    Tunnel,
    /// The peer's request is not one for this pod.
    BadRequest,
    /// The agent is out of file descriptors, or the pod out of ports.
    Exhausted,
    /// Reset by one end.
    Reset,
    /// Ended by this proxy: pod removed, drained.
    Ended,
    /// Our bug.
    Panicked,
}

impl FailureKind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Denied,
        Self::NoLongerAllowed,
        Self::Misdirected,
        Self::NoRoute,
        Self::Identity,
        Self::Connect,
        Self::Tunnel,
        Self::BadRequest,
        Self::Exhausted,
        Self::Reset,
        Self::Ended,
        Self::Panicked,
    ];

    /// Its name in metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::NoLongerAllowed => "no_longer_allowed",
            Self::Misdirected => "misdirected",
            Self::NoRoute => "no_route",
            Self::Identity => "identity",
            Self::Connect => "connect",
            Self::Tunnel => "tunnel",
            Self::BadRequest => "bad_request",
            Self::Exhausted => "exhausted",
            Self::Reset => "reset",
            Self::Ended => "ended",
            Self::Panicked => "panicked",
        }
    }
}

impl Failure {
    /// Its kind.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::NotCaptured | Self::Loop(_) => FailureKind::Misdirected,
            Self::UnknownWorkload(_) | Self::NoRoute(_) => FailureKind::NoRoute,
            Self::NoCredentials(_) | Self::OtherIdentity { .. } | Self::NoLongerTrusted(_) => FailureKind::Identity,
            Self::Denied(_) => FailureKind::Denied,
            Self::NoLongerAllowed(_) | Self::NoLongerRegistered(_) => FailureKind::NoLongerAllowed,
            failure if failure.is_exhaustion() => FailureKind::Exhausted,
            Self::Connect(_) | Self::Lookup(_) => FailureKind::Connect,
            Self::Open(_) | Self::Tunnel(_) | Self::Relay(_) => FailureKind::Tunnel,
            Self::BadRequest(_)
            | Self::NotThisPod { .. }
            | Self::NotServed(_)
            | Self::NotBehind(_)
            | Self::NoBinding(_)
            | Self::ProxyPort(_) => FailureKind::BadRequest,
            Self::Reset(_) | Self::GivenUp => FailureKind::Reset,
            Self::Stream(hbone::RelayError::ApplicationReset | hbone::RelayError::PeerReset { .. }) => {
                FailureKind::Reset
            }
            Self::Stream(_) => FailureKind::Tunnel,
            Self::PodRemoved | Self::Drained => FailureKind::Ended,
            Self::Exhausted(_) => FailureKind::Exhausted,
            Self::Panicked => FailureKind::Panicked,
        }
    }

    /// How the connection ended, as metrics and log say it in a word. A reset by one of its ends is an end like another.
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoRoute(RefuseReason::NoHealthyEndpoint(_) | RefuseReason::NoneNear { .. }) => {
                ResponseFlag::NoHealthyUpstream
            }
            Self::Open(hbone::OpenError::ConnectTimeout { .. }) => ResponseFlag::NetworkPolicy,
            Self::Open(hbone::OpenError::Handshake { source, .. }) => flag_of_handshake(source),
            Self::Open(hbone::OpenError::Refused { status: 401 | 403, .. }) => ResponseFlag::Deny,
            Self::Open(_) => ResponseFlag::Connect,
            Self::Tunnel(hbone::TunnelError::Handshake(source)) => flag_of_handshake(source),
            Self::GivenUp => ResponseFlag::DownstreamTermination,
            failure => match failure.kind() {
                FailureKind::Denied | FailureKind::NoLongerAllowed => ResponseFlag::Deny,
                FailureKind::Misdirected | FailureKind::NoRoute => ResponseFlag::NoRoute,
                FailureKind::Identity => ResponseFlag::IdentityError,
                FailureKind::Connect => ResponseFlag::Connect,
                FailureKind::Tunnel => ResponseFlag::UpstreamTermination,
                FailureKind::BadRequest => ResponseFlag::DownstreamProtocolError,
                FailureKind::Reset => ResponseFlag::None,
                FailureKind::Exhausted | FailureKind::Ended | FailureKind::Panicked => ResponseFlag::LocalReset,
            },
        }
    }

    /// Whether the agent had no descriptor left, or the pod no port: then nobody else is to blame.
    pub(crate) fn is_exhaustion(&self) -> bool {
        match self {
            Self::Exhausted(_) | Self::Connect(ConnectError::NoPort { .. }) => true,
            Self::Connect(ConnectError::Socket(error)) => are_exhausted(error),
            Self::Open(hbone::OpenError::Socket(error)) => are_exhausted(error),
            Self::Open(hbone::OpenError::Dial { source, .. }) => source.kind() == io::ErrorKind::AddrNotAvailable,
            _ => false,
        }
    }

    /// What decided, where it was a policy.
    pub(crate) fn rule(&self) -> Option<&Reason> {
        match self {
            Self::Denied(reason) | Self::NoLongerAllowed(reason) => Some(reason),
            _ => None,
        }
    }

    /// Whether the connection never came to be.
    pub(crate) fn is_refusal(&self) -> bool {
        !matches!(
            self,
            Self::NoLongerAllowed(_)
                | Self::OtherIdentity { .. }
                | Self::NoLongerTrusted(_)
                | Self::NoLongerRegistered(_)
                | Self::Relay(_)
                | Self::Reset(_)
                | Self::Stream(_)
                | Self::GivenUp
                | Self::PodRemoved
                | Self::Drained
        )
    }

    /// A stream's failure; `None` if it was told to stop.
    pub(crate) fn of_stream(error: hbone::RelayError) -> Option<Self> {
        match error {
            hbone::RelayError::Cut => None,
            error => Some(Self::Stream(error)),
        }
    }

    /// A plain relay's failure; `None` if it was told to stop, and then whoever told it has the reason.
    pub(crate) fn of_relay(error: RelayError) -> Option<Self> {
        let name = |end| match end {
            End::Client => "client",
            End::Server => "server",
        };
        match error {
            RelayError::Reset(end) => Some(Self::Reset(name(end))),
            RelayError::Io(end, error) => Some(Self::Relay(format!("the {}'s socket failed: {error}", name(end)))),
            RelayError::Cut => None,
        }
    }
}

fn flag_of_handshake(error: &hbone::HandshakeError) -> ResponseFlag {
    match error {
        hbone::HandshakeError::Http2(_) | hbone::HandshakeError::NotHttp2 => ResponseFlag::H2HandshakeFailure,
        _ => ResponseFlag::TlsFailure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lack_of_descriptors_and_of_ports_is_told_apart_from_what_others_did() {
        let target: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let os = io::Error::from_raw_os_error;
        let dial = |number| hbone::OpenError::Dial {
            address: target,
            source: os(number).into(),
        };
        let (emfile, refused, no_port) = (nix::libc::EMFILE, nix::libc::ECONNREFUSED, nix::libc::EADDRNOTAVAIL);
        let source = os(no_port);
        let lacks: [Failure; 4] = [
            ConnectError::Socket(os(emfile)).into(),
            ConnectError::NoPort { target, source }.into(),
            hbone::OpenError::Socket(os(emfile).into()).into(),
            dial(no_port).into(),
        ];
        for failure in lacks {
            assert_eq!(failure.kind(), FailureKind::Exhausted, "{failure}");
        }
        let source = os(refused);
        assert_eq!(
            Failure::from(ConnectError::Refused { target, source }).kind(),
            FailureKind::Connect
        );
        assert_eq!(Failure::from(dial(refused)).kind(), FailureKind::Tunnel);
    }
}
