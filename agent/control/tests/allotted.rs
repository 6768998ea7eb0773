//! Addresses for hosts of ServiceEntries: written where people and DNS find them, once, and for good.

#![allow(clippy::unwrap_used)]

mod cluster;

use cluster::{Cluster, eventually};
use kube::{
    Api,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
    discovery::ApiResource,
};
use serde_json::{Value, json};

fn entries(cluster: &Cluster) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "ServiceEntry");
    let resource = ApiResource::from_gvk_with_plural(&kind, "serviceentries");
    Api::namespaced_with(cluster.client.clone(), "shop", &resource)
}

async fn create(cluster: &Cluster, name: &str, spec: Value) {
    let object = cluster::object(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": name}, "spec": spec,
    }));
    entries(cluster).create(&PostParams::default(), &object).await.unwrap();
}

fn spec(host: &str, resolution: &str) -> Value {
    json!({"hosts": [host], "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}], "resolution": resolution})
}

/// The entry's addresses, once it has some.
async fn addresses(cluster: &Cluster, name: &str) -> Vec<String> {
    eventually("the entry has addresses", || async {
        let found = entries(cluster).get(name).await.ok()?;
        let addresses = found.data["status"]["addresses"].as_array()?.clone();
        let values = addresses
            .iter()
            .map(|address| address["value"].as_str().unwrap().to_owned());
        Some(values.collect::<Vec<_>>()).filter(|values| !values.is_empty())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_has_addresses_of_its_own_and_keeps_them() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    replica.ready().await;
    create(&cluster, "none", spec("none.example", "NONE")).await;
    create(&cluster, "wild", spec("*.example", "DNS")).await;
    create(&cluster, "one", spec("one.example", "DNS")).await;
    create(&cluster, "two", spec("two.example", "STATIC")).await;
    let (one, two) = (addresses(&cluster, "one").await, addresses(&cluster, "two").await);
    assert!(
        one[0].starts_with("240.240.") && one[1].starts_with("2001:2::"),
        "{one:?}"
    );
    assert!(one.iter().all(|address| !two.contains(address)), "{one:?} {two:?}");
    for without in ["none", "wild"] {
        let found = entries(&cluster).get(without).await.unwrap();
        assert!(found.data["status"]["addresses"].is_null(), "{found:?}");
    }

    // A status that is lost, and an entry that is made again, are what they were.
    let lost = json!({"status": {"addresses": []}});
    entries(&cluster)
        .patch_status("one", &PatchParams::default(), &Patch::Merge(&lost))
        .await
        .unwrap();
    assert_eq!(addresses(&cluster, "one").await, one);
    entries(&cluster).delete("two", &DeleteParams::default()).await.unwrap();
    create(&cluster, "two", spec("two.example", "STATIC")).await;
    assert_eq!(addresses(&cluster, "two").await, two);
}
