//! Which kinds there are: `/api`, `/apis`, each group and version, and both at once (aggregated discovery).
//!
//! Pure: made from the table of kinds.
//!
//! <https://kubernetes.io/docs/concepts/overview/kubernetes-api/#discovery-api>

use serde_json::{Map, Value, json};

use crate::kinds::{self, Kind};

/// The media type of aggregated discovery: clients look at it to know what they got.
pub const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

const ALL_VERBS: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

/// A legacy discovery document; `None` if the path names none.
pub fn document(path: &str) -> Option<Value> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    match segments.as_slice() {
        ["api"] => Some(json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        })),
        ["apis"] => {
            let groups: Vec<Value> = groups()
                .into_iter()
                .filter(|group| !group.is_empty())
                .map(group)
                .collect();
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        ["api", version] => resources("", version),
        ["apis", name] => groups().contains(name).then(|| {
            let mut document = group(name);
            document["kind"] = "APIGroup".into();
            document["apiVersion"] = "v1".into();
            document
        }),
        ["apis", group, version] => resources(group, version),
        _ => None,
    }
}

/// The aggregated document of `/api` or `/apis`.
pub fn aggregated(path: &str) -> Option<Value> {
    let core = match path.trim_end_matches('/') {
        "/api" => true,
        "/apis" => false,
        _ => return None,
    };
    let groups = groups().into_iter().filter(|group| group.is_empty() == core);
    let items: Vec<Value> = groups
        .map(|group| {
            let versions: Vec<Value> = versions(group)
                .into_iter()
                .map(|version| {
                    let resources: Vec<Value> = of(group, version).map(|kind| aggregated_kind(kind, version)).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let metadata = if core { json!({}) } else { json!({"name": group}) };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    Some(json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items,
    }))
}

/// All groups, in the order of a cluster: its own as kube-apiserver ranks them, then those of
/// CustomResourceDefinitions by name. Where two groups have a resource of one name, clients take the first group's: so
/// `kubectl get gateway` is the Gateway API's (`a_name_of_two_groups_is_the_first_groups`).
fn groups() -> Vec<&'static str> {
    const RANKED: &[&str] = &[
        "",
        "apps",
        "events.k8s.io",
        "authentication.k8s.io",
        "authorization.k8s.io",
        "batch",
        "coordination.k8s.io",
        "discovery.k8s.io",
    ];
    let rank = |group: &&str| RANKED.iter().position(|ranked| ranked == group);
    let mut groups: Vec<&'static str> = kinds::ALL.iter().map(|kind| kind.group).collect();
    groups.sort_by_key(|group| (rank(group).unwrap_or(RANKED.len()), *group));
    groups.dedup();
    groups
}

/// A group's versions, the preferred first.
fn versions(group: &str) -> Vec<&'static str> {
    let mut versions = Vec::new();
    for kind in kinds::ALL.iter().filter(|kind| kind.group == group) {
        for version in kind.versions {
            if !versions.contains(version) {
                versions.push(*version);
            }
        }
    }
    versions
}

fn of<'a>(group: &'a str, version: &'a str) -> impl Iterator<Item = &'static Kind> + 'a {
    kinds::ALL
        .iter()
        .filter(move |kind| kind.group == group && kind.versions.contains(&version))
}

fn group(name: &str) -> Value {
    let versions: Vec<Value> = versions(name)
        .into_iter()
        .map(|version| json!({"groupVersion": format!("{name}/{version}"), "version": version}))
        .collect();
    json!({"name": name, "versions": versions, "preferredVersion": versions.first()})
}

fn verbs(kind: &Kind) -> &'static [&'static str] {
    if kind.is_stored() { ALL_VERBS } else { &["create"] }
}

/// A subresource: its name, the group, version and kind of what is exchanged there, and the verbs.
type Subresource = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
);

fn subresources(kind: &'static Kind, version: &'static str) -> Vec<Subresource> {
    let mut all = Vec::new();
    if kind.status_subresource {
        all.push((
            "status",
            kind.group,
            version,
            kind.kind,
            &["get", "patch", "update"][..],
        ));
    }
    for (name, exchanged) in kind.subresources {
        let (api_version, exchanged) = exchanged.split_once(' ').unwrap_or(("v1", exchanged));
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let verbs: &[&str] = match *name {
            "scale" => &["get", "patch", "update"],
            "finalize" => &["update"],
            _ => &["create"],
        };
        all.push((name, group, version, exchanged, verbs));
    }
    all
}

