//! The stock kubectl against the store: what a person types, and what the terminal says.
//!
//! kubectl is found in the search path, or where `cargo xtask setup` puts it; without it a test says `not run: why`
//! (and to the file of `UNDERCURRENT_NOT_RUN`), and fails under `CI=true`. No test waits for time to pass: kubectl
//! itself waits, with a limit.

#![allow(clippy::unwrap_used)]

mod cluster;
mod deletion;

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use cluster::{Cluster, MESH};

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {containers: [{name: main, image: 'example/web:1'}]}
";

/// What of a table is there whatever the time: all but the last column.
fn columns(table: &str, count: usize) -> Vec<Vec<&str>> {
    table
        .lines()
        .map(|line| line.split_whitespace().take(count).collect())
        .collect()
}

#[test]
fn apply_makes_changes_and_leaves_alone() {
    let Some(cluster) = Cluster::start() else { return };
    let unchanged = cluster.with_input(&["apply", "-f", "-"], MESH);
    assert!(
        unchanged.lines().count() == 6 && unchanged.lines().all(|line| line.ends_with(" unchanged")),
        "{unchanged}"
    );
    let changed = MESH.replace("color: blue, size: small", "color: red");
    let said = cluster.with_input(&["apply", "-f", "-"], &changed);
    assert!(
        said.contains("configmap/settings configured") && said.contains("service/web unchanged"),
        "{said}"
    );
    assert_eq!(
        cluster.says("get cm settings -n shop -o jsonpath={.data}"),
        r#"{"color":"red"}"#
    );
    let difference = cluster.refuses("diff -f -", &changed.replace("replicas: 2", "replicas: 3"));
    assert!(difference.contains("-  replicas: 2\n+  replicas: 3"), "{difference}");
    assert_eq!(cluster.with_input(&["diff", "-f", "-"], &changed), "");
    // What only another manager would own is no difference either: a dry run has no revision of its own.
    assert_eq!(
        cluster.with_input(&["diff", "--server-side", "--field-manager=x", "-f", "-"], &changed),
        ""
    );
    let pruned = cluster.with_input(&["delete", "-f", "-", "--wait", "--ignore-not-found"], &changed);
    assert!(pruned.contains("namespace \"shop\" deleted"), "{pruned}");
    assert!(
        cluster
            .refuses("get ns shop", "")
            .contains("namespaces \"shop\" not found")
    );
}

#[test]
fn apply_on_the_server_names_who_owns_what() {
    let Some(cluster) = Cluster::start() else { return };
    let object = |color: &str| {
        format!(
            "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: ssa, namespace: shop}}, data: {{color: {color}}}}}"
        )
    };
    let apply = ["apply", "--server-side", "-f", "-"];
    assert_eq!(
        cluster.with_input(&apply, &object("blue")),
        "configmap/ssa serverside-applied"
    );
    let other = "apply --server-side --field-manager=other -f -";
    let conflict = cluster.refuses(other, &object("red"));
    assert!(
        conflict.contains("conflict with \"kubectl\": .data.color"),
        "{conflict}"
    );
    let forced = "apply --server-side --field-manager=other --force-conflicts -f -";
    assert_eq!(
        cluster.with_input(&forced.split(' ').collect::<Vec<_>>(), &object("red")),
        "configmap/ssa serverside-applied"
    );
    assert_eq!(cluster.says("get cm ssa -n shop -o jsonpath={.data.color}"), "red");
    let owners = "get cm ssa -n shop -o jsonpath={.metadata.managedFields[*].manager} --show-managed-fields";
    assert!(cluster.says(owners).split(' ').any(|owner| owner == "other"));
    // What a manager gives up goes.
    let empty = "{apiVersion: v1, kind: ConfigMap, metadata: {name: ssa, namespace: shop}}";
    cluster.with_input(
        &"apply --server-side --field-manager=other -f -"
            .split(' ')
            .collect::<Vec<_>>(),
        empty,
    );
    assert_eq!(cluster.says("get cm ssa -n shop -o jsonpath={.data}"), "");
}

