//! Certificates from a control plane on the embedded API: who gets which, and who gets none.

#![allow(clippy::unwrap_used)]

mod cluster;

use cluster::{CART, Cluster, DB, certificate, csr, identity_of, roots_of, verifies};
use futures_util::future::join_all;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_certificates_for_its_own_pods_only() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let token = cluster.agent(1).await;
    let chain = certificate(&channel, &token, Some(CART), csr()).await.unwrap();
    assert_eq!((chain.len(), identity_of(&chain[0])), (3, CART.to_owned()));
    assert!(verifies(&chain, &replica.bundle().await));
    assert_eq!(roots_of(&chain), replica.bundle().await);
    let refused = certificate(&channel, &token, Some(DB), csr()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(
        refused.message().contains("no pod of shop/db runs on its node n1"),
        "{}",
        refused.message()
    );
    // Its own, too, and that of a pod that came a moment ago.
    let own = certificate(&channel, &token, None, csr()).await.unwrap();
    assert_eq!(
        identity_of(&own[0]),
        "spiffe://cluster.local/ns/istio-system/sa/ztunnel"
    );
    cluster.pod("shop", "db-2", "db", "n1").await;
    let late = certificate(&channel, &token, Some(DB), csr()).await.unwrap();
    assert_eq!(identity_of(&late[0]), DB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_its_own_certificate_only() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let token = cluster.token("shop", "cart", Some("cart-1"), "istio-ca").await;
    let own = certificate(&channel, &token, None, csr()).await.unwrap();
    assert_eq!(identity_of(&own[0]), CART);
    let other = certificate(&channel, &token, Some(DB), csr()).await.unwrap_err();
    assert_eq!(other.code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_no_good_are_refused() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let ask = async |token: &str| certificate(&channel, token, Some(CART), csr()).await.unwrap_err();
    assert_eq!(ask("nonsense").await.code(), Code::Unauthenticated);
    let other_audience = cluster.token("istio-system", "ztunnel", Some("agent-1"), "api").await;
    assert_eq!(ask(&other_audience).await.code(), Code::Unauthenticated);
    let unbound = cluster.token("istio-system", "ztunnel", None, "istio-ca").await;
    let refused = ask(&unbound).await;
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(
        refused.message().contains("not bound to a pod"),
        "{}",
        refused.message()
    );
    let mut forged = cluster.agent(1).await;
    forged.replace_range(forged.len() - 8.., "AAAAAAAA");
    assert_eq!(ask(&forged).await.code(), Code::Unauthenticated);
    // The pod goes, and another of its name comes: the cached answer about the token does not help it.
    let stale = cluster.agent(1).await;
    certificate(&channel, &stale, Some(CART), csr()).await.unwrap();
    cluster.delete_pod("istio-system", "agent-1").await;
    cluster.pod("istio-system", "agent-1", "ztunnel", "n1").await;
    cluster::eventually("the token of a pod that is gone is refused", || async {
        let refused = certificate(&channel, &stale, Some(CART), csr()).await.err()?;
        (refused.code() == Code::Unauthenticated).then_some(())
    })
    .await;
    certificate(&channel, &cluster.agent(1).await, Some(CART), csr())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn weak_and_malformed_requests_are_refused_with_a_reason() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channel = replica.connect().await;
    let token = cluster.agent(1).await;
    for (request, reason) in [
        (include_str!("../src/ca/testdata/rsa-1024.csr").to_owned(), "1024 bits"),
        (include_str!("../src/ca/testdata/p224.csr").to_owned(), "P-256"),
        (
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n".to_owned(),
            "PKCS #10",
        ),
        (String::new(), "PEM"),
        ("x".repeat(20_000), "16384"),
    ] {
        let refused = certificate(&channel, &token, Some(CART), request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(reason), "{}", refused.message());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_requests_at_once_are_answered_or_refused_with_advice() {
    let cluster = Cluster::new().await;
    let replica = cluster.control().await;
    let channels = [replica.connect().await, replica.connect().await];
    let (one, two) = (cluster.agent(1).await, cluster.agent(2).await);
    let request = csr();
    let storm = join_all((0..10_000).map(|_| certificate(&channels[0], &one, Some(CART), request.clone())));
    let other = join_all((0..100).map(|_| certificate(&channels[1], &two, Some(DB), request.clone())));
    let (storm, other) = tokio::join!(storm, other);
    assert!(other.iter().all(Result::is_ok), "the other node is not held up");
    let mut issued = 0;
    for answer in storm {
        match answer {
            Ok(_) => issued += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
            }
        }
    }
    assert!(issued >= 1024, "{issued}");
    certificate(&channels[0], &one, Some(CART), request).await.unwrap();
}
