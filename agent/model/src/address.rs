//! Addresses that must not be mixed up, and the `:authority` of a CONNECT.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

/// Where an application wanted to go, before capture changed it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalDst(pub SocketAddr);

/// The other end of a socket, as the socket tells it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PeerAddr(pub SocketAddr);

/// The address with a v4-mapped IPv6 form (`::ffff:a.b.c.d`, what a dual-stack socket reports) turned into IPv4.
pub fn canonical_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// [`canonical_ip`] for a socket address; scope and flow of a mapped address are dropped.
pub fn canonical_socket(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(canonical_ip(address.ip()), address.port())
}

/// The target of a CONNECT (RFC 9110, 9.3.6): an address or a host name, always with a port.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Authority {
    /// `10.0.0.1:80` or `[fd00::1]:80`.
    Address(SocketAddr),
    /// `reviews.default.svc.cluster.local:80`.
    Host(Arc<str>, u16),
}

/// Why a text is not an authority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not host:port")]
pub struct AuthorityError(pub String);

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::Address(canonical_socket(address)));
        }
        let error = || AuthorityError(text.chars().take(256).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        if !port.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(error());
        }
        let port = port.parse().map_err(|_| error())?;
        // `10.0.0.1:080` is no socket address to the standard library, and must not become a host of that name. IPv6
        // without brackets is nothing at all: where would the port begin?
        if let Ok(address) = host.parse::<Ipv4Addr>() {
            return Ok(Self::Address(SocketAddr::new(address.into(), port)));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '*');
        if host.is_empty() || host.len() > 253 || !host.chars().all(is_name) {
            return Err(error());
        }
        Ok(Self::Host(host.to_ascii_lowercase().into(), port))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_need_a_port() {
        assert_eq!(
            "10.0.0.1:80".parse(),
            Ok(Authority::Address("10.0.0.1:80".parse().unwrap()))
        );
        assert_eq!("[::1]:80".parse(), Ok(Authority::Address("[::1]:80".parse().unwrap())));
        assert_eq!(
            "[::ffff:10.0.0.1]:80".parse(),
            Ok(Authority::Address("10.0.0.1:80".parse().unwrap()))
        );
        assert_eq!(
            "10.0.0.1:080".parse(),
            Ok(Authority::Address("10.0.0.1:80".parse().unwrap()))
        );
        assert_eq!("A.b:80".parse(), Ok(Authority::Host("a.b".into(), 80)));
        for bad in [
            "", "10.0.0.1", "a.b", ":80", "a.b:", "a.b:+80", "a b:80", "a:99999", "::1:80", "a/b:80",
        ] {
            assert!(bad.parse::<Authority>().is_err(), "{bad}");
        }
    }
}
