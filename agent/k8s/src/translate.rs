//! Objects to model: workloads with the services and policies that are theirs, once it is known where everything runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use model::{
    HealthStatus, MeshSettings, NamespacedName, NetworkAddress, NetworkMode, Policy, PortMap, SortedMap, TrustDomain,
    TunnelProtocol, Workload, WorkloadUid,
};

use crate::{
    Effect, Enablement, Finding, IntOrString, ObjectRef, Objects, Place, Pod, Problem, Selector, Service,
    authorization_policy::Compiled,
    authorization_rules::with_namespace,
    enablement,
    enablement::non_tcp,
    meta::selects,
    peer_authentication::{PeerAuthentications, policy_key},
};

/// Where a pod runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodPlace {
    /// The node's name.
    pub node: String,
    /// The pod's addresses; the node's for a pod on the host's network.
    pub addresses: Vec<IpAddr>,
}

/// What the objects do not say themselves.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where the policies for the mesh stand.
    pub root_namespace: String,
    /// The cluster's name.
    pub cluster: String,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Pod (`namespace/name`) → where it runs. A pod that is not here is left out: it does not run yet.
    pub pods: BTreeMap<(String, String), PodPlace>,
    /// Service (`namespace/name`) → its virtual addresses.
    pub vips: BTreeMap<(String, String), Vec<IpAddr>>,
}

impl Default for Context {
    fn default() -> Self {
        Self {
            root_namespace: crate::ROOT_NAMESPACE.to_owned(),
            cluster: "Kubernetes".to_owned(),
            trust_domain: TrustDomain::default(),
            pods: BTreeMap::new(),
            vips: BTreeMap::new(),
        }
    }
}

/// What the objects mean.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mesh {
    /// Settings of the mesh.
    pub settings: MeshSettings,
    /// Pods.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<model::Service>,
    /// Policies; a workload that names one that is not here is closed.
    pub policies: Vec<Policy>,
    /// What was not taken, in addition to what [`crate::parse`] found.
    pub findings: Vec<Finding>,
}

/// What the objects mean, given where everything runs.
pub fn translate(objects: &Objects, context: &Context) -> Mesh {
    let mut mesh = Mesh {
        settings: MeshSettings {
            trust_domain: context.trust_domain.clone(),
            ..MeshSettings::default()
        },
        ..Mesh::default()
    };
    mesh.services = objects
        .services
        .iter()
        .map(|(_, service)| model_service(service, context))
        .collect();
    let closed = compile_policies(objects, context, &mut mesh);
    let peer_authentications = PeerAuthentications::new(
        objects
            .peer_authentications
            .iter()
            .map(|(place, policy)| (place, policy)),
        &context.root_namespace,
        &mut mesh.findings,
    );
    let mut converted: BTreeMap<NamespacedName, Policy> = BTreeMap::new();
    for (place, pod) in &objects.pods {
        let key = (pod.metadata.namespace.clone(), pod.metadata.name.clone());
        let Some(at) = context.pods.get(&key) else { continue };
        let mut workload = model_workload(place, pod, at, objects, context, &mut mesh.findings);
        let (namespace, labels) = (pod.metadata.namespace.as_str(), &pod.metadata.labels);
        let mut policies = BTreeSet::new();
        for (_, policy) in &objects.authorization_policies {
            if policy.has_selector() && policy.selects(&context.root_namespace, namespace, labels) {
                let key = NamespacedName::new(policy.metadata.namespace.as_str(), policy.metadata.name.as_str());
                // Of those with a selector, named are the ones in force and the ones that close.
                if closed.contains(&key) || mesh.policies.iter().any(|policy| policy.key() == key) {
                    policies.insert(key);
                }
            } else if policy.selects(&context.root_namespace, namespace, labels) {
                let key = NamespacedName::new(policy.metadata.namespace.as_str(), policy.metadata.name.as_str());
                policies.extend(closed.get(&key).cloned());
            }
        }
        policies.extend(unreadable(objects, pod, &context.root_namespace));
        if let Some(policy) = peer_authentications.policy_for(namespace, labels) {
            policies.insert(policy.key());
            converted.insert(policy.key(), policy);
        }
        workload.authorization_policies = policies.into_iter().collect();
        mesh.workloads.push(workload);
    }
    mesh.policies.extend(converted.into_values());
    overlapping(objects, &peer_authentications, &mut mesh.findings);
    missing_references(objects, &mut mesh.findings);
    mesh
}