/// kubectl applies the items one by one; but before that it looks for what the server can do with the whole, in protobuf.
#[test]
fn lists_are_applied() {
    let Some(cluster) = Cluster::start() else { return };
    let list = |name: &str, colour: &str| {
        format!(
            "{{apiVersion: v1, kind: List, items: [\
             {{apiVersion: v1, kind: ConfigMap, metadata: {{name: {name}, namespace: shop}}, data: {{{colour}: blue}}}}, \
             {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}, namespace: shop}}}}]}}"
        )
    };
    for apply in [&["apply", "-f", "-"][..], &["apply", "--server-side", "-f", "-"]] {
        let said = cluster.with_input(apply, &list("of-a-list", "color"));
        assert!(
            said.contains("configmap/of-a-list") && said.contains("serviceaccount/of-a-list"),
            "{said}"
        );
    }
    // What `get` writes can be applied again.
    let written = cluster.says("get cm,sa -n shop -o yaml");
    assert!(written.contains("kind: List"), "{written}");
    let said = cluster.with_input(&["apply", "-f", "-"], &written);
    assert!(said.contains("configmap/of-a-list configured"), "{said}");
    // A mistake in an item is named.
    let misspelt = list("bad", "color").replace("data:", "dataa:");
    let refused = cluster.refuses("apply -f -", &misspelt);
    assert!(refused.contains("unknown field \"dataa\""), "{refused}");
}

/// The API server renews kubectl's annotation at a server-side apply, without the empty `annotations` that kubectl itself
/// writes: so the first client-side apply after that is a change, on a cluster as here.
#[test]
fn apply_goes_back_and_forth_between_client_and_server() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.with_input(&["apply", "--server-side", "-f", "-"], MESH);
    let said = |end: &str| {
        let said = cluster.with_input(&["apply", "-f", "-"], MESH);
        assert!(said.lines().all(|line| line.ends_with(end)), "{said}");
    };
    said(" configured");
    said(" unchanged");
}

#[test]
fn a_route_is_applied_with_its_defaults() {
    let Some(cluster) = Cluster::start() else { return };
    let route = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec: {parentRefs: [{name: web, kind: Service, group: '', port: 80}], rules: [{backendRefs: [{name: web, port: 8080}]}]}
";
    assert_eq!(
        cluster.with_input(&["apply", "-f", "-"], route),
        "httproute.gateway.networking.k8s.io/web created"
    );
    let rule = cluster.says("get httproute web -n shop -o jsonpath={.spec.rules[0]}");
    let rule: serde_json::Value = serde_json::from_str(&rule).unwrap();
    assert_eq!(rule["matches"][0]["path"]["type"], "PathPrefix", "{rule}");
    assert_eq!(rule["backendRefs"][0]["weight"], 1, "{rule}");
    assert!(cluster.says("describe httproute web -n shop").contains("Backend Refs:"));
    assert!(
        cluster
            .says("explain httproute.spec.parentRefs")
            .contains("sectionName\t<string>")
    );
}

