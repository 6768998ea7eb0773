//! Manifests in, model and findings out. `INSTA_UPDATE=always cargo test -p k8s` writes the goldens anew.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;

use k8s::{Context, Effect, Mesh, Objects, PodPlace, parse, translate};
use model::{NonTcp, StringMatch, TunnelProtocol, Workload};
use proptest::prelude::*;

fn mesh(text: &str) -> (Objects, Mesh) {
    let objects = parse([("test.yaml", text)]);
    let mut context = Context::default();
    for (index, (_, pod)) in objects.pods.iter().enumerate() {
        let place = PodPlace {
            node: "node-1".to_owned(),
            addresses: vec![[10, 244, 1, u8::try_from(index).unwrap()].into()],
        };
        context
            .pods
            .insert((pod.metadata.namespace.clone(), pod.metadata.name.clone()), place);
    }
    for (index, (_, service)) in objects.services.iter().enumerate() {
        let key = (service.metadata.namespace.clone(), service.metadata.name.clone());
        context
            .vips
            .insert(key, vec![[10, 96, 0, u8::try_from(index).unwrap()].into()]);
    }
    let mesh = translate(&objects, &context);
    (objects, mesh)
}

fn findings(text: &str) -> Vec<String> {
    let (objects, mesh) = mesh(text);
    objects
        .findings
        .iter()
        .chain(&mesh.findings)
        .map(ToString::to_string)
        .collect()
}

fn workload<'a>(mesh: &'a Mesh, name: &str) -> &'a Workload {
    mesh.workloads.iter().find(|workload| &*workload.name == name).unwrap()
}

fn pod(namespace: &str, name: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: {name}, labels: {{app: {name}}}}}\n\
         spec:\n  containers: [{{name: c, command: [sleep], ports: [{{name: http, containerPort: 8080}}]}}]\n{rest}"
    )
}

fn policy(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{namespace: {namespace}, name: {name}}}\nspec: {spec}\n"
    )
}

const AMBIENT: &str =
    "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n";

#[test]
fn a_shop_in_the_mesh() {
    let text = [
        AMBIENT.to_owned(),
        "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web, namespace: shop}\n".to_owned(),
        pod("shop", "web", "  serviceAccountName: web\n"),
        pod("shop", "agent", "  hostNetwork: true\n"),
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  selector: {app: web}\n  \
         ports: [{port: 80, targetPort: http, name: a}, {port: 53, protocol: UDP, name: b}, {port: 81, targetPort: none, name: c}]\n"
            .to_owned(),
        policy("PeerAuthentication", "shop", "default", "{mtls: {mode: STRICT}}"),
        policy("AuthorizationPolicy", "shop", "who", "{selector: {matchLabels: {app: web}}, rules: [{from: [{source: \
               {principals: [cluster.local/ns/shop/sa/*]}}], to: [{operation: {ports: ['8080']}}]}]}"),
    ]
    .concat();
    let (objects, mesh) = mesh(&text);
    assert_eq!(objects.findings, []);
    insta::assert_yaml_snapshot!((&mesh.workloads, &mesh.services, &mesh.policies));
    insta::assert_snapshot!(
        mesh.findings
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    );
}

#[test]
fn the_pods_label_is_over_its_namespaces() {
    let labelled = |name: &str, namespace: &str, mode: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: {name}, labels: \
             {{istio.io/dataplane-mode: {mode}}}}}\nspec: {{containers: [{{name: c, command: [sleep]}}]}}\n"
        )
    };
    let text = [
        AMBIENT.to_owned(),
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: kube-system, labels: {istio.io/dataplane-mode: ambient}}\n".into(),
        pod("shop", "inherits", ""),
        labelled("out", "shop", "none"),
        labelled("in", "outside", "ambient"),
        pod("outside", "plain", ""),
        pod("shop", "host", "  hostNetwork: true\n"),
        pod("kube-system", "dns", ""),
    ]
    .concat();
    let (_, mesh) = mesh(&text);
    let in_mesh: BTreeMap<_, _> = mesh
        .workloads
        .iter()
        .map(|workload| (&*workload.name, workload.protocol == TunnelProtocol::Hbone))
        .collect();
    let expected = [
        ("inherits", true),
        ("out", false),
        ("in", true),
        ("plain", false),
        ("host", false),
        ("dns", false),
    ];
    assert_eq!(in_mesh, BTreeMap::from(expected));
}

