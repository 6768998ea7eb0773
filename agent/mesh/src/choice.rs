//! Which of a service's endpoints: any that can be reached alike, or by their shares, or those nearest to the source,
//! as the service says (`istio.workload.LoadBalancing`).
//!
//! Alike and nothing to pass over, which is nearly always, costs the same however many endpoints there are.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use model::{
    HealthPolicy, LoadBalancing, LoadBalancingMode, NamespacedName, RoutingScope, Service, Workload, WorkloadUid,
};

use crate::{RefuseReason, Snapshot};

/// The choice of an endpoint.
pub(crate) struct Choice<'a> {
    pub(crate) snapshot: &'a Snapshot,
    /// Who dials.
    pub(crate) source: &'a Workload,
    pub(crate) service: &'a Service,
    /// The service's key.
    pub(crate) key: NamespacedName,
    pub(crate) dialled: SocketAddr,
    /// These failed already.
    pub(crate) tried: &'a [WorkloadUid],
}

impl<'a> Choice<'a> {
    /// An endpoint and where it is. The reason tells of an endpoint that could not be used, where one was the cause.
    pub(crate) fn choose(&self, random: u64) -> Result<(&'a Arc<Workload>, SocketAddr), RefuseReason> {
        let healthy = self.snapshot.endpoints(&self.key);
        let balancing = self.service.load_balancing.as_ref();
        let unhealthy = balancing
            .filter(|balancing| balancing.health_policy == HealthPolicy::AllowAll)
            .map(|_| self.snapshot.unhealthy_endpoints(&self.key));
        let preference = balancing
            .filter(|balancing| balancing.mode != LoadBalancingMode::Standard)
            .filter(|balancing| !balancing.routing_preference.is_empty());
        let (first, second) = (healthy.len(), unhealthy.map_or(0, |list| list.len()));
        if first + second == 0 {
            return Err(RefuseReason::NoHealthyEndpoint(self.key.clone()));
        }
        // From a random one on, so that the first that will do is as likely as any; seldom is it not the very first.
        let start = (random % (first + second) as u64) as usize;
        let all = healthy
            .iter_from(start.min(first))
            .chain(unhealthy.into_iter().flat_map(|list| list.iter()));
        let from_unhealthy = || {
            unhealthy
                .into_iter()
                .flat_map(move |list| list.iter_from(start - first))
        };
        let uneven = healthy.is_uneven() || unhealthy.is_some_and(|list| list.is_uneven());
        let mut refusal = None;
        let mut usable = |workload: &&'a Arc<Workload>| match self.usable(workload) {
            Ok(found) => found.map(|target| (*workload, target)),
            Err(reason) => {
                refusal.get_or_insert(reason);
                None
            }
        };
        let found = match preference {
            Some(preference) => {
                let usable: Vec<_> = all.filter_map(|workload| usable(&workload)).collect();
                weighted(&self.preferred(usable, preference), random)
            }
            None if uneven => weighted(
                &all.filter_map(|workload| usable(&workload)).collect::<Vec<_>>(),
                random,
            ),
            None if start < first => all.into_iter().find_map(|workload| usable(&workload)),
            None => from_unhealthy()
                .chain(healthy.iter())
                .find_map(|workload| usable(&workload)),
        };
        found.ok_or_else(|| refusal.unwrap_or_else(|| RefuseReason::NoHealthyEndpoint(self.key.clone())))
    }

    /// Where an endpoint is, if it is one to try.
    fn usable(&self, workload: &Workload) -> Result<Option<SocketAddr>, RefuseReason> {
        if self.tried.contains(&workload.uid) {
            return Ok(None);
        }
        self.snapshot.reachable(workload)?;
        Ok(endpoint_address(workload, self.service, &self.key, self.dialled))
    }

    /// Those that the service prefers for this source.
    fn preferred(
        &self,
        usable: Vec<(&'a Arc<Workload>, SocketAddr)>,
        balancing: &LoadBalancing,
    ) -> Vec<(&'a Arc<Workload>, SocketAddr)> {
        let scopes = &balancing.routing_preference;
        let shared = |workload: &Workload| {
            let shares = |scope: &&RoutingScope| share(**scope, self.source, workload);
            scopes.iter().take_while(shares).count()
        };
        let wanted = match balancing.mode {
            LoadBalancingMode::Strict => scopes.len(),
            _ => usable.iter().map(|(workload, _)| shared(workload)).max().unwrap_or(0),
        };
        usable
            .into_iter()
            .filter(|(workload, _)| shared(workload) == wanted)
            .collect()
    }
}

/// One of these, by their shares.
fn weighted<'a>(usable: &[(&'a Arc<Workload>, SocketAddr)], random: u64) -> Option<(&'a Arc<Workload>, SocketAddr)> {
    let total: u64 = usable.iter().map(|(workload, _)| u64::from(workload.capacity)).sum();
    let mut left = random.checked_rem(total)?;
    let within = |(workload, _): &&(&Arc<Workload>, SocketAddr)| match left.checked_sub(workload.capacity.into()) {
        Some(rest) => {
            left = rest;
            false
        }
        None => true,
    };
    usable.iter().find(within).copied()
}

