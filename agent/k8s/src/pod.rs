//! Pods: what runs, how it is probed, and where.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    IntOrString, Metadata, Probe, Problem,
    meta::{check_name, null_is_empty},
};

/// A pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pod {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// What it is to be.
    pub spec: PodSpec,
}

/// When a container that ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// Always.
    #[default]
    Always,
    /// If it did not end with 0.
    OnFailure,
    /// Never.
    Never,
}

/// What a pod is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// Run one after the other, each to its end, before the containers.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub init_containers: Vec<Container>,
    /// Run together; at least one.
    pub containers: Vec<Container>,
    /// In the node's network namespace; never in the mesh.
    #[serde(default)]
    pub host_network: bool,
    /// The node it must run on.
    #[serde(default)]
    pub node_name: Option<String>,
    /// When a container that ended is started again.
    #[serde(default)]
    pub restart_policy: RestartPolicy,
    /// Half of its identity; `default` where nothing is said.
    #[serde(default)]
    pub service_account_name: Option<String>,
    /// Who its processes are, where a container does not say.
    #[serde(default)]
    pub security_context: SecurityContext,
    /// The pod's host name, if not its name.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Seconds between SIGTERM and SIGKILL.
    #[serde(default)]
    pub termination_grace_period_seconds: Option<u64>,
}

/// Who a process is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecurityContext {
    /// Numeric user; root where nothing is said.
    #[serde(default)]
    pub run_as_user: Option<u32>,
    /// Numeric group.
    #[serde(default)]
    pub run_as_group: Option<u32>,
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Unique in the pod.
    pub name: String,
    /// Accepted and not used: containers run programs of this machine.
    #[serde(default)]
    pub image: Option<String>,
    /// Accepted and not used.
    #[serde(default)]
    pub image_pull_policy: Option<String>,
    /// The program and its first arguments.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub command: Vec<String>,
    /// The rest of its arguments.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub args: Vec<String>,
    /// Environment.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub env: Vec<EnvVar>,
    /// The directory it starts in.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// The ports it listens on.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub ports: Vec<ContainerPort>,
    /// While it fails, the container is restarted.
    #[serde(default)]
    pub liveness_probe: Option<Probe>,
    /// While it fails, the pod is not ready.
    #[serde(default)]
    pub readiness_probe: Option<Probe>,
    /// Until it succeeds, the others wait.
    #[serde(default)]
    pub startup_probe: Option<Probe>,
    /// Who its processes are.
    #[serde(default)]
    pub security_context: SecurityContext,
}

/// A variable of the environment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// Its name.
    pub name: String,
    /// Its value; `$(NAME)` stands for the variables before it.
    #[serde(default)]
    pub value: Option<String>,
    /// A value taken from the pod.
    #[serde(default)]
    pub value_from: Option<EnvVarSource>,
}

/// Where a variable's value is taken from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EnvVarSource {
    /// A field of the pod; the only source there is here.
    pub field_ref: FieldRef,
}

/// A field of the pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FieldRef {
    /// Accepted and not used.
    #[serde(default)]
    pub api_version: Option<String>,
    /// Such as `metadata.name` or `status.podIP`.
    pub field_path: String,
}

/// A port that a container listens on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// What services and probes may call it.
    #[serde(default)]
    pub name: Option<String>,
    /// Its number.
    pub container_port: u16,
    /// `TCP` or `UDP`.
    #[serde(default = "tcp")]
    pub protocol: String,
}

fn tcp() -> String {
    "TCP".to_owned()
}
/// A field's path and what is wrong with it.
pub(crate) type FieldProblem = (String, Problem);

impl Pod {
    /// The service account's name.
    pub fn service_account(&self) -> &str {
        let name = self.spec.service_account_name.as_deref();
        name.filter(|name| !name.is_empty()).unwrap_or("default")
    }

