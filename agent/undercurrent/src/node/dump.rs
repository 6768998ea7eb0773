//! What the agent knows, as JSON for people and for `istioctl ztunnel-config`: ztunnel's keys, and ours beside them. No
//! private key and no token is among it (`a_dump_has_no_secret` in the scenarios).

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

use admin::Listing;
use mesh::Snapshot;
use model::{NamespacedName, Workload, WorkloadUid};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::pods::PodView;

/// Every workload.
pub fn workloads(snapshot: &Arc<Snapshot>) -> Listing {
    let uids: Vec<_> = snapshot.workloads().map(|workload| workload.uid.clone()).collect();
    let snapshot = snapshot.clone();
    let one = move |uid: WorkloadUid| snapshot.workload(&uid).map(|workload| value(&**workload));
    Listing::Values(Box::new(uids.into_iter().filter_map(one)))
}

/// Every service, each with its endpoints.
pub fn services(snapshot: &Arc<Snapshot>) -> Listing {
    let mut keys: Vec<_> = snapshot.services().map(|service| service.key()).collect();
    keys.sort();
    let snapshot = snapshot.clone();
    Listing::Values(Box::new(
        keys.into_iter().filter_map(move |key| service(&snapshot, &key)),
    ))
}

fn service(snapshot: &Snapshot, key: &NamespacedName) -> Option<Value> {
    let service = snapshot.service(key)?;
    let mut shown = value(&**service);
    let healthy = snapshot.endpoints(key).iter().map(|workload| (workload, "Healthy"));
    let unhealthy = snapshot
        .unhealthy_endpoints(key)
        .iter()
        .map(|workload| (workload, "Unhealthy"));
    let endpoint = |(workload, status): (&Arc<Workload>, &str)| {
        let ports = workload.services.get(key);
        let endpoint =
            json!({"workloadUid": workload.uid, "service": key.to_string(), "port": ports, "status": status});
        (workload.uid.to_string(), endpoint)
    };
    let endpoints: serde_json::Map<_, _> = healthy.chain(unhealthy).map(endpoint).collect();
    shown.as_object_mut()?.insert("endpoints".to_owned(), endpoints.into());
    Some(shown)
}

/// Every policy.
pub fn policies(snapshot: &Arc<Snapshot>) -> Listing {
    let mut policies: Vec<_> = snapshot.policies().cloned().collect();
    policies.sort_by_key(|policy| policy.key());
    Listing::Values(Box::new(policies.into_iter().map(|policy| value(&*policy))))
}

/// Every certificate: what is public of it.
pub fn certificates(identities: &identity::Identities) -> Listing {
    let list = identities.list();
    Listing::Values(Box::new(list.into_iter().map(|info| {
        let now = SystemTime::now();
        let state = match &info.held {
            Some((_, _, not_after)) if *not_after > now => "Available",
            Some(_) => "Expired",
            None if info.last_error.is_some() => "Unavailable",
            None => "Initializing",
        };
        let chain = info.held.iter().map(|(serial, from, until)| {
            json!({"serialNumber": serial, "validFrom": date(*from), "expirationTime": date(*until)})
        });
        json!({
            "identity": info.identity.to_string(),
            "state": state,
            "certChain": chain.collect::<Vec<_>>(),
            "nextFetch": date(info.next_fetch),
            "lastError": info.last_error.as_ref().map(ToString::to_string),
        })
    })))
}

/// Live connections.
pub fn connections(connections: Vec<l4::ConnectionInfo>) -> Listing {
    Listing::Values(Box::new(
        connections.into_iter().map(|connection| self::connection(&connection)),
    ))
}

fn connection(connection: &l4::ConnectionInfo) -> Value {
    json!({
        "pod": connection.pod,
        "direction": connection.direction.as_str(),
        "source": connection.source,
        "sourceWorkload": connection.source_workload,
        "destination": connection.destination,
        "destinationWorkload": connection.destination_workload,
        "hboneTarget": connection.hbone_target,
        "service": connection.service,
        "peer": connection.peer.as_ref().map(ToString::to_string),
        "established": connection.established,
        "bytesSent": connection.sent,
        "bytesReceived": connection.received,
        "ageSeconds": connection.age.as_secs(),
        "rule": connection.rule,
        "traceId": connection.trace.map(|trace| trace.to_string()),
        "shard": connection.shard,
    })
}

/// The node's pods with their connections, as ztunnel's `workloadState`.
pub fn workload_state(pods: Vec<PodView>, connections: Vec<l4::ConnectionInfo>) -> Listing {
    let mut of_pod: BTreeMap<WorkloadUid, [Vec<Value>; 2]> = BTreeMap::new();
    for connection in connections {
        let protocol = if connection.peer.is_some() { "HBONE" } else { "TCP" };
        let shown = json!({
            "src": connection.source,
            "originalDst": connection.hbone_target.or(connection.destination),
            "actualDst": connection.destination,
            "protocol": protocol,
        });
        let side = usize::from(connection.direction == telemetry::Direction::Outbound);
        of_pod.entry(connection.pod).or_default()[side].push(shown);
    }
    let gone: HashSet<_> = pods.iter().map(|pod| pod.uid.clone()).collect();
    let retired = of_pod
        .keys()
        .filter(|uid| !gone.contains(*uid))
        .cloned()
        .collect::<Vec<_>>();
    let mut entries: Vec<_> = Vec::with_capacity(pods.len() + retired.len());
    for pod in pods {
        let [inbound, outbound] = of_pod.remove(&pod.uid).unwrap_or_default();
        let account = pod.identity.as_ref().map(|identity| identity.service_account.clone());
        let domain = pod.identity.as_ref().map(|identity| identity.trust_domain.to_string());
        let state = json!({
            "state": if pod.captured { "Up" } else { "Pending" },
            "problem": pod.problem,
            "connections": {"inbound": inbound, "outbound": outbound},
            "info": {"name": pod.pod.name, "namespace": pod.pod.namespace, "serviceAccount": account,
                     "trustDomain": domain},
        });
        entries.push((pod.uid.to_string(), state));
    }
    for uid in retired {
        let [inbound, outbound] = of_pod.remove(&uid).unwrap_or_default();
        let state = json!({"state": "Draining", "connections": {"inbound": inbound, "outbound": outbound}});
        entries.push((uid.to_string(), state));
    }
    Listing::Entries(Box::new(entries.into_iter()))
}

fn value(object: &impl serde::Serialize) -> Value {
    // Plain data of strings, numbers and lists: it can always be written.
    serde_json::to_value(object).unwrap_or_default()
}

fn date(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}
