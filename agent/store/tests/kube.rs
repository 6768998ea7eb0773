//! kube-rs against the store, without special cases: typed objects, watchers over restarts and expiry, reflectors,
//! server-side apply, finalizers, tokens.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    path::Path,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenReview},
    core::v1::{ConfigMap, Namespace, Pod, ServiceAccount},
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        WatchStreamExt as _, finalizer, reflector,
        watcher::{self, Event},
    },
};
use serde_json::json;
use store::Server;

/// Nothing here takes this long, unless it never happens.
const NEVER: Duration = Duration::from_secs(60);

async fn start(directory: &Path, listener: TcpListener) -> Server {
    let config = store::Config {
        directory: directory.to_owned(),
        listeners: vec![listener],
        names: Vec::new(),
        service_cidrs: Vec::new(),
    };
    Server::start(config).await.unwrap()
}

async fn client_of(kubeconfig: &str) -> Client {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    Client::try_from(config).unwrap()
}

struct Fixture {
    directory: tempfile::TempDir,
    address: SocketAddr,
    server: Server,
    client: Client,
}

impl Fixture {
    async fn new() -> Self {
        // kube-rs takes the process's provider.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = start(directory.path(), listener).await;
        let client = client_of(&server.kubeconfig(&format!("https://{address}"))).await;
        let fixture = Self {
            directory,
            address,
            server,
            client,
        };
        let shop: Namespace = object(json!({"metadata": {"name": "shop"}}));
        fixture
            .api_of_all::<Namespace>()
            .create(&PostParams::default(), &shop)
            .await
            .unwrap();
        fixture
    }

    fn api_of_all<K: kube::Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    fn maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), "shop")
    }

    /// The same directory and address, in a new server.
    async fn restart(self) -> Self {
        self.server.stop().await;
        let listener = TcpListener::bind(self.address).unwrap();
        let server = start(self.directory.path(), listener).await;
        Self { server, ..self }
    }
}

fn object<K: serde::de::DeserializeOwned>(value: serde_json::Value) -> K {
    serde_json::from_value(value).unwrap()
}

fn map(name: &str, value: &str) -> ConfigMap {
    object(json!({"metadata": {"name": name, "labels": {"is": value}}, "data": {"x": value}}))
}

/// The next event of a watcher that a test has anything to say of.
async fn next<K>(events: &mut (impl Stream<Item = watcher::Result<Event<K>>> + Unpin)) -> Event<K> {
    let wait = async {
        loop {
            match events.next().await.unwrap() {
                Ok(event) => return event,
                // A watcher says what it met, and goes on.
                Err(error) => eprintln!("watcher: {error}"),
            }
        }
    };
    tokio::time::timeout(NEVER, wait).await.expect("an event comes")
}

fn said(event: Event<ConfigMap>) -> String {
    match event {
        Event::Init => "init".into(),
        Event::InitDone => "done".into(),
        Event::InitApply(object) => format!("has {}={}", object.name_any(), object.data.unwrap()["x"]),
        Event::Apply(object) => format!("put {}={}", object.name_any(), object.data.unwrap()["x"]),
        Event::Delete(object) => format!("gone {}", object.name_any()),
    }
}

