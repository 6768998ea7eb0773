//! A control plane through its life: what it serves, roots that change, Secrets that break, an API that goes away.

#![allow(clippy::unwrap_used)]

mod cluster;

use std::{collections::BTreeMap, time::Duration};

use cluster::{CART, Cluster, Replica, certificate, csr, eventually, roots_of, verifies};
use control::Config;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use proto::{
    Message,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    workload::{Address, address::Type},
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, transport::Channel};

/// A stream of all addresses, each response acknowledged.
struct Addresses {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    names: BTreeMap<String, Address>,
}

impl Addresses {
    async fn open(channel: &Channel, token: &str) -> Self {
        let (requests, sent) = mpsc::channel(8);
        let first = DeltaDiscoveryRequest {
            type_url: proto::ADDRESS_TYPE.into(),
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(first).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(sent));
        let bearer = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
        Self {
            requests,
            responses: client.delta_aggregated_resources(request).await.unwrap().into_inner(),
            names: BTreeMap::new(),
        }
    }

    async fn until(&mut self, what: &str, so: impl Fn(&BTreeMap<String, Address>) -> bool) {
        while !so(&self.names) {
            let next = tokio::time::timeout(Duration::from_secs(60), self.responses.message()).await;
            let response = next.unwrap_or_else(|_| panic!("never: {what}")).unwrap().unwrap();
            for name in response.removed_resources {
                self.names.remove(&name);
            }
            for resource in response.resources {
                let address = Address::decode(resource.resource.unwrap().value.as_slice()).unwrap();
                self.names.insert(resource.name, address);
            }
            let acknowledge = DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                ..DeltaDiscoveryRequest::default()
            };
            self.requests.send(acknowledge).await.unwrap();
        }
    }
}

fn has_pod(names: &BTreeMap<String, Address>, name: &str) -> bool {
    names.values().any(|address| match &address.r#type {
        Some(Type::Workload(workload)) => workload.name == name,
        _ => false,
    })
}

