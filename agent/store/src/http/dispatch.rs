//! From a request to its answer.
//!
//! ```text
//! path ─► route ─► who (certificate, token) ─► may they (auth::rules) ─► body ─► verb
//! ```
//! Nothing is told to somebody who may not ask, not even whether it exists. A body is read only after that.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, Method, Request, header, request::Parts};
use hyper::body::Incoming;
use serde_json::Value;
use tasks::DrainSignal;
use tokio::sync::Semaphore;

use super::{
    accept::{self, Accepted, Shape},
    answer::{self, Answer, refusal},
    call::{self, Call, text},
    discovery, openapi,
    pages::{Pages, Token},
    query::Query,
    read, reviews,
    route::{Resource, Route, route},
    serve::Limits,
    subresource, watch, write,
};
use crate::{
    auth::{
        review::Accounts,
        rules::{Attributes, User, authorize, denial},
        tokens::{ISSUER, openid_configuration},
    },
    engine::{ApiError, Engine},
};

const IMPERSONATE_USER: HeaderName = HeaderName::from_static("impersonate-user");
const IMPERSONATE_GROUP: HeaderName = HeaderName::from_static("impersonate-group");

/// What requests are answered from.
pub struct Api {
    /// The objects.
    pub engine: Engine,
    /// The service accounts' tokens.
    pub accounts: Accounts,
    /// Long lists.
    pub pages: Pages,
    /// A permit per watch.
    pub watchers: Arc<Semaphore>,
    /// When watches end.
    pub drain: DrainSignal,
    /// How long a body may take.
    pub body_timeout: Duration,
}

impl Api {
    /// Of this engine and these accounts, within these limits.
    pub fn new(engine: Engine, accounts: Accounts, drain: DrainSignal, limits: &Limits) -> Self {
        Self {
            engine,
            accounts,
            pages: Pages::default(),
            watchers: Arc::new(Semaphore::new(limits.watches)),
            drain,
            body_timeout: limits.body,
        }
    }

    /// Answers a request of this client: `peer` is who its certificate says it is.
    pub async fn answer(&self, peer: Option<&User>, request: Request<Incoming>) -> Answer {
        let (parts, body) = request.into_parts();
        let before = SystemTime::now();
        let mut answer = match self.try_answer(peer, &parts, body).await {
            Ok(answer) => answer,
            Err(error) => refusal(&error),
        };
        if parts.method == Method::HEAD {
            *answer.body_mut() = answer::full("");
        }
        tracing::debug!(
            method = %parts.method, uri = %parts.uri, status = answer.status().as_u16(),
            agent = text(&parts.headers, header::USER_AGENT),
            took = ?before.elapsed().unwrap_or_default(), "answered"
        );
        answer
    }

    async fn try_answer(&self, peer: Option<&User>, parts: &Parts, body: Incoming) -> Result<Answer, ApiError> {
        let path = parts.uri.path();
        let route = route(path);
        let user = impersonated(self.user(peer, &parts.headers)?, &parts.headers)?;
        let watching = is_watch(parts.uri.query().unwrap_or_default());
        let attributes = attributes(&route, &parts.method, path, watching);
        if !authorize(&user, &attributes).allowed {
            return Err(forbidden(&user, &attributes, &route));
        }
        let accepted = accept::negotiate(parts.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()));
        match route {
            Route::Path => self.path(parts, accepted),
            Route::Unknown => Err(ApiError::no_such_resource()),
            Route::Resource(resource) => {
                let accepted =
                    accepted.ok_or_else(|| ApiError::not_acceptable("application/json, application/yaml"))?;
                let query = Query::parse(parts.uri.query().unwrap_or_default(), resource.kind)?;
                // One that is no text is none that is read here.
                let media_type = parts.headers.get(header::CONTENT_TYPE);
                let media_type = media_type.map_or("", |value| value.to_str().unwrap_or("?"));
                let media_type = media_type.split(';').next().unwrap_or_default();
                let call = Call {
                    user,
                    method: parts.method.clone(),
                    resource,
                    query,
                    accepted,
                    media_type: media_type.trim().to_ascii_lowercase(),
                    user_agent: text(&parts.headers, header::USER_AGENT).to_owned(),
                    body: call::body(body, self.body_timeout).await?,
                };
                self.resource(call).await
            }
        }
    }

    /// Who asks. A token that is no good is a 401, also where anybody may ask: as in Kubernetes.
    fn user(&self, peer: Option<&User>, headers: &HeaderMap) -> Result<User, ApiError> {
        if let Some(peer) = peer {
            return Ok(peer.clone());
        }
        let given = text(headers, header::AUTHORIZATION);
        let Some((scheme, token)) = given.split_once(' ') else {
            return if given.is_empty() {
                Ok(User::anonymous())
            } else {
                Err(ApiError::unauthorized())
            };
        };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(ApiError::unauthorized());
        }
        let bearer = self.accounts.bearer(token.trim(), &[ISSUER.to_owned()]);
        bearer.map(|(user, _)| user).map_err(|why| {
            tracing::debug!(why, "a token was refused");
            ApiError::unauthorized()
        })
    }

    async fn resource(&self, call: Call) -> Result<Answer, ApiError> {
        let resource = &call.resource;
        let kind = resource.kind;
        if !kind.is_stored() {
            return reviews::answer(self, &call);
        }
        if !matches!(resource.subresource.as_str(), "" | "status") {
            return subresource::answer(self, &call).await;
        }
        let collection = resource.name.is_empty();
        let everywhere = kind.namespaced && resource.namespace.is_empty();
        match (call.method.as_str(), collection) {
            ("GET" | "HEAD", true) if call.query.watch => watch::watch(self, call),
            ("GET" | "HEAD", true) => read::list(self, &call),
            ("GET" | "HEAD", false) => read::get(self, &call),
            ("POST", true) if !everywhere => write::create(self, &call).await,
            ("PUT", false) => write::update(self, &call).await,
            ("PATCH", false) => write::patch(self, &call).await,
            ("DELETE", true) if !everywhere => write::delete_collection(self, &call).await,
            ("DELETE", false) if resource.subresource.is_empty() => write::delete(self, &call).await,
            (method, _) => Err(ApiError::method_not_allowed(kind, &method.to_ascii_lowercase())),
        }
    }

    fn path(&self, parts: &Parts, accepted: Option<Accepted>) -> Result<Answer, ApiError> {
        let (path, headers) = (parts.uri.path(), &parts.headers);
        let query = parts.uri.query().unwrap_or_default();
        if !matches!(parts.method, Method::GET | Method::HEAD) {
            let mut error = ApiError::no_such_resource();
            (error.code, error.reason) = (405, "MethodNotAllowed");
            error.message = "the server does not allow this method on the requested resource".into();
            return Err(error);
        }
        if matches!(
            path,
            "/healthz" | "/readyz" | "/livez" | "/healthz/" | "/readyz/" | "/livez/"
        ) {
            return Ok(answer::plain(200, "text/plain; charset=utf-8", "ok"));
        }
        if let Some(answer) = openapi::answer(path, query, headers) {
            return Ok(answer);
        }
        if accepted.is_some_and(|accepted| accepted.shape == Shape::AggregatedDiscovery)
            && let Some(document) = discovery::aggregated(path)
        {
            return Ok(answer::plain(200, discovery::AGGREGATED, document.to_string()));
        }
        let document = match path.trim_end_matches('/') {
            "/version" => version(),
            "/openid/v1/jwks" => {
                return Ok(answer::plain(
                    200,
                    "application/jwk-set+json",
                    self.accounts.key_set().to_string(),
                ));
            }
            "/.well-known/openid-configuration" => openid_configuration(),
            path => discovery::document(path).ok_or_else(ApiError::no_such_resource)?,
        };
        let accepted = accepted.ok_or_else(|| ApiError::not_acceptable("application/json, application/yaml"))?;
        Ok(answer::value(200, accepted.format, &document))
    }
}

