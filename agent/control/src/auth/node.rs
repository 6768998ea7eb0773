//! From a token to a caller, and from a caller to the identities it may have.
//!
//! A node agent's token must be bound to a pod that there is, with that uid, and its node is that pod's; it may have the
//! identity of any account of which a pod runs there, in the mesh's trust domain or an alias of it. Everybody else has the
//! account's own identity (`a_node_gets_only_what_runs_on_it`, `others_get_only_their_own`). A pod that the watch has not brought yet is asked for
//! at the API, once, a few at a time for each caller.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use model::{Identity, NamespacedName, TrustDomain};
use tokio::sync::Semaphore;

use super::{AuthError, BoundPod, Caller, PodFacts, PodView, TokenUser, pods::Pods, tokens::Tokens};

/// Questions to the API at once: in all, and for each caller.
const ASKED_AT_ONCE: usize = 32;
const ASKED_PER_CALLER: usize = 8;

/// Whose identities are given out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustDomains {
    /// The mesh's own.
    pub own: TrustDomain,
    /// Those that count as it, for they were the mesh's own, or will be (`trustDomainAliases`).
    pub aliases: Vec<TrustDomain>,
}

impl From<TrustDomain> for TrustDomains {
    fn from(own: TrustDomain) -> Self {
        Self {
            own,
            aliases: Vec::new(),
        }
    }
}

/// Knows callers.
pub struct Authenticator {
    tokens: Tokens,
    view: Arc<PodView>,
    pods: Arc<dyn Pods>,
    node_accounts: BTreeSet<NamespacedName>,
    trust_domains: Arc<ArcSwap<TrustDomains>>,
    asking: Arc<Semaphore>,
    per_caller: Mutex<HashMap<Arc<str>, usize>>,
}

impl Authenticator {
    /// `node_accounts`: whose pods are node agents. The trust domains may change with the mesh configuration.
    pub fn new(
        tokens: Tokens,
        view: Arc<PodView>,
        pods: impl Pods,
        node_accounts: impl IntoIterator<Item = NamespacedName>,
        trust_domains: Arc<ArcSwap<TrustDomains>>,
    ) -> Self {
        Self {
            tokens,
            view,
            pods: Arc::new(pods),
            node_accounts: node_accounts.into_iter().collect(),
            trust_domains,
            asking: Arc::new(Semaphore::new(ASKED_AT_ONCE)),
            per_caller: Mutex::default(),
        }
    }

    /// Who sends this token.
    pub async fn caller(&self, token: &str) -> Result<Caller, AuthError> {
        let TokenUser { account, pod } = self.tokens.check(token).await?;
        let facts = match &pod {
            Some(bound) => Some(self.bound(&account, bound).await?),
            None => None,
        };
        let node = match facts {
            _ if !self.node_accounts.contains(&account) => None,
            Some(facts) if !facts.node.is_empty() => Some(facts.node),
            Some(_) => return Err(unauthenticated(format!("the pod of {account} is on no node yet"))),
            None => None,
        };
        Ok(Caller { account, pod, node })
    }

    /// The pod that a token is bound to, if it is still that one.
    async fn bound(&self, account: &NamespacedName, bound: &BoundPod) -> Result<PodFacts, AuthError> {
        let name = NamespacedName {
            namespace: account.namespace.clone(),
            name: bound.name.clone(),
        };
        let fits = |facts: &PodFacts| facts.uid == bound.uid && !facts.node.is_empty();
        let facts = match self.view.get(&name).filter(fits) {
            Some(facts) => facts,
            None => {
                let _turn = self.turn(&bound.uid).await?;
                let found = self.pods.get(&name).await?;
                found.ok_or_else(|| unauthenticated(format!("the token's pod {name} is gone")))?
            }
        };
        if facts.uid != bound.uid {
            return Err(unauthenticated(format!(
                "the token's pod {name} is gone; another one has its name"
            )));
        }
        if facts.account != account.name {
            return Err(unauthenticated(format!(
                "the token's pod {name} does not run as {account}"
            )));
        }
        if !facts.runs {
            return Err(unauthenticated(format!("the token's pod {name} has ended")));
        }
        Ok(facts)
    }