#[test]
fn get_prints_every_form() {
    let Some(cluster) = Cluster::start() else { return };
    let table = cluster.says("get svc,deploy -n shop");
    assert_eq!(
        columns(&table, 4)[..2],
        [
            vec!["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP"],
            columns(&table, 4)[1].clone()
        ]
    );
    assert_eq!(columns(&table, 2)[1], ["service/web", "ClusterIP"]);
    assert_eq!(columns(&table, 4)[4], ["deployment.apps/web", "0/2", "0", "0"]);
    // Two groups have a Gateway: as on a cluster with both, the plain name is the Gateway API's.
    assert_eq!(
        cluster.says("get gateway -n shop -o name"),
        "gateway.gateway.networking.k8s.io/waypoint"
    );
    assert_eq!(cluster.says("get gw -A"), "No resources found");
    let wide = cluster.says("get deploy -n shop -o wide");
    assert!(
        wide.lines()
            .next()
            .unwrap()
            .ends_with("CONTAINERS   IMAGES          SELECTOR"),
        "{wide}"
    );
    assert_eq!(cluster.says("get deploy -n shop -o name"), "deployment.apps/web");
    assert_eq!(
        cluster.says("get deploy -A --no-headers -o custom-columns=N:.metadata.name,R:.spec.replicas"),
        "web   2"
    );
    let json: serde_json::Value = serde_json::from_str(&cluster.says("get deploy web -n shop -o json")).unwrap();
    assert_eq!(
        (&json["kind"], &json["spec"]["replicas"]),
        (&"Deployment".into(), &2.into())
    );
    let yaml = cluster.says("get authorizationpolicies.v1beta1.security.istio.io only-web -n shop -o yaml");
    assert!(
        yaml.starts_with("apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\n"),
        "{yaml}"
    );
    assert_eq!(cluster.says("get cm -A -l app=web -o name"), "configmap/settings");
    assert_eq!(
        cluster.says("get cm -A --field-selector metadata.name=settings -o name"),
        "configmap/settings"
    );
    assert_eq!(
        cluster.says("get cm -n nowhere"),
        "No resources found in nowhere namespace."
    );
    for index in 0..4 {
        cluster.says(&format!("create configmap many-{index} -n shop"));
    }
    let chunked = cluster.says("get cm -n shop -o name --chunk-size=2");
    assert_eq!(chunked.lines().count(), 6, "{chunked}");
    assert_eq!(
        cluster.refuses("get pods nope -n shop", ""),
        "Error from server (NotFound): pods \"nope\" not found"
    );
    assert_eq!(
        cluster.refuses("get widgets", ""),
        "error: the server doesn't have a resource type \"widgets\""
    );
}

