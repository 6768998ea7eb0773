//! Service-account tokens: JWTs signed with a key of the data directory, as Kubernetes makes them.
//!
//! Knows signatures, audiences and times (given as an argument), not whether the account or the pod is still there:
//! that is `review`. A token of another issuer, algorithm or key is refused
//! (`a_token_of_another_key_is_refused`), as is one that is expired or for another audience
//! (`expired_and_misaddressed_tokens_are_refused`).
//!
//! <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#bound-service-account-tokens>

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Who issues the tokens, and the audience of those for this API itself.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// How long a token is valid if nothing is said.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);
/// The longest token that is looked at.
const MAX_TOKEN: usize = 16 << 10;

/// An object as a token names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Its name.
    pub name: String,
    /// Its uid: another object of the same name is another object.
    #[serde(default)]
    pub uid: String,
}

/// The claim `kubernetes.io`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// The account's namespace.
    pub namespace: String,
    /// The account.
    pub serviceaccount: Reference,
    /// The pod that the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    /// The secret that it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
    /// The pod's node, or the node that it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Whom it is for.
    pub aud: Vec<String>,
    /// Not valid from here on, in seconds of the epoch.
    pub exp: u64,
    /// Issued.
    pub iat: u64,
    /// By whom.
    pub iss: String,
    /// Its own name.
    #[serde(default)]
    pub jti: String,
    /// Kubernetes' part.
    #[serde(rename = "kubernetes.io")]
    pub bound: Bound,
    /// Not valid before.
    pub nbf: u64,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
}

/// Why a token is refused. Nothing but another token helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not ours, or damaged.
    #[error("service account token is not valid: {0}")]
    Invalid(String),
    /// Too late.
    #[error("service account token has expired")]
    Expired,
    /// Too early.
    #[error("service account token is not valid yet")]
    Early,
    /// For others.
    #[error("token audiences {has:?} is invalid for the target audiences {wanted:?}")]
    Audience {
        /// Its audiences.
        has: Vec<String>,
        /// Those asked for.
        wanted: Vec<String>,
    },
}

/// Signs and checks.
pub struct Tokens {
    signs: EncodingKey,
    checks: DecodingKey,
    id: String,
    x: String,
    y: String,
}

impl Tokens {
    /// With this P-256 key.
    pub fn new(key: &KeyPair) -> Self {
        // An uncompressed point: 4, then x and y of 32 bytes each.
        let point = key.public_key_raw();
        let (x, y) = point
            .get(1..)
            .unwrap_or_default()
            .split_at(point.len().saturating_sub(1) / 2);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        Self {
            signs: EncodingKey::from_ec_der(&key.serialize_der()),
            checks: DecodingKey::from_ec_der(point),
            id: x.clone(),
            x,
            y,
        }
    }

    /// The token that says this.
    pub fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        let header = Header {
            typ: None,
            kid: Some(self.id.clone()),
            ..Header::new(Algorithm::ES256)
        };
        jsonwebtoken::encode(&header, claims, &self.signs).map_err(|error| TokenError::Invalid(error.to_string()))
    }

    /// What this token says, if it is ours, of now, and for one of `audiences`; with those of `audiences` that it is for.
    pub fn check(
        &self,
        token: &str,
        audiences: &[String],
        now: SystemTime,
    ) -> Result<(Claims, Vec<String>), TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Invalid("it is too long".into()));
        }
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[ISSUER]);
        // Times and audiences are checked below: against `now`, and with words of Kubernetes.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp", "iss", "sub", "aud", "nbf"]);
        let claims: Claims = jsonwebtoken::decode(token, &self.checks, &validation)
            .map_err(|error| TokenError::Invalid(error.to_string()))?
            .claims;
        let now = seconds(now);
        if now >= claims.exp {
            return Err(TokenError::Expired);
        }
        if now < claims.nbf {
            return Err(TokenError::Early);
        }
        let common: Vec<String> = audiences
            .iter()
            .filter(|one| claims.aud.contains(one))
            .cloned()
            .collect();
        if common.is_empty() {
            return Err(TokenError::Audience {
                has: claims.aud,
                wanted: audiences.to_vec(),
            });
        }
        Ok((claims, common))
    }

    /// The document `/openid/v1/jwks`.
    pub fn key_set(&self) -> Value {
        json!({"keys": [{
            "use": "sig", "kty": "EC", "kid": self.id, "crv": "P-256", "alg": "ES256", "x": self.x, "y": self.y,
        }]})
    }
}

