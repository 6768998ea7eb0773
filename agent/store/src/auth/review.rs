//! Whether a token's bearer is still who it says: the account, and the pod, secret and node that it is bound to, must be
//! there, with the same uid.
//!
//! Asked at every use: a token dies with what it is bound to (`a_token_dies_with_its_pod` in `tests/`).
//!
//! <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#bound-service-account-tokens>

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use super::{
    rules::User,
    tokens::{Bound, Claims, DEFAULT_LIFETIME, ISSUER, Reference, TokenError, Tokens, seconds},
};
use crate::{
    engine::{ApiError, Cause, Engine, Key},
    kinds::{self, Kind},
};

/// The shortest and the longest life that may be asked for, as in Kubernetes.
const SHORTEST: i64 = 600;
const LONGEST: i64 = 1 << 32;

/// Makes and checks tokens of the accounts in the engine.
#[derive(Clone)]
pub struct Accounts {
    engine: Engine,
    tokens: Arc<Tokens>,
}

impl Accounts {
    /// Of this engine, signed with this key.
    pub fn new(engine: Engine, tokens: Arc<Tokens>) -> Self {
        Self { engine, tokens }
    }

    /// The key set that checks the tokens.
    pub fn key_set(&self) -> Value {
        self.tokens.key_set()
    }

    /// Who bears this token, and for which of `audiences` it is. The error is for a `TokenReview`'s status.
    pub fn bearer(&self, token: &str, audiences: &[String]) -> Result<(User, Vec<String>), String> {
        let refuse = |error: &dyn std::fmt::Display| format!("[invalid bearer token, {error}]");
        let checked = self.tokens.check(token, audiences, SystemTime::now());
        let (claims, common) = checked.map_err(|error| refuse(&error))?;
        let user = self.user(&claims).map_err(|error| refuse(&error))?;
        Ok((user, common))
    }

    fn user(&self, claims: &Claims) -> Result<User, String> {
        let bound = &claims.bound;
        let account = &bound.serviceaccount;
        if claims.sub != format!("system:serviceaccount:{}:{}", bound.namespace, account.name) {
            return Err("service account name does not match the subject".into());
        }
        self.still_there("serviceaccounts", &bound.namespace, account)?;
        let mut user = User::service_account(&bound.namespace, &account.name, &account.uid);
        if let Some(secret) = &bound.secret {
            self.still_there("secrets", &bound.namespace, secret)?;
        }
        if !claims.jti.is_empty() {
            let id = format!("JTI={}", claims.jti);
            user.extra.push(("authentication.kubernetes.io/credential-id", id));
        }
        if let Some(pod) = &bound.pod {
            self.still_there("pods", &bound.namespace, pod)?;
            user.extra
                .push(("authentication.kubernetes.io/pod-name", pod.name.clone()));
            user.extra
                .push(("authentication.kubernetes.io/pod-uid", pod.uid.clone()));
        }
        if let Some(node) = &bound.node {
            if bound.pod.is_none() {
                self.still_there("nodes", "", node)?;
            }
            user.extra
                .push(("authentication.kubernetes.io/node-name", node.name.clone()));
            if !node.uid.is_empty() {
                user.extra
                    .push(("authentication.kubernetes.io/node-uid", node.uid.clone()));
            }
        }
        Ok(user)
    }

    fn still_there(&self, plural: &str, namespace: &str, named: &Reference) -> Result<(), String> {
        let (_, found) = self
            .find(plural, namespace, &named.name)
            .ok_or_else(|| format!("{plural} {namespace}/{} that the token is bound to is gone", named.name))?;
        if uid(&found) == named.uid {
            return Ok(());
        }
        Err(format!(
            "{plural} {namespace}/{} is another than the one that the token is bound to",
            named.name
        ))
    }

    fn find(&self, plural: &str, namespace: &str, name: &str) -> Option<(&'static Kind, Value)> {
        let kind = kinds::by_plural("", plural)?;
        let object = self.engine.get(&Key::new(kind, namespace, name))?;
        Some((kind, object.value()))
    }

