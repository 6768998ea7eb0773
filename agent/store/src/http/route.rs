//! What a path names: an object, a collection, a subresource, or something that is no resource.
//!
//! ```text
//! /api/v1/namespaces/shop/pods/web-1/status
//!  └group └version    └namespace └kind └name └subresource
//! ```
//! Pure. Whether it exists is asked later; a kind or version that is not served is `Unknown`, never guessed.

use percent_encoding::percent_decode_str;

use crate::kinds::{self, Kind};

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Something of the API.
    Resource(Resource),
    /// Discovery, health, OpenAPI and the like.
    Path,
    /// A resource path of a kind, version or form that is not served.
    Unknown,
}

/// A collection or an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The kind.
    pub kind: &'static Kind,
    /// The version asked for.
    pub version: &'static str,
    /// "" for all namespaces, or for a kind that is in none.
    pub namespace: String,
    /// "" for the collection.
    pub name: String,
    /// "" for the object itself.
    pub subresource: String,
}

impl Resource {
    /// Plural, with the subresource: as authorization names it.
    pub fn full_name(&self) -> String {
        if self.subresource.is_empty() {
            self.kind.plural.to_owned()
        } else {
            format!("{}/{}", self.kind.plural, self.subresource)
        }
    }
}

/// Reads a path.
pub fn route(path: &str) -> Route {
    let segments: Vec<String> = path
        .split('/')
        .filter(|segment| !segment.is_empty())
        .map(|segment| percent_decode_str(segment).decode_utf8_lossy().into_owned())
        .collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match segments.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Route::Path,
    };
    if rest.is_empty() {
        return Route::Path;
    }
    resource(group, version, rest).map_or(Route::Unknown, Route::Resource)
}

fn resource(group: &str, version: &str, rest: &[&str]) -> Option<Resource> {
    let (namespace, plural, rest) = match rest {
        // A namespace's own subresources look like collections in it.
        ["namespaces", name, sub @ ("status" | "finalize")] => {
            return build("", version, "", "namespaces", &[name, sub]);
        }
        ["namespaces", namespace, plural, rest @ ..] => (*namespace, *plural, rest),
        [plural, rest @ ..] => ("", *plural, rest),
        [] => return None,
    };
    build(group, version, namespace, plural, rest)
}

fn build(group: &str, version: &str, namespace: &str, plural: &str, rest: &[&str]) -> Option<Resource> {
    let kind = kinds::find(group, version, plural)?;
    let version = kind.versions.iter().copied().find(|served| *served == version)?;
    let (name, subresource) = match rest {
        [] => ("", ""),
        [name] => (*name, ""),
        [name, subresource] => (*name, *subresource),
        _ => return None,
    };
    let known = match subresource {
        "" => true,
        "status" => kind.status_subresource,
        other => kind.subresources.iter().any(|(name, _)| *name == other),
    };
    // An object of a namespaced kind is in a namespace, and of another kind is not.
    let placed = if kind.namespaced {
        name.is_empty() || !namespace.is_empty()
    } else {
        namespace.is_empty()
    };
    (known && placed).then(|| Resource {
        kind,
        version,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        subresource: subresource.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, expected: &str) {
        let found = match route(path) {
            Route::Path => "path".to_owned(),
            Route::Unknown => "unknown".to_owned(),
            Route::Resource(found) => format!(
                "{} {} ns={} name={} sub={}",
                found.kind, found.version, found.namespace, found.name, found.subresource
            ),
        };
        assert_eq!(found, expected, "{path}");
    }

    #[test]
    fn paths_name_what_kubernetes_says_they_name() {
        check("/api/v1/pods", "pods v1 ns= name= sub=");
        check("/api/v1/namespaces/shop/pods", "pods v1 ns=shop name= sub=");
        check("/api/v1/namespaces/shop/pods/web-1", "pods v1 ns=shop name=web-1 sub=");
        check(
            "/api/v1/namespaces/shop/pods/web-1/status",
            "pods v1 ns=shop name=web-1 sub=status",
        );
        check("/api/v1/namespaces", "namespaces v1 ns= name= sub=");
        check("/api/v1/namespaces/shop", "namespaces v1 ns= name=shop sub=");
        check(
            "/api/v1/namespaces/shop/status",
            "namespaces v1 ns= name=shop sub=status",
        );
        check(
            "/api/v1/namespaces/shop/finalize",
            "namespaces v1 ns= name=shop sub=finalize",
        );
        check("/api/v1/nodes/a%2Db", "nodes v1 ns= name=a-b sub=");
        check(
            "/apis/security.istio.io/v1beta1/namespaces/shop/authorizationpolicies/x",
            "authorizationpolicies.security.istio.io v1beta1 ns=shop name=x sub=",
        );
        check(
            "/apis/apps/v1/namespaces/a/deployments/b/scale",
            "deployments.apps v1 ns=a name=b sub=scale",
        );
    }

    #[test]
    fn what_is_not_served_is_unknown_and_what_is_no_resource_a_path() {
        check("/api/v1/widgets", "unknown");
        check("/apis/apps/v1beta1/deployments", "unknown");
        check("/api/v1/pods/web-1", "unknown");
        check("/api/v1/namespaces/shop/nodes/a", "unknown");
        check("/api/v1/namespaces/shop/pods/a/b/c", "unknown");
        check("/api/v1/namespaces/shop/configmaps/a/status", "unknown");
        for path in [
            "/",
            "/api",
            "/api/v1",
            "/apis/apps/v1",
            "/openapi/v3/api/v1",
            "/healthz",
            "//",
        ] {
            check(path, "path");
        }
    }
}