/// Whether a request's path and query make sense, without asking for anything.
///
/// # Errors
///
/// What a request for it would be answered with before anybody looks for the object.
pub fn check_target(path: &str, query: &str) -> Result<(), ApiError> {
    match route(path) {
        Route::Path => Ok(()),
        Route::Unknown => Err(ApiError::no_such_resource()),
        Route::Resource(resource) => {
            let query = Query::parse(query, resource.kind)?;
            if query.next.is_empty() {
                return Ok(());
            }
            Token::decode(&query.next).map(drop)
        }
    }
}

/// Whom the administrator asks to be (`kubectl --as`).
fn impersonated(user: User, headers: &HeaderMap) -> Result<User, ApiError> {
    let name = text(headers, IMPERSONATE_USER);
    let groups = headers.get_all(IMPERSONATE_GROUP).iter();
    let mut groups: Vec<String> = groups
        .filter_map(|group| group.to_str().ok().map(str::to_owned))
        .collect();
    if name.is_empty() && groups.is_empty() {
        return Ok(user);
    }
    if name.is_empty() || !user.is_administrator() {
        let why = format!(
            "User {:?} cannot impersonate resource \"users\" in API group \"\"",
            user.name
        );
        return Err(ApiError::forbidden_request(why));
    }
    if let ["system", "serviceaccount", namespace, account] = name.split(':').collect::<Vec<_>>().as_slice()
        && groups.is_empty()
    {
        return Ok(User::service_account(namespace, account, ""));
    }
    groups.push("system:authenticated".to_owned());
    Ok(User {
        name: name.to_owned(),
        groups,
        ..User::default()
    })
}

/// The Kubernetes whose API this is the shape of.
fn version() -> Value {
    serde_json::json!({
        "major": "1", "minor": "37", "gitVersion": concat!("v1.37.0+undercurrent-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc",
        "platform": format!("linux/{}", std::env::consts::ARCH),
    })
}

fn is_watch(query: &str) -> bool {
    form_urlencoded::parse(query.as_bytes())
        .any(|(name, value)| name == "watch" && matches!(&*value, "" | "1" | "t" | "T" | "true" | "TRUE" | "True"))
}

/// What authorization is asked.
fn attributes<'a>(route: &'a Route, method: &'a Method, path: &'a str, watching: bool) -> Attributes<'a> {
    let Route::Resource(resource) = route else {
        let verb = match method.as_str() {
            "GET" | "HEAD" => "get",
            "POST" => "post",
            "PUT" => "put",
            "PATCH" => "patch",
            "DELETE" => "delete",
            _ => "other",
        };
        return Attributes::Path { verb, path };
    };
    let verb = match (method.as_str(), resource.name.is_empty()) {
        ("GET" | "HEAD", true) if watching => "watch",
        ("GET" | "HEAD", true) => "list",
        ("GET" | "HEAD", false) => "get",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", true) => "deletecollection",
        ("DELETE", false) => "delete",
        _ => "other",
    };
    Attributes::Resource {
        verb,
        group: resource.kind.group,
        resource: resource.full_name(),
        namespace: &resource.namespace,
        name: &resource.name,
    }
}

fn forbidden(user: &User, attributes: &Attributes<'_>, route: &Route) -> ApiError {
    let mut error = ApiError::forbidden_request("");
    error.message = denial(user, attributes);
    if let (Route::Resource(Resource { kind, name, .. }), Some(details)) = (route, &mut error.details) {
        details.name = name.clone();
        details.group = kind.group.to_owned();
        details.kind = kind.plural.to_owned();
    }
    error
}
