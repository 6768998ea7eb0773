//! A namespace behind waypoints: a client, a web server with a service, and the Envoys that play the waypoints.
//!
//! No controller makes waypoints yet: what it would write (Service, pods, the Gateway's status) is written here.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{Kubectl, envoy, kubectl::is_captured, machine};

pub const NAMESPACE: &str = "gate";
/// The address of the web server's service.
pub const VIP: &str = "10.96.88.1";

const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// The labels of what a controller makes for a Gateway: what has them is behind no waypoint itself.
fn made_for(gateway: &str) -> Value {
    json!({GATEWAY_NAME: gateway, "gateway.istio.io/managed": "istio.io-mesh-controller"})
}

fn object(kind: &str, version: &str, name: &str, labels: Value, more: Value) -> Value {
    let metadata = json!({"name": name, "namespace": NAMESPACE, "labels": labels});
    let mut object = json!({"apiVersion": version, "kind": kind, "metadata": metadata});
    if let (Some(object), Some(more)) = (object.as_object_mut(), more.as_object()) {
        object.extend(more.clone());
    }
    object
}

/// Its account has the name up to the first `-`.
fn pod(name: &str, node: &str, labels: Value, container: Value) -> Value {
    let account = name.split('-').next().unwrap_or(name);
    let spec = json!({"nodeName": node, "serviceAccountName": account, "containers": [container]});
    object("Pod", "v1", name, labels, json!({"spec": spec}))
}

fn envoy_container(binary: &Path, config: &Value) -> Value {
    json!({
        "name": "envoy",
        "command": [binary, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning",
            "--config-yaml", config.to_string()],
        "readinessProbe": {"httpGet": {"path": "/", "port": envoy::READY}, "periodSeconds": 1},
    })
}

/// A replica of the waypoint `wp`, whose HBONE the agent terminates.
pub fn replica(binary: &Path, name: &str, node: &str) -> Value {
    let container = envoy_container(binary, &envoy::handed(name));
    pod(name, node, made_for("wp"), container)
}

fn account(name: &str) -> Value {
    object("ServiceAccount", "v1", name, json!({}), json!({}))
}

fn service(name: &str, labels: Value, spec: Value) -> Value {
    object("Service", "v1", name, labels, json!({"spec": spec}))
}

fn gateway_service(name: &str) -> Value {
    let ports = json!([{"name": "mesh", "port": 15008}]);
    service(
        name,
        json!({}),
        json!({"selector": {GATEWAY_NAME: name}, "ports": ports}),
    )
}

/// The namespace with everything in it but the Gateway.
pub fn stage(kubectl: &Kubectl, binary: &Path) -> Result<()> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"istio.io/dataplane-mode": "ambient"}}});
    let web = json!({
        "name": "nginx",
        "command": ["nginx", "-c", machine::scripts().join("nginx.conf"), "-p", "/tmp"],
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
    });
    let idle = json!({"name": "idle", "command": ["sleep", "infinity"]});
    let ports = json!([{"name": "http", "port": 80, "targetPort": 8080}]);
    let all = [
        namespace,
        account("client"),
        account("web"),
        account("wp"),
        pod("client", "node-1", json!({}), idle),
        pod("web", "node-2", json!({"app": "web"}), web),
        service(
            "web",
            json!({"istio.io/use-waypoint": "wp"}),
            json!({"clusterIP": VIP, "selector": {"app": "web"}, "ports": ports}),
        ),
        gateway_service("wp"),
        replica(binary, "wp-1", "node-1"),
        replica(binary, "wp-2", "node-2"),
    ];
    apply(kubectl, &all)?;
    for name in ["client", "web", "wp-1", "wp-2"] {
        kubectl.until(
            &format!("{name} is captured and ready"),
            &["pod", "-n", NAMESPACE, name],
            |pod| is_captured(pod) && is_ready(pod),
        )?;
    }
    Ok(())
}

/// A waypoint `own` of one replica that speaks HBONE itself, outside the mesh, and goes on to this pod.
pub fn stage_native(kubectl: &Kubectl, binary: &Path, certificates: &Path, web: &str) -> Result<()> {
    let mut labels = made_for("own");
    labels["networking.istio.io/tunnel"] = json!("http");
    labels["istio.io/dataplane-mode"] = json!("none");
    let container = envoy_container(binary, &envoy::native("own-1", certificates, web, 8080));
    let replica = pod("own-1", "node-1", labels, container);
    apply(kubectl, &[account("own"), gateway_service("own"), replica])?;
    let arguments = ["pod", "-n", NAMESPACE, "own-1"];
    kubectl.until("own-1 is ready", &arguments, is_ready).map(drop)
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["containerStatuses"][0]["ready"] == true
}

/// `kubectl apply` of all of them.
pub fn apply(kubectl: &Kubectl, objects: &[Value]) -> Result<()> {
    let documents: Vec<_> = objects.iter().map(Value::to_string).collect();
    kubectl.apply(&documents.join("\n")).map(drop)
}

/// The Gateway, and what its controller says of it. `wp` has its HBONE terminated by the agent.
pub fn program(kubectl: &Kubectl, name: &str, used_for: &str) -> Result<()> {
    let listeners = json!([{"name": "mesh", "port": 15008, "protocol": "HBONE"}]);
    let spec = json!({"spec": {"gatewayClassName": "istio-waypoint", "listeners": listeners}});
    let labels = json!({"istio.io/waypoint-for": used_for});
    let mut gateway = object("Gateway", "gateway.networking.k8s.io/v1", name, labels, spec);
    if name == "wp" {
        let binding = format!("PROXY/{}", envoy::BINDING);
        gateway["metadata"]["annotations"] = json!({"ambient.istio.io/waypoint-inbound-binding": binding});
    }
    apply(kubectl, &[gateway])?;
    let service = kubectl.get(&["service", "-n", NAMESPACE, name])?;
    let address = service["spec"]["clusterIP"].as_str();
    let address = address.context("the waypoint's service has no address")?;
    let condition = json!({"type": "Programmed", "status": "True", "reason": "Programmed", "message": "",
        "lastTransitionTime": "2024-01-01T00:00:00Z"});
    let status = json!({"status": {"addresses": [{"type": "IPAddress", "value": address}], "conditions": [condition]}});
    let gateways = "gateways.gateway.networking.k8s.io";
    let patching = [
        "patch",
        gateways,
        "-n",
        NAMESPACE,
        name,
        "--subresource=status",
        "--type=merge",
        "-p",
    ];
    let patch = status.to_string();
    kubectl.says(&[&patching[..], &[&patch]].concat()).map(drop)
}
