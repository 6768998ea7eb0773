//! A server with a mesh in it, and a kubectl of its own.

use std::{
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use store::Server;
use tokio::runtime::Runtime;

/// What is in the cluster at first.
pub const MESH: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: shop, labels: {app: web}}
data: {color: blue, size: small}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: main, image: 'example/web:1', ports: [{containerPort: 8080}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-web, namespace: shop}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: Same}}}]}
";

/// kubectl, or the reason why there is none.
fn program() -> Result<PathBuf, String> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/kubectl");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain([tools.join("bin")]);
    let mut programs = directories.map(|directory| directory.join("kubectl"));
    let found = programs.find(|program| program.is_file());
    found.ok_or_else(|| "kubectl is not in the search path (cargo xtask setup)".to_owned())
}

fn not_run(why: &str) {
    println!("not run: {why}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "not run: {why}");
    if let Some(file) = std::env::var_os("UNDERCURRENT_NOT_RUN") {
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(file)
            .unwrap();
        writeln!(file, "store::kubectl: {why}").unwrap();
    }
}

/// A server with [`MESH`] in it, and a kubectl of its own.
pub struct Cluster {
    directory: tempfile::TempDir,
    program: PathBuf,
    server: Option<Server>,
    runtime: Runtime,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
        }
    }
}

impl Cluster {
    pub fn start() -> Option<Self> {
        let program = program().map_err(|why| not_run(&why)).ok()?;
        let directory = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let config = store::Config {
            directory: directory.path().join("data"),
            listeners: vec![listener],
            names: Vec::new(),
            service_cidrs: Vec::new(),
        };
        let server = runtime.block_on(Server::start(config)).unwrap();
        std::fs::write(directory.path().join("kubeconfig"), server.kubeconfig(&url)).unwrap();
        let cluster = Self {
            directory,
            program,
            server: Some(server),
            runtime,
        };
        cluster.with_input(&["apply", "-f", "-"], MESH);
        Some(cluster)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("KUBECONFIG", self.directory.path().join("kubeconfig"))
            .env("KUBECACHEDIR", self.directory.path().join("cache"))
            .env("HOME", self.directory.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str], input: &str) -> (bool, String) {
        let mut command = self.command(arguments);
        let command = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // YAML in braces: up to 1.36 or so kubectl takes what begins with one for JSON.
        let is_json = serde_json::from_str::<serde_json::Value>(input).is_ok();
        let input = match input.starts_with('{') && !is_json {
            true => format!("---\n{input}"),
            false => input.to_owned(),
        };
        // A kubectl that needs no input may be gone already.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    /// What kubectl says, which is that it did it.
    pub fn with_input(&self, arguments: &[&str], input: &str) -> String {
        let (good, said) = self.run(arguments, input);
        assert!(good, "kubectl {arguments:?}: {said}");
        said.trim_end().to_owned()
    }

    /// The same, for a command line without quotes.
    pub fn says(&self, line: &str) -> String {
        self.with_input(&line.split(' ').collect::<Vec<_>>(), "")
    }

    /// What kubectl says when it fails.
    pub fn refuses(&self, line: &str, input: &str) -> String {
        let (good, said) = self.run(&line.split(' ').collect::<Vec<_>>(), input);
        assert!(!good, "kubectl {line}: {said}");
        said.trim_end().to_owned()
    }
}
