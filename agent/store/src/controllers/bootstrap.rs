//! What is there before anybody asks.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::accounts;
use crate::engine::{ApiError, Engine, Key, Part, known};

const NAMESPACES: &[&str] = &["default", "kube-system", "kube-public", "istio-system"];

/// Makes what is missing.
///
/// # Errors
///
/// What the engine refused, which it does only when it can't write.
pub async fn bootstrap(engine: &Engine, addresses: &[SocketAddr]) -> Result<(), ApiError> {
    for name in NAMESPACES {
        let namespace = json!({"metadata": {"name": name}});
        create(engine, "", "namespaces", "", namespace).await?;
    }
    accounts::reconcile(engine, None).await?;
    // As in Kubernetes, no endpoint is a loopback address: nobody could reach it from a pod.
    let is_reachable = |address: &&SocketAddr| !address.ip().is_loopback() && !address.ip().is_unspecified();
    let reachable = addresses.iter().find(is_reachable);
    let Some(port) = reachable.or(addresses.first()).map(SocketAddr::port) else {
        return Ok(());
    };
    let mut labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let ports = json!([{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]);
    let first = engine.first_service_address();
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": labels},
        "spec": {"clusterIP": first, "ports": ports},
    });
    create(engine, "", "services", "default", service).await?;
    change(engine, "", "services", |service| {
        service["spec"]["ports"] = ports.clone()
    })
    .await?;
    let Some(address) = reachable.map(SocketAddr::ip) else {
        return Ok(());
    };
    labels["kubernetes.io/service-name"] = "kubernetes".into();
    let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
    let endpoints = json!([{"addresses": [address], "conditions": {"ready": true}}]);
    let slice = json!({
        "metadata": {"name": "kubernetes", "labels": labels},
        "addressType": family,
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        "endpoints": endpoints,
    });
    create(engine, "discovery.k8s.io", "endpointslices", "default", slice.clone()).await?;
    change(engine, "discovery.k8s.io", "endpointslices", |live| {
        for field in ["ports", "endpoints"] {
            live[field] = slice[field].clone();
        }
    })
    .await
}

async fn create(engine: &Engine, group: &str, plural: &str, namespace: &str, value: Value) -> Result<(), ApiError> {
    match engine.create(known(group, plural), namespace, value, false).await {
        Err(error) if error.reason != "AlreadyExists" => Err(error),
        _ => Ok(()),
    }
}

/// What was made by an earlier start, at another port.
async fn change(
    engine: &Engine,
    group: &str,
    plural: &str,
    edit: impl Fn(&mut Value) + Send + Sync,
) -> Result<(), ApiError> {
    let key = Key::new(known(group, plural), "default", "kubernetes");
    let mut change = |live: &Value| {
        let mut new = live.clone();
        edit(&mut new);
        Ok(new)
    };
    engine.change(&key, Part::Main, false, &mut change).await.map(drop)
}