/// What PeerAuthentications do not get of the pods that they select, since older ones select them, too.
fn overlapping(objects: &Objects, scopes: &PeerAuthentications<'_>, findings: &mut Vec<Finding>) {
    for (place, policy) in &objects.peer_authentications {
        let pods = objects.pods.iter().map(|(_, pod)| &pod.metadata);
        let pods = pods.filter(|pod| pod.namespace == policy.metadata.namespace);
        let labelled = pods.map(|pod| (pod.name.as_str(), &pod.labels));
        let has = |labels: &&BTreeMap<String, String>, asked: &BTreeMap<String, String>| {
            asked.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        let overlaps = scopes.overlaps(policy, labelled, has).into_iter();
        findings.extend(overlaps.map(|overlap| Finding::of(policy.object(), place, overlap)));
    }
}

/// Compiles the AuthorizationPolicies into `mesh`; returns those that close what they select.
fn compile_policies(objects: &Objects, context: &Context, mesh: &mut Mesh) -> BTreeSet<NamespacedName> {
    let mut closed = BTreeSet::new();
    for (place, written) in &objects.authorization_policies {
        let mut find = |condition| mesh.findings.push(Finding::of(written.object(), place, condition));
        match written.compile(&context.root_namespace) {
            Compiled::Policy(mut policy, conditions) => {
                with_namespace(&mut policy);
                mesh.policies.push(policy);
                conditions.into_iter().for_each(find);
            }
            Compiled::Nothing(condition) => find(condition),
            Compiled::Closed(condition) => {
                find(condition);
                let metadata = &written.metadata;
                closed.insert(NamespacedName::new(metadata.namespace.as_str(), metadata.name.as_str()));
            }
        }
    }
    closed
}

/// The unreadable policies that may concern a pod.
fn unreadable<'a>(objects: &'a Objects, pod: &'a Pod, root: &'a str) -> impl Iterator<Item = NamespacedName> + 'a {
    let namespace = pod.metadata.namespace.as_str();
    let concerns = move |(object, selector): &&(ObjectRef, Selector)| {
        (object.namespace == namespace || object.namespace == root) && selector.matches(&pod.metadata.labels)
    };
    objects
        .unreadable_policies
        .iter()
        .filter(concerns)
        .map(|(object, _)| match object.kind.as_str() {
            "PeerAuthentication" => policy_key(object),
            // A name that is no name may hold a slash, which a key must not.
            _ => NamespacedName::new(object.namespace.as_str(), object.name.replace('/', "_")),
        })
}

fn hostname(service: &Service) -> String {
    format!(
        "{}.{}.svc.cluster.local",
        service.metadata.name, service.metadata.namespace
    )
}

fn is_tcp(port: &&crate::ServicePort) -> bool {
    port.protocol == "TCP"
}

fn model_service(service: &Service, context: &Context) -> model::Service {
    let key = (service.metadata.namespace.clone(), service.metadata.name.clone());
    let vips = context.vips.get(&key).into_iter().flatten();
    let target = |port: &crate::ServicePort| match &port.target_port {
        Some(IntOrString::Number(number)) => *number,
        // A named port is each endpoint's own; this is only what is said where none says otherwise.
        Some(IntOrString::Name(_)) | None => port.port,
    };
    model::Service {
        name: service.metadata.name.as_str().into(),
        namespace: service.metadata.namespace.as_str().into(),
        hostname: hostname(service).into(),
        vips: vips.map(|address| NetworkAddress::new("", *address)).collect(),
        ports: service
            .spec
            .ports
            .iter()
            .filter(is_tcp)
            .map(|port| (port.port, target(port)))
            .collect(),
        ..model::Service::default()
    }
}

