//! Whether the API serves a kind, by what it says of itself.
//!
//! A 404 says little: whoever stands before an API that starts again answers so, too. Only a list of groups is believed
//! that has a group which every API has (`only_an_api_is_believed`).

use std::time::Duration;

use k8s::live::Kind;
use kube::{Client, discovery::ApiResource};

/// How long it may take to say so.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the API says of a kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// It has it, in the version at this place.
    In(usize),
    /// It does not have it.
    Nowhere,
    /// It does not say: this account may not read `/apis`.
    Forbidden,
    /// It did not say: why.
    Unknown(String),
}

/// Asks for a kind by the ways in which it may be served, the best first.
pub(super) async fn served(client: &Client, ways: &[ApiResource]) -> Served {
    match tokio::time::timeout(PATIENCE, ask(client, ways)).await {
        Ok(Ok(served)) => served,
        Ok(Err(kube::Error::Api(status))) if status.code == 403 => Served::Forbidden,
        Ok(Err(error)) => Served::Unknown(error.to_string()),
        Err(_) => Served::Unknown("it does not say which kinds it has".into()),
    }
}

async fn ask(client: &Client, ways: &[ApiResource]) -> Result<Served, kube::Error> {
    let groups = client.list_api_groups().await?.groups;
    let always = Kind::EndpointSlice.group();
    if !groups.iter().any(|group| group.name == always) {
        return Ok(Served::Unknown("what lists no groups is no API".into()));
    }
    for (place, way) in ways.iter().enumerate() {
        let versions = groups.iter().filter(|group| group.name == way.group);
        let mut versions = versions.flat_map(|group| &group.versions);
        if !versions.any(|version| version.version == way.version) {
            continue;
        }
        let listed = client.list_api_group_resources(&way.api_version).await?;
        if listed.resources.iter().any(|resource| resource.name == way.plural) {
            return Ok(Served::In(place));
        }
    }
    Ok(Served::Nowhere)
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use kube::client::Body;

    use super::*;
    use crate::watch::resource;

    async fn check(expected: Option<Served>, answer: fn(&str) -> (u16, &'static str)) {
        let service = tower::service_fn(move |request: Request<Body>| {
            let (code, text) = answer(request.uri().path());
            let body = Body::from(text.as_bytes().to_vec());
            let response = Response::builder().status(code).body(body).unwrap();
            async move { Ok::<_, std::convert::Infallible>(response) }
        });
        let client = Client::new(service, "default");
        let ways = ["v1", "v1beta1"].map(|version| resource(Kind::Gateway, version));
        let found = served(&client, &ways).await;
        match expected {
            Some(expected) => assert_eq!(found, expected),
            None => assert!(matches!(found, Served::Unknown(_)), "{found:?}"),
        }
    }

    const OTHERS: &str = r#"{"kind": "APIGroupList", "apiVersion": "v1", "groups": [
        {"name": "discovery.k8s.io", "versions": [{"groupVersion": "discovery.k8s.io/v1", "version": "v1"}]}]}"#;
    const BETA: &str = r#"{"kind": "APIGroupList", "apiVersion": "v1", "groups": [
        {"name": "discovery.k8s.io", "versions": [{"groupVersion": "discovery.k8s.io/v1", "version": "v1"}]},
        {"name": "gateway.networking.k8s.io",
         "versions": [{"groupVersion": "gateway.networking.k8s.io/v1beta1", "version": "v1beta1"}]}]}"#;
    const GATEWAYS: &str = r#"{"kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": "gateway.networking.k8s.io/v1beta1", "resources": [
        {"name": "gateways", "singularName": "", "namespaced": true, "kind": "Gateway", "verbs": ["list"]}]}"#;
    const NONE: &str = r#"{"kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": "gateway.networking.k8s.io/v1beta1", "resources": []}"#;

    #[tokio::test]
    async fn a_kind_is_where_the_api_says() {
        let group = "/apis/gateway.networking.k8s.io/v1beta1";
        assert_eq!(resource(Kind::Gateway, "v1beta1").api_version, group["/apis/".len()..]);
        check(Some(Served::In(1)), |path| match path {
            "/apis" => (200, BETA),
            "/apis/gateway.networking.k8s.io/v1beta1" => (200, GATEWAYS),
            _ => (404, ""),
        })
        .await;
        check(Some(Served::Nowhere), |path| match path {
            "/apis" => (200, BETA),
            _ => (200, NONE),
        })
        .await;
        check(Some(Served::Nowhere), |_| (200, OTHERS)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn only_an_api_is_believed() {
        check(None, |_| (404, "404 page not found")).await;
        check(None, |_| (200, "<html>")).await;
        check(None, |_| (200, "{}")).await;
        check(None, |_| {
            (200, r#"{"kind": "APIGroupList", "apiVersion": "v1", "groups": []}"#)
        })
        .await;
        check(None, |path| match path {
            "/apis" => (200, BETA),
            _ => (503, "{}"),
        })
        .await;
    }
}
