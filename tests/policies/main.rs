//! AuthorizationPolicies from their text to the verdict: translation and decision together, against an interpreter that
//! knows nothing of either and reads Istio's documentation off the object itself.
//!
//! <https://istio.io/latest/docs/reference/config/security/authorization-policy/>; where Istio at L4 would let something
//! in that the author may have meant to keep out, the interpreter denies:
//! - an ALLOW rule with a field that needs HTTP holds for nobody;
//! - in a DENY rule such a field is as if it held.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;

use k8s::live::{Kind, Object, read};
use model::Identity;
use policy::{Facts, decide};
use proptest::{collection::vec, option, prelude::*, sample::select, strategy::Union};
use serde_json::{Map, Value, json};

const NEED_HTTP: [&str; 8] = [
    "hosts",
    "notMethods",
    "methods",
    "paths",
    "requestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
    "request.headers[x]",
];

/// Whether the connection may be, by the objects alone.
fn interpreted(facts: &Facts, policies: &[Value]) -> bool {
    let action = |policy: &&Value| policy["spec"]["action"].as_str().unwrap_or("ALLOW").to_owned();
    let live = || {
        policies
            .iter()
            .filter(|policy| policy["metadata"]["annotations"].is_null())
    };
    let holds = |policy: &Value, deny: bool| items(&policy["spec"]["rules"]).any(|rule| rule_holds(rule, deny, facts));
    if live().any(|policy| action(&policy) == "DENY" && holds(policy, true)) {
        return false;
    }
    let mut allows = live().filter(|policy| action(policy) == "ALLOW").peekable();
    allows.peek().is_none() || allows.any(|policy| holds(policy, false))
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn rule_holds(rule: &Value, deny: bool, facts: &Facts) -> bool {
    if !deny
        && NEED_HTTP
            .iter()
            .any(|name| rule.to_string().contains(&format!("\"{name}\"")))
    {
        return false;
    }
    let any = |list: &str, inner: &str| {
        rule[list].is_null() || items(&rule[list]).any(|item| fields_hold(item[inner].as_object().unwrap(), facts))
    };
    let when = items(&rule["when"]).all(|when| {
        let fits = |value: &Value| fits(when["key"].as_str().unwrap(), value.as_str().unwrap(), facts);
        (when["values"].is_null() || items(&when["values"]).any(fits))
            && !items(&when["notValues"]).any(is_not(when, facts))
    });
    any("from", "source") && any("to", "operation") && when
}

fn is_not<'a>(when: &'a Value, facts: &'a Facts) -> impl Fn(&Value) -> bool + 'a {
    let key = when["key"].as_str().unwrap();
    move |value| !NEED_HTTP.contains(&key) && fits(key, value.as_str().unwrap(), facts)
}

fn fields_hold(fields: &Map<String, Value>, facts: &Facts) -> bool {
    fields.iter().all(|(name, values)| {
        if NEED_HTTP.contains(&name.as_str()) {
            return true;
        }
        let positive = match name.strip_prefix("not") {
            Some(rest) => rest[..1].to_lowercase() + &rest[1..],
            None => name.clone(),
        };
        let found = items(values).any(|value| fits(&positive, value.as_str().unwrap(), facts));
        found != name.starts_with("not")
    })
}

/// Whether one value of a field fits.
fn fits(field: &str, text: &str, facts: &Facts) -> bool {
    let peer = facts.identity.as_ref();
    let block = |ip: std::net::IpAddr| match text.parse::<ipnet::IpNet>() {
        Ok(block) => block.contains(&ip),
        Err(_) => text.parse::<std::net::IpAddr>().unwrap().to_canonical() == ip,
    };
    match field {
        "principals" | "source.principal" => peer.is_some_and(|peer| {
            let name = format!(
                "{}/ns/{}/sa/{}",
                peer.trust_domain, peer.namespace, peer.service_account
            );
            glob(text.strip_prefix("spiffe://").unwrap_or(text), &name)
        }),
        "namespaces" | "source.namespace" => peer.is_some_and(|peer| glob(text, &peer.namespace)),
        "trustDomains" | "source.trustDomain" => peer.is_some_and(|peer| glob(text, peer.trust_domain.as_str())),
        "serviceAccounts" | "source.serviceAccount" => peer.is_some_and(|peer| {
            let (namespace, account) = text.split_once('/').unwrap_or(("shop", text));
            *peer.namespace == *namespace && *peer.service_account == *account
        }),
        "ipBlocks" | "source.ip" => block(facts.source),
        "destination.ip" => block(facts.destination.ip()),
        "ports" | "destination.port" => text == facts.destination.port().to_string(),
        needs_http => {
            assert!(NEED_HTTP.contains(&needs_http), "{needs_http}");
            true
        }
    }
}

fn glob(pattern: &str, text: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => text.ends_with(end),
        (_, Some(start)) => text.starts_with(start),
        _ => text == pattern,
    }
}

fn texts(of: &'static [&'static str]) -> impl Strategy<Value = Value> {
    vec(select(of), 1..3).prop_map(|texts| json!(texts))
}

const NAMESPACES: &[&str] = &["a", "shop", "sh*", "*op", "*"];
const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/a/sa/x",
    "spiffe://cluster.local/ns/shop/sa/x",
    "cluster.local/ns/a/*",
    "*/sa/y",
    "else/ns/a/sa/x",
    "*",
];
const ACCOUNTS: &[&str] = &["x", "shop/x", "a/y", "a/x"];
const BLOCKS: &[&str] = &["10.0.0.1", "10.0.0.0/30", "fd00::/8", "::ffff:10.0.0.9", "0.0.0.0/0"];
const PORTS: &[&str] = &["80", "81", "82"];
const DOMAINS: &[&str] = &["cluster.local", "else", "cl*", "*"];