fn model_workload(
    place: &Place,
    pod: &Pod,
    at: &PodPlace,
    objects: &Objects,
    context: &Context,
    findings: &mut Vec<Finding>,
) -> Workload {
    let metadata = &pod.metadata;
    let label = |names: &[&str]| -> Option<Arc<str>> {
        let found = names.iter().find_map(|name| metadata.labels.get(*name));
        found.map(|value| value.as_str().into())
    };
    let namespace = objects.namespace(&metadata.namespace);
    let enablement = enablement(pod, namespace);
    let mut find = |field: &str, problem: Problem, effect: Effect| {
        let object = ObjectRef {
            kind: "Pod".to_owned(),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
        };
        findings.push(Finding::of(object, place, (field, problem, effect)));
    };
    let not_captured = |why: &str| Problem::Unsupported(format!("{why}: its traffic is not captured"));
    match enablement {
        Enablement::HostNetwork => {
            find(
                "spec.hostNetwork",
                not_captured("the node's network namespace"),
                Effect::Note,
            );
        }
        Enablement::Sidecar => find("metadata.annotations", not_captured("a sidecar"), Effect::Note),
        Enablement::ExcludedNamespace => {
            find("metadata.namespace", not_captured("this namespace"), Effect::Note);
        }
        Enablement::Captured | Enablement::NotAsked => {}
    }
    let (non_tcp, bad) = non_tcp(pod, namespace);
    if let Some(bad) = bad {
        let why = format!("undercurrent.io/non-tcp-traffic: {bad:?} is neither pass nor forbid: it is forbidden");
        find("metadata.annotations", Problem::Invalid(why), Effect::Narrowed);
    }
    Workload {
        uid: WorkloadUid::of_pod(&context.cluster, &metadata.namespace, &metadata.name),
        name: metadata.name.as_str().into(),
        namespace: metadata.namespace.as_str().into(),
        trust_domain: context.trust_domain.clone(),
        service_account: pod.service_account().into(),
        workload_ips: at.addresses.clone(),
        protocol: match enablement {
            Enablement::Captured => TunnelProtocol::Hbone,
            _ => TunnelProtocol::None,
        },
        network_mode: match pod.spec.host_network {
            true => NetworkMode::HostNetwork,
            false => NetworkMode::Standard,
        },
        node: at.node.as_str().into(),
        canonical_name: label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| metadata.name.as_str().into()),
        canonical_revision: label(&[
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ])
        .unwrap_or_else(|| "latest".into()),
        workload_name: label(&["service.istio.io/workload-name"]).unwrap_or_else(|| metadata.name.as_str().into()),
        workload_type: "pod".into(),
        cluster_id: context.cluster.as_str().into(),
        services: endpoints_of(pod, objects),
        authorization_policies: Vec::new(),
        status: HealthStatus::Healthy,
        non_tcp,
        ..Workload::default()
    }
}

/// The services that select a pod, with the ports that it serves them on.
fn endpoints_of(pod: &Pod, objects: &Objects) -> SortedMap<NamespacedName, PortMap> {
    let selected = objects.services.iter().filter(|(_, service)| {
        let spec = &service.spec;
        service.metadata.namespace == pod.metadata.namespace
            && !spec.selector.is_empty()
            && selects(&spec.selector, &pod.metadata.labels)
    });
    let ports = |service: &Service| {
        let ports = service.spec.ports.iter().filter(is_tcp);
        let resolved = ports.filter_map(|port| {
            let target = match &port.target_port {
                None => port.port,
                Some(IntOrString::Number(number)) => *number,
                Some(IntOrString::Name(name)) => pod.named_port(name)?,
            };
            Some((port.port, target))
        });
        resolved.collect()
    };
    selected
        .map(|(_, service)| {
            let key = NamespacedName::new(service.metadata.namespace.as_str(), hostname(service));
            (key, ports(service))
        })
        .collect()
}

/// A namespace or service account that a pod names and nobody defines: it works, but it may be a slip of the pen.
fn missing_references(objects: &Objects, findings: &mut Vec<Finding>) {
    let accounts: BTreeSet<_> = objects
        .service_accounts
        .iter()
        .map(|(_, account)| (account.metadata.namespace.as_str(), account.metadata.name.as_str()))
        .collect();
    for (place, pod) in &objects.pods {
        let (namespace, account) = (pod.metadata.namespace.as_str(), pod.service_account());
        let object = || ObjectRef {
            kind: "Pod".to_owned(),
            namespace: namespace.to_owned(),
            name: pod.metadata.name.clone(),
        };
        let mut find = |field: &str, missing: ObjectRef| {
            let condition = (field, Problem::Missing(missing), Effect::Note);
            findings.push(Finding::of(object(), place, condition));
        };
        if namespace != "default" && objects.namespace(namespace).is_none() {
            let missing = ObjectRef {
                kind: "Namespace".to_owned(),
                name: namespace.to_owned(),
                ..ObjectRef::default()
            };
            find("metadata.namespace", missing);
        }
        if account != "default" && !accounts.contains(&(namespace, account)) {
            let missing = ObjectRef {
                kind: "ServiceAccount".to_owned(),
                namespace: namespace.to_owned(),
                name: account.to_owned(),
            };
            find("spec.serviceAccountName", missing);
        }
    }
}
