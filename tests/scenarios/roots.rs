//! A root that the mesh no longer trusts: what was proved under it ends, and the rest goes on under the new one.

use anyhow::{Context, Result, ensure};
use system_tests::{
    Background, Kubectl, Mesh, Pod,
    forge::{self, Offer},
    mesh::Log,
    scenarios, wait,
};

scenarios![a_root_that_leaves_takes_along_what_was_proved_under_it];

/// A connection that lives, and where it is logged: at the source and at the destination.
struct Live {
    watcher: Background,
    name: String,
    logs: [(Log, &'static str); 2],
}

impl Live {
    fn between(mesh: &Mesh, from: Pod<'_>, to: Pod<'_>, nodes: [&'static str; 2]) -> Result<Self> {
        let watcher = from.start("client.py", &["watch", &to.v4()?.to_string(), "8013"])?;
        ensure!(
            watcher.next()?["first"] == "tick\n",
            "no connection from {} to {}",
            from.key(),
            to.key()
        );
        let log = |node| mesh.node(node).access_log();
        Ok(Self {
            watcher,
            name: format!("{} to {}", from.key(), to.key()),
            logs: [(log(nodes[0])?, "outbound"), (log(nodes[1])?, "inbound")],
        })
    }

    /// Whichever agent knows of it first resets it, and says why; the other end has a reset then.
    fn until_reset_with_the_reason(self) -> Result<()> {
        let end = self.watcher.next()?;
        ensure!(end["end"] == "ECONNRESET", "{}: {end}", self.name);
        wait::until_true(&format!("an agent says why {} was reset", self.name), || {
            let mut told = false;
            for (log, direction) in &self.logs {
                told |= log.lines()?.iter().any(|line| {
                    [direction, ":8013", "under a root that is no longer trusted"]
                        .iter()
                        .all(|word| line.contains(word))
                });
            }
            Ok(told)
        })
    }
}

/// With these Secrets an authority of its own signs, and no other is trusted from the next start of the control plane on;
/// without them the mesh's first one does.
fn change_authority(mesh: &Mesh, kubectl: &Kubectl, change: impl FnOnce(&Kubectl) -> Result<()>) -> Result<()> {
    mesh.kill_control()?;
    let changed = kubectl
        .says(&["delete", "secret", "-n", "istio-system", "undercurrent-ca-state"])
        .and_then(|_| change(kubectl));
    mesh.start_control()?;
    changed
}

/// The user's own authority, in Istio's form, with a root of its own.
fn give_authority(kubectl: &Kubectl) -> Result<()> {
    let (certificate, key) = identity::generate_root(&model::TrustDomain::default())?;
    let files = tempfile::tempdir()?;
    let mut create: Vec<String> = ["create", "secret", "generic", "cacerts", "-n", "istio-system"]
        .map(str::to_owned)
        .into();
    for (name, text) in [
        ("ca-cert.pem", &certificate),
        ("ca-key.pem", &key),
        ("root-cert.pem", &certificate),
        ("cert-chain.pem", &certificate),
    ] {
        let path = files.path().join(name);
        std::fs::write(&path, text)?;
        create.push(format!("--from-file={name}={}", path.display()));
    }
    kubectl
        .says(&create.iter().map(String::as_str).collect::<Vec<_>>())
        .map(drop)
}

/// Of the certificate of a pod on the first node.
fn serial(mesh: &Mesh) -> Result<String> {
    let mut pods = mesh.node("node-1").status()?.pods.into_iter();
    let client = pods.find(|pod| pod.name == "client" && pod.namespace == "mesh");
    let certificate = client.and_then(|pod| pod.certificate);
    Ok(certificate.context("the client has no certificate")?.serial)
}

fn works(mesh: &Mesh) -> Result<()> {
    let pairs = [
        (("mesh", "client"), ("mesh", "server")),
        (("mesh", "server"), ("mesh", "near")),
    ];
    for ((from_namespace, from), (to_namespace, to)) in pairs {
        let (from, to) = (
            mesh.pod(from_namespace, from),
            mesh.pod(to_namespace, to).v4()?.to_string(),
        );
        wait::until_true(&format!("{} reaches {to}", from.key()), || {
            Ok(from.client(&["echo", &to, "8001", "rT5-", "100"])?["same"] == true)
        })?;
    }
    Ok(())
}

fn a_root_that_leaves_takes_along_what_was_proved_under_it(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "another root")? else {
        return Ok(());
    };
    let (client, server, near) = (
        mesh.pod("mesh", "client"),
        mesh.pod("mesh", "server"),
        mesh.pod("mesh", "near"),
    );
    let lives = [
        Live::between(mesh, client, server, ["node-1", "node-2"])?,
        Live::between(mesh, server, near, ["node-2", "node-1"])?,
        Live::between(mesh, client, near, ["node-1", "node-1"])?,
    ];
    let before = serial(mesh)?;
    let moved = change_authority(mesh, &kubectl, give_authority);
    let checked = moved.and_then(|()| {
        lives.into_iter().try_for_each(Live::until_reset_with_the_reason)?;
        works(mesh)?;
        ensure!(serial(mesh)? != before, "the certificate is still the one of before");
        // Who is still certified by the old one is nobody.
        let old = Offer::of(mesh, "spiffe://cluster.local/ns/mesh/sa/client")?;
        let at = std::net::SocketAddr::new(server.v4()?, 15008);
        let outcome = forge::connect(
            &mesh.pod("outside", "client").netns(),
            at,
            old,
            &format!("{}:8001", server.v4()?),
            &[],
        )?;
        ensure!(outcome.is_refused(), "the old root still opens: {outcome:?}");
        Ok(())
    });
    let back = change_authority(mesh, &kubectl, |kubectl| {
        kubectl
            .says(&[
                "delete",
                "secret",
                "-n",
                "istio-system",
                "cacerts",
                "--ignore-not-found",
            ])
            .map(drop)
    });
    checked.and(back).and_then(|()| works(mesh))
}
