//! Which of a service's endpoints: of those nearest to the source, as the service says (`istio.workload.LoadBalancing`),
//! two are drawn, by their capacity, and the one with fewer of this process's connections for each unit of it is taken
//! (`the_less_loaded_of_two_is_taken_and_capacity_counts`). What is loaded and what failed is told ([`Experience`]); time
//! is not known here.
//!
//! An endpoint that failed lately is passed over, near or far, but not the last ones: where all failed, they are tried as
//! if none had (`who_failed_lately_is_passed_over_unless_all_did`).
//!
//! Alike and without preference, which is nearly always, costs the same however many endpoints there are.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use model::{
    HealthPolicy, LoadBalancing, LoadBalancingMode, NamespacedName, RoutingScope, Service, Workload, WorkloadUid,
};

use crate::{
    RefuseReason, Snapshot,
    endpoints::{EndpointList, Random},
};

/// What this process has learnt of endpoints by dialling them, which the mesh does not say.
pub trait Experience {
    /// How many connections of this process live there.
    fn load(&self, endpoint: &WorkloadUid) -> u32;

    /// Whether it failed so lately, at this address and port, that others go first.
    fn is_passed_over(&self, endpoint: &WorkloadUid, target: SocketAddr) -> bool;
}

/// Nothing was learnt: endpoints are alike.
#[derive(Clone, Copy, Debug)]
pub struct NoExperience;

impl Experience for NoExperience {
    fn load(&self, _: &WorkloadUid) -> u32 {
        0
    }

    fn is_passed_over(&self, _: &WorkloadUid, _: SocketAddr) -> bool {
        false
    }
}

/// One attempt of a connection to find its way.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    /// Picks among a service's endpoints.
    pub random: u64,
    /// These failed already: never again for this connection.
    pub tried: &'a [WorkloadUid],
    /// What is known of them beside what the mesh says.
    pub experience: &'a dyn Experience,
}

/// Rounds of drawing two before all are looked at.
const ROUNDS: usize = 4;

/// An endpoint, and where it is.
type Found<'a> = (&'a Arc<Workload>, SocketAddr);

/// The choice of an endpoint.
pub(crate) struct Choice<'a> {
    pub(crate) snapshot: &'a Snapshot,
    /// Who dials.
    pub(crate) source: &'a Workload,
    pub(crate) service: &'a Service,
    /// The service's key.
    pub(crate) key: NamespacedName,
    pub(crate) dialled: SocketAddr,
    pub(crate) attempt: Attempt<'a>,
}

