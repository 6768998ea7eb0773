//! What can go wrong, in words that a person understands, and whose doing it is.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use identity::{PeerIdentityError, peer_identity_error};
use rustls::{AlertDescription, CertificateError};

/// Whose doing a failure is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Culprit {
    /// The other end of the tunnel.
    Peer,
    /// This process, or its configuration.
    Us,
    /// What lies between.
    Network,
}

/// Why no tunnel came of a TCP connection.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// It began like an HTTP/1 request.
    #[error("the peer speaks plain HTTP, not TLS")]
    PlainHttp,
    /// It did not begin like TLS.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// TLS 1.2 or older.
    #[error("the peer offers no TLS 1.3")]
    OldVersion,
    /// Another application protocol than `h2`.
    #[error("the peer does not offer HTTP/2 (ALPN h2)")]
    NotHttp2,
    /// No certificate came.
    #[error("the peer sent no certificate")]
    NoCertificate,
    /// The certificate is over.
    #[error("the peer's certificate expired {} ago", seconds(.0))]
    Expired(Duration),
    /// The certificate's time has not begun.
    #[error("the peer's certificate is not valid for another {}: are the clocks right?", seconds(.0))]
    NotYetValid(Duration),
    /// Signed by nobody we trust.
    #[error("the peer's certificate is not signed by an authority that we trust")]
    UnknownIssuer,
    /// No identity, several, another trust domain's, or another than the one that was dialled.
    #[error(transparent)]
    Identity(#[from] PeerIdentityError),
    /// The peer refused us.
    #[error("the peer refused the handshake: {0}")]
    Refused(Arc<str>),
    /// Anything else in TLS.
    #[error("TLS failed: {0}")]
    Tls(rustls::Error),
    /// Anything in HTTP/2's connection preface.
    #[error("HTTP/2 failed: {0}")]
    Http2(Arc<str>),
    /// The connection ended before.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// It took too long.
    #[error("the handshake was not finished in {0:?}")]
    Timeout(Duration),
    /// The socket failed.
    #[error("the connection failed during the handshake: {0}")]
    Io(Arc<io::Error>),
}

fn seconds(duration: &Duration) -> String {
    format!("{} s", duration.as_secs())
}

impl HandshakeError {
    /// From what rustls says, and the first bytes that the peer sent.
    pub(crate) fn from_tls(error: &rustls::Error, first_bytes: &[u8]) -> Self {
        use rustls::{Error, PeerIncompatible};
        if let Some(reason) = peer_identity_error(error) {
            return Self::Identity(reason.clone());
        }
        match error {
            Error::InvalidMessage(_) if is_http(first_bytes) => Self::PlainHttp,
            Error::InvalidMessage(_) if !is_tls(first_bytes) => Self::NotTls,
            Error::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::ServerDoesNotSupportTls12Or13,
            ) => Self::OldVersion,
            Error::NoApplicationProtocol => Self::NotHttp2,
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
                Self::Expired(Duration::from_secs(time.as_secs().saturating_sub(not_after.as_secs())))
            }
            Error::InvalidCertificate(CertificateError::Expired) => Self::Expired(Duration::ZERO),
            Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
                Self::NotYetValid(Duration::from_secs(not_before.as_secs().saturating_sub(time.as_secs())))
            }
            // The latter where another authority has the same name.
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                Self::UnknownIssuer
            }
            Error::AlertReceived(alert) => Self::Refused(describe(*alert).into()),
            other => Self::Tls(other.clone()),
        }
    }

    /// Whose doing it is.
    pub fn culprit(&self) -> Culprit {
        match self {
            Self::Refused(_) => Culprit::Us,
            Self::Closed | Self::Timeout(_) | Self::Io(_) => Culprit::Network,
            _ => Culprit::Peer,
        }
    }
}