#[test]
fn non_tcp_annotations() {
    let annotated = |name: &str, value: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, annotations: {{undercurrent.io/non-tcp-traffic: \
             {value}}}}}\nspec: {{containers: [{{name: c, command: [sleep]}}]}}\n"
        )
    };
    let text = [
        annotated("a", "pass"),
        annotated("b", "forbid"),
        annotated("c", "maybe"),
    ]
    .concat();
    let (_, mesh) = mesh(&text);
    assert_eq!(workload(&mesh, "a").non_tcp, NonTcp::Pass);
    assert_eq!(workload(&mesh, "b").non_tcp, NonTcp::Forbid);
    assert_eq!(
        workload(&mesh, "c").non_tcp,
        NonTcp::Forbid,
        "what can't be read forbids"
    );
    assert_eq!(mesh.findings.len(), 1);
}

#[test]
fn a_bad_document_spoils_no_other() {
    let text = format!(
        "a: [\n{}---\n- 1\n---\nkind: Pod\n{}",
        pod("shop", "one", ""),
        pod("shop", "two", "")
    );
    let (objects, _) = mesh(&text);
    assert_eq!(objects.pods.len(), 2);
    assert_eq!(objects.findings.len(), 3, "{:?}", objects.findings);
}

#[test]
fn every_refused_object_is_named() {
    let text = [
        "---\nkind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n\
         - {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\n",
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: no-command}\nspec: {containers: [{name: c, image: nginx}]}\n",
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: ../../etc}\nspec: {containers: [{name: c, command: [a]}]}\n",
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: typed}\nspec: {containers: [{name: c, command: [a], ports: \
         [{containerPort: eighty}]}]}\n",
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: probed}\nspec: {containers: [{name: c, command: [a], \
         livenessProbe: {httpGet: {port: web}}}]}\n",
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: noted}\nspec: {containers: [{name: c, command: [a], resources: {}}]}\n",
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: noted}\nspec: {containers: [{name: c, command: [a]}]}\n",
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 0}]}\n",
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: t}\nspec: {type: ExternalName}\n",
        "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n",
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec: {mtls: {mode: SOMETIMES}}\n",
    ]
    .concat();
    insta::assert_snapshot!(findings(&text).join("\n"));
}

#[test]
fn peer_authentication_scopes() {
    let root = policy("PeerAuthentication", "istio-system", "mesh", "{mtls: {mode: STRICT}}");
    let namespace = |mode: &str| {
        policy(
            "PeerAuthentication",
            "shop",
            "ns",
            &format!("{{mtls: {{mode: {mode}}}}}"),
        )
    };
    let selected = |spec: &str| {
        policy(
            "PeerAuthentication",
            "shop",
            "web",
            &format!("{{selector: {{matchLabels: {{app: web}}}}, {spec}}}"),
        )
    };
    let of = |policies: &[&str]| {
        let text = [
            &[AMBIENT.to_owned(), pod("shop", "web", "")][..],
            &policies.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>(),
        ]
        .concat()
        .concat();
        let (_, mesh) = mesh(&text);
        let keys = &workload(&mesh, "web").authorization_policies.clone();
        let found = mesh.policies.into_iter().find(|policy| keys.contains(&policy.key()));
        found.map(|policy| (policy.origin.unwrap().to_string(), policy.rules))
    };
    let origin = |policies: &[&str]| of(policies).map(|(origin, _)| origin);
    assert_eq!(origin(&[]), None);
    assert_eq!(
        origin(&[&root]).as_deref(),
        Some("PeerAuthentication istio-system/mesh")
    );
    assert_eq!(
        origin(&[&root, &namespace("UNSET")]).as_deref(),
        Some("PeerAuthentication istio-system/mesh")
    );
    assert_eq!(
        origin(&[&root, &namespace("DISABLE")]),
        None,
        "the narrower one decides"
    );
    assert_eq!(
        origin(&[&namespace("PERMISSIVE"), &selected("mtls: {mode: STRICT}")]).as_deref(),
        Some("PeerAuthentication shop/web")
    );

    let (_, rules) = of(&[
        &namespace("STRICT"),
        &selected("portLevelMtls: {8080: {mode: PERMISSIVE}}"),
    ])
    .unwrap();
    assert_eq!(rules[0][0][0].not_principals, [StringMatch::Presence]);
    assert_eq!(rules[0][1][0].not_destination_ports, [8080]);
    let (_, rules) = of(&[&selected("portLevelMtls: {8080: {mode: STRICT}, 9: {mode: UNSET}}")]).unwrap();
    assert_eq!(rules[0][1][0].destination_ports, [8080]);
}