#[tokio::test]
async fn typed_objects_are_made_read_changed_and_deleted() {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    let made = maps.create(&PostParams::default(), &map("a", "1")).await.unwrap();
    assert!(made.uid().is_some() && made.resource_version().is_some());
    let again = maps.create(&PostParams::default(), &map("a", "1")).await.unwrap_err();
    assert!(
        matches!(again, kube::Error::Api(ref status) if status.reason == "AlreadyExists"),
        "{again}"
    );

    let mut changed = made.clone();
    changed.data.as_mut().unwrap().insert("y".into(), "2".into());
    let changed = maps.replace("a", &PostParams::default(), &changed).await.unwrap();
    assert_ne!(changed.resource_version(), made.resource_version());
    let stale = maps.replace("a", &PostParams::default(), &made).await.unwrap_err();
    assert!(
        matches!(stale, kube::Error::Api(ref status) if status.code == 409),
        "{stale}"
    );

    let patch = Patch::Merge(json!({"data": {"x": null}}));
    let patched = maps.patch("a", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(patched.data.unwrap().keys().collect::<Vec<_>>(), ["y"]);

    maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(maps.get_opt("a").await.unwrap().is_none());
    let gone = maps.get("a").await.unwrap_err().to_string();
    assert!(gone.contains("configmaps \"a\" not found"), "{gone}");
}

#[tokio::test]
async fn lists_are_selected_and_come_in_pages_of_one_moment() {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    for index in 0..7 {
        let value = if index % 2 == 0 { "even" } else { "odd" };
        maps.create(&PostParams::default(), &map(&format!("m{index}"), value))
            .await
            .unwrap();
    }
    let names = |list: &kube::core::ObjectList<ConfigMap>| -> Vec<String> {
        list.items
            .iter()
            .map(|item| item.name_any())
            .filter(|name| name.starts_with('m'))
            .collect()
    };
    let odd = maps.list(&ListParams::default().labels("is in (odd)")).await.unwrap();
    assert_eq!(names(&odd), ["m1", "m3", "m5"]);
    let one = maps
        .list(&ListParams::default().fields("metadata.name=m2"))
        .await
        .unwrap();
    assert_eq!(names(&one), ["m2"]);
    let bad = maps
        .list(&ListParams::default().fields("data.x=1"))
        .await
        .unwrap_err()
        .to_string();
    assert!(bad.contains("field label not supported: data.x"), "{bad}");

    let page = ListParams::default().labels("is").limit(3);
    let first = maps.list(&page).await.unwrap();
    maps.delete("m5", &DeleteParams::default()).await.unwrap();
    let second = maps
        .list(&page.clone().continue_token(first.metadata.continue_.as_ref().unwrap()))
        .await
        .unwrap();
    let third = maps
        .list(&page.clone().continue_token(second.metadata.continue_.as_ref().unwrap()))
        .await
        .unwrap();
    let pages = [&first, &second, &third].map(names);
    // m5 was there when the list began.
    assert_eq!(pages.concat(), ["m0", "m1", "m2", "m3", "m4", "m5", "m6"]);
    assert_eq!(first.metadata.resource_version, third.metadata.resource_version);
    assert!(third.metadata.continue_.as_deref().unwrap_or_default().is_empty());
}

async fn follows(config: watcher::Config) {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    maps.create(&PostParams::default(), &map("a", "1")).await.unwrap();
    let mut events = pin!(kube::runtime::watcher(maps.clone(), config.labels("is=1")).default_backoff());
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(said(next(&mut events).await));
    }
    assert_eq!(seen, ["init", "has a=1", "done"]);
    maps.create(&PostParams::default(), &map("b", "1")).await.unwrap();
    assert_eq!(said(next(&mut events).await), "put b=1");
    // The selector matches it no longer, and then again.
    maps.patch(
        "b",
        &PatchParams::default(),
        &Patch::Merge(json!({"metadata": {"labels": {"is": "2"}}})),
    )
    .await
    .unwrap();
    assert_eq!(said(next(&mut events).await), "gone b");
    maps.patch(
        "b",
        &PatchParams::default(),
        &Patch::Merge(json!({"metadata": {"labels": {"is": "1"}}})),
    )
    .await
    .unwrap();
    assert_eq!(said(next(&mut events).await), "put b=1");

    // A restart ends the watch; the watcher goes on where it was.
    let fixture = fixture.restart().await;
    let maps = fixture.maps();
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    let mut last = said(next(&mut events).await);
    // Where the history before the restart is not kept, it lists anew.
    while last == "init" || last.starts_with("has") {
        assert!(!last.contains("has a"), "{last}");
        last = said(next(&mut events).await);
    }
    assert!(last == "gone a" || last == "done", "{last}");
    maps.create(&PostParams::default(), &map("c", "1")).await.unwrap();
    assert_eq!(said(next(&mut events).await), "put c=1");
}

#[tokio::test]
async fn a_watcher_sees_every_change_also_over_a_restart() {
    follows(watcher::Config::default()).await;
}

#[tokio::test]
async fn a_streaming_watcher_sees_every_change_also_over_a_restart() {
    follows(watcher::Config::default().streaming_lists()).await;
}

