//! Deletions that wait, with the stock kubectl.

use std::process::Stdio;

use crate::cluster::Cluster;

const HELD: &str =
    "{apiVersion: v1, kind: ConfigMap, metadata: {name: held, namespace: shop, finalizers: [undercurrent.io/x]}}";

#[test]
fn a_deletion_waits_for_a_finalizer() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.with_input(&["create", "-f", "-"], HELD);
    let deleting = cluster
        .command(&["delete", "cm", "held", "-n", "shop", "--wait"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    cluster.says("wait --for=jsonpath={.metadata.deletionTimestamp} cm/held -n shop --timeout=60s");
    let release = [
        "patch",
        "cm",
        "held",
        "-n",
        "shop",
        "--type=merge",
        "-p",
        r#"{"metadata":{"finalizers":null}}"#,
    ];
    cluster.with_input(&release, "");
    let output = deleting.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("configmap \"held\" deleted"));
}

/// As people do it on a cluster.
#[test]
fn a_namespace_that_hangs_is_let_go_by_force() {
    let Some(cluster) = Cluster::start() else { return };
    let stuck = "{apiVersion: v1, kind: Namespace, metadata: {name: stuck}}";
    cluster.with_input(&["create", "-f", "-"], stuck);
    let holds = HELD.replace("name: held, namespace: shop", "name: holds, namespace: stuck");
    cluster.with_input(&["create", "-f", "-"], &holds);
    cluster.says("delete ns stuck --wait=false");
    assert_eq!(cluster.says("get ns stuck -o jsonpath={.status.phase}"), "Terminating");
    let finalize = ["replace", "--raw", "/api/v1/namespaces/stuck/finalize", "-f", "-"];
    let none = r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "stuck"}, "spec": {}}"#;
    cluster.with_input(&finalize, none);
    assert!(cluster.refuses("get ns stuck", "").contains("not found"));
}
