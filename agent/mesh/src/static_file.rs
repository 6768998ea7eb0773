//! The static file: `undercurrent node --static FILE`. YAML (and so JSON), with ztunnel's names for its local
//! configuration, so that one file can be given to both.
//!
//! ```yaml
//! settings: {trustDomain: cluster.local, nonTcp: Pass,        # not in ztunnel's
//!            outboundTrafficPolicy: {mode: REGISTRY_ONLY}}
//! workloads: [ … model::Workload … ]
//! services:  [ … model::Service … ]
//! policies:  [ … model::Policy … ]
//! ```
//! A workload or service that can't be read is rejected by name and the rest is used. A policy or a setting that can't
//! be read fails the whole file, for without it something might be open: what was known before stays in force.

use model::{MeshSettings, Policy, Service, Workload};
use serde::{Deserialize, de::DeserializeOwned};
use serde_yaml_ng::Value;

use crate::{Contents, Rejected, contents::RejectedObject};

/// Why a file can't be used at all.
#[derive(Debug, thiserror::Error)]
pub enum StaticFileError {
    /// Not YAML, or not of this shape.
    #[error("not a static file: {0}")]
    Shape(#[source] serde_yaml_ng::Error),
    /// A policy that can't be read: without it something might be open.
    #[error(
        "policies[{index}]{name}: {source}; the file is not used, since without the policy something might be open"
    )]
    Policy {
        /// Which entry.
        index: usize,
        /// ` (namespace/name)` where it says so.
        name: String,
        /// What is wrong with it.
        #[source]
        source: serde_yaml_ng::Error,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    settings: MeshSettings,
    #[serde(default)]
    workloads: Vec<Value>,
    #[serde(default)]
    services: Vec<Value>,
    #[serde(default)]
    policies: Vec<Value>,
}

/// Reads a static file.
pub fn parse(text: &str) -> Result<(Contents, Vec<Rejected>), StaticFileError> {
    let file: File = serde_yaml_ng::from_str(text).map_err(StaticFileError::Shape)?;
    let mut rejected = Vec::new();
    let workloads = each(file.workloads, "workloads", &mut rejected, |value| {
        Some(RejectedObject::Workload(model::WorkloadUid(
            text_of(value, "uid")?.into(),
        )))
    });
    let services = each(file.services, "services", &mut rejected, |value| {
        let (namespace, hostname) = (text_of(value, "namespace")?, text_of(value, "hostname")?);
        Some(RejectedObject::Service(model::NamespacedName::new(namespace, hostname)))
    });
    let policies = file
        .policies
        .into_iter()
        .enumerate()
        .map(policy)
        .collect::<Result<_, _>>()?;
    Ok((
        Contents {
            settings: file.settings,
            workloads,
            services,
            policies,
        },
        rejected,
    ))
}

fn policy((index, value): (usize, Value)) -> Result<Policy, StaticFileError> {
    let name = match (text_of(&value, "namespace"), text_of(&value, "name")) {
        (Some(namespace), Some(name)) => format!(" ({namespace}/{name})"),
        _ => String::new(),
    };
    serde_yaml_ng::from_value(value).map_err(|source| StaticFileError::Policy { index, name, source })
}

fn each<T: DeserializeOwned>(
    values: Vec<Value>,
    list: &'static str,
    rejected: &mut Vec<Rejected>,
    name: impl Fn(&Value) -> Option<RejectedObject>,
) -> Vec<T> {
    let mut objects: Vec<T> = Vec::with_capacity(values.len());
    for (index, value) in values.into_iter().enumerate() {
        let object = name(&value).unwrap_or(RejectedObject::Entry(list, index));
        match serde_yaml_ng::from_value(value) {
            Ok(read) => objects.push(read),
            Err(error) => rejected.push(Rejected {
                object,
                reason: error.to_string(),
            }),
        }
    }
    objects
}

fn text_of<'a>(value: &'a Value, field: &str) -> Option<&'a str> {
    value.get(field)?.as_str()
}

/// The text of a static file with these contents.
pub fn write(contents: &Contents) -> String {
    #[derive(serde::Serialize)]
    struct Out<'a> {
        settings: &'a MeshSettings,
        workloads: &'a [Workload],
        services: &'a [Service],
        policies: &'a [Policy],
    }
    let Contents {
        settings,
        workloads,
        services,
        policies,
    } = contents;
    serde_yaml_ng::to_string(&Out {
        settings,
        workloads,
        services,
        policies,
    })
    .expect("plain values with text keys always serialise")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_workload_does_not_spoil_the_others() {
        let (contents, rejected) = parse(
            "workloads:\n- {uid: u1, name: a, namespace: n}\n- {uid: u2, name: b, namespace: n, colour: red}\n- 7\n",
        )
        .unwrap();
        assert_eq!(contents.workloads.len(), 1);
        let texts: Vec<_> = rejected.iter().map(ToString::to_string).collect();
        assert!(
            texts[0].starts_with("workload u2: ") && texts[0].contains("colour"),
            "{texts:?}"
        );
        assert!(texts[1].starts_with("workloads[2]: "), "{texts:?}");
    }

    #[test]
    fn a_bad_policy_fails_the_file() {
        let error = parse("policies:\n- {name: p, namespace: n, scope: Global, action: Perhaps}\n").unwrap_err();
        assert!(error.to_string().starts_with("policies[0] (n/p): "), "{error}");
    }

    #[test]
    fn the_example_of_ztunnels_local_configuration_is_read() {
        let (contents, rejected) = parse(
            r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: default
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  node: local
  services:
    "default/example.com":
      80: 8080
policies:
- action: Allow
  rules:
  - - - notDestinationPorts:
        - 9999
  name: deny-9999
  namespace: default
  scope: Namespace
services:
- name: local
  namespace: default
  hostname: example.com
  vips:
  - /127.10.0.1
  ports:
    80: 8080
"#,
        )
        .unwrap();
        assert!(rejected.is_empty());
        assert_eq!(
            (
                contents.workloads.len(),
                contents.services.len(),
                contents.policies.len()
            ),
            (1, 1, 1)
        );
        let (again, _) = parse(&write(&contents)).unwrap();
        assert_eq!(again, contents);
    }

    /// A good file with one stretch of it replaced: closer to what goes wrong than random text is.
    fn damaged() -> impl proptest::strategy::Strategy<Value = String> {
        use proptest::prelude::*;
        let good = "settings: {trustDomain: td, nonTcp: Forbid}\nworkloads:\n- {uid: u, name: a, namespace: n, \
                    workloadIps: [10.0.0.1], services: {n/h: {80: 81}}}\nservices:\n- {name: s, namespace: n, \
                    hostname: h, vips: [/10.1.0.1], ports: {80: 81}}\npolicies:\n- {name: p, namespace: n, scope: \
                    Global, action: Deny, rules: [[[{principals: [Presence]}]]]}\n";
        (0..good.len(), 0..12usize, "[ -~\\n]{0,8}").prop_map(move |(start, length, text)| {
            let end = (start + length).min(good.len());
            format!("{}{text}{}", &good[..start], &good[end..])
        })
    }

    proptest::proptest! {
        #[test]
        fn whatever_the_file_holds_it_is_read_or_refused(text in damaged()) {
            if let Ok((contents, rejected)) = parse(&text) {
                let (mut writer, knowledge) = crate::new();
                writer.replace(contents, &rejected);
                assert!(knowledge.snapshot().ready());
            }
        }
    }
}
