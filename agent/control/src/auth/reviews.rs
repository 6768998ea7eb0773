//! TokenReviews, by the Kubernetes API.

use std::{collections::BTreeMap, future::Future, pin::Pin};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use model::NamespacedName;

use super::{AuthError, BoundPod, TokenUser, tokens::Reviews};

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Asks the API, for certain audiences.
pub struct KubeReviews {
    client: Client,
    audiences: Vec<String>,
}

impl KubeReviews {
    /// A token must be for one of these audiences; istiod's is `istio-ca`.
    pub fn new(client: Client, audiences: Vec<String>) -> Self {
        Self { client, audiences }
    }
}

impl Reviews for KubeReviews {
    fn review(&self, token: String) -> Pin<Box<dyn Future<Output = Result<TokenUser, AuthError>> + Send>> {
        let (api, audiences) = (Api::<TokenReview>::all(self.client.clone()), self.audiences.clone());
        Box::pin(async move {
            let review = TokenReview {
                spec: TokenReviewSpec {
                    audiences: Some(audiences.clone()),
                    token,
                },
                ..TokenReview::default()
            };
            match api.create(&PostParams::default(), &review).await {
                Ok(answer) => user(answer, &audiences),
                Err(error) => Err(AuthError::Unavailable(
                    format!("the Kubernetes API cannot check the token: {error}").into(),
                )),
            }
        })
    }
}

fn user(answer: TokenReview, audiences: &[String]) -> Result<TokenUser, AuthError> {
    let refused = |why: String| AuthError::Unauthenticated(why.into());
    let status = answer.status.unwrap_or_default();
    if status.authenticated != Some(true) {
        let error = status.error.unwrap_or_else(|| "no reason given".into());
        return Err(refused(format!("the Kubernetes API rejects the token: {error}")));
    }
    // An API that does not know of audiences would accept a token for any.
    let found = status.audiences.unwrap_or_default();
    if !found.iter().any(|audience| audiences.contains(audience)) {
        return Err(refused(format!(
            "the token's audience is not {}",
            audiences.join(" or ")
        )));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.clone().unwrap_or_default();
    let account = name
        .strip_prefix("system:serviceaccount:")
        .and_then(|account| account.split_once(':'))
        .ok_or_else(|| refused(format!("the token is {name}'s, which is not a service account")))?;
    Ok(TokenUser {
        account: NamespacedName::new(account.0, account.1),
        pod: bound_pod(&user),
    })
}

fn bound_pod(user: &UserInfo) -> Option<BoundPod> {
    let extra: &BTreeMap<String, Vec<String>> = user.extra.as_ref()?;
    let of = |key: &str| extra.get(key)?.first().filter(|value| !value.is_empty());
    Some(BoundPod {
        name: of(POD_NAME)?.as_str().into(),
        uid: of(POD_UID)?.as_str().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(answer: serde_json::Value) -> Result<TokenUser, AuthError> {
        let review = serde_json::json!({"spec": {"token": "x"}, "status": answer});
        user(serde_json::from_value(review).unwrap(), &["istio-ca".into()])
    }

    #[test]
    fn a_service_account_and_its_pod_are_read() {
        let found = check(serde_json::json!({
            "authenticated": true,
            "audiences": ["istio-ca"],
            "user": {
                "username": "system:serviceaccount:shop:cart",
                "extra": {POD_NAME: ["cart-1"], POD_UID: ["u1"]},
            },
        }));
        let pod = Some(BoundPod {
            name: "cart-1".into(),
            uid: "u1".into(),
        });
        let account = NamespacedName::new("shop", "cart");
        assert_eq!(found, Ok(TokenUser { account, pod }));
    }

    #[test]
    fn others_are_refused_with_a_reason() {
        let user = serde_json::json!({"username": "system:serviceaccount:a:b"});
        for (answer, reason) in [
            (
                serde_json::json!({"authenticated": false, "error": "expired"}),
                "expired",
            ),
            (serde_json::json!({"authenticated": true, "user": user}), "audience"),
            (
                serde_json::json!({"authenticated": true, "audiences": ["api"], "user": user}),
                "audience",
            ),
            (
                serde_json::json!({"authenticated": true, "audiences": ["istio-ca"], "user": {"username": "kubelet"}}),
                "kubelet",
            ),
            (serde_json::json!({}), "rejects"),
        ] {
            let error = check(answer).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
