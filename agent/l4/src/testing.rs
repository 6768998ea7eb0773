//! What this crate's tests share.

use model::Workload;

/// A workload with one address.
pub(crate) fn workload(name: &str, namespace: &str, ip: &str) -> Workload {
    Workload {
        uid: model::WorkloadUid::of_pod("Kubernetes", namespace, name),
        name: name.into(),
        namespace: namespace.into(),
        trust_domain: model::TrustDomain::default(),
        service_account: name.into(),
        workload_ips: vec![ip.parse().unwrap()],
        protocol: model::TunnelProtocol::Hbone,
        network_mode: model::NetworkMode::Standard,
        node: "node".into(),
        canonical_name: "".into(),
        canonical_revision: "".into(),
        workload_name: "".into(),
        workload_type: "pod".into(),
        cluster_id: "Kubernetes".into(),
        services: Default::default(),
        authorization_policies: Vec::new(),
        status: model::HealthStatus::Healthy,
        ..Workload::default()
    }
}
