//! What a runtime tells a plugin: environment and configuration, read and checked.

use std::{io::Read, path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::answer::{CniError, Code};

/// Spoken here, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Which of them know CHECK, and which GC and STATUS.
const WITH_CHECK: &[&str] = &["0.4.0", "1.0.0", "1.1.0"];
const WITH_GC: &[&str] = &["1.1.0"];
/// A chain's configuration is a few kilobytes; with all attachments of a node perhaps a hundred.
const CONFIGURATION_LIMIT: u64 = 4 << 20;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

/// The plugin's configuration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    #[serde(default)]
    pub cni_version: String,
    /// The node agent's socket.
    #[serde(default = "default_socket")]
    pub agent_socket: PathBuf,
    /// How long ADD waits for a pod's capture.
    #[serde(default = "default_timeout")]
    timeout_seconds: u64,
    /// Pods of these namespaces start without waiting for the agent.
    #[serde(default = "default_excluded")]
    pub exclude_namespaces: Vec<String>,
    /// `error`, `info` or `debug`; on standard error.
    #[serde(default)]
    pub log_level: LogLevel,
    /// What the plugins before this one made, byte for byte.
    #[serde(default)]
    pub prev_result: Option<Box<RawValue>>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// What is said on standard error.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    #[default]
    Info,
    Debug,
}

/// A container and an interface that are still there.
#[derive(Debug, Deserialize)]
pub struct Attachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
}

/// A pod, as `CNI_ARGS` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    /// Empty where the runtime does not say.
    pub uid: String,
}

fn default_socket() -> PathBuf {
    "/var/run/undercurrent/agent.sock".into()
}

fn default_timeout() -> u64 {
    30
}

fn default_excluded() -> Vec<String> {
    vec!["kube-system".to_owned()]
}

impl Command {
    /// Of `CNI_COMMAND`.
    pub fn parse(text: Option<&str>) -> Result<Self, CniError> {
        match text {
            Some("ADD") => Ok(Self::Add),
            Some("CHECK") => Ok(Self::Check),
            Some("DEL") => Ok(Self::Del),
            Some("GC") => Ok(Self::Gc),
            Some("STATUS") => Ok(Self::Status),
            Some("VERSION") => Ok(Self::Version),
            other => Err(CniError {
                version: VERSIONS[VERSIONS.len() - 1].to_owned(),
                code: Code::InvalidEnvironment,
                message: "CNI_COMMAND is not one of ADD, CHECK, DEL, GC, STATUS, VERSION",
                details: other.map_or_else(
                    || "it is not set: this is a CNI plugin, started by a container runtime".to_owned(),
                    |other| format!("it is {other:?}"),
                ),
            }),
        }
    }

    /// Whether this version of the specification has it.
    pub fn is_in(self, version: &str) -> bool {
        match self {
            Self::Check => WITH_CHECK.contains(&version),
            Self::Gc | Self::Status => WITH_GC.contains(&version),
            Self::Add | Self::Del | Self::Version => true,
        }
    }
}

impl Config {
    /// From standard input; its version must be one that is spoken here.
    pub fn read(input: &mut dyn Read) -> Result<Self, CniError> {
        let failure = |version: &str, code, message, details: String| CniError {
            version: version.to_owned(),
            code,
            message,
            details,
        };
        let latest = VERSIONS[VERSIONS.len() - 1];
        let mut text = String::new();
        input
            .take(CONFIGURATION_LIMIT)
            .read_to_string(&mut text)
            .map_err(|error| failure(latest, Code::Io, "cannot read the configuration", error.to_string()))?;
        let config: Self = serde_json::from_str(&text).map_err(|error| {
            failure(
                latest,
                Code::Decoding,
                "cannot decode the configuration",
                error.to_string(),
            )
        })?;
        if !VERSIONS.contains(&config.cni_version.as_str()) {
            return Err(failure(
                latest,
                Code::IncompatibleVersion,
                "incompatible CNI version",
                format!(
                    "the configuration is of {:?}, spoken are {VERSIONS:?}",
                    config.cni_version
                ),
            ));
        }
        Ok(config)
    }

