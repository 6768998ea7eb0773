//! The plugin as a runtime starts it: the real binary, a fake agent behind its socket.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// What the fake was asked: path and body.
type Asked = Arc<Mutex<Vec<(String, Value)>>>;

struct Lab {
    directory: TempDir,
    asked: Asked,
}

impl Lab {
    /// With an agent that answers everything with this status and text.
    fn with_agent(status: u16, text: &'static str) -> Self {
        let lab = Self::without_agent();
        let (listener, asked) = (UnixListener::bind(lab.socket()).unwrap(), lab.asked.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut head, mut length) = (String::new(), 0);
                while reader.read_line(&mut head).unwrap() > 2 {}
                for line in head.lines() {
                    if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let path = head.split(' ').nth(1).unwrap().to_owned();
                let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
                asked.lock().unwrap().push((path, body));
                let length = text.len();
                write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{text}").unwrap();
            }
        });
        lab
    }

    fn without_agent() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            asked: Asked::default(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    fn config(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "k8s", "type": "undercurrent-cni", "agentSocket": self.socket(),
            "excludeNamespaces": ["kube-system"],
            "prevResult": {"cniVersion": version, "interfaces": [{"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": "/var/run/netns/x"}],
                "ips": [{"address": "10.0.0.7/24", "gateway": "10.0.0.1", "interface": 0}], "dns": {}, "zzz": [1, 2]},
        })
    }

    fn call(&self, command: &str, config: &str) -> Output {
        self.call_for("shop", command, config)
    }

    fn call_for(&self, namespace: &str, command: &str, config: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_undercurrent"))
            .arg("cni")
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_NETNS", "/var/run/netns/x")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env(
                "CNI_ARGS",
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID=u1"),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A plugin that answers without reading it closes its end.
        let _ = child.stdin.take().unwrap().write_all(config.as_bytes());
        child.wait_with_output().unwrap()
    }

    fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().clone()
    }
}

fn value(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[track_caller]
fn fails(output: &Output, code: u32, says: &str) {
    assert!(!output.status.success(), "{output:?}");
    let error = value(output);
    assert_eq!(error["code"], code, "{error}");
    assert!(error["cniVersion"].is_string() && error["msg"].is_string(), "{error}");
    assert!(error["details"].as_str().unwrap().contains(says), "{error}");
}

#[test]
fn add_asks_the_agent_and_passes_the_result_on() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let lab = Lab::with_agent(200, "");
        let config = lab.config(version);
        let output = lab.call("ADD", &config.to_string());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, config["prevResult"].to_string().as_bytes());
        let expected = json!({"Netns": "/var/run/netns/x", "PodName": "web", "PodNamespace": "shop", "ContainerID": "c1",
            "PodUID": "u1", "IPs": [{"Address": "10.0.0.7/24", "Interface": 0, "Gateway": "10.0.0.1"}]});
        assert_eq!(lab.asked(), [("/cmdadd".to_owned(), expected)]);
    }
}

#[test]
fn a_pod_that_is_not_captured_does_not_start() {
    let lab = Lab::with_agent(500, "no certificate for it");
    fails(
        &lab.call("ADD", &lab.config("1.0.0").to_string()),
        11,
        "pod shop/web: the agent answers 500",
    );
    let away = Lab::without_agent();
    fails(
        &away.call("ADD", &away.config("1.0.0").to_string()),
        11,
        "no agent answers at",
    );
}

#[test]
fn who_is_excluded_or_no_pod_starts_without_the_agent() {
    let lab = Lab::without_agent();
    let config = lab.config("1.0.0");
    let output = lab.call_for("kube-system", "ADD", &config.to_string());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(value(&output), config["prevResult"]);
    assert!(lab.call_for("", "ADD", &config.to_string()).status.success());
}

#[test]
fn the_agent_is_told_of_who_is_excluded_and_may_refuse() {
    for status in [200, 500, 503] {
        let lab = Lab::with_agent(status, "no");
        let config = lab.config("1.0.0");
        let output = lab.call_for("kube-system", "ADD", &config.to_string());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(value(&output), config["prevResult"]);
        let output = lab.call_for("kube-system", "DEL", &config.to_string());
        assert!(output.status.success(), "{output:?}");
        assert!(
            lab.call_for("kube-system", "CHECK", &config.to_string())
                .status
                .success()
        );
        let asked: Vec<_> = lab.asked().into_iter().map(|(path, _)| path).collect();
        assert_eq!(asked, ["/cmdadd", "/cmddel"]);
    }
}

