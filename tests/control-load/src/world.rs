//! The objects of a large cluster, as the API has them: services of ten pods each, in fifty namespaces, on nodes of a
//! hundred pods, with a policy in each namespace.

use control::index::ObjectChange;
use k8s::live::{Kind, read};
use serde_json::{Value, json};

/// Pods of one service.
pub const PODS: usize = 10;
const NAMESPACES: usize = 50;

/// A cluster by its size.
#[derive(Clone, Copy)]
pub struct World {
    /// With [`PODS`] pods each.
    pub services: usize,
}

fn put(kind: Kind, object: &Value) -> ObjectChange {
    ObjectChange::Put(read(kind, object))
}

fn namespace(service: usize) -> String {
    format!("team-{}", service % NAMESPACES)
}

fn address(first: u8, n: usize) -> String {
    format!("{first}.{}.{}.{}", n >> 16 & 255, n >> 8 & 255, n & 255)
}

impl World {
    /// How many pods there are.
    pub fn pods(self) -> usize {
        self.services * PODS
    }

    /// Everything, a service at a time.
    pub fn objects(self) -> impl Iterator<Item = Vec<ObjectChange>> {
        let namespaces = (0..NAMESPACES.min(self.services)).map(|n| {
            let name = namespace(n);
            let labels = json!({"istio.io/dataplane-mode": "ambient"});
            let policy = json!({"kind": "AuthorizationPolicy", "metadata": {"name": "same-team", "namespace": name},
                "spec": {"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": [name]}}]}]}});
            vec![
                put(
                    Kind::Namespace,
                    &json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
                ),
                put(Kind::AuthorizationPolicy, &policy),
            ]
        });
        namespaces.chain((0..self.services).map(move |service| self.service(service)))
    }

    fn service(self, n: usize) -> Vec<ObjectChange> {
        let (name, namespace) = (format!("service-{n}"), namespace(n));
        let ip = address(172, n);
        let service = json!({"kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
        let endpoint = |pod: usize| {
            let target = json!({"kind": "Pod", "name": self.pod_name(pod), "namespace": namespace});
            json!({"addresses": [address(10, pod)], "conditions": {"ready": true}, "targetRef": target})
        };
        let pods = n * PODS..(n + 1) * PODS;
        let slice = json!({"kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-x"), "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": pods.clone().map(endpoint).collect::<Vec<_>>()});
        let mut objects = vec![put(Kind::Service, &service), put(Kind::EndpointSlice, &slice)];
        objects.extend(pods.map(|pod| self.pod(pod, true)));
        objects
    }

    fn pod_name(self, pod: usize) -> String {
        format!("service-{}-7d9f8b6c5-{pod:05}", pod / PODS)
    }

    /// A pod that is ready, or not.
    pub fn pod(self, pod: usize, ready: bool) -> ObjectChange {
        let (service, ip) = (pod / PODS, address(10, pod));
        let app = format!("service-{service}");
        let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-7d9f8b6c5"),
            "uid": "8f2f6b0a-5a55-4c3e-9d62-000000000000", "controller": true});
        let ready = if ready { "True" } else { "False" };
        put(
            Kind::Pod,
            &json!({"kind": "Pod",
                "metadata": {"name": self.pod_name(pod), "namespace": namespace(service), "ownerReferences": [owner],
                    "labels": {"app": app, "version": "v1", "pod-template-hash": "7d9f8b6c5"},
                    "annotations": {"ambient.istio.io/redirection": "enabled"}},
                "spec": {"nodeName": format!("node-{}", pod / 100), "serviceAccountName": app},
                "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                    "conditions": [{"type": "Ready", "status": ready}]}}),
        )
    }
}
