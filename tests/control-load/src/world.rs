//! The objects of a large cluster, as the API has them: services of ten pods each, in fifty namespaces, on nodes of a
//! hundred pods, with a policy in each namespace.

use control::index::ObjectChange;
use k8s::live::{Kind, read};
use serde_json::{Value, json};

/// An object, with the kind as which the index reads it.
pub type Object = (Kind, Value);

/// Pods of one service.
pub const PODS: usize = 10;
const NAMESPACES: usize = 50;

/// A cluster by its size.
#[derive(Clone, Copy)]
pub struct World {
    /// With [`PODS`] pods each.
    pub services: usize,
}

/// As the watch would bring it.
pub fn put((kind, object): &Object) -> ObjectChange {
    ObjectChange::Put(read(*kind, object))
}

fn namespace(service: usize) -> String {
    format!("team-{}", service % NAMESPACES)
}

fn address(n: usize) -> String {
    format!("10.{}.{}.{}", n >> 16 & 255, n >> 8 & 255, n & 255)
}

impl World {
    /// How many pods there are.
    pub fn pods(self) -> usize {
        self.services * PODS
    }

    /// How many nodes.
    pub fn nodes(self) -> usize {
        self.pods().div_ceil(100)
    }

    /// Everything, some that belong together at a time; what others are in comes first.
    pub fn objects(self) -> impl Iterator<Item = Vec<Object>> {
        let namespaces = (0..NAMESPACES.min(self.services)).map(|n| {
            let name = namespace(n);
            let metadata = json!({"name": name, "labels": {"istio.io/dataplane-mode": "ambient"}});
            let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "same-team", "namespace": name},
                "spec": {"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": [name]}}]}]}});
            vec![
                (
                    Kind::Namespace,
                    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}),
                ),
                (Kind::AuthorizationPolicy, policy),
            ]
        });
        let nodes = (0..self.nodes()).map(|n| {
            let zone = format!("zone-{}", n % 3);
            let labels = json!({"topology.kubernetes.io/region": "region", "topology.kubernetes.io/zone": zone});
            let metadata = json!({"name": format!("node-{n}"), "labels": labels});
            vec![(
                Kind::Node,
                json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata}),
            )]
        });
        let services = (0..self.services).map(move |service| self.service(service));
        namespaces.chain(nodes).chain(services)
    }

    fn service(self, n: usize) -> Vec<Object> {
        let (name, namespace) = (format!("service-{n}"), namespace(n));
        // Within the range that the API takes them from.
        let ip = format!("10.96.{}.{}", 1 + (n >> 8), n & 255);
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
        let endpoint = |pod: usize| {
            let target = json!({"kind": "Pod", "name": self.pod_name(pod), "namespace": namespace});
            json!({"addresses": [address(pod)], "conditions": {"ready": true}, "targetRef": target})
        };
        let pods = n * PODS..(n + 1) * PODS;
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-x"), "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": pods.clone().map(endpoint).collect::<Vec<_>>()});
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": namespace}});
        let mut objects = vec![
            (Kind::ServiceAccount, account),
            (Kind::Service, service),
            (Kind::EndpointSlice, slice),
        ];
        objects.extend(pods.map(|pod| self.pod(pod, true)));
        objects
    }

    /// A pod's namespace and name.
    pub fn pod_of(self, pod: usize) -> (String, String) {
        (namespace(pod / PODS), self.pod_name(pod))
    }

    fn pod_name(self, pod: usize) -> String {
        format!("service-{}-7d9f8b6c5-{pod:05}", pod / PODS)
    }

    /// A pod that is ready, or not.
    pub fn pod(self, pod: usize, ready: bool) -> Object {
        let (service, ip) = (pod / PODS, address(pod));
        let app = format!("service-{service}");
        let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-7d9f8b6c5"),
            "uid": "8f2f6b0a-5a55-4c3e-9d62-000000000000", "controller": true});
        let mut status = readiness(ready);
        status["phase"] = json!("Running");
        status["podIP"] = json!(ip);
        status["podIPs"] = json!([{"ip": ip}]);
        let object = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.pod_name(pod), "namespace": namespace(service), "ownerReferences": [owner],
                "labels": {"app": app, "version": "v1", "pod-template-hash": "7d9f8b6c5"},
                "annotations": {"ambient.istio.io/redirection": "enabled"}},
            "spec": {"nodeName": format!("node-{}", pod / 100), "serviceAccountName": app,
                "containers": [{"name": "app", "image": "app"}]},
            "status": status});
        (Kind::Pod, object)
    }
}

/// The part of a pod's status that changes.
pub fn readiness(ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    json!({"conditions": [{"type": "Ready", "status": ready}]})
}