    /// Answers a `TokenRequest` for an account: its `status`.
    pub fn request(&self, namespace: &str, name: &str, spec: &Value) -> Result<Value, ApiError> {
        let kind = kinds::by_plural("", "serviceaccounts").ok_or_else(ApiError::no_such_resource)?;
        let account = self.engine.get(&Key::new(kind, namespace, name));
        let account = account.ok_or_else(|| ApiError::not_found(kind, name))?.value();
        let lifetime = lifetime(kind, name, spec)?;
        let mut bound = Bound {
            namespace: namespace.to_owned(),
            serviceaccount: Reference {
                name: name.to_owned(),
                uid: uid(&account),
            },
            pod: None,
            secret: None,
            node: None,
        };
        if let Some(reference) = spec.get("boundObjectRef").filter(|reference| !reference.is_null()) {
            self.bind(&mut bound, kind, reference)?;
        }
        let audiences: Vec<String> = spec
            .get("audiences")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|one| one.as_str().map(str::to_owned))
            .collect();
        let now = SystemTime::now();
        let expires = now + lifetime;
        let claims = Claims {
            aud: if audiences.is_empty() {
                vec![ISSUER.to_owned()]
            } else {
                audiences
            },
            exp: seconds(expires),
            iat: seconds(now),
            iss: ISSUER.to_owned(),
            jti: random_id().map_err(ApiError::internal)?,
            nbf: seconds(now),
            sub: format!("system:serviceaccount:{namespace}:{name}"),
            bound,
        };
        let token = self.tokens.sign(&claims).map_err(ApiError::internal)?;
        Ok(serde_json::json!({"token": token, "expirationTimestamp": rfc3339(claims.exp)}))
    }

    /// Binds a token to the object that a `boundObjectRef` names.
    fn bind(&self, bound: &mut Bound, account: &'static Kind, reference: &Value) -> Result<(), ApiError> {
        let text = |field: &str| reference.get(field).and_then(Value::as_str).unwrap_or_default();
        let (kind, name) = (text("kind"), text("name"));
        let (plural, namespace) = match kind {
            "Pod" => ("pods", bound.namespace.as_str()),
            "Secret" => ("secrets", bound.namespace.as_str()),
            "Node" => ("nodes", ""),
            other => {
                let known = ["Pod", "Secret", "Node"];
                let cause = Cause::not_supported("spec.boundObjectRef.kind", other, &known);
                return Err(ApiError::invalid(account, &bound.serviceaccount.name, vec![cause]));
            }
        };
        let Some((kind, object)) = self.find(plural, namespace, name) else {
            let kind = kinds::by_plural("", plural).unwrap_or(account);
            return Err(ApiError::not_found(kind, name));
        };
        let actual = uid(&object);
        if !text("uid").is_empty() && text("uid") != actual {
            let why = format!(
                "the UID in the bound object reference ({}) does not match the UID in record. The object might have \
                 been deleted and then recreated",
                text("uid")
            );
            return Err(ApiError::conflict(kind, name, why));
        }
        let reference = Reference {
            name: name.to_owned(),
            uid: actual,
        };
        match plural {
            "pods" => {
                let of_pod = object.pointer("/spec/serviceAccountName").and_then(Value::as_str);
                if of_pod.unwrap_or("default") != bound.serviceaccount.name {
                    let why = format!(
                        "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                        bound.serviceaccount.name
                    );
                    return Err(ApiError::forbidden(account, &bound.serviceaccount.name, why));
                }
                bound.node = self.node_of(&object);
                bound.pod = Some(reference);
            }
            "secrets" => bound.secret = Some(reference),
            _ => bound.node = Some(reference),
        }
        Ok(())
    }

    fn node_of(&self, pod: &Value) -> Option<Reference> {
        let name = pod.pointer("/spec/nodeName").and_then(Value::as_str)?;
        let uid = self.find("nodes", "", name).map(|(_, node)| uid(&node));
        Some(Reference {
            name: name.to_owned(),
            uid: uid.unwrap_or_default(),
        })
    }
}

fn uid(object: &Value) -> String {
    let uid = object.pointer("/metadata/uid").and_then(Value::as_str);
    uid.unwrap_or_default().to_owned()
}

fn lifetime(kind: &'static Kind, name: &str, spec: &Value) -> Result<Duration, ApiError> {
    let field = "spec.expirationSeconds";
    let asked = match spec.get("expirationSeconds") {
        None | Some(Value::Null) => return Ok(DEFAULT_LIFETIME),
        Some(asked) => asked,
    };
    let why = match asked.as_i64() {
        Some(SHORTEST..=LONGEST) => return Ok(Duration::from_secs(asked.as_u64().unwrap_or(0))),
        Some(seconds) if seconds < SHORTEST => "may not specify a duration less than 10 minutes",
        _ => "may not specify a duration larger than 2^32 seconds",
    };
    Err(ApiError::invalid(
        kind,
        name,
        vec![Cause::invalid(field, asked.clone(), why)],
    ))
}

/// Sixteen random bytes, written as a UUID.
fn random_id() -> Result<String, TokenError> {
    let mut bytes = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| TokenError::Invalid("no randomness".into()))?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"))
}

fn rfc3339(epoch: u64) -> String {
    let format = time::format_description::well_known::Rfc3339;
    let moment = i64::try_from(epoch)
        .ok()
        .and_then(|epoch| time::OffsetDateTime::from_unix_timestamp(epoch).ok());
    moment
        .and_then(|moment| moment.format(&format).ok())
        .unwrap_or_default()
}