#[test]
fn a_watch_prints_changes_as_they_come() {
    let Some(cluster) = Cluster::start() else { return };
    let watch = "get cm -n shop -l app -w --output-watch-events --no-headers";
    let mut command = cluster.command(&watch.split(' ').collect::<Vec<_>>());
    let mut watching = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    // The event, the name and how many fields there are; then the age.
    let mut next = || {
        let line = lines.next().unwrap().unwrap();
        line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(next(), "ADDED settings 2");
    cluster.says("create cm other -n shop");
    cluster.says("label cm other -n shop app=db");
    assert_eq!(next(), "ADDED other 0");
    cluster.says("annotate cm other -n shop note=x");
    assert_eq!(next(), "MODIFIED other 0");
    cluster.says("label cm other -n shop app-");
    assert_eq!(next(), "DELETED other 0");
    cluster.says("delete cm settings -n shop");
    assert_eq!(next(), "DELETED settings 2");
    watching.kill().unwrap();
    watching.wait().unwrap();
}

#[test]
fn edit_patch_label_annotate_scale_and_set_change_objects() {
    let Some(cluster) = Cluster::start() else { return };
    let mut edit = cluster.command(&["edit", "cm", "settings", "-n", "shop"]);
    let edited = edit.env("KUBE_EDITOR", "sed -i s/blue/green/").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&edited.stdout), "configmap/settings edited\n");
    assert_eq!(
        cluster.says("get cm settings -n shop -o jsonpath={.data.color}"),
        "green"
    );

    let patch = |patch_type: &str, patch: &str| {
        cluster.with_input(
            &[
                "patch", "deploy", "web", "-n", "shop", "--type", patch_type, "-p", patch,
            ],
            "",
        )
    };
    let container = r#"{"spec":{"template":{"spec":{"containers":[{"name":"main","image":"example/web:2"}]}}}}"#;
    assert_eq!(patch("strategic", container), "deployment.apps/web patched");
    assert_eq!(patch("strategic", container), "deployment.apps/web patched (no change)");
    let container = "get deploy web -n shop -o jsonpath={.spec.template.spec.containers[0].ports[0].containerPort}";
    assert_eq!(cluster.says(container), "8080");
    patch("merge", r#"{"spec":{"minReadySeconds":3}}"#);
    patch("json", r#"[{"op":"replace","path":"/spec/replicas","value":7}]"#);
    assert_eq!(
        cluster.says("get deploy web -n shop -o jsonpath={.spec.replicas}/{.spec.minReadySeconds}"),
        "7/3"
    );
    let policy = [
        "patch",
        "authorizationpolicy",
        "only-web",
        "-n",
        "shop",
        "--type",
        "merge",
        "-p",
        r#"{"spec":{"action":"DENY"}}"#,
    ];
    assert!(cluster.with_input(&policy, "").ends_with(" patched"));

    assert_eq!(
        cluster.says("scale deploy web -n shop --replicas=4"),
        "deployment.apps/web scaled"
    );
    assert_eq!(cluster.says("get deploy web -n shop -o jsonpath={.spec.replicas}"), "4");
    assert_eq!(
        cluster.says("set image deploy/web -n shop main=example/web:3"),
        "deployment.apps/web image updated"
    );
    assert_eq!(
        cluster.says("label cm settings -n shop tier=front"),
        "configmap/settings labeled"
    );
    assert_eq!(
        cluster.refuses("label cm settings -n shop tier=back", ""),
        "error: 'tier' already has a value (front), and --overwrite is false"
    );
    assert_eq!(
        cluster.says("annotate cm settings -n shop note=x"),
        "configmap/settings annotated"
    );
    let status = [
        "patch",
        "deploy",
        "web",
        "-n",
        "shop",
        "--subresource=status",
        "--type=merge",
        "-p",
        r#"{"status":{"replicas":9}}"#,
    ];
    assert_eq!(cluster.with_input(&status, ""), "deployment.apps/web patched");
    assert_eq!(
        cluster.says("get deploy web -n shop -o jsonpath={.spec.replicas}/{.status.replicas}"),
        "4/9"
    );
}

#[test]
fn describe_tells_of_every_kind() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.with_input(&["create", "-f", "-"], POD);
    cluster.with_input(
        &["create", "-f", "-"],
        "{apiVersion: v1, kind: Node, metadata: {name: n1}, status: {conditions: [{type: Ready, status: 'True'}]}}",
    );
    let event = "
apiVersion: v1
kind: Event
metadata: {name: web-1.1, namespace: shop}
involvedObject: {apiVersion: v1, kind: Pod, name: web-1, namespace: shop, uid: UID}
reason: Captured
message: the pod is in the mesh
type: Normal
count: 1
source: {component: undercurrent}
firstTimestamp: '2026-01-01T00:00:00Z'
lastTimestamp: '2026-01-01T00:00:00Z'
";
    let uid = cluster.says("get pod web-1 -n shop -o jsonpath={.metadata.uid}");
    cluster.with_input(&["create", "-f", "-"], &event.replace("UID", &uid));
    for (what, tells) in [
        ("pod web-1 -n shop", "the pod is in the mesh"),
        ("svc web -n shop", "TargetPort:               8080/TCP"),
        ("ns shop", "istio.io/dataplane-mode=ambient"),
        ("deploy web -n shop", "2 desired"),
        ("node n1", "Ready"),
        ("gtw waypoint -n shop", "Gateway Class Name:  istio-waypoint"),
        ("authorizationpolicy only-web -n shop", "cluster.local/ns/shop/sa/web"),
    ] {
        let said = cluster.says(&format!("describe {what}"));
        assert!(said.contains(tells), "{what}: {said}");
    }
    let events = cluster.says("get events -n shop --field-selector involvedObject.name=web-1");
    assert!(events.contains("Captured") && events.contains("pod/web-1"), "{events}");
    assert!(cluster.says("events -n shop").contains("the pod is in the mesh"));
}