fn is_http(bytes: &[u8]) -> bool {
    const METHODS: [&[u8]; 9] = [
        b"GET ",
        b"POST ",
        b"PUT ",
        b"HEAD ",
        b"DELETE ",
        b"OPTIONS ",
        b"PATCH ",
        b"CONNECT ",
        b"PRI * ",
    ];
    METHODS.iter().any(|method| {
        let length = method.len().min(bytes.len());
        length >= 3 && method[..length] == bytes[..length]
    })
}

/// A TLS record of a handshake or an alert.
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [21 | 22, 3, ..])
}

fn describe(alert: AlertDescription) -> String {
    let hint = match alert {
        AlertDescription::CertificateRequired => "it wants a certificate",
        AlertDescription::CertificateExpired => "our certificate is expired for it",
        AlertDescription::UnknownCA => "it does not trust our authority",
        AlertDescription::CertificateUnknown => "it does not accept our identity",
        AlertDescription::ProtocolVersion => "it speaks another version of TLS",
        AlertDescription::NoApplicationProtocol => "it does not speak HTTP/2",
        _ => "it sent an alert",
    };
    format!("{hint} ({alert:?})")
}

/// Why a tunnel that we accepted ended other than orderly.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// It never came to be.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The peer broke HTTP/2's rules, or was told off for it.
    #[error("HTTP/2 failed: {0}")]
    Http2(Arc<str>),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(Arc<str>),
    /// The peer no longer answers.
    #[error("the peer did not answer a PING in {0:?}")]
    Silent(Duration),
    /// It was told to end at once.
    #[error("the tunnel was cut by an immediate drain")]
    Drained,
}

impl TunnelError {
    /// From how h2 says that the connection ended, and what TLS had to say, of which h2 keeps only the text.
    pub(crate) fn new(error: &h2::Error, tls: Option<rustls::Error>) -> Self {
        match (tls, error.get_io()) {
            (Some(tls @ rustls::Error::AlertReceived(_)), _) => Self::Handshake(HandshakeError::from_tls(&tls, &[])),
            (_, Some(error)) => Self::Io(error.to_string().into()),
            (_, None) => Self::Http2(error.to_string().into()),
        }
    }

    /// Whose doing it is.
    pub fn culprit(&self) -> Culprit {
        match self {
            Self::Handshake(error) => error.culprit(),
            Self::Http2(_) => Culprit::Peer,
            Self::Io(_) | Self::Silent(_) => Culprit::Network,
            Self::Drained => Culprit::Us,
        }
    }
}

/// Why [`Pool::open`](crate::Pool::open) gave no stream.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No socket to dial with, in the pod's network namespace.
    #[error("cannot make a socket: {0}")]
    Socket(Arc<io::Error>),
    /// The TCP connection of the tunnel was refused, or failed.
    #[error("cannot connect to {address}: {source}{}", dial_hint(source))]
    Dial {
        /// Whom we dialled.
        address: SocketAddr,
        /// What the kernel said.
        source: Arc<io::Error>,
    },
    /// No answer to the TCP connection.
    #[error("no answer from {address} in {after:?}: does a NetworkPolicy block HBONE's port {}?", .address.port())]
    ConnectTimeout {
        /// Whom we dialled.
        address: SocketAddr,
        /// For how long.
        after: Duration,
    },
    /// No tunnel came of it.
    #[error("no tunnel to {address}: {source}")]
    Handshake {
        /// Whom we dialled.
        address: SocketAddr,
        /// Why.
        source: HandshakeError,
    },
    /// The peer answered with another status than 200.
    #[error("the peer refused: {status}{}", why_refused(*.status, .reason.as_deref()))]
    Refused {
        /// 400 bad target, 401 denied by policy, 503 no connection to the application, or not known whether it may be.
        status: u16,
        /// In the peer's words, which our own peers give where it was not allowed.
        reason: Option<Arc<str>>,
    },
    /// The peer reset the stream.
    #[error("the peer reset the request ({reason})")]
    Reset {
        /// HTTP/2's name for why.
        reason: Arc<str>,
    },
    /// The tunnel ended before the answer.
    #[error("the tunnel to {address} broke before the answer: {reason}")]
    TunnelClosed {
        /// Its peer.
        address: SocketAddr,
        /// Why.
        reason: Arc<str>,
    },
    /// No answer to the CONNECT.
    #[error("no answer to the CONNECT in {0:?}")]
    ResponseTimeout(Duration),
    /// The request cannot be written: a header value with control characters in it.
    #[error("the request cannot be sent: {0}")]
    Request(Arc<str>),
    /// The pool takes no more streams.
    #[error("draining")]
    Draining,
}

