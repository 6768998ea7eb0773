//! Who may do what: a fixed rule, not RBAC.
//!
//! | who | may |
//! | --- | --- |
//! | the group `system:masters` (the administrator's certificate) | everything |
//! | service accounts of `istio-system` | everything |
//! | other service accounts | discovery, the token issuer's documents, and questions about themselves |
//! | nobody known | `/healthz`, `/readyz`, `/livez`, `/version` |
//!
//! Pure. Anything that no rule allows is denied (`what_no_rule_allows_is_denied`).

use serde_json::{Value, json};

/// Groups whose members may do everything.
const ALL_POWERFUL: &[&str] = &["system:masters", "system:serviceaccounts:istio-system"];
/// Paths, with what is below them, that anybody may read.
const PUBLIC: &[&str] = &["/healthz", "/readyz", "/livez", "/version"];
/// Paths, with what is below them, that whoever is known may read.
const DISCOVERY: &[&str] = &[
    "/api",
    "/apis",
    "/openapi",
    "/openid/v1/jwks",
    "/.well-known/openid-configuration",
];
/// Questions about oneself.
const OWN: &[(&str, &str)] = &[
    ("authentication.k8s.io", "selfsubjectreviews"),
    ("authorization.k8s.io", "selfsubjectaccessreviews"),
    ("authorization.k8s.io", "selfsubjectrulesreviews"),
];

/// Somebody.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct User {
    /// `system:serviceaccount:NAMESPACE:NAME`, a certificate's common name, or `system:anonymous`.
    pub name: String,
    /// The service account's; "" for others.
    pub uid: String,
    /// The groups, `system:authenticated` or `system:unauthenticated` among them.
    pub groups: Vec<String>,
    /// What else is known, as in a `UserInfo`: the pod and node that a token is bound to.
    pub extra: Vec<(&'static str, String)>,
}

impl User {
    /// Who shows nothing.
    pub fn anonymous() -> Self {
        Self {
            name: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            ..Self::default()
        }
    }

    /// Who shows a client certificate with this common name and these organizations.
    pub fn from_certificate(name: String, organizations: Vec<String>) -> Self {
        let mut groups = organizations;
        groups.push("system:authenticated".into());
        Self {
            name,
            groups,
            ..Self::default()
        }
    }

    /// A service account.
    pub fn service_account(namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            uid: uid.to_owned(),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".into(),
            ],
            extra: Vec::new(),
        }
    }

    /// Whether it is the administrator, who may also ask as somebody else.
    pub fn is_administrator(&self) -> bool {
        self.is_in(ALL_POWERFUL[0])
    }

    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|own| own == group)
    }
}

/// What somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attributes<'a> {
    /// Something of the API.
    Resource {
        /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
        verb: &'a str,
        /// "" for the core group.
        group: &'a str,
        /// Plural; with `/` and the subresource, if any.
        resource: String,
        /// "" for all, or if there are none.
        namespace: &'a str,
        /// "" if no object is named.
        name: &'a str,
    },
    /// Something else.
    Path {
        /// `get`, or another HTTP method in small letters.
        verb: &'a str,
        /// The path.
        path: &'a str,
    },
}

/// Why something is allowed or not, in words for a `SubjectAccessReview`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is.
    pub allowed: bool,
    /// The rule.
    pub reason: &'static str,
}

/// Whether this user may do this.
pub fn authorize(user: &User, wanted: &Attributes<'_>) -> Verdict {
    let allow = |reason| Verdict { allowed: true, reason };
    if user.is_in(ALL_POWERFUL[0]) {
        return allow("the group system:masters may do everything");
    }
    if user.is_in(ALL_POWERFUL[1]) {
        return allow("service accounts of istio-system may do everything");
    }
    match wanted {
        Attributes::Path { verb: "get", path } if under(path, PUBLIC) => allow("anybody may read this path"),
        Attributes::Path { verb: "get", path } if user.is_in("system:authenticated") && under(path, DISCOVERY) => {
            allow("whoever is known may read this path")
        }
        Attributes::Resource {
            verb: "create",
            group,
            resource,
            ..
        } if user.is_in("system:authenticated") && OWN.contains(&(*group, resource.as_str())) => {
            allow("whoever is known may ask about themselves")
        }
        _ => Verdict {
            allowed: false,
            reason: "",
        },
    }
}

/// All that this user may do, as the status of a `SelfSubjectRulesReview`: the same rules, told instead of applied
/// (`what_is_told_is_what_is_allowed`).
pub fn rules(user: &User) -> Value {
    let resources = |verbs: &[&str], group: &str, resources: &[&str]| json!({"verbs": verbs, "apiGroups": [group], "resources": resources});
    let below = |trees: &[&str]| -> Vec<String> {
        let both = |tree: &&str| [(*tree).to_owned(), format!("{tree}/*")];
        trees.iter().flat_map(both).collect()
    };
    let mut of_resources = Vec::new();
    let mut of_paths = vec![json!({"verbs": ["get"], "nonResourceURLs": below(PUBLIC)})];
    if ALL_POWERFUL.iter().any(|group| user.is_in(group)) {
        of_resources.push(resources(&["*"], "*", &["*"]));
        of_paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    } else if user.is_in("system:authenticated") {
        of_resources.extend(
            OWN.iter()
                .map(|(group, plural)| resources(&["create"], group, &[plural])),
        );
        of_paths.push(json!({"verbs": ["get"], "nonResourceURLs": below(DISCOVERY)}));
    }
    json!({"resourceRules": of_resources, "nonResourceRules": of_paths, "incomplete": false})
}