#[test]
fn wait_and_rollout_see_conditions_come() {
    let Some(cluster) = Cluster::start() else { return };
    cluster.with_input(&["create", "-f", "-"], POD);
    let wait = |what: &str, object: &str| {
        let arguments = ["wait", what, object, "-n", "shop", "--timeout=60s"];
        cluster.command(&arguments).stdout(Stdio::piped()).spawn().unwrap()
    };
    let ready = wait("--for=condition=Ready", "pod/web-1");
    let placed = wait("--for=jsonpath={.status.phase}=Running", "pod/web-1");
    let gone = wait("--for=delete", "pod/web-1");
    let status = r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}"#;
    let patch = [
        "patch",
        "pod",
        "web-1",
        "-n",
        "shop",
        "--subresource=status",
        "--type=merge",
        "-p",
        status,
    ];
    cluster.with_input(&patch, "");
    let said = |child: std::process::Child| String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(said(ready), "pod/web-1 condition met\n");
    assert_eq!(said(placed), "pod/web-1 condition met\n");
    let deleted = cluster.says("delete pod web-1 -n shop --force --grace-period=0");
    assert!(deleted.contains("pod \"web-1\" force deleted"), "{deleted}");
    let gone = said(gone);
    assert!(gone.is_empty() || gone == "pod/web-1 condition met\n", "{gone}");

    let done = r#"{"status":{"observedGeneration":1,"replicas":2,"updatedReplicas":2,"availableReplicas":2,"readyReplicas":2}}"#;
    cluster.with_input(
        &[
            "patch",
            "deploy",
            "web",
            "-n",
            "shop",
            "--subresource=status",
            "--type=merge",
            "-p",
            done,
        ],
        "",
    );
    let rollout = cluster.says("rollout status deploy/web -n shop --timeout=60s");
    assert_eq!(rollout, "deployment \"web\" successfully rolled out");
}

#[test]
fn create_replace_and_delete_say_what_they_did() {
    let Some(cluster) = Cluster::start() else { return };
    assert_eq!(cluster.says("create ns other"), "namespace/other created");
    assert_eq!(
        cluster.says("create cm a -n other --from-literal=x=y"),
        "configmap/a created"
    );
    assert_eq!(
        cluster.says("create secret generic s -n other --from-literal=x=y"),
        "secret/s created"
    );
    assert_eq!(cluster.says("get secret s -n other -o jsonpath={.data.x}"), "eQ==");
    assert_eq!(cluster.says("create sa robot -n other"), "serviceaccount/robot created");
    assert_eq!(
        cluster.says("create deploy d -n other --image=x --replicas=0"),
        "deployment.apps/d created"
    );
    assert_eq!(cluster.says("get deploy d -n other -o jsonpath={.spec.replicas}"), "0");
    assert_eq!(
        cluster.says("create svc clusterip c -n other --tcp=80:http"),
        "service/c created"
    );
    assert_eq!(
        cluster.says("get svc c -n other -o jsonpath={.spec.ports[0].targetPort}"),
        "http"
    );
    assert_eq!(
        cluster.refuses("create cm a -n other", ""),
        "error: failed to create configmap: configmaps \"a\" already exists"
    );
    let replaced = "{apiVersion: v1, kind: ConfigMap, metadata: {name: a, namespace: other}, data: {x: z}}";
    assert_eq!(
        cluster.with_input(&["replace", "-f", "-"], replaced),
        "configmap/a replaced"
    );
    let stale = replaced.replace("name: a", "name: a, resourceVersion: '1'");
    let conflict = cluster.refuses("replace -f -", &stale);
    assert!(
        conflict.contains("Error from server (Conflict)") && conflict.contains("please apply your changes"),
        "{conflict}"
    );
    assert_eq!(
        cluster.says("create cm b -n other --dry-run=server -o name"),
        "configmap/b"
    );
    assert!(cluster.refuses("get cm b -n other", "").contains("not found"));

    assert!(
        cluster
            .says("delete cm --all -n other")
            .contains("configmap \"a\" deleted")
    );
    assert!(
        cluster
            .says("delete ns other --timeout=60s")
            .starts_with("namespace \"other\" deleted")
    );
}