/// Some of these fields, at least one.
fn fields(of: &'static [(&'static str, &'static [&'static str])]) -> impl Strategy<Value = Value> {
    let field = Union::new(
        of.iter()
            .map(|(name, values)| texts(values).prop_map(|values| ((*name).to_owned(), values))),
    );
    vec(field, 1..3).prop_map(|fields| {
        let mut fields: Map<String, Value> = fields.into_iter().collect();
        // Together they need another form: see the tests of `k8s`.
        if fields.contains_key("principals") {
            fields.remove("trustDomains");
        }
        Value::Object(fields)
    })
}

fn source() -> impl Strategy<Value = Value> {
    fields(&[
        ("principals", PRINCIPALS),
        ("notPrincipals", PRINCIPALS),
        ("namespaces", NAMESPACES),
        ("notNamespaces", NAMESPACES),
        ("serviceAccounts", ACCOUNTS),
        ("notServiceAccounts", ACCOUNTS),
        ("trustDomains", DOMAINS),
        ("notTrustDomains", DOMAINS),
        ("ipBlocks", BLOCKS),
        ("notIpBlocks", BLOCKS),
        ("requestPrincipals", &["*"]),
        ("remoteIpBlocks", BLOCKS),
        ("notRemoteIpBlocks", BLOCKS),
    ])
    .prop_map(|source| json!({"source": source}))
}

fn operation() -> impl Strategy<Value = Value> {
    fields(&[
        ("ports", PORTS),
        ("notPorts", PORTS),
        ("ports", PORTS),
        ("notPorts", PORTS),
        ("methods", &["GET"]),
        ("notMethods", &["GET"]),
        ("hosts", &["web"]),
        ("paths", &["/x*"]),
    ])
    .prop_map(|operation| json!({"operation": operation}))
}

fn when() -> impl Strategy<Value = Value> {
    let keys: [(&str, &[&str]); 8] = [
        ("source.ip", BLOCKS),
        ("source.namespace", NAMESPACES),
        ("source.principal", PRINCIPALS),
        ("source.serviceAccount", ACCOUNTS),
        ("source.trustDomain", DOMAINS),
        ("destination.ip", BLOCKS),
        ("destination.port", PORTS),
        ("request.headers[x]", &["y"]),
    ];
    let one = keys.into_iter().map(|(key, values)| {
        let either = (texts(values), texts(values), 0..3);
        either.prop_map(move |(values, not_values, which)| match which {
            0 => json!({"key": key, "values": values}),
            1 => json!({"key": key, "notValues": not_values}),
            _ => json!({"key": key, "values": values, "notValues": not_values}),
        })
    });
    Union::new(one)
}

fn rule() -> impl Strategy<Value = Value> {
    let parts = (
        option::of(vec(source(), 1..3)),
        option::of(vec(operation(), 1..3)),
        option::weighted(0.4, vec(when(), 1..3)),
    );
    parts.prop_map(|(from, to, when)| {
        let parts = [
            ("from", from.map(Value::from)),
            ("to", to.map(Value::from)),
            ("when", when.map(Value::from)),
        ];
        let given = parts
            .into_iter()
            .filter_map(|(name, part)| Some((name.to_owned(), part?)));
        Value::Object(given.collect())
    })
}

fn written() -> impl Strategy<Value = Value> {
    let action = select(vec![None, Some("ALLOW"), Some("DENY")]);
    (action, vec(rule(), 0..3), any::<u8>()).prop_map(|(action, rules, dry)| {
        let annotations = (dry % 4 == 0).then(|| json!({"istio.io/dry-run": "true"}));
        let mut spec = json!({"rules": rules});
        if let Some(action) = action {
            spec["action"] = action.into();
        }
        json!({"metadata": {"namespace": "shop", "name": "p", "annotations": annotations}, "spec": spec})
    })
}

fn facts() -> impl Strategy<Value = Facts> {
    let names = (
        select(vec!["a", "shop"]),
        select(vec!["x", "y"]),
        select(vec!["cluster.local", "else"]),
    );
    let identity = names.prop_map(|(namespace, account, domain)| {
        let text = format!("spiffe://{domain}/ns/{namespace}/sa/{account}");
        text.parse::<Identity>().unwrap()
    });
    let ip = || select(vec!["10.0.0.1", "10.0.0.9", "fd00::1"]).prop_map(|text| text.parse().unwrap());
    (option::of(identity), ip(), ip(), 80u16..83).prop_map(|(identity, source, ip, port)| Facts {
        identity,
        aliases: Arc::new([]),
        source,
        destination: (ip, port).into(),
    })
}

fn translated(written: &Value) -> Option<model::Policy> {
    let read = read(Kind::AuthorizationPolicy, written);
    assert_eq!(read.findings, [], "{written}");
    let Object::AuthorizationPolicy(policy) = read.object else {
        panic!("not read: {written}");
    };
    let (policy, findings) = policy.l4("istio-system");
    let closed = findings.iter().find(|finding| finding.effect == k8s::Effect::Closed);
    assert_eq!(closed, None, "{written}");
    policy
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn what_is_written_is_what_is_decided(facts in facts(), policies in vec(written(), 1..4)) {
        let translated: Vec<_> = policies.iter().map(|policy| translated(policy).unwrap()).collect();
        let verdict = decide(&facts, translated.iter().map(Ok));
        prop_assert_eq!(verdict.allowed, interpreted(&facts, &policies), "{}", verdict.reason);
        let mut enforced = policies;
        enforced.iter_mut().for_each(|policy| policy["metadata"]["annotations"] = Value::Null);
        if let Some(told) = verdict.dry_run {
            prop_assert_eq!(told.allowed, interpreted(&facts, &enforced), "as if in force: {}", told.reason);
        }
    }
}