/// `path` is one of `trees` or below it.
fn under(path: &str, trees: &[&str]) -> bool {
    trees.iter().any(|tree| {
        path.strip_prefix(tree)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// The refusal, in the words of Kubernetes.
pub fn denial(user: &User, wanted: &Attributes<'_>) -> String {
    let user = &user.name;
    match wanted {
        Attributes::Path { verb, path } => format!("forbidden: User {user:?} cannot {verb} path {path:?}"),
        Attributes::Resource {
            verb,
            group,
            resource,
            namespace,
            name,
        } => {
            let named = if name.is_empty() {
                String::new()
            } else {
                format!(" {name:?}")
            };
            let place = if namespace.is_empty() {
                " at the cluster scope".to_owned()
            } else {
                format!(" in the namespace {namespace:?}")
            };
            let full = match (*group, resource.split('/').next().unwrap_or_default()) {
                ("", plural) => plural.to_owned(),
                (group, plural) => format!("{plural}.{group}"),
            };
            format!(
                "{full}{named} is forbidden: User {user:?} cannot {verb} resource {resource:?} in API group {group:?}{place}"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(verb: &'static str, group: &'static str, resource: &'static str) -> Attributes<'static> {
        Attributes::Resource {
            verb,
            group,
            resource: resource.to_owned(),
            namespace: "shop",
            name: "",
        }
    }

    fn path(path: &str) -> Attributes<'_> {
        Attributes::Path { verb: "get", path }
    }

    fn people() -> [User; 4] {
        [
            User::from_certificate("kubernetes-admin".into(), vec!["system:masters".into()]),
            User::service_account("istio-system", "istiod", "1"),
            User::service_account("shop", "default", "2"),
            User::anonymous(),
        ]
    }

    #[test]
    fn each_rule_allows_what_it_says_and_no_more() {
        for (wanted, allowed) in [
            (path("/healthz"), [true, true, true, true]),
            (path("/readyz/etcd"), [true, true, true, true]),
            (path("/version"), [true, true, true, true]),
            (path("/versions"), [true, true, false, false]),
            (path("/api/v1"), [true, true, true, false]),
            (path("/apis"), [true, true, true, false]),
            (path("/openapi/v3/api/v1"), [true, true, true, false]),
            (path("/openid/v1/jwks"), [true, true, true, false]),
            (path("/metrics"), [true, true, false, false]),
            (resource("get", "", "pods"), [true, true, false, false]),
            (resource("create", "", "pods"), [true, true, false, false]),
            (
                resource("create", "authentication.k8s.io", "tokenreviews"),
                [true, true, false, false],
            ),
            (
                resource("create", "authentication.k8s.io", "selfsubjectreviews"),
                [true, true, true, false],
            ),
            (
                resource("create", "authorization.k8s.io", "selfsubjectaccessreviews"),
                [true, true, true, false],
            ),
            (
                resource("create", "authorization.k8s.io", "subjectaccessreviews"),
                [true, true, false, false],
            ),
            (
                resource("create", "", "serviceaccounts/token"),
                [true, true, false, false],
            ),
        ] {
            let verdicts = people().map(|user| authorize(&user, &wanted).allowed);
            assert_eq!(verdicts, allowed, "{wanted:?}");
        }
    }

    #[test]
    fn what_is_told_is_what_is_allowed() {
        for user in people() {
            let told = rules(&user);
            for rule in told["resourceRules"].as_array().unwrap() {
                let first = |field: &str| rule[field][0].as_str().unwrap().to_owned();
                let wanted = Attributes::Resource {
                    verb: &first("verbs"),
                    group: &first("apiGroups"),
                    resource: first("resources"),
                    namespace: "",
                    name: "",
                };
                assert!(authorize(&user, &wanted).allowed, "{wanted:?}");
            }
            for rule in told["nonResourceRules"].as_array().unwrap() {
                for url in rule["nonResourceURLs"].as_array().unwrap() {
                    assert!(authorize(&user, &path(url.as_str().unwrap())).allowed, "{url}");
                }
            }
        }
        let shop = rules(&people()[2]);
        assert_eq!(shop["resourceRules"].as_array().unwrap().len(), OWN.len());
        assert_eq!(rules(&people()[3])["resourceRules"], json!([]));
    }

    #[test]
    fn what_no_rule_allows_is_denied() {
        let user = User::service_account("istio-systemx", "istiod", "1");
        assert!(!authorize(&user, &resource("get", "", "secrets")).allowed);
        let write = Attributes::Path {
            verb: "post",
            path: "/healthz",
        };
        assert!(!authorize(&User::anonymous(), &write).allowed);
    }

    #[test]
    fn a_refusal_has_the_words_of_kubernetes() {
        assert_eq!(
            denial(&User::anonymous(), &resource("list", "", "pods")),
            "pods is forbidden: User \"system:anonymous\" cannot list resource \"pods\" in API group \"\" in the \
             namespace \"shop\""
        );
        let named = Attributes::Resource {
            verb: "get",
            group: "apps",
            resource: "deployments/scale".to_owned(),
            namespace: "",
            name: "web",
        };
        assert_eq!(
            denial(&User::anonymous(), &named),
            "deployments.apps \"web\" is forbidden: User \"system:anonymous\" cannot get resource \
             \"deployments/scale\" in API group \"apps\" at the cluster scope"
        );
        assert_eq!(
            denial(&User::anonymous(), &path("/metrics")),
            "forbidden: User \"system:anonymous\" cannot get path \"/metrics\""
        );
    }
}
