//! Workloads that have no address but a name: looked up, then tried address by address.
//!
//! ```text
//! Route::Named ─► Lookup::addresses ─► of the dialled family first, ADDRESSES at most ─► each: the way there, connect
//! ```
//! An address that is the mesh's own is reached as the mesh says, through its tunnel or not at all: that the answer of
//! a DNS server names a pod is no way around encryption (`a_name_that_leads_into_the_mesh_goes_as_the_mesh_says`). All
//! addresses share one connect timeout, so that the first of several that does not answer leaves time for the others
//! (`a_name_with_a_dead_address_is_reached_by_the_next`). A failure names the host and who was asked. Knows nothing of
//! DNS: [`Lookup`] does, and bounds what it keeps and how long it asks.

use std::{fmt, net::IpAddr, pin::Pin, sync::Arc};

/// Addresses of a name that are tried.
pub(crate) const ADDRESSES: usize = 4;

/// The answer to a question for a name.
pub type Answer = Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, LookupError>> + Send>>;

/// Who knows the addresses of names that are not the mesh's own.
pub trait Lookup: fmt::Debug + Send + Sync + 'static {
    /// The addresses of a fully qualified name, both families, in no order; never none.
    fn addresses(&self, host: &Arc<str>) -> Answer;
}

/// Why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name {host} could not be looked up ({resolver}): {reason}")]
pub struct LookupError {
    /// The name.
    pub host: Arc<str>,
    /// Who was asked, such as `10.96.0.10, of /etc/resolv.conf`.
    pub resolver: Arc<str>,
    /// What became of it.
    pub reason: String,
}

/// Knows no name.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLookup;

impl Lookup for NoLookup {
    fn addresses(&self, host: &Arc<str>) -> Answer {
        let error = LookupError {
            host: host.clone(),
            resolver: "none".into(),
            reason: "this proxy was given no resolver".to_owned(),
        };
        Box::pin(std::future::ready(Err(error)))
    }
}

/// Which addresses are tried, in their order: those of the family that was dialled first, then as they came.
pub(crate) fn in_turn(mut addresses: Vec<IpAddr>, v4_first: bool) -> Vec<IpAddr> {
    addresses.iter_mut().for_each(|ip| *ip = ip.to_canonical());
    addresses.retain(|ip| !ip.is_unspecified() && !ip.is_multicast());
    let mut tried = Vec::with_capacity(ADDRESSES);
    let (first, second): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|ip| ip.is_ipv4() == v4_first);
    for ip in first.into_iter().chain(second) {
        if tried.len() < ADDRESSES && !tried.contains(&ip) {
            tried.push(ip);
        }
    }
    tried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dialled_family_goes_first_and_few_are_tried() {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let all = ips(&[
            "fd00::1",
            "10.0.0.1",
            "::ffff:10.0.0.1",
            "0.0.0.0",
            "10.0.0.2",
            "ff02::1",
        ]);
        assert_eq!(in_turn(all.clone(), true), ips(&["10.0.0.1", "10.0.0.2", "fd00::1"]));
        assert_eq!(in_turn(all, false), ips(&["fd00::1", "10.0.0.1", "10.0.0.2"]));
        let many = (1..=9).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        assert_eq!(in_turn(many, true).len(), ADDRESSES);
    }
}