fn dial_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            "; no port is left to dial it from: net.ipv4.ip_local_port_range of the pod has no more, and each tunnel to the \
             same address takes one"
        }
        io::ErrorKind::ConnectionRefused => "; nobody listens there: does the agent of that pod's node run?",
        _ => "",
    }
}

fn why_refused(status: u16, reason: Option<&str>) -> String {
    let why = match (reason, status) {
        (Some(reason), _) => reason,
        (None, 400) => "it does not serve this target",
        (None, 401 | 403) => "denied by its policy",
        (None, 503) => "it cannot reach the application",
        (None, _) => return String::new(),
    };
    format!(" ({why})")
}

impl OpenError {
    /// Whether another endpoint, or the same one later, may do.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Refused { status, .. } => *status == 503,
            Self::Socket(_) | Self::Request(_) | Self::Draining => false,
            // Whoever answers there may not be who is meant.
            Self::Handshake { source, .. } => source.culprit() != Culprit::Us,
            Self::Dial { .. }
            | Self::ConnectTimeout { .. }
            | Self::Reset { .. }
            | Self::TunnelClosed { .. }
            | Self::ResponseTimeout(_) => true,
        }
    }

    /// Whose doing it is.
    pub fn culprit(&self) -> Culprit {
        match self {
            Self::Refused { .. } | Self::Reset { .. } | Self::ResponseTimeout(_) => Culprit::Peer,
            Self::Dial { .. } | Self::ConnectTimeout { .. } | Self::TunnelClosed { .. } => Culprit::Network,
            Self::Handshake { source, .. } => source.culprit(),
            Self::Socket(_) | Self::Request(_) | Self::Draining => Culprit::Us,
        }
    }
}

/// Why a relay ended other than by both sides' clean end. Both sides saw a reset, but where it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// The application reset its connection. If it had closed before, the peer may have had a clean end all the same.
    #[error("the application reset the connection")]
    ApplicationReset,
    /// The application's socket failed otherwise.
    #[error("the application's connection failed: {0}")]
    ApplicationIo(io::ErrorKind),
    /// The peer reset the stream.
    #[error("the peer reset the stream ({})", h2::Reason::from(*.code).description())]
    PeerReset {
        /// HTTP/2's error code; `CONNECT_ERROR` (10) where its application's connection was reset.
        code: u32,
    },
    /// The tunnel broke.
    #[error("the tunnel broke: {0}")]
    TunnelClosed(Arc<str>),
    /// [`Live::cut`](crate::Live::cut) was called, or the relay was dropped.
    #[error("the connection was cut")]
    Cut,
}

impl RelayError {
    pub(crate) fn from_h2(error: &h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::PeerReset { code: reason.into() },
            _ => Self::TunnelClosed(error.to_string().into()),
        }
    }

    pub(crate) fn from_application(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected => Self::ApplicationReset,
            kind => Self::ApplicationIo(kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dial_that_failed_says_what_to_look_at() {
        let dial = |kind: io::ErrorKind| {
            let address = "10.0.0.1:15008".parse().unwrap();
            let source = Arc::new(kind.into());
            OpenError::Dial { address, source }.to_string()
        };
        assert!(dial(io::ErrorKind::AddrNotAvailable).contains("ip_local_port_range"));
        assert!(dial(io::ErrorKind::ConnectionRefused).contains("does the agent of that pod's node run?"));
        assert_eq!(
            dial(io::ErrorKind::NetworkUnreachable),
            "cannot connect to 10.0.0.1:15008: network unreachable"
        );
    }
}