    /// The identity that a caller's certificate will have: the one it asks for, or its own. A node's agent may ask for those
    /// of an alias, too: agents learn their trust domain when they start, and not all at once.
    pub async fn identity(&self, caller: &Caller, asked: Option<&str>) -> Result<Identity, AuthError> {
        let domains = self.trust_domains.load_full();
        let own = Identity {
            trust_domain: domains.own.clone(),
            namespace: caller.account.namespace.clone(),
            service_account: caller.account.name.clone(),
        };
        let Some(asked) = asked else {
            return Ok(own);
        };
        let denied = |why: String| AuthError::Denied(why.into());
        let asked: Identity = asked
            .parse()
            .map_err(|error| denied(format!("{asked:.300}: {error}")))?;
        if asked == own {
            return Ok(own);
        }
        let Some(node) = &caller.node else {
            let why = match self.node_accounts.contains(&caller.account) {
                true => "its token is not bound to a pod, so its node is not known",
                false => "it is not a node agent's account",
            };
            return Err(denied(format!("{caller} may not ask for {asked}: {why}")));
        };
        if asked.trust_domain != domains.own && !domains.aliases.contains(&asked.trust_domain) {
            return Err(denied(format!(
                "{asked} is not of this trust domain, {}, nor of an alias of it",
                domains.own
            )));
        }
        let account = NamespacedName {
            namespace: asked.namespace.clone(),
            name: asked.service_account.clone(),
        };
        if self.view.runs(node, &account) || self.runs_by_the_api(caller, node, &account).await? {
            return Ok(asked);
        }
        Err(denied(format!(
            "{caller} may not ask for {asked}: no pod of {account} runs on its node {node}"
        )))
    }

    async fn runs_by_the_api(&self, caller: &Caller, node: &str, account: &NamespacedName) -> Result<bool, AuthError> {
        let _turn = self.turn(&caller.key()).await?;
        let pods = self.pods.on_node(node, &account.namespace).await?;
        Ok(pods.iter().any(|pod| pod.runs && pod.account == account.name))
    }

    /// A place among those who ask the API.
    async fn turn(&self, caller: &Arc<str>) -> Result<Turn<'_>, AuthError> {
        let busy = || AuthError::Unavailable("too many questions about new pods at once; try again later".into());
        {
            let mut per_caller = self.per_caller.lock().unwrap_or_else(PoisonError::into_inner);
            let own = per_caller.entry(caller.clone()).or_default();
            if *own >= ASKED_PER_CALLER {
                return Err(busy());
            }
            *own += 1;
        }
        // Counted from here on, also if this future is dropped while it waits.
        let mut turn = Turn {
            authenticator: self,
            caller: caller.clone(),
            _permit: None,
        };
        turn._permit = Some(self.asking.clone().acquire_owned().await.map_err(|_| busy())?);
        Ok(turn)
    }
}

struct Turn<'a> {
    authenticator: &'a Authenticator,
    caller: Arc<str>,
    _permit: Option<tokio::sync::OwnedSemaphorePermit>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut per_caller = self
            .authenticator
            .per_caller
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = per_caller.get_mut(&self.caller) {
            *own -= 1;
            if *own == 0 {
                per_caller.remove(&self.caller);
            }
        }
    }
}