#[tokio::test]
async fn an_expired_revision_is_a_410_after_which_a_watcher_lists_anew() {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    // A revision that this server never had.
    let mut events = pin!(
        maps.watch(&kube::api::WatchParams::default(), "1000000")
            .await
            .unwrap()
            .boxed()
    );
    let first = tokio::time::timeout(NEVER, events.try_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let kube::core::WatchEvent::Error(status) = first else {
        panic!("{first:?}")
    };
    assert_eq!((status.code, status.reason.as_str()), (410, "Expired"));

    // The same in a watcher: a new server without the data of the old, whose revisions are far behind.
    for index in 0..100 {
        let name = format!("m{index}");
        maps.create(&PostParams::default(), &map(&name, "1")).await.unwrap();
        maps.delete(&name, &DeleteParams::default()).await.unwrap();
    }
    maps.create(&PostParams::default(), &map("old", "1")).await.unwrap();
    let mut events = pin!(kube::runtime::watcher(maps, watcher::Config::default().labels("is")).default_backoff());
    while said(next(&mut events).await) != "done" {}
    let address = fixture.address;
    fixture.server.stop().await;
    for entry in std::fs::read_dir(fixture.directory.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::remove_file(path).unwrap();
        }
    }
    let server = start(fixture.directory.path(), TcpListener::bind(address).unwrap()).await;
    let client = client_of(&server.kubeconfig(&format!("https://{address}"))).await;
    let shop: Namespace = object(json!({"metadata": {"name": "shop"}}));
    Api::all(client.clone())
        .create(&PostParams::default(), &shop)
        .await
        .unwrap();
    Api::namespaced(client, "shop")
        .create(&PostParams::default(), &map("new", "1"))
        .await
        .unwrap();
    let mut seen = Vec::new();
    while seen.last().map(String::as_str) != Some("done") {
        seen.push(said(next(&mut events).await));
    }
    assert!(
        seen.contains(&"has new=1".to_owned()) && !seen.contains(&"has old=1".to_owned()),
        "{seen:?}"
    );
    server.stop().await;
}

#[tokio::test]
async fn a_reflector_holds_what_the_server_holds() {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    let (reader, writer) = reflector::store();
    let watcher = kube::runtime::watcher(maps.clone(), watcher::Config::default().labels("is"));
    let follows = reflector(writer, watcher.default_backoff())
        .touched_objects()
        .for_each(|_| async {});
    let check = async {
        reader.wait_until_ready().await.unwrap();
        for index in 0..50 {
            maps.create(&PostParams::default(), &map(&format!("m{index}"), "1"))
                .await
                .unwrap();
        }
        maps.delete_collection(
            &DeleteParams::default(),
            &ListParams::default().fields("metadata.name=m7"),
        )
        .await
        .unwrap();
        let holds = |name: &str| reader.state().iter().any(|object| object.name_any() == name);
        while reader.len() != 49 || holds("m7") {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = follows => panic!("the reflector ended"),
        done = tokio::time::timeout(NEVER, check) => done.unwrap(),
    }
}

#[tokio::test]
async fn what_one_manager_applied_another_takes_only_by_force() {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    let apply = |value: &str| {
        Patch::Apply(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"x": value},
        }))
    };
    let one = PatchParams::apply("one");
    let made = maps.patch("a", &one, &apply("1")).await.unwrap();
    assert_eq!(made.managed_fields()[0].manager.as_deref(), Some("one"));
    let same = maps.patch("a", &one, &apply("1")).await.unwrap();
    assert_eq!(same.resource_version(), made.resource_version());
    let conflict = maps
        .patch("a", &PatchParams::apply("two"), &apply("2"))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        conflict.contains("conflict with \"one\"") && conflict.contains(".data.x"),
        "{conflict}"
    );
    let forced = maps
        .patch("a", &PatchParams::apply("two").force(), &apply("2"))
        .await
        .unwrap();
    assert_eq!(forced.data.unwrap()["x"], "2");
    let nothing = Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}));
    let given_up = maps.patch("a", &PatchParams::apply("two"), &nothing).await.unwrap();
    assert_eq!(given_up.data.unwrap_or_default(), BTreeMap::new());
}

#[tokio::test]
async fn a_finalizer_runs_before_its_object_goes() {
    let fixture = Fixture::new().await;
    let maps = fixture.maps();
    maps.create(&PostParams::default(), &map("a", "1")).await.unwrap();
    let reconcile = |object: ConfigMap| {
        let maps = maps.clone();
        async move {
            let done = finalizer::finalizer(&maps, "undercurrent.io/test", Arc::new(object), |event| async move {
                let what = match event {
                    finalizer::Event::Apply(_) => "apply",
                    finalizer::Event::Cleanup(_) => "cleanup",
                };
                eprintln!("{what}");
                Ok::<_, std::convert::Infallible>(kube::runtime::controller::Action::await_change())
            });
            done.await.unwrap();
        }
    };
    reconcile(maps.get("a").await.unwrap()).await;
    let held = maps.get("a").await.unwrap();
    assert_eq!(held.finalizers(), ["undercurrent.io/test"]);
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    let going = maps.get("a").await.unwrap();
    assert!(going.metadata.deletion_timestamp.is_some());
    reconcile(going).await;
    assert!(maps.get_opt("a").await.unwrap().is_none());
}