#[test]
fn of_two_in_a_scope_the_older_wins() {
    let dated = |name: &str, time: &str, mode: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop, \
             creationTimestamp: \"{time}\"}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    let text = [
        pod("shop", "web", ""),
        dated("a", "2026-02-01T00:00:00Z", "PERMISSIVE"),
        dated("b", "2026-01-01T00:00:00Z", "STRICT"),
    ]
    .concat();
    let (_, mesh) = mesh(&text);
    assert_eq!(workload(&mesh, "web").authorization_policies.len(), 1);
    assert!(
        findings(&text)
            .iter()
            .any(|finding| finding.contains("PeerAuthentication shop/b is older and wins"))
    );
}

#[test]
fn what_l4_cannot_check_never_opens() {
    let of = |spec: &str| {
        let (_, mesh) = mesh(&policy("AuthorizationPolicy", "shop", "p", spec));
        let conditions: Vec<_> = mesh.findings.iter().map(|finding| finding.field.clone()).collect();
        (mesh.policies[0].rules.clone(), conditions)
    };
    let get = "to: [{operation: {methods: [GET]}}]";
    let (rules, fields) = of(&format!("{{rules: [{{{get}}}]}}"));
    assert!(rules.is_empty(), "an ALLOW rule that can't be checked allows nothing");
    assert_eq!(fields, ["spec.rules[0].to[0].operation.methods"]);
    let (rules, _) = of(&format!("{{action: DENY, rules: [{{{get}}}]}}"));
    assert_eq!(
        rules,
        [model::Rule::new()],
        "a DENY rule that can't be checked always denies"
    );
    let (rules, _) = of("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}, {operation: {ports: ['80']}}]}]}");
    assert_eq!(
        rules,
        [model::Rule::new()],
        "one alternative that can't be checked is all of them"
    );
    let (rules, _) = of(
        "{action: DENY, rules: [{from: [{source: {namespaces: [a]}}], when: [{key: connection.sni, values: [b]}]}]}",
    );
    assert_eq!(rules[0].len(), 1, "the rest still narrows");
    let (rules, fields) = of("{rules: [{}]}");
    assert_eq!((rules, fields), (vec![vec![]], vec![]), "an empty rule allows all");
    assert!(of("{}").0.is_empty(), "no rule allows nothing");
}

#[test]
fn rules_keep_their_places() {
    let of = |spec: &str| {
        mesh(&policy("AuthorizationPolicy", "shop", "p", spec)).1.policies[0]
            .rules
            .clone()
    };
    let (get, port) = (
        "to: [{operation: {methods: [GET]}}]",
        "to: [{operation: {ports: ['80']}}]",
    );
    let rules = of(&format!("{{rules: [{{{get}}}, {{{port}}}, {{{get}}}]}}"));
    let never = vec![vec![model::Match::default()]];
    assert_eq!((rules.len(), &rules[0]), (2, &never), "what comes behind is not needed");
    assert_eq!(rules[1][0][0].destination_ports, [80]);
}

