//! The node's pods from a real API: learnt, resolved, annotated, complained of.

use std::{
    net::TcpListener,
    path::Path,
    time::{Duration, Instant},
};

use ::store::Server;
use k8s_openapi::api::{
    core::v1::{Namespace, Pod},
    events::v1::Event,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use model::NamespacedName;
use serde_json::{Value, json};

use super::{
    kube_source::{Cluster, REDIRECTION, Rules},
    redirection::{self, Board, Wish, Wishes},
    source::client_of,
};

/// Nothing here takes this long, unless it never happens.
const NEVER: Duration = Duration::from_secs(30);

struct Lab {
    directory: tempfile::TempDir,
    server: Server,
    client: Client,
    cluster: Cluster,
}

async fn serve(directory: &Path, listener: TcpListener) -> Server {
    let config = ::store::Config {
        directory: directory.to_owned(),
        listeners: vec![listener],
        names: Vec::new(),
        service_cidrs: Vec::new(),
    };
    Server::start(config).await.unwrap()
}

impl Lab {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = serve(directory.path(), TcpListener::bind("127.0.0.1:0").unwrap()).await;
        let kubeconfig = server.kubeconfig(&format!("https://{}", server.addresses()[0]));
        let client = client_of(kube::config::Kubeconfig::from_yaml(&kubeconfig).unwrap())
            .await
            .unwrap();
        let cluster = Cluster::new(client.clone(), "n1", Rules::default());
        let namespaces = Api::<Namespace>::all(client.clone());
        let shop = serde_json::from_value(json!({"metadata": {"name": "shop"}})).unwrap();
        namespaces.create(&PostParams::default(), &shop).await.unwrap();
        Self {
            directory,
            server,
            client,
            cluster,
        }
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "shop")
    }

    async fn create(&self, name: &str, spec: Value) -> String {
        let mut spec = spec;
        spec["containers"] = json!([{"name": "c", "image": "x"}]);
        spec["nodeName"] = spec.get("nodeName").cloned().unwrap_or(json!("n1"));
        let pod = json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec});
        let pod = serde_json::from_value(pod).unwrap();
        let created = self.pods().create(&PostParams::default(), &pod).await.unwrap();
        created.uid().unwrap()
    }

    async fn label_namespace(&self, mode: Value) {
        let patch = Patch::Merge(json!({"metadata": {"labels": {"istio.io/dataplane-mode": mode}}}));
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces.patch("shop", &PatchParams::default(), &patch).await.unwrap();
    }

    /// Waits until what the cluster knows satisfies `holds`.
    async fn until(&self, holds: impl Fn(&Cluster) -> bool) {
        let mut changed = self.cluster.changed();
        let wait = async {
            while !holds(&self.cluster) {
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(NEVER, wait).await.expect("it never came");
    }
}

fn web() -> NamespacedName {
    NamespacedName::new("shop", "web")
}

#[tokio::test]
async fn labels_enrol_a_running_pod_and_let_it_go() {
    let lab = Lab::new().await;
    let uid = lab.create("web", json!({"serviceAccountName": "default"})).await;
    lab.create("elsewhere", json!({"nodeName": "n2"})).await;
    let cluster = lab.cluster.clone();
    let watching = tokio::spawn(async move { cluster.run().await });
    lab.until(|cluster| cluster.pod(&web()).is_some_and(|pod| !pod.in_mesh && pod.uid == uid))
        .await;
    assert_eq!(lab.cluster.pod(&NamespacedName::new("shop", "elsewhere")), None);
    lab.label_namespace(json!("ambient")).await;
    lab.until(|cluster| cluster.pod(&web()).is_some_and(|pod| pod.in_mesh))
        .await;
    lab.label_namespace(Value::Null).await;
    lab.until(|cluster| cluster.pod(&web()).is_some_and(|pod| !pod.in_mesh))
        .await;
    assert!(lab.cluster.status().synced);
    // On its way out: it is still there, and said to leave; its uid has to agree.
    assert!(!lab.cluster.is_leaving(&web(), &uid));
    lab.pods().delete("web", &DeleteParams::default()).await.unwrap();
    lab.until(|cluster| cluster.is_leaving(&web(), &uid)).await;
    assert!(!lab.cluster.is_leaving(&web(), "its-successor"));
    lab.pods()
        .delete("web", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    lab.until(|cluster| cluster.pod(&web()).is_none()).await;
    watching.abort();
}

#[tokio::test]
async fn pods_with_a_network_of_their_own_are_looked_for_while_nobody_told_of_them() {
    let lab = Lab::new().await;
    let uid = lab.create("web", json!({})).await;
    lab.create("on-node", json!({"hostNetwork": true})).await;
    lab.create("unborn", json!({})).await;
    let status =
        |phase: &str, ip: &str| Patch::Merge(json!({"status": {"phase": phase, "podIP": ip, "podIPs": [{"ip": ip}]}}));
    let pods = lab.pods();
    for (name, ip) in [("web", "10.0.0.7"), ("on-node", "10.1.0.1")] {
        let running = status("Running", ip);
        pods.patch_status(name, &PatchParams::default(), &running)
            .await
            .unwrap();
    }
    assert!(lab.cluster.untold(|_| false).is_empty(), "nothing is known yet");
    let cluster = lab.cluster.clone();
    let watching = tokio::spawn(async move { cluster.run().await });
    lab.until(|cluster| !cluster.untold(|_| false).is_empty()).await;
    let ip: std::net::IpAddr = "10.0.0.7".parse().unwrap();
    let untold = lab.cluster.untold(|_| false);
    let said: Vec<_> = untold
        .iter()
        .map(|pod| (&pod.pod, &*pod.addresses, pod.running))
        .collect();
    assert_eq!(said, [(&web(), &[ip][..], true)]);
    assert_eq!(lab.cluster.holders(), [(web(), vec![ip])]);
    assert!(lab.cluster.untold(|pod| *pod == web()).is_empty());
    assert!(!lab.cluster.denies(&web(), &uid, &[ip]));
    assert!(lab.cluster.denies(&web(), "its-successor", &[ip]));
    let moved = status("Running", "10.0.0.8");
    pods.patch_status("web", &PatchParams::default(), &moved).await.unwrap();
    lab.until(|cluster| cluster.denies(&web(), &uid, &[ip])).await;
    pods.delete("web", &DeleteParams::default()).await.unwrap();
    lab.until(|cluster| cluster.untold(|_| false).is_empty()).await;
    watching.abort();
}

#[tokio::test]
async fn a_pod_that_the_api_does_not_have_is_refused() {
    let lab = Lab::new().await;
    let error = lab.cluster.resolve(&web(), "", &[], Duration::ZERO).await.unwrap_err();
    assert!(
        error.contains("who pod shop/web is cannot be known") && error.contains("404"),
        "{error}"
    );
    lab.create("web", json!({"nodeName": "n2"})).await;
    let error = lab.cluster.resolve(&web(), "", &[], Duration::ZERO).await.unwrap_err();
    assert!(error.contains("runs on \"n2\""), "{error}");
}

#[tokio::test]
async fn the_predecessor_of_a_pod_does_not_stand_for_it() {
    let lab = Lab::new().await;
    lab.label_namespace(json!("ambient")).await;
    let uid = lab.create("web", json!({})).await;
    let error = lab
        .cluster
        .resolve(&web(), "its-successor", &[], Duration::ZERO)
        .await
        .unwrap_err();
    assert!(error.contains(&uid), "{error}");
    // It is asked for before the watch has it.
    let pod = lab.cluster.resolve(&web(), &uid, &[], Duration::ZERO).await.unwrap();
    assert!(pod.in_mesh && *pod.service_account == *"default");
    assert_eq!(lab.cluster.resolve(&web(), "", &[], Duration::ZERO).await.unwrap(), pod);
    let waiting = tokio::spawn({
        let cluster = lab.cluster.clone();
        async move {
            cluster
                .resolve(&NamespacedName::new("shop", "late"), "", &[], NEVER)
                .await
        }
    });
    lab.create("late", json!({})).await;
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_known_stands_while_the_api_is_away() {
    let lab = Lab::new().await;
    let uid = lab.create("web", json!({})).await;
    let cluster = lab.cluster.clone();
    let watching = tokio::spawn(async move { cluster.run().await });
    lab.until(|cluster| cluster.pod(&web()).is_some()).await;
    let address = lab.server.addresses()[0];
    let Lab {
        directory,
        server,
        cluster,
        client,
    } = lab;
    server.stop().await;
    assert_eq!(
        cluster.resolve(&web(), &uid, &[], Duration::ZERO).await.unwrap().uid,
        uid
    );
    assert_eq!(cluster.resolve(&web(), "", &[], Duration::ZERO).await.unwrap().uid, uid);
    let error = cluster
        .resolve(&NamespacedName::new("shop", "new"), "", &[], Duration::ZERO)
        .await
        .unwrap_err();
    assert!(error.contains("cannot be asked"), "{error}");
    // It is back: the watches go on by themselves.
    let begun = Instant::now();
    let listener = loop {
        match TcpListener::bind(address) {
            Ok(listener) => break listener,
            Err(error) => assert!(begun.elapsed() < NEVER, "{error}"),
        }
    };
    let lab = Lab {
        server: serve(directory.path(), listener).await,
        directory,
        cluster,
        client,
    };
    lab.label_namespace(json!("ambient")).await;
    lab.until(|cluster| cluster.pod(&web()).is_some_and(|pod| pod.in_mesh))
        .await;
    watching.abort();
}

#[tokio::test]
async fn an_answer_that_comes_late_is_not_taken_for_news() {
    let lab = Lab::new().await;
    lab.label_namespace(json!("ambient")).await;
    lab.create("web", json!({})).await;
    let cluster = lab.cluster.clone();
    let watching = tokio::spawn(async move { cluster.run().await });
    let in_mesh =
        |expected: bool| move |cluster: &Cluster| cluster.pod(&web()).is_some_and(|pod| pod.in_mesh == expected);
    lab.until(in_mesh(true)).await;
    let patch = async |metadata: Value| {
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        lab.pods().patch("web", &PatchParams::default(), &patch).await.unwrap()
    };
    let late = patch(json!({"annotations": {REDIRECTION: "enabled"}})).await;
    patch(json!({"labels": {"istio.io/dataplane-mode": "none"}})).await;
    lab.until(in_mesh(false)).await;
    lab.cluster.learn_pod(late.clone());
    assert!(in_mesh(false)(&lab.cluster), "it is in the mesh again");
    // The watch has no more to say than this, and not yet.
    watching.abort();
    let _ = watching.await;
    lab.cluster
        .learn_pod(patch(json!({"annotations": {REDIRECTION: null}})).await);
    assert_eq!(lab.cluster.redirection(&web()), None);
    lab.cluster
        .learn_pod(patch(json!({"labels": {"istio.io/dataplane-mode": null}})).await);
    assert!(
        in_mesh(true)(&lab.cluster),
        "an answer before the watch counts for nothing"
    );
    // One that is gone, and one in whose place there is another.
    let cluster = lab.cluster.clone();
    let watching = tokio::spawn(async move { cluster.run().await });
    let at_once = DeleteParams::default().grace_period(0);
    lab.pods().delete("web", &at_once).await.unwrap();
    lab.until(|cluster| cluster.pod(&web()).is_none()).await;
    lab.cluster.learn_pod(late.clone());
    assert_eq!(lab.cluster.pod(&web()), None);
    let successor = lab.create("web", json!({})).await;
    lab.until(in_mesh(true)).await;
    lab.cluster.learn_pod(late);
    assert_eq!(lab.cluster.pod(&web()).unwrap().uid, successor);
    watching.abort();
}

#[tokio::test]
async fn annotations_follow_what_is_so() {
    let lab = Lab::new().await;
    lab.label_namespace(json!("ambient")).await;
    let uid = lab.create("web", json!({})).await;
    // Left wrong by an agent that is no more.
    let stale = lab.create("stale", json!({})).await;
    let wrong = Patch::Merge(json!({"metadata": {"annotations": {REDIRECTION: "enabled"}}}));
    lab.pods()
        .patch("stale", &PatchParams::default(), &wrong)
        .await
        .unwrap();
    let (cluster, board) = (lab.cluster.clone(), Board::default());
    let running = tokio::spawn({
        let board = board.clone();
        async move { tokio::join!(cluster.run(), redirection::run(cluster.clone(), board, "n1".to_owned())) }
    });
    let wishes = |wish, complete| Wishes {
        pods: [(web(), (uid.clone(), wish))].into(),
        complete,
        ..Wishes::default()
    };
    let says = |name: &'static str, expected: Option<&'static str>| {
        move |cluster: &Cluster| cluster.redirection(&NamespacedName::new("shop", name)).as_deref() == expected
    };
    board.put(wishes(Wish::Enabled, false));
    lab.until(says("web", Some("enabled"))).await;
    assert!(
        says("stale", Some("enabled"))(&lab.cluster),
        "nobody knows yet whether it is captured"
    );
    board.put(wishes(Wish::Enabled, true));
    lab.until(says("stale", None)).await;
    // Somebody else's hand is corrected.
    let wrong = Patch::Merge(json!({"metadata": {"annotations": {REDIRECTION: "nonsense"}}}));
    lab.pods().patch("web", &PatchParams::default(), &wrong).await.unwrap();
    let corrected = async {
        while lab.pods().get("web").await.unwrap().annotations()[REDIRECTION] != "enabled" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(NEVER, corrected).await.expect("it stayed wrong");
    board.put(wishes(Wish::Absent, true));
    lab.until(says("web", None)).await;
    let annotations = lab.pods().get("stale").await.unwrap();
    assert_eq!(
        (annotations.uid().unwrap(), annotations.annotations().get(REDIRECTION)),
        (stale, None)
    );
    running.abort();
}

#[tokio::test]
async fn a_host_network_pod_that_asks_is_told_why_not() {
    let lab = Lab::new().await;
    lab.label_namespace(json!("ambient")).await;
    let uid = lab.create("web", json!({"hostNetwork": true})).await;
    let cluster = lab.cluster.clone();
    let running = tokio::spawn(async move {
        tokio::join!(
            cluster.run(),
            redirection::run(cluster.clone(), Board::default(), "n1".to_owned())
        )
    });
    let events = Api::<Event>::namespaced(lab.client.clone(), "shop");
    let found = async {
        loop {
            let list = events.list(&ListParams::default()).await.unwrap();
            let ours = |event: &Event| event.reason.as_deref() == Some("HostNetworkNotCaptured");
            if let Some(event) = list.items.into_iter().find(ours) {
                break event;
            }
        }
    };
    let event = tokio::time::timeout(NEVER, found).await.expect("no Event came");
    assert_eq!(event.regarding.unwrap().uid.unwrap(), uid);
    assert!(event.note.unwrap().contains("node's network"));
    running.abort();
}
