//! What should be of a pod: whether it is in the mesh, and as whom. Decided, not done.
//!
//! Two oracles: a static file that names every pod of the mesh, by address, and only if name and node agree; or the
//! Kubernetes API, which vouches for a pod by its name and uid ([`ApiPod`], kept in the pod's record). A mix-up would give
//! a pod another's identity.

use std::sync::Arc;

use mesh::{Knowledge, Locals, Snapshot};
use model::{Identity, NetworkMode, PodSettings, TrustDomain, TunnelProtocol, Workload, WorkloadUid};

use super::super::{
    kube_source::{ApiPod, Cluster},
    records::PodRecord,
};

/// What should be of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// It is there, and nothing is done to it.
    Uncaptured(WorkloadUid),
    /// Its traffic goes through the mesh.
    Captured {
        uid: WorkloadUid,
        identity: Identity,
        settings: PodSettings,
    },
}

impl Expected {
    pub fn uid(&self) -> &WorkloadUid {
        match self {
            Self::Uncaptured(uid) | Self::Captured { uid, .. } => uid,
        }
    }
}

/// Why a pod is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It may come right by itself, soon: cmdadd waits for it.
    Waiting(String),
    /// It was tried.
    Failed(String),
}

impl Trouble {
    pub fn text(&self) -> &str {
        match self {
            Self::Waiting(text) | Self::Failed(text) => text,
        }
    }
}

/// Who says what should be.
pub enum Oracle {
    /// The mesh's knowledge itself names this node's pods.
    Mesh { node: Arc<str> },
    /// The Kubernetes API does.
    Cluster(PodsOfCluster),
}

/// This node's pods as the API has them, on their way into the mesh's knowledge.
pub struct PodsOfCluster {
    pub cluster: Cluster,
    /// Where the mesh is told of this node's own pods, before the control plane announces them.
    pub locals: Locals,
    pub cluster_id: Arc<str>,
    pub network: Arc<str>,
    pub trust_domain: TrustDomain,
    pub node: Arc<str>,
}

impl Oracle {
    /// What should be of the pod of this record, or why that is not known.
    pub fn expected(&self, record: &PodRecord, knowledge: &Knowledge) -> Result<Expected, Trouble> {
        let snapshot = knowledge.snapshot();
        match self {
            Self::Mesh { node } => of_mesh(record, &snapshot, node),
            Self::Cluster(pods) => pods.expected(record, &snapshot),
        }
    }

    /// The pod of this record as it is captured, whether it is to be or not; nothing where that is not known.
    pub fn captured(&self, record: &PodRecord, knowledge: &Knowledge) -> Option<Expected> {
        let Self::Cluster(pods) = self else { return None };
        let api = record.api.as_ref()?;
        Some(pods.captured(record, api, &knowledge.snapshot()))
    }

    /// What the API says of the pod of this record now, where that is something else than the record has.
    pub fn news(&self, record: &PodRecord) -> Option<ApiPod> {
        let Self::Cluster(pods) = self else { return None };
        let now = pods.cluster.pod(&record.pod)?;
        // Another uid: a successor, whose sandbox comes by another record.
        let same = record.api.as_ref().is_none_or(|then| then.uid == now.uid);
        (same && record.api.as_ref() != Some(&now)).then_some(now)
    }

    /// Whether the pod of this record is on its way out. Without an API nobody says so: it goes when it is gone.
    pub fn is_leaving(&self, record: &PodRecord) -> bool {
        match (self, &record.api) {
            (Self::Cluster(pods), Some(api)) => pods.cluster.is_leaving(&record.pod, &api.uid),
            _ => false,
        }
    }
}

fn of_mesh(record: &PodRecord, snapshot: &Snapshot, node: &Arc<str>) -> Result<Expected, Trouble> {
    let named = |workload: &&Arc<Workload>| {
        workload.namespace == record.pod.namespace && workload.name == record.pod.name && workload.node == *node
    };
    let workload = record
        .addresses
        .iter()
        .find_map(|ip| snapshot.workload_by_ip(*ip))
        .filter(named);
    let Some(workload) = workload else {
        return Err(Trouble::Failed(format!(
            "the mesh does not know a pod {} of this node with this address (yet)",
            record.pod
        )));
    };
    if !workload.is_captured() {
        return Ok(Expected::Uncaptured(workload.uid.clone()));
    }
    Ok(Expected::Captured {
        uid: workload.uid.clone(),
        identity: workload.identity(),
        settings: PodSettings {
            forbid_non_tcp: workload.non_tcp.is_forbidden(snapshot.settings().non_tcp),
            ..PodSettings::default()
        },
    })
}

impl PodsOfCluster {
    fn expected(&self, record: &PodRecord, snapshot: &Snapshot) -> Result<Expected, Trouble> {
        let Some(api) = &record.api else {
            let text = format!("the Kubernetes API does not know a pod {} (yet)", record.pod);
            return Err(Trouble::Waiting(text));
        };
        Ok(match api.in_mesh {
            true => self.captured(record, api, snapshot),
            false => Expected::Uncaptured(self.workload(record, api).uid),
        })
    }

