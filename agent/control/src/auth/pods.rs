//! Which pods there are and where they run: a view that the watch keeps, and the API itself for what it does not have yet.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt, api::ListParams};
use model::NamespacedName;

use super::AuthError;

/// How long the API may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What matters of a pod here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Its uid.
    pub uid: Arc<str>,
    /// The node it is bound to; empty before that.
    pub node: Arc<str>,
    /// Its service account.
    pub account: Arc<str>,
    /// Not Succeeded or Failed. One that is being deleted still runs.
    pub runs: bool,
}

impl PodFacts {
    /// From an object of the API.
    pub fn of(pod: &serde_json::Value) -> Self {
        let text = |pointer: &str| {
            pod.pointer(pointer)
                .and_then(serde_json::Value::as_str)
                .unwrap_or_default()
        };
        Self::from_parts(
            text("/metadata/uid"),
            text("/spec/nodeName"),
            text("/spec/serviceAccountName"),
            text("/status/phase"),
        )
    }

    fn from_parts(uid: &str, node: &str, account: &str, phase: &str) -> Self {
        Self {
            uid: uid.into(),
            node: node.into(),
            account: if account.is_empty() { "default" } else { account }.into(),
            runs: !matches!(phase, "Succeeded" | "Failed"),
        }
    }
}

type PlaceOfAccount = (Arc<str>, Arc<str>, Arc<str>);

/// All pods, by name, and by node with account.
#[derive(Default)]
pub struct PodView(RwLock<Inner>);

#[derive(Default)]
struct Inner {
    pods: HashMap<NamespacedName, PodFacts>,
    /// (node, namespace, account) → how many run.
    running: HashMap<PlaceOfAccount, usize>,
}

impl PodView {
    /// A pod is new or other than before.
    pub fn put(&self, name: NamespacedName, facts: PodFacts) {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        inner.remove(&name);
        if facts.runs && !facts.node.is_empty() {
            let place = (facts.node.clone(), name.namespace.clone(), facts.account.clone());
            *inner.running.entry(place).or_default() += 1;
        }
        inner.pods.insert(name, facts);
    }

    /// A pod is gone.
    pub fn remove(&self, name: &NamespacedName) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// A pod.
    pub fn get(&self, name: &NamespacedName) -> Option<PodFacts> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .pods
            .get(name)
            .cloned()
    }

    /// Whether a pod of this account runs on this node.
    pub fn runs(&self, node: &Arc<str>, account: &NamespacedName) -> bool {
        let place = (node.clone(), account.namespace.clone(), account.name.clone());
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .running
            .contains_key(&place)
    }
}

impl Inner {
    fn remove(&mut self, name: &NamespacedName) {
        let Some(before) = self.pods.remove(name) else {
            return;
        };
        let place = (before.node, name.namespace.clone(), before.account);
        if before.runs
            && let Some(count) = self.running.get_mut(&place)
        {
            *count -= 1;
            if *count == 0 {
                self.running.remove(&place);
            }
        }
    }
}

/// An answer of the API.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, AuthError>> + Send + 'a>>;

/// The API, for what the watch has not brought yet.
pub trait Pods: Send + Sync + 'static {
    /// One pod.
    fn get<'a>(&'a self, name: &'a NamespacedName) -> Answer<'a, Option<PodFacts>>;
    /// The pods of a namespace on a node.
    fn on_node<'a>(&'a self, node: &'a str, namespace: &'a str) -> Answer<'a, Vec<PodFacts>>;
}

/// By a client.
pub struct KubePods(pub Client);

impl Pods for KubePods {
    fn get<'a>(&'a self, name: &'a NamespacedName) -> Answer<'a, Option<PodFacts>> {
        Box::pin(async move {
            let pods = Api::<Pod>::namespaced(self.0.clone(), &name.namespace);
            let found = in_time(pods.get_opt(&name.name)).await?;
            Ok(found.as_ref().map(facts))
        })
    }

    fn on_node<'a>(&'a self, node: &'a str, namespace: &'a str) -> Answer<'a, Vec<PodFacts>> {
        Box::pin(async move {
            let pods = Api::<Pod>::namespaced(self.0.clone(), namespace);
            let of_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
            let found = in_time(pods.list(&of_node)).await?;
            // An API that does not know the selector answers with more.
            Ok(found.iter().map(facts).filter(|pod| *pod.node == *node).collect())
        })
    }
}

fn facts(pod: &Pod) -> PodFacts {
    let spec = pod.spec.as_ref();
    let node = spec.and_then(|spec| spec.node_name.as_deref());
    let account = spec.and_then(|spec| spec.service_account_name.as_deref());
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    PodFacts::from_parts(
        &pod.uid().unwrap_or_default(),
        node.unwrap_or_default(),
        account.unwrap_or_default(),
        phase.unwrap_or_default(),
    )
}

async fn in_time<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T, AuthError> {
    let unavailable =
        |why: String| AuthError::Unavailable(format!("the Kubernetes API cannot be asked about pods: {why}").into());
    match tokio::time::timeout(PATIENCE, question).await {
        Ok(answer) => answer.map_err(|error| unavailable(error.to_string())),
        Err(_) => Err(unavailable("no answer in time".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(node: &str, phase: &str) -> PodFacts {
        PodFacts::from_parts("u", node, "", phase)
    }

    #[test]
    fn only_pods_that_run_count_for_their_node() {
        let view = PodView::default();
        let (node, account) = (Arc::<str>::from("n1"), NamespacedName::new("shop", "default"));
        let name = |name: &str| NamespacedName::new("shop", name);
        view.put(name("a"), pod("", "Pending"));
        assert!(!view.runs(&node, &account));
        view.put(name("a"), pod("n1", "Pending"));
        view.put(name("b"), pod("n1", "Running"));
        view.put(name("a"), pod("n1", "Succeeded"));
        assert!(view.runs(&node, &account));
        assert!(!view.runs(&"n2".into(), &account));
        view.remove(&name("b"));
        view.remove(&name("b"));
        assert!(!view.runs(&node, &account));
        assert_eq!(view.get(&name("a")), Some(pod("n1", "Succeeded")));
    }

    #[test]
    fn a_pod_is_read_from_the_apis_json() {
        let json = serde_json::json!({
            "metadata": {"uid": "u"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Failed"},
        });
        assert_eq!(PodFacts::of(&json), pod("n1", "Failed"));
        assert_eq!(
            PodFacts::of(&serde_json::json!(3)),
            PodFacts::from_parts("", "", "", "")
        );
    }
}
