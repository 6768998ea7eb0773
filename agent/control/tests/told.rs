//! What authors of objects and pods find: conditions, Events, and the trust bundle in every namespace.

#![allow(clippy::unwrap_used)]

mod cluster;

use cluster::{Cluster, config_map, create, eventually};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace};
use kube::{
    Api,
    api::{DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
    discovery::ApiResource,
};
use proto::discovery::{
    DeltaDiscoveryRequest, Node, Status as RpcStatus,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

fn policies(cluster: &Cluster) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "authorizationpolicies");
    Api::namespaced_with(cluster.client.clone(), "shop", &resource)
}

fn policy(name: &str, spec: &Value) -> DynamicObject {
    cluster::object(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name}, "spec": spec,
    }))
}

/// Our condition of a policy, once it is about this generation.
async fn condition(cluster: &Cluster, name: &str, generation: i64) -> Value {
    eventually("the policy has a condition", || async {
        let found = policies(cluster).get(name).await.ok()?;
        let conditions = found.data["status"]["conditions"].as_array()?.clone();
        conditions
            .into_iter()
            .find(|condition| condition["type"] == "ZtunnelAccepted" && condition["observedGeneration"] == generation)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_carry_a_condition_that_people_understand() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    replica.ready().await;
    let good = json!({"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]});
    policies(&cluster)
        .create(&PostParams::default(), &policy("good", &good))
        .await
        .unwrap();
    let told = condition(&cluster, "good", 1).await;
    assert_eq!(
        (&told["status"], &told["reason"]),
        (&json!("True"), &json!("Accepted")),
        "{told}"
    );
    let http = json!({"action": "ALLOW", "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
    policies(&cluster)
        .create(&PostParams::default(), &policy("http", &http))
        .await
        .unwrap();
    let told = condition(&cluster, "http", 1).await;
    assert_eq!(
        (&told["status"], &told["reason"]),
        (&json!("False"), &json!("UnsupportedValue")),
        "{told}"
    );
    assert!(told["message"].as_str().unwrap().contains("methods"), "{told}");
    // Somebody else's condition stays when ours changes.
    let others = json!({"status": {"conditions": [
        {"type": "Others", "status": "True", "reason": "Known", "message": "x"}, told,
    ]}});
    policies(&cluster)
        .patch_status("http", &PatchParams::default(), &Patch::Merge(&others))
        .await
        .unwrap();
    let mended = json!({"spec": good});
    policies(&cluster)
        .patch("http", &PatchParams::default(), &Patch::Merge(&mended))
        .await
        .unwrap();
    let generation = policies(&cluster)
        .get("http")
        .await
        .unwrap()
        .metadata
        .generation
        .unwrap();
    let told = condition(&cluster, "http", generation).await;
    assert_eq!(told["status"], "True", "{told}");
    let found = policies(&cluster).get("http").await.unwrap();
    let types: Vec<_> = found.data["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| &c["type"])
        .collect();
    assert_eq!(types, ["Others", "ZtunnelAccepted"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_an_agent_refuses_says_so() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let (requests, sent) = mpsc::channel(8);
    let ask = DeltaDiscoveryRequest {
        type_url: proto::AUTHORIZATION_TYPE.into(),
        ..DeltaDiscoveryRequest::default()
    };
    let first = DeltaDiscoveryRequest {
        node: Some(Node {
            id: "ztunnel~10.0.0.9~agent-1.istio-system~istio-system.svc.cluster.local".into(),
            ..Node::default()
        }),
        ..ask.clone()
    };
    requests.send(first).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(sent));
    let bearer = format!("Bearer {}", cluster.agent(1).await).parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut responses = client.delta_aggregated_resources(request).await.unwrap().into_inner();
    let spec = json!({"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]});
    policies(&cluster)
        .create(&PostParams::default(), &policy("bad", &spec))
        .await
        .unwrap();
    let agent = async {
        while let Ok(Some(response)) = responses.message().await {
            let refused = response.resources.iter().any(|resource| resource.name == "shop/bad");
            let answer = DeltaDiscoveryRequest {
                response_nonce: response.nonce,
                error_detail: refused.then(|| RpcStatus {
                    code: 3,
                    message: "shop/bad: I do not know this".into(),
                    ..RpcStatus::default()
                }),
                ..ask.clone()
            };
            requests.send(answer).await.unwrap();
        }
    };
    let told = eventually("the refusal is told", || async {
        let told = condition(&cluster, "bad", 1).await;
        (told["reason"] == "Rejected").then_some(told)
    });
    tokio::select! {
        () = agent => panic!("the stream ended"),
        told = told => {
            let message = told["message"].as_str().unwrap();
            assert!(message.contains("agent-1") && message.contains("I do not know this"), "{message}");
        }
    }
    // Nobody refuses it any more when the agent is gone.
    drop((requests, responses));
    eventually("the condition is mended", || async {
        let told = condition(&cluster, "bad", 1).await;
        (told["reason"] == "Accepted").then_some(told)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn service_entries_carry_a_condition_beside_the_addresses_that_they_are_allotted() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    replica.ready().await;
    let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "ServiceEntry");
    let entries = Api::<DynamicObject>::namespaced_with(
        cluster.client.clone(),
        "shop",
        &ApiResource::from_gvk_with_plural(&kind, "serviceentries"),
    );
    let entry = |hosts: Value| {
        cluster::object(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "api"},
            "spec": {"hosts": hosts, "resolution": "DNS", "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]},
        }))
    };
    // Its status once our condition is about this generation and it has an address.
    let status = async |generation: i64| {
        eventually("the entry has a condition and an address", || async {
            let status = entries.get("api").await.ok()?.data["status"].clone();
            let condition = status["conditions"].as_array()?.iter().find(|condition| {
                condition["type"] == "ZtunnelAccepted" && condition["observedGeneration"] == generation
            })?;
            status["addresses"][0]["value"].as_str()?;
            Some(condition.clone())
        })
        .await
    };
    entries
        .create(&PostParams::default(), &entry(json!(["api.example.com"])))
        .await
        .unwrap();
    let told = status(1).await;
    assert_eq!(
        (&told["status"], &told["reason"]),
        (&json!("True"), &json!("Accepted")),
        "{told}"
    );
    let partly = json!({"spec": {"hosts": ["api.example.com", "*.example.com"]}});
    entries
        .patch("api", &PatchParams::default(), &Patch::Merge(&partly))
        .await
        .unwrap();
    let generation = entries.get("api").await.unwrap().metadata.generation.unwrap();
    let told = status(generation).await;
    assert_eq!(told["status"], "False", "{told}");
    let message = told["message"].as_str().unwrap();
    assert!(
        message.contains("spec.hosts[1]") && message.contains("the rest of it holds"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_without_conditions_get_an_event() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    replica.ready().await;
    let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "WorkloadEntry");
    let entries = Api::<DynamicObject>::namespaced_with(
        cluster.client.clone(),
        "shop",
        &ApiResource::from_gvk_with_plural(&kind, "workloadentries"),
    );
    let entry = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": {"name": "vm"}, "spec": {"address": "unix:///var/run/app.sock"},
    });
    entries
        .create(&PostParams::default(), &cluster::object(entry))
        .await
        .unwrap();
    let event = eventually("an Event says what is wrong", || async {
        let events = cluster
            .api::<Event>("shop")
            .list(&kube::api::ListParams::default())
            .await
            .ok()?;
        events
            .items
            .into_iter()
            .find(|event| event.involved_object.name.as_deref() == Some("vm"))
    })
    .await;
    assert_eq!((event.type_.as_deref(), event.count), (Some("Warning"), Some(1)));
    assert!(event.message.unwrap().contains("spec.address"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_namespace_has_the_trust_bundle() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    replica.ready().await;
    let right = async |namespace: &'static str| {
        eventually("the bundle is there", || async {
            let text = config_map(&cluster, namespace, "istio-ca-root-cert").await?;
            text.contains("BEGIN CERTIFICATE").then_some(text)
        })
        .await
    };
    let text = right("shop").await;
    create(
        &Api::<Namespace>::all(cluster.client.clone()),
        json!({"metadata": {"name": "late"}}),
    )
    .await;
    assert_eq!(right("late").await, text);
    let edit = json!({"data": {"root-cert.pem": "mine"}});
    let maps = cluster.api::<ConfigMap>("shop");
    maps.patch("istio-ca-root-cert", &PatchParams::default(), &Patch::Merge(&edit))
        .await
        .unwrap();
    assert_eq!(right("shop").await, text);
    maps.delete("istio-ca-root-cert", &kube::api::DeleteParams::default())
        .await
        .unwrap();
    assert_eq!(right("shop").await, text);
}