    /// The TCP port that a container of this pod calls so.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        let ports = self.spec.containers.iter().flat_map(|container| &container.ports);
        let mut named = ports.filter(|port| port.name.as_deref() == Some(name) && port.protocol == "TCP");
        named.next().map(|port| port.container_port)
    }

    /// A field of the pod, as `fieldRef` names it, given what is only known once it runs.
    pub fn field(&self, path: &str, node: &str, pod_ip: &str, pod_ips: &str) -> Option<String> {
        let key = |path: &str, of: &str| {
            let inner = path.strip_prefix(of)?.strip_prefix("['")?.strip_suffix("']")?;
            Some(inner.to_owned())
        };
        let metadata = &self.metadata;
        Some(match path {
            "metadata.name" => metadata.name.clone(),
            "metadata.namespace" => metadata.namespace.clone(),
            "spec.nodeName" => node.to_owned(),
            "spec.serviceAccountName" => self.service_account().to_owned(),
            "status.podIP" => pod_ip.to_owned(),
            "status.podIPs" => pod_ips.to_owned(),
            _ => {
                if let Some(label) = key(path, "metadata.labels") {
                    metadata.labels.get(&label).cloned().unwrap_or_default()
                } else {
                    let annotation = key(path, "metadata.annotations")?;
                    metadata.annotations.get(&annotation).cloned().unwrap_or_default()
                }
            }
        })
    }

    /// What can't be run as it is written.
    pub(crate) fn check(&self) -> Result<(), FieldProblem> {
        let spec = &self.spec;
        if spec.containers.is_empty() {
            return Err(invalid("spec.containers", "at least one container is needed"));
        }
        if let Some(name) = spec.service_account_name.as_deref().filter(|name| !name.is_empty()) {
            check_name(name, true).map_err(|why| invalid("spec.serviceAccountName", &why))?;
        }
        let mut names = Vec::new();
        for (list, containers) in [
            ("initContainers", &spec.init_containers),
            ("containers", &spec.containers),
        ] {
            for (index, container) in containers.iter().enumerate() {
                let at = format!("spec.{list}[{index}]");
                container.check(self, &at)?;
                if names.contains(&&container.name) {
                    return Err(invalid(
                        &format!("{at}.name"),
                        "the pod has another container of this name",
                    ));
                }
                names.push(&container.name);
            }
        }
        Ok(())
    }
}

impl Container {
    fn check(&self, pod: &Pod, at: &str) -> Result<(), FieldProblem> {
        check_name(&self.name, false).map_err(|why| invalid(&format!("{at}.name"), &why))?;
        if self.command.first().is_none_or(String::is_empty) {
            let why = "must be given: containers run programs of this machine, not images";
            return Err(invalid(&format!("{at}.command"), why));
        }
        if self.command.iter().chain(&self.args).any(|word| word.contains('\0')) {
            return Err(invalid(&format!("{at}.command"), "holds a NUL"));
        }
        for (index, env) in self.env.iter().enumerate() {
            let field = format!("{at}.env[{index}]");
            if env.name.is_empty() || env.name.contains(['=', '\0']) {
                return Err(invalid(&format!("{field}.name"), "is not the name of a variable"));
            }
            if env.value.as_deref().is_some_and(|value| value.contains('\0')) {
                return Err(invalid(&format!("{field}.value"), "holds a NUL"));
            }
            if let Some(from) = &env.value_from
                && pod.field(&from.field_ref.field_path, "", "", "").is_none()
            {
                let problem = Problem::Unsupported(format!("the field {:?}", from.field_ref.field_path));
                return Err((format!("{field}.valueFrom.fieldRef.fieldPath"), problem));
            }
        }
        let probes = [
            ("livenessProbe", &self.liveness_probe),
            ("readinessProbe", &self.readiness_probe),
            ("startupProbe", &self.startup_probe),
        ];
        for (name, probe) in probes {
            if let Some(probe) = probe {
                probe.check(self, &format!("{at}.{name}"))?;
            }
        }
        Ok(())
    }

    /// The number of a port that a probe names.
    pub fn port(&self, port: &IntOrString) -> Option<u16> {
        match port {
            IntOrString::Number(number) => Some(*number),
            IntOrString::Name(name) => {
                let named = self.ports.iter().find(|port| port.name.as_deref() == Some(name))?;
                Some(named.container_port)
            }
        }
    }
}

pub(crate) fn invalid(field: &str, why: &str) -> FieldProblem {
    (field.to_owned(), Problem::Invalid(why.to_owned()))
}

/// A text in which `$(NAME)` stands for a variable, and `$$` for `$`, as Kubernetes expands commands and arguments. A
/// name that is not known stays as it is written.
pub fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            expanded.push('$');
            rest = after;
            continue;
        }
        let reference = rest.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        match reference.and_then(|(name, after)| Some((env.get(name)?, after))) {
            Some((value, after)) => {
                expanded.push_str(value);
                rest = after;
            }
            None => expanded.push('$'),
        }
    }
    expanded.push_str(rest);
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_expanded_as_kubernetes_does() {
        let env = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, expected) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
        ] {
            assert_eq!(expand(text, &env), expected, "{text}");
        }
    }
}