#[test]
fn a_pod_is_let_go_without_an_agent() {
    let lab = Lab::without_agent();
    for config in [lab.config("1.0.0").to_string(), String::new(), "{".to_owned()] {
        let output = lab.call("DEL", &config);
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
    let lab = Lab::with_agent(200, "");
    assert!(lab.call("DEL", &lab.config("1.0.0").to_string()).status.success());
    let expected = json!({"PodName": "web", "PodNamespace": "shop", "ContainerID": "c1"});
    assert_eq!(lab.asked(), [("/cmddel".to_owned(), expected)]);
}

#[test]
fn check_says_what_the_agent_says() {
    let lab = Lab::with_agent(200, "");
    assert!(lab.call("CHECK", &lab.config("1.0.0").to_string()).status.success());
    let lab = Lab::with_agent(500, "the veth is gone");
    fails(
        &lab.call("CHECK", &lab.config("1.0.0").to_string()),
        100,
        "the veth is gone",
    );
    fails(
        &lab.call("CHECK", &lab.config("0.3.1").to_string()),
        1,
        "not in version 0.3.1",
    );
}

#[test]
fn garbage_is_what_is_not_attached() {
    let lab = Lab::with_agent(200, "");
    let mut config = lab.config("1.1.0");
    fails(&lab.call("GC", &config.to_string()), 7, "cni.dev/valid-attachments");
    config["cni.dev/valid-attachments"] = json!([{"containerID": "b", "ifname": "eth0"}, {"containerID": "a", "ifname": "eth0"},
        {"containerID": "a", "ifname": "net1"}]);
    assert!(lab.call("GC", &config.to_string()).status.success());
    assert_eq!(lab.asked(), [("/gc".to_owned(), json!({"ContainerIDs": ["a", "b"]}))]);
}

#[test]
fn status_is_the_agents_readiness() {
    let lab = Lab::with_agent(200, "ready");
    assert!(lab.call("STATUS", &lab.config("1.1.0").to_string()).status.success());
    let lab = Lab::with_agent(500, "not ready, pending: knowledge");
    fails(
        &lab.call("STATUS", &lab.config("1.1.0").to_string()),
        50,
        "pending: knowledge",
    );
    let lab = Lab::without_agent();
    fails(
        &lab.call("STATUS", &lab.config("1.1.0").to_string()),
        50,
        "no agent answers",
    );
}

#[test]
fn versions_are_told_to_whoever_asks() {
    let lab = Lab::without_agent();
    for config in [r#"{"cniVersion":"1.1.0"}"#, "", r#"{"cniVersion":"9.9.9"}"#] {
        let output = lab.call("VERSION", config);
        assert!(output.status.success(), "{output:?}");
        let supported = value(&output)["supportedVersions"].clone();
        assert!(
            ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
                .iter()
                .all(|version| supported.as_array().unwrap().contains(&json!(version)))
        );
    }
}

#[test]
fn nonsense_is_refused_with_the_specifications_codes() {
    let lab = Lab::without_agent();
    fails(&lab.call("FLY", "{}"), 4, "FLY");
    fails(&lab.call("ADD", "nonsense"), 6, "expected");
    fails(&lab.call("ADD", r#"{"cniVersion":"0.1.0"}"#), 1, "0.1.0");
    fails(&lab.call("ADD", r#"{"cniVersion":"1.0.0"}"#), 7, "last in a chain");
}

fn install(directory: &Path, command: &str) {
    let status = Command::new(env!("CARGO_BIN_EXE_undercurrent"))
        .args(["cni", command, "--once", "--conf-dir"])
        .arg(directory.join("net.d"))
        .arg("--bin-dir")
        .arg(directory.join("bin"))
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn installing_chains_the_plugin_and_uninstalling_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let conf = directory.path().join("net.d");
    std::fs::create_dir(&conf).unwrap();
    let chain = json!({"cniVersion": "1.0.0", "name": "k8s", "plugins": [{"type": "ptp"}]});
    std::fs::write(conf.join("10-net.conflist"), chain.to_string()).unwrap();
    std::fs::write(conf.join("20-other.conflist"), chain.to_string()).unwrap();
    install(directory.path(), "install");
    install(directory.path(), "install");
    let read =
        |name: &str| -> Value { serde_json::from_str(&std::fs::read_to_string(conf.join(name)).unwrap()).unwrap() };
    assert_eq!(read("10-net.conflist")["plugins"][1]["type"], "undercurrent-cni");
    assert_eq!(read("10-net.conflist")["plugins"].as_array().unwrap().len(), 2);
    assert_eq!(read("20-other.conflist"), chain);
    // By its own name the binary is the plugin.
    let output = Command::new(directory.path().join("bin/undercurrent-cni"))
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(value(&output)["supportedVersions"].is_array());
    install(directory.path(), "uninstall");
    assert_eq!(read("10-net.conflist"), chain);
    assert!(!directory.path().join("bin/undercurrent-cni").exists());
    assert_eq!(std::fs::read_dir(&conf).unwrap().count(), 2);
}