/// The document `/.well-known/openid-configuration`.
pub fn openid_configuration() -> Value {
    json!({
        "issuer": ISSUER,
        "jwks_uri": format!("{ISSUER}/openid/v1/jwks"),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    })
}

/// Seconds of the epoch.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Tokens {
        Tokens::new(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap())
    }

    fn claims() -> Claims {
        Claims {
            aud: vec!["istio-ca".into()],
            exp: 2000,
            iat: 1000,
            iss: ISSUER.into(),
            jti: "j".into(),
            bound: Bound {
                namespace: "shop".into(),
                serviceaccount: Reference {
                    name: "web".into(),
                    uid: "u".into(),
                },
                pod: None,
                secret: None,
                node: None,
            },
            nbf: 1000,
            sub: "system:serviceaccount:shop:web".into(),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn what_was_signed_is_read_back() {
        let tokens = tokens();
        let token = tokens.sign(&claims()).unwrap();
        let audiences = ["other".to_owned(), "istio-ca".to_owned()];
        let (read, common) = tokens.check(&token, &audiences, at(1999)).unwrap();
        assert_eq!((read, common), (claims(), vec!["istio-ca".to_owned()]));
    }

    #[test]
    fn expired_and_misaddressed_tokens_are_refused() {
        let tokens = tokens();
        let token = tokens.sign(&claims()).unwrap();
        let audience = ["istio-ca".to_owned()];
        assert_eq!(tokens.check(&token, &audience, at(2000)), Err(TokenError::Expired));
        assert_eq!(tokens.check(&token, &audience, at(999)), Err(TokenError::Early));
        let error = tokens.check(&token, &["x".to_owned()], at(1500)).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"token audiences ["istio-ca"] is invalid for the target audiences ["x"]"#
        );
    }

    #[test]
    fn a_token_of_another_key_is_refused() {
        let tokens = tokens();
        let audience = ["istio-ca".to_owned()];
        let other = self::tokens().sign(&claims()).unwrap();
        let of_another_issuer = tokens
            .sign(&Claims {
                iss: "https://elsewhere".into(),
                ..claims()
            })
            .unwrap();
        let ours = tokens.sign(&claims()).unwrap();
        let (head, _) = ours.rsplit_once('.').unwrap();
        let none = format!(
            "{}.{}.",
            URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#),
            ours.split('.').nth(1).unwrap()
        );
        for token in [
            other,
            of_another_issuer,
            head.to_owned(),
            format!("{head}."),
            none,
            String::new(),
            "a.b.c".into(),
        ] {
            let refused = tokens.check(&token, &audience, at(1500));
            assert!(matches!(refused, Err(TokenError::Invalid(_))), "{token}: {refused:?}");
        }
    }

    #[test]
    fn the_published_key_checks_what_was_signed() {
        let tokens = tokens();
        let token = tokens.sign(&claims()).unwrap();
        let set: jsonwebtoken::jwk::JwkSet = serde_json::from_value(tokens.key_set()).unwrap();
        let header = jsonwebtoken::decode_header(&token).unwrap();
        let key = DecodingKey::from_jwk(set.find(&header.kid.unwrap()).unwrap()).unwrap();
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&["istio-ca"]);
        validation.validate_exp = false;
        assert!(jsonwebtoken::decode::<Claims>(&token, &key, &validation).is_ok());
    }
}