#[test]
fn a_dry_run_is_one_and_closes_nothing() {
    let annotated = |value: &str, spec: &str| {
        let text = [
            pod("shop", "web", ""),
            format!(
                "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: shop, name: p, \
                 annotations: {{istio.io/dry-run: \"{value}\"}}}}\nspec: {spec}\n"
            ),
        ]
        .concat();
        let (_, mesh) = mesh(&text);
        let dry_run = mesh.policies.first().map(|policy| policy.dry_run);
        let effects: Vec<_> = mesh
            .findings
            .iter()
            .filter(|finding| finding.object.kind == "AuthorizationPolicy")
            .collect();
        let effects: Vec<_> = effects.iter().map(|finding| finding.effect).collect();
        (dry_run, effects, workload(&mesh, "web").authorization_policies.len())
    };
    for yes in ["true", "1", "T"] {
        assert_eq!(
            annotated(yes, "{rules: [{}]}"),
            (Some(true), vec![Effect::Note], 0),
            "{yes}"
        );
    }
    assert_eq!(annotated("false", "{rules: [{}]}"), (Some(false), vec![], 0));
    assert_eq!(
        annotated("yes", "{rules: [{}]}"),
        (Some(false), vec![Effect::Narrowed], 0),
        "in force, and said"
    );
    let custom = "{action: CUSTOM, provider: {name: x}, rules: [{}]}";
    assert_eq!(
        annotated("true", custom),
        (None, vec![Effect::Refused], 0),
        "a rehearsal closes nothing"
    );
    assert_eq!(annotated("false", custom), (None, vec![Effect::Closed], 1));
}

#[test]
fn a_strict_port_that_can_not_be_is_every_port() {
    let text = [
        pod("shop", "web", ""),
        policy(
            "PeerAuthentication",
            "shop",
            "p",
            "{mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}}}",
        ),
    ]
    .concat();
    let (_, found) = mesh(&text);
    assert_eq!(found.policies[0].rules[0].len(), 1, "whatever the port");
    assert!(
        findings(&text)
            .iter()
            .any(|finding| finding.contains("its STRICT holds for every port"))
    );
    let open = text.replace("{8080: {mode: STRICT}}", "{8080: {mode: DISABLE}}");
    assert!(mesh(&open).1.policies.is_empty());
}

#[test]
fn two_that_select_the_same_are_in_conflict() {
    let spec = |mode: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mode}}}}}");
    let text = [
        pod("shop", "web", ""),
        policy("PeerAuthentication", "shop", "b", &spec("PERMISSIVE")),
        policy("PeerAuthentication", "shop", "a", &spec("STRICT")),
    ]
    .concat();
    let conflict = "PeerAuthentication shop/b: spec.selector: PeerAuthentication shop/a is older and wins";
    assert!(findings(&text).iter().any(|finding| finding.contains(conflict)));
}

#[test]
fn where_two_overlap_the_older_wins_and_the_younger_is_told() {
    let labelled = |name: &str, labels: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\nspec: \
             {{containers: [{{name: c, command: [x]}}]}}\n"
        )
    };
    let selecting = |name: &str, time: &str, labels: &str, mode: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop, \
             creationTimestamp: \"2026-0{time}-01T00:00:00Z\"}}\nspec: {{selector: {{matchLabels: {{{labels}}}}}, mtls: \
             {{mode: {mode}}}}}\n"
        )
    };
    let policies = [
        selecting("old", "1", "app: web", "PERMISSIVE"),
        selecting("young", "2", "tier: front", "STRICT"),
        selecting("all", "3", "app: web, tier: front", "STRICT"),
    ]
    .concat();
    let both = labelled("web", "app: web, tier: front");
    let text = [AMBIENT, &both, &labelled("cart", "tier: front"), &policies].concat();
    let (_, found) = mesh(&text);
    assert!(
        workload(&found, "web").authorization_policies.is_empty(),
        "the older one says PERMISSIVE"
    );
    assert_eq!(workload(&found, "cart").authorization_policies.len(), 1);
    let told = |text: &str, policy: &str| {
        let of = format!("PeerAuthentication shop/{policy}: ");
        let all = findings(text).into_iter();
        let told: Vec<_> = all
            .filter_map(|line| Some((line.split(':').next()?.to_owned(), line.split_once(&of)?.1.to_owned())))
            .collect();
        told
    };
    let shared = "spec.selector: PeerAuthentication shop/old is older and wins for what both select: web";
    assert_eq!(told(&text, "young"), [("divided".to_owned(), shared.to_owned())]);
    assert!(told(&text, "old").is_empty());
    // What an older one selects whatever the pods are is told without any pod.
    let always = "spec.selector: PeerAuthentication shop/old is older and wins";
    assert_eq!(told(&policies, "all"), [("refused".to_owned(), always.to_owned())]);
    assert!(told(&policies, "young").is_empty());
    // With nothing left for it, it has no effect.
    let text = [AMBIENT, &both, &policies].concat();
    assert_eq!(told(&text, "young"), [("refused".to_owned(), shared.to_owned())]);
}