    fn captured(&self, record: &PodRecord, api: &ApiPod, snapshot: &Snapshot) -> Expected {
        let workload = self.workload(record, api);
        Expected::Captured {
            identity: workload.identity(),
            uid: workload.uid,
            settings: PodSettings {
                forbid_non_tcp: api.non_tcp.is_forbidden(snapshot.settings().non_tcp),
                ..api.settings.clone()
            },
        }
    }

    /// The pod as the mesh is told of it before the control plane announces it.
    fn workload(&self, record: &PodRecord, api: &ApiPod) -> Workload {
        Workload {
            uid: WorkloadUid::of_pod(&self.cluster_id, &record.pod.namespace, &record.pod.name),
            name: record.pod.name.clone(),
            namespace: record.pod.namespace.clone(),
            trust_domain: self.trust_domain.clone(),
            service_account: api.service_account.clone(),
            workload_ips: record.addresses.clone(),
            protocol: if api.in_mesh {
                TunnelProtocol::Hbone
            } else {
                TunnelProtocol::None
            },
            network_mode: NetworkMode::Standard,
            node: self.node.clone(),
            canonical_name: record.pod.name.clone(),
            workload_name: record.pod.name.clone(),
            cluster_id: self.cluster_id.clone(),
            network: self.network.clone(),
            non_tcp: api.non_tcp,
            ..Workload::default()
        }
    }

    /// Tells the mesh of these pods, if it was told otherwise before.
    pub fn tell<'a>(&self, records: impl Iterator<Item = &'a PodRecord>) {
        let pods = records.filter_map(|record| Some(self.workload(record, record.api.as_ref()?)));
        let mut workloads: Vec<_> = pods.collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let told = self.locals.workloads();
        if !told.iter().map(|told| &**told).eq(&workloads) {
            self.locals.set(workloads);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::kube_source::Rules;
    use model::{NamespacedName, NonTcp};

    fn record(api: Option<ApiPod>) -> PodRecord {
        PodRecord {
            pod: NamespacedName::new("shop", "web"),
            netns: "/var/run/netns/x".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            container_id: String::new(),
            found: false,
            starting: false,
            captured: None,
            api,
        }
    }

    #[test]
    fn a_pod_of_another_name_or_node_is_not_taken_for_this_one() {
        let (mut writer, knowledge) = mesh::new();
        let workload = |name: &str, node: &str| Workload {
            uid: WorkloadUid::of_pod("c", "shop", name),
            name: name.into(),
            namespace: "shop".into(),
            workload_ips: vec!["10.0.0.1".parse().unwrap()],
            protocol: TunnelProtocol::Hbone,
            node: node.into(),
            ..Workload::default()
        };
        let oracle = Oracle::Mesh { node: "n1".into() };
        for (workload, known) in [
            (workload("web", "n1"), true),
            (workload("other", "n1"), false),
            (workload("web", "n2"), false),
        ] {
            let contents = mesh::Contents {
                workloads: vec![workload],
                ..mesh::Contents::default()
            };
            writer.replace(contents, &[]);
            let expected = oracle.expected(&record(None), &knowledge);
            assert_eq!(matches!(expected, Ok(Expected::Captured { .. })), known, "{expected:?}");
        }
    }

    #[tokio::test]
    async fn the_api_says_who_a_pod_is_and_the_mesh_is_told() {
        let (writer, knowledge) = mesh::new();
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let pods = PodsOfCluster {
            cluster: Cluster::new(kube::Client::try_from(config).unwrap(), "n1", Rules::default()),
            locals: writer.locals(),
            cluster_id: "c1".into(),
            network: "".into(),
            trust_domain: TrustDomain::default(),
            node: "n1".into(),
        };
        let api = ApiPod {
            uid: "u1".to_owned(),
            service_account: "checkout".into(),
            in_mesh: true,
            left_out: None,
            non_tcp: NonTcp::Forbid,
            settings: PodSettings::default(),
            problems: Vec::new(),
        };
        let record = record(Some(api.clone()));
        pods.tell(std::iter::once(&record));
        let generation = knowledge.snapshot().generation();
        pods.tell(std::iter::once(&record));
        assert_eq!(knowledge.snapshot().generation(), generation, "told twice");
        let oracle = Oracle::Cluster(pods);
        let uid = WorkloadUid::of_pod("c1", "shop", "web");
        assert_eq!(
            oracle.expected(&record, &knowledge),
            Ok(Expected::Captured {
                uid: uid.clone(),
                identity: "spiffe://cluster.local/ns/shop/sa/checkout".parse().unwrap(),
                settings: PodSettings {
                    forbid_non_tcp: true,
                    ..PodSettings::default()
                },
            })
        );
        let local = knowledge
            .snapshot()
            .workload_by_ip("10.0.0.1".parse().unwrap())
            .cloned();
        assert_eq!(local.unwrap().uid, uid);
        let mut out = record.clone();
        out.api = Some(ApiPod { in_mesh: false, ..api });
        assert_eq!(oracle.expected(&out, &knowledge), Ok(Expected::Uncaptured(uid)));
        out.api = None;
        assert!(matches!(oracle.expected(&out, &knowledge), Err(Trouble::Waiting(_))));
    }
}