fn resources(group: &str, version: &str) -> Option<Value> {
    let group_version = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    let mut resources = Vec::new();
    for kind in of(group, version) {
        let mut entry = json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced, "kind": kind.kind,
            "verbs": verbs(kind),
        });
        names(&mut entry, kind);
        resources.push(entry);
        let served = kind.versions.iter().copied().find(|served| *served == version)?;
        for (name, of_group, of_version, exchanged, verbs) in subresources(kind, served) {
            let mut entry = json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "", "namespaced": kind.namespaced,
                "kind": exchanged, "verbs": verbs,
            });
            if (of_group, of_version) != (group, version) {
                entry["group"] = of_group.into();
                entry["version"] = of_version.into();
            }
            resources.push(entry);
        }
    }
    (!resources.is_empty()).then(|| {
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources})
    })
}

fn aggregated_kind(kind: &'static Kind, version: &'static str) -> Value {
    let exchanged = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut entry = json!({
        "resource": kind.plural, "responseKind": exchanged(kind.group, version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular, "verbs": verbs(kind),
    });
    names(&mut entry, kind);
    let below: Vec<Value> = subresources(kind, version)
        .into_iter()
        .map(|(name, group, version, of, verbs)| {
            json!({"subresource": name, "responseKind": exchanged(group, version, of), "verbs": verbs})
        })
        .collect();
    if !below.is_empty() {
        entry["subresources"] = below.into();
    }
    entry
}

fn names(entry: &mut Value, kind: &Kind) {
    if let Some(entry) = entry.as_object_mut() {
        let mut put = |field: &str, names: &[&str]| -> Option<Value> {
            let entry: &mut Map<String, Value> = entry;
            if names.is_empty() {
                None
            } else {
                entry.insert(field.to_owned(), names.into())
            }
        };
        put("shortNames", kind.short_names);
        put("categories", kind.categories);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_discovery_name_the_same_kinds() {
        let mut legacy = Vec::new();
        for group in groups() {
            for version in versions(group) {
                let path = if group.is_empty() {
                    format!("/api/{version}")
                } else {
                    format!("/apis/{group}/{version}")
                };
                for entry in document(&path).unwrap()["resources"].as_array().unwrap() {
                    legacy.push(format!("{group}/{version}/{}", entry["name"].as_str().unwrap()));
                }
            }
        }
        let mut both = Vec::new();
        for path in ["/api", "/apis"] {
            for group in aggregated(path).unwrap()["items"].as_array().unwrap() {
                let name = group["metadata"]["name"].as_str().unwrap_or_default();
                for version in group["versions"].as_array().unwrap() {
                    for kind in version["resources"].as_array().unwrap() {
                        let prefix = format!(
                            "{name}/{}/{}",
                            version["version"].as_str().unwrap(),
                            kind["resource"].as_str().unwrap()
                        );
                        both.push(prefix.clone());
                        for below in kind["subresources"].as_array().into_iter().flatten() {
                            both.push(format!("{prefix}/{}", below["subresource"].as_str().unwrap()));
                        }
                    }
                }
            }
        }
        assert_eq!(legacy, both);
        assert!(legacy.contains(&"/v1/serviceaccounts/token".to_owned()), "{legacy:?}");
    }

    #[test]
    fn a_name_of_two_groups_is_the_first_groups() {
        let groups = groups();
        let at = |wanted| groups.iter().position(|group| *group == wanted).unwrap();
        assert!(
            at("gateway.networking.k8s.io") < at("networking.istio.io"),
            "{groups:?}"
        );
        assert!(at("") < at("events.k8s.io"), "{groups:?}");
        let told: Vec<_> = document("/apis").unwrap()["groups"].as_array().unwrap().to_vec();
        assert_eq!((&told[0]["name"], told.len()), (&json!("apps"), groups.len() - 1));
    }

    #[test]
    fn a_scale_is_of_its_own_group() {
        let apps = document("/apis/apps/v1").unwrap();
        let all = apps["resources"].as_array().unwrap();
        let scale = all.iter().find(|entry| entry["name"] == "deployments/scale").unwrap();
        assert_eq!(
            (&scale["group"], &scale["kind"]),
            (&json!("autoscaling"), &json!("Scale"))
        );
    }

    #[test]
    fn unknown_groups_have_no_document() {
        for path in ["/apis/x", "/apis/apps/v2", "/api/v2", "/apis/apps/v1/x", "/x"] {
            assert_eq!(document(path), None, "{path}");
        }
        assert_eq!(aggregated("/api/v1"), None);
    }
}