/// Whether two workloads are in one region, zone…; a zone is one only within its region.
fn share(scope: RoutingScope, a: &Workload, b: &Workload) -> bool {
    let (x, y) = (&a.locality, &b.locality);
    match scope {
        RoutingScope::Region => x.region == y.region,
        RoutingScope::Zone => (&x.region, &x.zone) == (&y.region, &y.zone),
        RoutingScope::Subzone => x == y,
        RoutingScope::Node => a.node == b.node,
        RoutingScope::Cluster => a.cluster_id == b.cluster_id,
        RoutingScope::Network => a.network == b.network,
    }
}

/// The endpoint's own port map goes before the service's; its address of the family that was dialled goes first. The
/// unspecified address stands for its name, where it has no other.
fn endpoint_address(
    workload: &Workload,
    service: &Service,
    key: &NamespacedName,
    dialled: SocketAddr,
) -> Option<SocketAddr> {
    let ports = workload.services.get(key)?;
    let port = ports
        .get(&dialled.port())
        .or_else(|| service.ports.get(&dialled.port()));
    // 0: a named port that this endpoint does not have.
    let port = port.copied().filter(|port| *port != 0)?;
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == dialled.is_ipv4();
    let ip = workload
        .workload_ips
        .iter()
        .find(same_family)
        .or_else(|| workload.workload_ips.first())
        .copied()
        // One that has a name instead: that of any family will do.
        .or_else(|| (!workload.hostname.is_empty()).then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)))?;
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use model::OriginalDst;

    use crate::{Route, static_file};

    use super::*;

    /// How often each endpoint is chosen, over many connections of a pod in region r, zone z.
    fn spread(endpoints: &str, service: &str) -> BTreeMap<String, u32> {
        let file = format!(
            "workloads:\n{endpoints}services: [{{name: h, namespace: n, hostname: h, vips: [10.9.0.1], ports: {{80: \
             80}}, {service}}}]"
        );
        let (contents, rejected) = static_file::parse(&file).unwrap();
        assert!(rejected.is_empty(), "{rejected:?}");
        let (mut writer, knowledge) = crate::new();
        assert!(writer.replace(contents, &[]).is_empty());
        let source: Workload =
            serde_yaml_ng::from_str("{uid: s, name: s, namespace: n, locality: {region: r, zone: z}}").unwrap();
        let mut counts = BTreeMap::new();
        for random in 0..600 {
            let dialled = OriginalDst("10.9.0.1:80".parse().unwrap());
            let to = match knowledge.snapshot().resolve(&source, dialled, random, &[]) {
                Route::Plaintext { workload, .. } => workload.uid.to_string(),
                Route::Refused { reason } => reason.to_string(),
                other => format!("{other:?}"),
            };
            *counts.entry(to).or_default() += 1;
        }
        counts
    }

    fn endpoint(uid: &str, last: u8, more: &str) -> String {
        format!(
            "- {{uid: {uid}, name: {uid}, namespace: n, workloadIps: [10.0.0.{last}], services: {{n/h: {{}}}}, {more}}}\n"
        )
    }

    fn three(a: &str, b: &str, c: &str) -> String {
        [endpoint("a", 1, a), endpoint("b", 2, b), endpoint("c", 3, c)].concat()
    }

    fn counts<const N: usize>(expected: [(&str, u32); N]) -> BTreeMap<String, u32> {
        expected.map(|(uid, count)| (uid.to_owned(), count)).into()
    }

    #[test]
    fn endpoints_are_alike_unless_something_is_said() {
        assert_eq!(
            spread(&three("", "", ""), ""),
            counts([("a", 200), ("b", 200), ("c", 200)])
        );
        let sick = three("", "status: Unhealthy", "");
        assert_eq!(spread(&sick, ""), counts([("a", 300), ("c", 300)]));
        let all = "loadBalancing: {healthPolicy: AllowAll}";
        assert_eq!(spread(&sick, all), counts([("a", 200), ("b", 200), ("c", 200)]));
        let shares = three("capacity: 3", "capacity: 0", "capacity: 1");
        assert_eq!(spread(&shares, ""), counts([("a", 450), ("c", 150)]));
    }

    #[test]
    fn those_that_can_be_reached_stand_in_for_those_that_can_not() {
        let far = three("network: far", "", "network: far");
        assert_eq!(spread(&far, ""), counts([("b", 600)]));
    }

    #[test]
    fn nearer_endpoints_go_first_and_strictly_only_they() {
        let places = three(
            "locality: {region: r, zone: y}",
            "locality: {region: r, zone: z}",
            "locality: {region: q, zone: z}",
        );
        let mode = |mode: &str| format!("loadBalancing: {{routingPreference: [Region, Zone], mode: {mode}}}");
        assert_eq!(spread(&places, &mode("Failover")), counts([("b", 600)]));
        assert_eq!(spread(&places, &mode("Strict")), counts([("b", 600)]));
        let places = three("locality: {region: r, zone: y}", "", "locality: {region: q}");
        assert_eq!(spread(&places, &mode("Failover")), counts([("a", 600)]));
        assert_eq!(
            spread(&places, &mode("Strict")),
            counts([("service n/h has no healthy endpoint", 600)])
        );
        assert_eq!(spread(&places, &mode("Standard")).len(), 3);
    }
}