    /// How long ADD waits.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds.clamp(1, 600))
    }

    /// An error in the configuration's version.
    pub fn error(&self, code: Code, message: &'static str, details: impl Into<String>) -> CniError {
        CniError {
            version: self.cni_version.clone(),
            code,
            message,
            details: details.into(),
        }
    }

    /// The pod's addresses, from what the plugins before this one made. Interfaces outside the pod do not count.
    pub fn addresses(&self) -> Result<Vec<admin::PodIp>, CniError> {
        let invalid = |details: String| self.error(Code::InvalidConfiguration, "prevResult cannot be used", details);
        let raw = self.prev_result.as_ref().ok_or_else(|| {
            invalid("there is none: this plugin goes last in a chain, after the one that makes the network".to_owned())
        })?;
        let result: PrevResult = serde_json::from_str(raw.get()).map_err(|error| invalid(error.to_string()))?;
        let in_pod = |ip: &&PrevIp| {
            let interface = ip.interface.and_then(|at| result.interfaces.get(at as usize));
            interface.is_none_or(|interface| !interface.sandbox.is_empty())
        };
        Ok(result
            .ips
            .iter()
            .filter(in_pod)
            .map(|ip| admin::PodIp {
                address: ip.address.clone(),
                interface: ip.interface,
                gateway: ip.gateway.clone(),
            })
            .collect())
    }
}

/// The parts of a result that matter here; the same from 0.3.0 to 1.1.0.
#[derive(Deserialize)]
struct PrevResult {
    #[serde(default)]
    interfaces: Vec<PrevInterface>,
    #[serde(default)]
    ips: Vec<PrevIp>,
}

#[derive(Deserialize)]
struct PrevInterface {
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct PrevIp {
    address: String,
    #[serde(default)]
    interface: Option<u32>,
    #[serde(default)]
    gateway: Option<String>,
}

/// The pod in `CNI_ARGS` (`K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;…`); none outside of Kubernetes.
pub fn pod_name(args: Option<&str>) -> Option<PodName> {
    let value = |key: &str| {
        let pairs = args.unwrap_or_default().split(';');
        let value = pairs
            .filter_map(|pair| pair.split_once('='))
            .find(|(name, _)| *name == key);
        value
            .map(|(_, value)| value.to_owned())
            .filter(|value| !value.is_empty())
    };
    Some(PodName {
        namespace: value("K8S_POD_NAMESPACE")?,
        name: value("K8S_POD_NAME")?,
        uid: value("K8S_POD_UID").unwrap_or_default(),
    })
}

/// The answer to VERSION.
pub fn versions(asked: &str) -> String {
    let version = if VERSIONS.contains(&asked) {
        asked
    } else {
        VERSIONS[VERSIONS.len() - 1]
    };
    let answer: Value = serde_json::json!({ "cniVersion": version, "supportedVersions": VERSIONS });
    answer.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, CniError> {
        Config::read(&mut text.as_bytes())
    }

    #[test]
    fn a_pods_addresses_are_those_inside_it() {
        let read = config(
            r#"{"cniVersion":"1.0.0","name":"n","type":"undercurrent-cni","prevResult":{"cniVersion":"1.0.0",
              "interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/var/run/netns/x"}],
              "ips":[{"address":"10.0.0.7/24","gateway":"10.0.0.1","interface":1},
                     {"address":"169.254.1.1/32","interface":0},{"address":"fd00::7/64"}]}}"#,
        )
        .unwrap();
        let addresses: Vec<_> = read.addresses().unwrap().into_iter().map(|ip| ip.address).collect();
        assert_eq!(addresses, ["10.0.0.7/24", "fd00::7/64"]);
        assert_eq!(read.timeout(), Duration::from_secs(30));
        assert_eq!(read.exclude_namespaces, ["kube-system"]);
        let alone = config(r#"{"cniVersion":"1.0.0"}"#).unwrap();
        assert_eq!(alone.addresses().unwrap_err().code, Code::InvalidConfiguration);
    }

    #[test]
    fn what_is_no_configuration_is_named() {
        for (text, code) in [
            ("", Code::Decoding),
            (r#"{"cniVersion":"0.2.0"}"#, Code::IncompatibleVersion),
            (r#"{"cniVersion":"2.0.0"}"#, Code::IncompatibleVersion),
            (r#"{"cniVersion":"1.0.0","timeoutSeconds":-1}"#, Code::Decoding),
        ] {
            assert_eq!(config(text).unwrap_err().code, code, "{text}");
        }
    }

    #[test]
    fn pods_are_found_in_the_arguments() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=1";
        let pod = pod_name(Some(args)).unwrap();
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("shop", "web-0"));
        for none in [
            None,
            Some(""),
            Some("K8S_POD_NAME=x"),
            Some("K8S_POD_NAMESPACE=;K8S_POD_NAME=x"),
            Some(";;="),
        ] {
            assert_eq!(pod_name(none), None, "{none:?}");
        }
    }
}