#[test]
fn mistakes_are_named() {
    let Some(cluster) = Cluster::start() else { return };
    let misspelt = POD.replace("image:", "imagee: x, image:");
    let refused = cluster.refuses("create -f -", &misspelt);
    assert!(
        refused.contains("unknown field \"spec.containers[0].imagee\""),
        "{refused}"
    );
    let warned = cluster.with_input(&["create", "-f", "-", "--validate=warn"], &misspelt);
    assert!(
        warned.contains("Warning: unknown field \"spec.containers[0].imagee\""),
        "{warned}"
    );
    let refused = cluster.refuses("get pods -n shop --field-selector spec.x=1", "");
    assert!(refused.contains("field label not supported: spec.x"), "{refused}");
    let refused = cluster.refuses("create cm Not_A_Name -n shop", "");
    assert!(refused.contains("a lowercase RFC 1123 subdomain"), "{refused}");
    let refused = cluster.refuses("create cm a -n nowhere", "");
    assert!(refused.contains("namespaces \"nowhere\" not found"), "{refused}");
}

#[test]
fn discovery_explain_and_auth_answer() {
    let Some(cluster) = Cluster::start() else { return };
    let kinds = cluster.says("api-resources --no-headers");
    for line in [
        "pods",
        "deployments",
        "authorizationpolicies",
        "httproutes",
        "endpointslices",
    ] {
        assert!(kinds.lines().any(|kind| kind.starts_with(line)), "{kinds}");
    }
    assert!(
        cluster
            .says("api-versions")
            .lines()
            .any(|version| version == "networking.istio.io/v1alpha3")
    );
    let explained = cluster.says("explain authorizationpolicy.spec.rules.from.source");
    assert!(explained.contains("principals\t<[]string>"), "{explained}");
    assert!(
        cluster
            .says("explain deployment.spec.replicas")
            .contains("FIELD: replicas <integer>")
    );
    let whoami = cluster.says("auth whoami");
    assert!(
        whoami.contains("kubernetes-admin") && whoami.contains("system:masters"),
        "{whoami}"
    );
    assert_eq!(cluster.says("auth can-i delete pods -n shop"), "yes");
    let all = cluster.says("auth can-i --list");
    assert!(
        all.lines().any(|line| line.starts_with("*.*") && line.ends_with("[*]")),
        "{all}"
    );
    let own = cluster.says("auth can-i --list -n shop --as=system:serviceaccount:shop:default");
    assert!(
        own.contains("selfsubjectreviews.authentication.k8s.io") && !own.contains("*.*"),
        "{own}"
    );
    let other = "auth can-i delete pods -n shop --as=system:serviceaccount:shop:default";
    assert_eq!(cluster.refuses(other, "").lines().last().unwrap(), "no");
    let token = cluster.says("create token default -n shop --duration=10m");
    assert_eq!(token.split('.').count(), 3);
    let mut as_account = vec![
        "--kubeconfig=/dev/null",
        "--insecure-skip-tls-verify",
        "--token",
        &token,
        "--server",
    ];
    let server = cluster.says("config view -o jsonpath={.clusters[0].cluster.server}");
    as_account.push(&server);
    let whoami = cluster.with_input(&[&as_account[..], &["auth", "whoami"]].concat(), "");
    assert!(whoami.contains("system:serviceaccount:shop:default"), "{whoami}");
    let (allowed, said) = cluster.run(&[&as_account[..], &["get", "pods", "-n", "shop"]].concat(), "");
    let refusal = "pods is forbidden: User \"system:serviceaccount:shop:default\" cannot list resource \"pods\" in API group \
                   \"\" in the namespace \"shop\"";
    assert!(!allowed && said.contains(refusal), "{said}");
    assert!(cluster.says("version").contains("Server Version: v1."));
}
