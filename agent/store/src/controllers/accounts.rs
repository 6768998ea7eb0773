//! What every namespace has: ServiceAccount `default`, and ConfigMap `kube-root-ca.crt` with the API's own authority.

use serde_json::{Value, json};

use super::woken;
use crate::engine::{ApiError, Engine, Key, Part, known};

const ACCOUNT: &str = "default";
const ROOT: &str = "kube-root-ca.crt";

pub(super) async fn run(engine: Engine, ca_pem: Option<String>) {
    let mut namespaces = engine.watch_changes(known("", "namespaces"));
    let mut accounts = engine.watch_changes(known("", "serviceaccounts"));
    let mut maps = engine.watch_changes(known("", "configmaps"));
    loop {
        if let Err(error) = reconcile(&engine, ca_pem.as_deref()).await {
            tracing::warn!("service accounts of namespaces: {error}");
        }
        tokio::select! {
            () = woken(&mut namespaces) => {}
            () = woken(&mut accounts) => {}
            () = woken(&mut maps) => {}
        }
    }
}

/// Makes what is missing. Without the authority's certificate only accounts.
pub(super) async fn reconcile(engine: &Engine, ca_pem: Option<&str>) -> Result<(), ApiError> {
    for namespace in engine.list(known("", "namespaces"), None).1 {
        let name = &namespace.key.name;
        let account = Key::new(known("", "serviceaccounts"), name, ACCOUNT);
        if engine.get(&account).is_none() {
            ensure(engine, &account, json!({"metadata": {"name": ACCOUNT}})).await?;
        }
        if let Some(ca_pem) = ca_pem {
            root(engine, name, ca_pem).await?;
        }
    }
    Ok(())
}

async fn root(engine: &Engine, namespace: &str, ca_pem: &str) -> Result<(), ApiError> {
    let key = Key::new(known("", "configmaps"), namespace, ROOT);
    let data = json!({"ca.crt": ca_pem});
    match engine.get(&key) {
        Some(there) if there.value()["data"] == data => Ok(()),
        Some(_) => {
            let mut change = |live: &Value| {
                let mut new = live.clone();
                new["data"] = data.clone();
                Ok(new)
            };
            match engine.change(&key, Part::Main, false, &mut change).await {
                Err(error) if error.code != 404 => Err(error),
                _ => Ok(()),
            }
        }
        None => {
            let about = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
                endpoints such as the internal service IP or kubernetes.default.svc.";
            let annotations = json!({"kubernetes.io/description": about});
            let value = json!({"metadata": {"name": ROOT, "annotations": annotations}, "data": data});
            ensure(engine, &key, value).await
        }
    }
}

async fn ensure(engine: &Engine, key: &Key, value: Value) -> Result<(), ApiError> {
    match engine.create(key.kind, &key.namespace, value, false).await {
        // Somebody was faster, or the namespace is on its way out.
        Err(error) if !["AlreadyExists", "NotFound", "Forbidden"].contains(&error.reason) => Err(error),
        _ => Ok(()),
    }
}