fn pod(name: &str) -> Pod {
    object(json!({
        "metadata": {"name": name},
        "spec": {"serviceAccountName": "web", "nodeName": "n1", "containers": [{"name": "c", "image": "x"}]},
    }))
}

async fn review(client: &Client, token: &str, audience: &str) -> serde_json::Value {
    let reviews: Api<TokenReview> = Api::all(client.clone());
    let question: TokenReview = object(json!({"spec": {"token": token, "audiences": [audience]}}));
    let answered = reviews.create(&PostParams::default(), &question).await.unwrap();
    serde_json::to_value(answered.status.unwrap()).unwrap()
}

#[tokio::test]
async fn a_token_dies_with_its_pod() {
    let fixture = Fixture::new().await;
    let accounts: Api<ServiceAccount> = Api::namespaced(fixture.client.clone(), "shop");
    let web: ServiceAccount = object(json!({"metadata": {"name": "web"}}));
    let account = accounts.create(&PostParams::default(), &web).await.unwrap();
    let pods: Api<Pod> = Api::namespaced(fixture.client.clone(), "shop");
    let made = pods.create(&PostParams::default(), &pod("web-1")).await.unwrap();
    let request: TokenRequest = object(json!({"spec": {
        "audiences": ["istio-ca"], "expirationSeconds": 3600,
        "boundObjectRef": {"kind": "Pod", "name": "web-1", "uid": made.uid()},
    }}));
    let issued = accounts
        .create_token_request("web", &PostParams::default(), &request)
        .await
        .unwrap();
    let issued = serde_json::to_value(issued).unwrap();
    let token = issued["status"]["token"].as_str().unwrap().to_owned();

    let good = review(&fixture.client, &token, "istio-ca").await;
    assert_eq!(good["authenticated"], true, "{good}");
    assert_eq!(good["user"]["username"], "system:serviceaccount:shop:web");
    assert_eq!(good["user"]["uid"], json!(account.uid()));
    assert_eq!(good["audiences"], json!(["istio-ca"]));
    let extra = &good["user"]["extra"];
    assert_eq!(extra["authentication.kubernetes.io/pod-name"], json!(["web-1"]));
    assert_eq!(extra["authentication.kubernetes.io/pod-uid"], json!([made.uid()]));
    assert_eq!(extra["authentication.kubernetes.io/node-name"], json!(["n1"]));
    let other = review(&fixture.client, &token, "vault").await;
    assert_ne!(other["authenticated"], true);
    assert!(other["error"].as_str().unwrap().contains("istio-ca"), "{other}");

    // Not even this API takes a token for another audience.
    let mut config = Config::new(format!("https://{}", fixture.address).parse().unwrap());
    config.accept_invalid_certs = true;
    config.auth_info.token = Some(token.clone().into());
    let refused = Client::try_from(config)
        .unwrap()
        .apiserver_version()
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("Unauthorized"), "{refused}");

    pods.delete("web-1", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    pods.create(&PostParams::default(), &pod("web-1")).await.unwrap();
    let dead = review(&fixture.client, &token, "istio-ca").await;
    assert_ne!(dead["authenticated"], true);
    assert!(
        dead["error"].as_str().unwrap().contains("another than the one"),
        "{dead}"
    );
}

#[tokio::test]
async fn anybody_reads_the_version_and_no_more() {
    let fixture = Fixture::new().await;
    let mut config = Config::new(format!("https://{}", fixture.address).parse().unwrap());
    config.accept_invalid_certs = true;
    let nobody = Client::try_from(config).unwrap();
    assert_eq!(nobody.apiserver_version().await.unwrap().major, "1");
    let maps: Api<ConfigMap> = Api::namespaced(nobody, "shop");
    let refused = maps.list(&ListParams::default()).await.unwrap_err().to_string();
    assert!(
        refused.contains("User \"system:anonymous\" cannot list resource \"configmaps\""),
        "{refused}"
    );
}