async fn give_address(cluster: &Cluster, pod: &str, ip: &str) {
    let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}});
    let pods = cluster.api::<k8s_openapi::api::core::v1::Pod>("shop");
    pods.patch_status(pod, &PatchParams::default(), &Patch::Merge(&status))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_reach_an_agent_and_outlive_the_api() {
    let mut cluster = Cluster::new().await;
    give_address(&cluster, "cart-1", "10.0.0.1").await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let token = cluster.agent(1).await;
    let mut addresses = Addresses::open(&channel, &token).await;
    addresses
        .until("the pod that was there", |names| has_pod(names, "cart-1"))
        .await;
    give_address(&cluster, "db-1", "10.0.0.2").await;
    addresses
        .until("the pod that came", |names| has_pod(names, "db-1"))
        .await;
    // Without the API, what is known is served, and certificates are signed for callers that are known.
    cluster.stop_api().await;
    let mut others = Addresses::open(&channel, &token).await;
    others
        .until("all of it", |names| has_pod(names, "cart-1") && has_pod(names, "db-1"))
        .await;
    certificate(&channel, &token, Some(CART), csr()).await.unwrap();
    assert_eq!(replica.get("/readyz").await.unwrap().0, 200);
    // What happened meanwhile is made up for.
    cluster.start_api().await;
    cluster.delete_pod("shop", "cart-1").await;
    addresses
        .until("the pod that went", |names| !has_pod(names, "cart-1"))
        .await;
    let (_, syncz) = replica.get("/debug/syncz").await.unwrap();
    let syncz: serde_json::Value = serde_json::from_str(&syncz).unwrap();
    assert_eq!(syncz["clients"].as_array().unwrap().len(), 2, "{syncz}");
    let (_, metrics) = replica.get("/metrics").await.unwrap();
    assert!(
        metrics.contains("citadel_server_success_cert_issuance_count_total 1"),
        "{metrics}"
    );
    assert!(metrics.contains("pilot_xds 2"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_agree_on_one_authority() {
    let cluster = Cluster::new().await;
    let (one, two) = tokio::join!(cluster.control(), cluster.control());
    let token = cluster.agent(1).await;
    let from_one = certificate(&one.connect().await, &token, Some(CART), csr())
        .await
        .unwrap();
    let from_two = certificate(&two.connect().await, &token, Some(CART), csr())
        .await
        .unwrap();
    assert_eq!(from_one[1..], from_two[1..], "the same signer and the same roots");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_ends_sends_its_clients_away() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let token = cluster.agent(1).await;
    let mut addresses = Addresses::open(&channel, &token).await;
    let (ended, ()) = tokio::join!(
        async {
            loop {
                match addresses.responses.message().await {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            }
        },
        replica.control.stop()
    );
    assert_eq!(ended.unwrap_err().code(), tonic::Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_leads_when_the_first_ends() {
    let cluster = Cluster::new().await;
    let one = cluster.control().await;
    let bundle = async |namespace: &'static str| {
        let found = || cluster::config_map(&cluster, namespace, "istio-ca-root-cert");
        eventually("the leader writes the bundle", found).await;
    };
    bundle("shop").await;
    let two = cluster.control().await;
    two.ready().await;
    one.control.stop().await;
    let namespaces = kube::Api::<k8s_openapi::api::core::v1::Namespace>::all(cluster.client.clone());
    cluster::create(&namespaces, json!({"metadata": {"name": "late"}})).await;
    bundle("late").await;
}

/// An authority of the user's, as `cacerts` has it.
fn given() -> BTreeMap<String, String> {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{name} {}", rand_name()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    };
    let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let root = authority("root");
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let signer = authority("signer")
        .signed_by(&key, &Issuer::new(root, root_key))
        .unwrap()
        .pem();
    BTreeMap::from([
        ("ca-cert.pem".into(), signer.clone()),
        ("ca-key.pem".into(), key.serialize_pem()),
        ("cert-chain.pem".into(), format!("{signer}{root_pem}")),
        ("root-cert.pem".into(), root_pem),
    ])
}

/// Two authorities of one name would be mistaken for each other.
fn rand_name() -> String {
    use rcgen::PublicKeyData;
    let key = rcgen::KeyPair::generate().unwrap();
    key.der_bytes()
        .iter()
        .skip(1)
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

async fn give(cluster: &Cluster, values: &BTreeMap<String, String>) {
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts"}, "stringData": values,
    });
    let secrets = cluster.api::<Secret>("istio-system");
    secrets
        .patch("cacerts", &PatchParams::apply("user").force(), &Patch::Apply(&secret))
        .await
        .unwrap();
}

fn quick() -> Config {
    Config {
        root_overlap: Duration::from_secs(3),
        ..Config::default()
    }
}

async fn issue(replica: &Replica, token: &str) -> Vec<String> {
    certificate(&replica.connect().await, token, Some(CART), csr())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_root_takes_over_without_an_outage() {
    let cluster = Cluster::new().await;
    let replica = cluster.control_with(quick()).await;
    let token = cluster.agent(1).await;
    let before = issue(&replica, &token).await;
    give(&cluster, &given()).await;
    eventually("the new root is announced", || async {
        (replica.bundle().await.len() == 2).then_some(())
    })
    .await;
    let announced = issue(&replica, &token).await;
    assert_eq!(announced[1], before[1], "the old one signs on");
    assert_eq!(roots_of(&announced).len(), 2);
    let after = eventually("the new one signs", || async {
        let chain = issue(&replica, &token).await;
        (chain[1] != before[1]).then_some(chain)
    })
    .await;
    assert!(
        verifies(&after, &roots_of(&announced)),
        "the new is known to who was told in time"
    );
    assert!(verifies(&before, &roots_of(&after)), "the old is still trusted");
    eventually("the old root leaves", || async {
        (replica.bundle().await.len() == 1).then_some(())
    })
    .await;
    assert!(verifies(&after, &replica.bundle().await));
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_cacerts_are_refused_by_name_and_the_last_good_one_signs_on() {
    let cluster = Cluster::new().await;
    let mut values = given();
    give(&cluster, &values).await;
    let replica = cluster.control().await;
    let token = cluster.agent(1).await;
    let before = issue(&replica, &token).await;
    values.insert("ca-key.pem".into(), given()["ca-key.pem"].clone());
    give(&cluster, &values).await;
    eventually("it is said which key is wrong", || async {
        let (_, syncz) = replica.get("/debug/syncz").await?;
        syncz.contains("Secret istio-system/cacerts, ca-key.pem").then_some(())
    })
    .await;
    assert_eq!(issue(&replica, &token).await[1..], before[1..]);
    // A replica that starts now takes what is in force, too.
    assert_eq!(issue(&cluster.control().await, &token).await[1..], before[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_broken_cacerts_from_the_start_nothing_is_made_up() {
    let cluster = Cluster::new().await;
    let mut values = given();
    values.remove("root-cert.pem");
    give(&cluster, &values).await;
    let replica = cluster.control().await;
    eventually("it is said why it is not ready", || async {
        let (status, text) = replica.get("/readyz").await?;
        (status == 503 && text.contains("cacerts, root-cert.pem")).then_some(())
    })
    .await;
    assert!(
        cluster
            .api::<Secret>("istio-system")
            .get_opt("istio-ca-secret")
            .await
            .unwrap()
            .is_none()
    );
    give(&cluster, &given()).await;
    replica.ready().await;
}