#[test]
fn trust_domains_and_mapped_addresses() {
    let of = |spec: &str| {
        mesh(&policy("AuthorizationPolicy", "shop", "p", spec)).1.policies[0]
            .rules
            .clone()
    };
    let rules = of(
        "{rules: [{from: [{source: {trustDomains: [td, 'a*'], notTrustDomains: [old], ipBlocks: ['::ffff:10.0.0.0/104']}}]}]}",
    );
    let one = &rules[0][0][0];
    assert_eq!(
        one.principals,
        [StringMatch::Prefix("td/".into()), StringMatch::Prefix("a".into())]
    );
    assert_eq!(one.not_principals, [StringMatch::Prefix("old/".into())]);
    assert_eq!(one.source_ips, ["10.0.0.0/8".parse().unwrap()]);
    // Both have to hold, which can't be said.
    assert!(of("{rules: [{from: [{source: {trustDomains: [td], principals: [x]}}]}]}").is_empty());
    assert_eq!(
        of("{action: DENY, rules: [{from: [{source: {trustDomains: [td], principals: [x]}}]}]}")[0].len(),
        1
    );
    assert!(of("{rules: [{when: [{key: source.trustDomain, values: ['*d']}]}]}").is_empty());
}

#[test]
fn an_unreadable_policy_closes_its_workloads() {
    for bad in [
        "{rules: [{from: [{source: {ipBlocks: [nowhere]}}]}]}",
        "{rules: [{from: [{source: {principal: [typo]}}]}]}",
        "{rules: [{from: []}]}",
        "{rules: [{from: [{source: {}}]}]}",
        "{rules: 1}",
        "{action: CUSTOM, provider: {name: x}, rules: [{}]}",
        "{action: DENY, rules: [{to: [{operation: {ports: ['0']}}]}]}",
        "{action: DENY, rules: [{from: [{source: {principals: ['a*b']}}]}]}",
        "{rules: 1, selector: {matchLabels: {app: web}}}",
    ] {
        let text = [
            pod("shop", "web", ""),
            pod("bank", "other", ""),
            policy("AuthorizationPolicy", "shop", "p", bad),
        ]
        .concat();
        let (objects, mesh) = mesh(&text);
        let named = &workload(&mesh, "web").authorization_policies;
        assert_eq!(named.len(), 1, "{bad}");
        assert!(mesh.policies.is_empty(), "{bad}: it is named but not there");
        assert!(workload(&mesh, "other").authorization_policies.is_empty(), "{bad}");
        let closed = |finding: &&k8s::Finding| finding.effect == Effect::Closed;
        assert_eq!(
            objects.findings.iter().chain(&mesh.findings).filter(closed).count(),
            1,
            "{bad}"
        );
    }
}

/// Text that looks like manifests, so that more of it gets past the first line.
fn yaml() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "apiVersion: v1",
        "apiVersion: security.istio.io/v1",
        "kind: Pod",
        "kind: Service",
        "kind: List",
        "items:",
        "- ",
        "  ",
        "metadata: {name: a}",
        "metadata:",
        "name: a",
        "spec:",
        "spec: {rules: [{}]}",
        "kind: AuthorizationPolicy",
        "kind: PeerAuthentication",
        "containers:",
        "ports: [{port: 1}]",
        "---",
        "--- ",
        "\n",
        "\n  ",
        "&a",
        "*a",
        "!!x ",
        "[",
        "{",
        "}",
        "]",
        ": ",
        "selector: {}",
        "from: [{source: {principals: ['*']}}]",
        "mtls: {mode: STRICT}",
        "\u{0}",
        "ü",
        "|",
        ">",
    ]);
    prop::collection::vec(prop_oneof![4 => word.prop_map(str::to_owned), 1 => ".{0,8}"], 0..40)
        .prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in yaml()) {
        mesh(&text);
    }

    #[test]
    fn any_text_at_all_never_panics(text in "\\PC{0,200}") {
        mesh(&text);
    }
}