fn unauthenticated(why: String) -> AuthError {
    AuthError::Unauthenticated(why.into())
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::Pin};

    use identity::Clock;

    use super::{
        super::{pods::Answer, tokens::Reviews},
        *,
    };

    /// A token is `e30.e30.<namespace>/<account>/<pod>/<uid>`.
    struct Words;

    impl Reviews for Words {
        fn review(&self, token: String) -> Pin<Box<dyn Future<Output = Result<TokenUser, AuthError>> + Send>> {
            let parts: Vec<_> = token
                .rsplit('.')
                .next()
                .unwrap()
                .split('/')
                .map(str::to_owned)
                .collect();
            let pod = parts.get(2).map(|name| BoundPod {
                name: name.as_str().into(),
                uid: parts[3].as_str().into(),
            });
            let account = NamespacedName::new(parts[0].as_str(), parts[1].as_str());
            Box::pin(std::future::ready(Ok(TokenUser { account, pod })))
        }
    }

    /// The API knows of `late` only, the view of the others.
    struct Late;

    impl Pods for Late {
        fn get<'a>(&'a self, name: &'a NamespacedName) -> Answer<'a, Option<PodFacts>> {
            let found = (&*name.name == "agent-3").then(|| facts("u3", "n3", "ztunnel"));
            Box::pin(std::future::ready(Ok(found)))
        }

        fn on_node<'a>(&'a self, node: &'a str, namespace: &'a str) -> Answer<'a, Vec<PodFacts>> {
            let found = (node == "n1" && namespace == "shop").then(|| facts("u", "n1", "late"));
            Box::pin(std::future::ready(Ok(found.into_iter().collect())))
        }
    }

    fn facts(uid: &str, node: &str, account: &str) -> PodFacts {
        PodFacts {
            uid: uid.into(),
            node: node.into(),
            account: account.into(),
            runs: true,
        }
    }

    fn authenticator() -> Authenticator {
        authenticator_of("cluster.local", &[])
    }

    fn authenticator_of(own: &str, aliases: &[&str]) -> Authenticator {
        let view = PodView::default();
        view.put(
            NamespacedName::new("istio-system", "agent-1"),
            facts("u1", "n1", "ztunnel"),
        );
        view.put(
            NamespacedName::new("istio-system", "agent-2"),
            facts("u2", "n2", "ztunnel"),
        );
        view.put(NamespacedName::new("shop", "cart-1"), facts("u4", "n1", "cart"));
        view.put(NamespacedName::new("shop", "db-1"), facts("u5", "n2", "db"));
        let ended = PodFacts {
            runs: false,
            ..facts("u6", "n1", "job")
        };
        view.put(NamespacedName::new("shop", "job-1"), ended);
        Authenticator::new(
            Tokens::new(Words, Clock::system()),
            Arc::new(view),
            Late,
            [NamespacedName::new("istio-system", "ztunnel")],
            Arc::new(ArcSwap::from_pointee(TrustDomains {
                own: TrustDomain::new(own),
                aliases: aliases.iter().map(|alias| TrustDomain::new(*alias)).collect(),
            })),
        )
    }

    async fn ask(token: &str, asked: Option<&str>) -> Result<String, AuthError> {
        let authenticator = authenticator();
        let caller = authenticator.caller(&format!("e30.e30.{token}")).await?;
        Ok(authenticator.identity(&caller, asked).await?.to_string())
    }

    const AGENT_1: &str = "istio-system/ztunnel/agent-1/u1";

    #[tokio::test]
    async fn a_node_gets_only_what_runs_on_it() {
        let cart = "spiffe://cluster.local/ns/shop/sa/cart";
        assert_eq!(ask(AGENT_1, Some(cart)).await.unwrap(), cart);
        let late = "spiffe://cluster.local/ns/shop/sa/late";
        assert_eq!(ask(AGENT_1, Some(late)).await.unwrap(), late);
        for refused in [
            "spiffe://cluster.local/ns/shop/sa/db",
            "spiffe://cluster.local/ns/shop/sa/job",
            "spiffe://cluster.local/ns/shop/sa/none",
            "spiffe://other/ns/shop/sa/cart",
            "spiffe://cluster.local/ns/shop/sa/",
            "cart",
        ] {
            let error = ask(AGENT_1, Some(refused)).await.unwrap_err();
            assert!(matches!(error, AuthError::Denied(_)), "{refused}: {error}");
        }
        let of_agent_2 = ask("istio-system/ztunnel/agent-2/u2", Some(cart)).await;
        assert!(matches!(of_agent_2, Err(AuthError::Denied(_))));
    }

    #[tokio::test]
    async fn while_the_trust_domain_changes_a_node_gets_identities_of_the_former_one() {
        let authenticator = authenticator_of("new", &["cluster.local", ""]);
        let asks = async |token: &str, asked: &str| {
            let caller = authenticator.caller(&format!("e30.e30.{token}")).await?;
            let given = authenticator.identity(&caller, Some(asked)).await?;
            Ok::<_, AuthError>(given.to_string())
        };
        for domain in ["new", "cluster.local"] {
            let cart = format!("spiffe://{domain}/ns/shop/sa/cart");
            assert_eq!(asks(AGENT_1, &cart).await.unwrap(), cart);
            let late = format!("spiffe://{domain}/ns/shop/sa/late");
            assert_eq!(asks(AGENT_1, &late).await.unwrap(), late);
        }
        for (token, refused) in [
            (AGENT_1, "spiffe://cluster.local/ns/shop/sa/db"),
            (AGENT_1, "spiffe://cluster.local/ns/bank/sa/cart"),
            (AGENT_1, "spiffe://other/ns/shop/sa/cart"),
            (AGENT_1, "spiffe:///ns/shop/sa/cart"),
            ("shop/cart/cart-1/u4", "spiffe://cluster.local/ns/shop/sa/cart"),
            ("istio-system/ztunnel", "spiffe://cluster.local/ns/shop/sa/cart"),
        ] {
            let error = asks(token, refused).await.unwrap_err();
            assert!(matches!(error, AuthError::Denied(_)), "{token} {refused}: {error}");
        }
        // What nobody asks for by name is of the mesh's own domain.
        let caller = authenticator.caller("e30.e30.shop/cart/cart-1/u4").await.unwrap();
        let own = authenticator.identity(&caller, None).await.unwrap();
        assert_eq!(own.to_string(), "spiffe://new/ns/shop/sa/cart");
    }

    #[tokio::test]
    async fn others_get_only_their_own() {
        let cart = "spiffe://cluster.local/ns/shop/sa/cart";
        assert_eq!(ask("shop/cart/cart-1/u4", None).await.unwrap(), cart);
        assert_eq!(ask("shop/cart/cart-1/u4", Some(cart)).await.unwrap(), cart);
        assert_eq!(ask("shop/cart", None).await.unwrap(), cart);
        let other = ask("shop/cart/cart-1/u4", Some("spiffe://cluster.local/ns/shop/sa/late")).await;
        assert!(matches!(other, Err(AuthError::Denied(_))));
    }

    #[tokio::test]
    async fn an_agent_without_a_pod_is_on_no_node() {
        let cart = "spiffe://cluster.local/ns/shop/sa/cart";
        let error = ask("istio-system/ztunnel", Some(cart)).await.unwrap_err();
        assert!(error.to_string().contains("not bound to a pod"), "{error}");
    }

    #[tokio::test]
    async fn a_token_of_a_pod_that_is_gone_is_refused() {
        for token in [
            "istio-system/ztunnel/agent-1/u0",
            "istio-system/ztunnel/agent-9/u9",
            "shop/job/job-1/u6",
            "shop/db/cart-1/u4",
        ] {
            let error = ask(token, None).await.unwrap_err();
            assert!(matches!(error, AuthError::Unauthenticated(_)), "{token}: {error}");
        }
    }

    #[tokio::test]
    async fn an_agent_newer_than_the_view_is_found_at_the_api() {
        let caller = authenticator()
            .caller("e30.e30.istio-system/ztunnel/agent-3/u3")
            .await
            .unwrap();
        assert_eq!(caller.node.as_deref(), Some("n3"));
    }
}