impl<'a> Choice<'a> {
    /// An endpoint and where it is. The reason tells of an endpoint that could not be used, where one was the cause.
    pub(crate) fn choose(&self) -> Result<Found<'a>, RefuseReason> {
        let balancing = self.service.load_balancing.as_ref();
        let all_healths = balancing.is_some_and(|balancing| balancing.health_policy == HealthPolicy::AllowAll);
        let healthy = self.snapshot.endpoints(&self.key);
        let unhealthy = match all_healths {
            true => self.snapshot.unhealthy_endpoints(&self.key),
            false => EndpointList::EMPTY,
        };
        let preference = balancing
            .filter(|balancing| balancing.mode != LoadBalancingMode::Standard)
            .filter(|balancing| !balancing.routing_preference.is_empty());
        let mut random = Random::new(self.attempt.random);
        let alike = preference.is_none() && unhealthy.is_empty() && !healthy.is_uneven();
        if alike && let Some(found) = self.of_two(healthy, &mut random) {
            return Ok(found);
        }
        self.of_all(healthy.iter().chain(unhealthy.iter()), preference, &mut random)
    }

    /// The less loaded of two that are drawn; one alone, where the other can't be used or failed lately.
    fn of_two(&self, list: &'a EndpointList, random: &mut Random) -> Option<Found<'a>> {
        let usable = |workload: &'a Arc<Workload>| {
            let target = self.usable(workload).ok()??;
            Some((workload, target)).filter(|found| !self.is_passed_over(found))
        };
        for _ in 0..ROUNDS {
            match list.draw_two(random)?.map(usable) {
                [Some(first), Some(second)] => return Some(self.less_loaded(first, second)),
                [Some(found), None] | [None, Some(found)] => return Some(found),
                [None, None] => {}
            }
        }
        None
    }

    /// The same among all that can be used, by their shares, near ones first, and those that failed lately only where
    /// there is nobody else.
    fn of_all(
        &self,
        all: impl Iterator<Item = &'a Arc<Workload>>,
        preference: Option<&LoadBalancing>,
        random: &mut Random,
    ) -> Result<Found<'a>, RefuseReason> {
        let mut refusal = None;
        let mut usable = Vec::new();
        for workload in all {
            match self.usable(workload) {
                Ok(target) => usable.extend(target.map(|target| (workload, target))),
                Err(reason) => _ = refusal.get_or_insert(reason),
            }
        }
        let good = usable.iter().filter(|found| !self.is_passed_over(found)).copied();
        let mut best = self.preferred(good.collect(), preference);
        let elsewhere = usable.len();
        if best.is_empty() {
            best = self.preferred(usable, preference);
        }
        let found = weighted(&best, None, random).map(|first| match weighted(&best, Some(first), random) {
            Some(second) => self.less_loaded(first, second),
            None => first,
        });
        found.ok_or_else(|| {
            refusal.unwrap_or_else(|| match preference.filter(|_| elsewhere > 0) {
                Some(strict) => RefuseReason::NoneNear {
                    service: self.key.clone(),
                    shared: strict.routing_preference.clone(),
                    elsewhere,
                },
                None => RefuseReason::NoHealthyEndpoint(self.key.clone()),
            })
        })
    }

    /// Where an endpoint is, if it is one to try.
    fn usable(&self, workload: &Workload) -> Result<Option<SocketAddr>, RefuseReason> {
        if self.attempt.tried.contains(&workload.uid) {
            return Ok(None);
        }
        self.snapshot.reachable(workload)?;
        Ok(endpoint_address(workload, self.service, &self.key, self.dialled))
    }

    fn is_passed_over(&self, (workload, target): &Found<'_>) -> bool {
        self.attempt.experience.is_passed_over(&workload.uid, *target)
    }

    /// By load for each unit of capacity; of two that are alike the first.
    fn less_loaded(&self, first: Found<'a>, second: Found<'a>) -> Found<'a> {
        let load = |(workload, _): &Found<'_>| u64::from(self.attempt.experience.load(&workload.uid));
        let (of_first, of_second) = (load(&first), load(&second));
        match of_first * u64::from(second.0.capacity) <= of_second * u64::from(first.0.capacity) {
            true => first,
            false => second,
        }
    }

    /// Those that the service prefers for this source.
    fn preferred(&self, usable: Vec<Found<'a>>, balancing: Option<&LoadBalancing>) -> Vec<Found<'a>> {
        let Some(balancing) = balancing else { return usable };
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

/// One of these, by their shares, but for this one.
fn weighted<'a>(usable: &[Found<'a>], but: Option<Found<'a>>, random: &mut Random) -> Option<Found<'a>> {
    let is_in = |(workload, _): &&Found<'a>| but.is_none_or(|(other, _)| !Arc::ptr_eq(workload, other));
    let total: u64 = usable
        .iter()
        .filter(is_in)
        .map(|(workload, _)| u64::from(workload.capacity))
        .sum();
    let mut left = random.below(usize::try_from(total).ok()?)? as u64;
    let within = |(workload, _): &&Found<'a>| match left.checked_sub(workload.capacity.into()) {
        Some(rest) => {
            left = rest;
            false
        }
        None => true,
    };
    usable.iter().filter(is_in).find(within).copied()
}

