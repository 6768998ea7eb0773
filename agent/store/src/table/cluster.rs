//! Nodes, namespaces, and what pods are configured with.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{AGE, Column, NAME, Table, at, condition, created, entries, list, name, or, text};

pub(super) const NODE: Table = Table {
    columns: &[
        NAME,
        Column::text("Status", "The status of the node"),
        Column::text("Roles", "The roles of the node"),
        AGE,
        Column::text("Version", "Kubelet Version reported by the node."),
        Column::text("Internal-IP", "The address inside the cluster.").wide(),
        Column::text("External-IP", "The address outside the cluster.").wide(),
        Column::text("OS-Image", "OS Image reported by the node.").wide(),
        Column::text("Kernel-Version", "Kernel Version reported by the node.").wide(),
        Column::text("Container-Runtime", "ContainerRuntime Version reported by the node.").wide(),
    ],
    cells: |node, now| {
        let info = |field: &str| text(node, &format!("status.nodeInfo.{field}"));
        let wide = |field: &str| Value::from(or(info(field), "<unknown>"));
        vec![
            name(node),
            Value::from(node_status(node)),
            Value::from(roles(node)),
            created(node, now),
            Value::from(info("kubeletVersion")),
            Value::from(address(node, "InternalIP")),
            Value::from(address(node, "ExternalIP")),
            wide("osImage"),
            wide("kernelVersion"),
            wide("containerRuntimeVersion"),
        ]
    },
};

pub(super) const NAMESPACE: Table = Table {
    columns: &[NAME, Column::text("Status", "The status of the namespace"), AGE],
    cells: |object, now| {
        vec![
            name(object),
            Value::from(text(object, "status.phase")),
            created(object, now),
        ]
    },
};

pub(super) const CONFIG_MAP: Table = Table {
    columns: &[NAME, Column::text("Data", "Number of entries."), AGE],
    cells: |object, now| {
        let entries = entries(object, "data") + entries(object, "binaryData");
        vec![name(object), Value::from(entries), created(object, now)]
    },
};

pub(super) const SECRET: Table = Table {
    columns: &[
        NAME,
        Column::text("Type", "What the secret is for."),
        Column::text("Data", "Number of entries."),
        AGE,
    ],
    cells: |object, now| {
        let type_ = Value::from(text(object, "type"));
        vec![
            name(object),
            type_,
            Value::from(entries(object, "data")),
            created(object, now),
        ]
    },
};

pub(super) const SERVICE_ACCOUNT: Table = Table {
    columns: &[
        NAME,
        Column::text("Secrets", "Number of secrets that its pods may use."),
        AGE,
    ],
    cells: |object, now| {
        let secrets = list(object, "secrets").len();
        vec![name(object), Value::from(secrets), created(object, now)]
    },
};

pub(super) const LEASE: Table = Table {
    columns: &[NAME, Column::text("Holder", "Who holds the lease."), AGE],
    cells: |object, now| {
        let holder = text(object, "spec.holderIdentity");
        vec![name(object), Value::from(holder), created(object, now)]
    },
};

fn node_status(node: &Value) -> String {
    let status = match condition(node, "Ready") {
        "True" => "Ready",
        "" => "Unknown",
        _ => "NotReady",
    };
    let unschedulable = at(node, "spec.unschedulable").and_then(Value::as_bool).unwrap_or(false);
    let suffix = if unschedulable { ",SchedulingDisabled" } else { "" };
    format!("{status}{suffix}")
}

fn roles(node: &Value) -> String {
    let labels = at(node, "metadata.labels").and_then(Value::as_object);
    let role = |(label, value): (&String, &Value)| match label.strip_prefix("node-role.kubernetes.io/") {
        Some(role) => Some(role.to_owned()),
        None if label == "kubernetes.io/role" => value.as_str().map(str::to_owned),
        None => None,
    };
    let roles: BTreeSet<String> = labels
        .into_iter()
        .flatten()
        .filter_map(role)
        .filter(|role| !role.is_empty())
        .collect();
    let roles: Vec<String> = roles.into_iter().collect();
    or(&roles.join(","), "<none>").to_owned()
}

fn address<'a>(node: &'a Value, type_: &str) -> &'a str {
    let mut addresses = list(node, "status.addresses").iter();
    addresses
        .find(|address| text(address, "type") == type_)
        .map_or("<none>", |address| text(address, "address"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::line;

    #[test]
    fn nodes_show_status_roles_and_addresses() {
        let node = json!({
            "metadata": {"name": "n", "labels": {"node-role.kubernetes.io/control-plane": "", "kubernetes.io/role": "x"}},
            "spec": {"unschedulable": true},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}],
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                "nodeInfo": {"kubeletVersion": "v1.37.0", "osImage": "Debian"},
            },
        });
        let expected = "n | Ready,SchedulingDisabled | control-plane,x | 5m | v1.37.0 | 192.0.2.1 | <none> | Debian | \
                        <unknown> | <unknown>";
        assert_eq!(line("", "nodes", node), expected);
        let lost =
            json!({"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
        assert!(line("", "nodes", lost).starts_with("n | NotReady | <none> | 5m"));
    }

    #[test]
    fn the_small_kinds_show_what_they_hold() {
        let metadata = json!({"name": "a"});
        let check = |group: &str, plural: &str, mut object: serde_json::Value, expected: &str| {
            object["metadata"] = metadata.clone();
            assert_eq!(line(group, plural, object), expected);
        };
        check(
            "",
            "namespaces",
            json!({"status": {"phase": "Active"}}),
            "a | Active | 5m",
        );
        check(
            "",
            "configmaps",
            json!({"data": {"a": "", "b": ""}, "binaryData": {"c": ""}}),
            "a | 3 | 5m",
        );
        check(
            "",
            "secrets",
            json!({"type": "Opaque", "data": {"a": ""}}),
            "a | Opaque | 1 | 5m",
        );
        check("", "serviceaccounts", json!({}), "a | 0 | 5m");
        check(
            "coordination.k8s.io",
            "leases",
            json!({"spec": {"holderIdentity": "me"}}),
            "a | me | 5m",
        );
    }
}
