//! Where pods may go, from a real API: heard, kept, found again.

use std::{net::TcpListener, path::Path, time::Duration};

use ::store::Server;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, PostParams},
};
use mesh::Knowledge;
use model::{OutboundMode, OutboundTrafficPolicy};
use serde_json::{Value, json};

use super::{outbound_source::OutboundSource, source::client_of};

/// Nothing here takes this long, unless it never happens.
const NEVER: Duration = Duration::from_secs(30);

struct Lab {
    directory: tempfile::TempDir,
    server: Server,
    client: Client,
}

impl Lab {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = ::store::Config {
            directory: directory.path().join("store"),
            listeners: vec![TcpListener::bind("127.0.0.1:0").unwrap()],
            names: Vec::new(),
            service_cidrs: Vec::new(),
        };
        let server = Server::start(config).await.unwrap();
        let kubeconfig = server.kubeconfig(&format!("https://{}", server.addresses()[0]));
        let kubeconfig = kube::config::Kubeconfig::from_yaml(&kubeconfig).unwrap();
        let client = client_of(kubeconfig).await.unwrap();
        let namespaces = Api::<Namespace>::all(client.clone());
        for name in ["istio-system", "shop"] {
            let namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            let created = namespaces.create(&PostParams::default(), &namespace).await;
            assert!(created.is_ok() || name == "istio-system", "{created:?}");
        }
        Self {
            directory,
            server,
            client,
        }
    }

    fn state(&self) -> &Path {
        self.directory.path()
    }

    fn maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), "istio-system")
    }

    async fn mesh_config(&self, text: &str) {
        let map = json!({"metadata": {"name": "istio"}, "data": {"mesh": text}});
        let map: ConfigMap = serde_json::from_value(map).unwrap();
        let _ = self.maps().delete("istio", &DeleteParams::default()).await;
        self.maps().create(&PostParams::default(), &map).await.unwrap();
    }

    async fn sidecar(&self, name: &str, spec: Value) {
        let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "Sidecar");
        let resource = ApiResource::from_gvk_with_plural(&kind, "sidecars");
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), "shop", &resource);
        let mut object = DynamicObject::new(name, &resource);
        object.data = json!({"spec": spec});
        api.create(&PostParams::default(), &object).await.unwrap();
    }

    /// An agent's source, that runs, and what is known by it.
    fn agent(&self) -> (OutboundSource, Knowledge, tokio::task::JoinHandle<()>) {
        let (writer, knowledge) = mesh::new();
        let source = OutboundSource::new(
            self.client.clone(),
            "istio-system",
            "istio",
            self.state(),
            writer.outbound(),
        );
        let running = source.clone();
        let task = tokio::spawn(async move { running.run().await });
        (source, knowledge, task)
    }
}

fn only() -> OutboundTrafficPolicy {
    OutboundTrafficPolicy {
        mode: OutboundMode::RegistryOnly,
        ..OutboundTrafficPolicy::default()
    }
}

async fn until(knowledge: &Knowledge, expected: &OutboundTrafficPolicy) {
    let mut changed = knowledge.changed();
    let wait = async {
        while knowledge.snapshot().outbound() != Some(expected) {
            changed.changed().await.unwrap();
        }
    };
    let waited = tokio::time::timeout(NEVER, wait).await;
    waited.unwrap_or_else(|_| panic!("{:?} and not {expected:?}", knowledge.snapshot().outbound()));
}

#[tokio::test]
async fn the_mesh_configuration_and_sidecars_say_where_pods_may_go() {
    let lab = Lab::new().await;
    let (source, knowledge, _task) = lab.agent();
    assert!(!source.problems().is_empty(), "it is not known yet, and that is said");
    // That there is no such ConfigMap is an answer.
    until(&knowledge, &OutboundTrafficPolicy::default()).await;
    assert_eq!(source.problems(), Vec::<String>::new());
    lab.mesh_config("outboundTrafficPolicy: {mode: REGISTRY_ONLY}").await;
    until(&knowledge, &only()).await;
    lab.sidecar("a", json!({"outboundTrafficPolicy": {"mode": "ALLOW_ANY"}}))
        .await;
    let mut free = only();
    free.namespaces.insert("shop".into(), OutboundMode::AllowAny);
    until(&knowledge, &free).await;
    lab.maps().delete("istio", &DeleteParams::default()).await.unwrap();
    until(&knowledge, &OutboundTrafficPolicy::default()).await;
}

#[tokio::test]
async fn what_can_not_be_read_changes_nothing() {
    let lab = Lab::new().await;
    lab.mesh_config("outboundTrafficPolicy: {mode: REGISTRY_ONLY}").await;
    let (source, knowledge, _task) = lab.agent();
    until(&knowledge, &only()).await;
    let map = json!({"metadata": {"name": "istio"}, "data": {"mesh": "outboundTrafficPolicy: {mode: ALLOW}"}});
    let mut map: ConfigMap = serde_json::from_value(map).unwrap();
    map.metadata.resource_version = lab.maps().get("istio").await.unwrap().metadata.resource_version;
    lab.maps().replace("istio", &PostParams::default(), &map).await.unwrap();
    let wait = async {
        while source.problems().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(NEVER, wait).await.unwrap();
    assert!(
        source.problems()[0].contains("neither ALLOW_ANY nor REGISTRY_ONLY"),
        "{:?}",
        source.problems()
    );
    assert_eq!(knowledge.snapshot().outbound(), Some(&only()));
}

#[tokio::test]
async fn what_held_is_found_again_with_the_api_away() {
    let lab = Lab::new().await;
    lab.mesh_config("outboundTrafficPolicy: {mode: REGISTRY_ONLY}").await;
    let (_, knowledge, task) = lab.agent();
    until(&knowledge, &only()).await;
    task.abort();
    let Lab {
        directory,
        server,
        client,
    } = lab;
    server.stop().await;
    let (writer, knowledge) = mesh::new();
    let at = |path: &Path| OutboundSource::new(client.clone(), "istio-system", "istio", path, writer.outbound());
    let _source = at(directory.path());
    assert_eq!(knowledge.snapshot().outbound(), Some(&only()));
    // And where nothing was kept, nothing is known.
    let nothing = at(&directory.path().join("elsewhere"));
    assert_eq!(knowledge.snapshot().outbound(), None);
    assert!(nothing.problems()[0].contains("not known yet"));
}