/// Whether two workloads are in one region, zone…; a zone is one only within its region.
fn share(scope: RoutingScope, a: &Workload, b: &Workload) -> bool {
    let (x, y) = (&a.locality, &b.locality);
    match scope {
        RoutingScope::Region => x.region == y.region,
        RoutingScope::Zone => (&x.region, &x.zone) == (&y.region, &y.zone),
        RoutingScope::Subzone => x == y,
        // What runs on no node, outside Kubernetes, shares none.
        RoutingScope::Node => a.node == b.node && !a.node.is_empty(),
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
    use std::{cell::RefCell, collections::BTreeMap};

    use model::OriginalDst;

    use crate::{Route, static_file};

    use super::*;

    /// How often each endpoint is chosen, over many connections of a pod in region r, zone z.
    fn spread(endpoints: &str, service: &str) -> BTreeMap<String, u32> {
        spread_by(&NoExperience, endpoints, service, 600, |_| {})
    }

    /// What was counted, and who is passed over.
    #[derive(Default)]
    struct Told {
        loads: RefCell<BTreeMap<String, u32>>,
        passed_over: Vec<&'static str>,
    }

    impl Experience for Told {
        fn load(&self, endpoint: &WorkloadUid) -> u32 {
            self.loads.borrow().get(&*endpoint.0).copied().unwrap_or_default()
        }

        fn is_passed_over(&self, endpoint: &WorkloadUid, target: SocketAddr) -> bool {
            assert_eq!(target.port(), 80);
            self.passed_over.contains(&&*endpoint.0)
        }
    }

    fn spread_by(
        experience: &dyn Experience,
        endpoints: &str,
        service: &str,
        connections: u64,
        mut chosen: impl FnMut(&str),
    ) -> BTreeMap<String, u32> {
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
        for random in 0..connections {
            let dialled = OriginalDst("10.9.0.1:80".parse().unwrap());
            let attempt = Attempt {
                random,
                tried: &[],
                experience,
            };
            let to = match knowledge.snapshot().resolve_attempt(&source, dialled, attempt) {
                Route::Plaintext { workload, .. } => workload.uid.to_string(),
                Route::Refused { reason } => reason.to_string(),
                other => format!("{other:?}"),
            };
            chosen(&to);
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
    fn the_less_loaded_of_two_is_taken_and_capacity_counts() {
        // Two: the one with less, always.
        let told = Told::default();
        told.loads.borrow_mut().insert("a".into(), 1);
        let two = [endpoint("a", 1, ""), endpoint("b", 2, "")].concat();
        assert_eq!(spread_by(&told, &two, "", 600, |_| {}), counts([("b", 600)]));
        // Connections that live on: loads become even, and where capacities differ, even for each unit of them.
        for (endpoints, expected) in [
            (three("", "", ""), [200, 200, 200]),
            (three("capacity: 4", "capacity: 1", "capacity: 1"), [400, 100, 100]),
        ] {
            let told = Told::default();
            told.loads.borrow_mut().insert("a".into(), 50);
            let count = |uid: &str| *told.loads.borrow_mut().entry(uid.to_owned()).or_default() += 1;
            spread_by(&told, &endpoints, "", 550, count);
            let loads: Vec<u32> = told.loads.borrow().values().copied().collect();
            let near = loads
                .iter()
                .zip(expected)
                .all(|(load, expected)| load.abs_diff(expected) <= 3);
            assert!(near, "{loads:?}, not {expected:?}");
        }
    }

    #[test]
    fn who_failed_lately_is_passed_over_unless_all_did() {
        let told = |passed_over: &[&'static str]| Told {
            passed_over: passed_over.to_vec(),
            ..Told::default()
        };
        let strict = "loadBalancing: {routingPreference: [Zone], mode: Strict}";
        let failover = "loadBalancing: {routingPreference: [Zone], mode: Failover}";
        let spread = |who: &[&'static str], endpoints: &str, service: &str| {
            let counts = spread_by(&told(who), endpoints, service, 600, |_| {});
            counts.into_keys().collect::<String>()
        };
        let near = "locality: {region: r, zone: z}";
        for (alike, balancing) in [("", ""), ("capacity: 2", ""), (near, strict), (near, failover)] {
            let all = three(alike, alike, alike);
            for (who, expected) in [(&["b"][..], "ac"), (&["a", "b"], "c"), (&["a", "b", "c"], "abc")] {
                assert_eq!(spread(who, &all, balancing), expected, "{balancing}");
            }
        }
        // Near ones that failed yield to far ones; strictly they are tried, for nobody else may be.
        let places = three(near, near, "locality: {region: q, zone: z}");
        assert_eq!(spread(&["a", "b"], &places, failover), "c");
        assert_eq!(spread(&["a", "b"], &places, strict), "ab");
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
            counts([(
                "service n/h has no healthy endpoint on the source's region and zone, and strictly prefers that (3 elsewhere)",
                600
            )])
        );
        assert_eq!(spread(&places, &mode("Standard")).len(), 3);
    }
}
