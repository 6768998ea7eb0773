//! Kinds that a cluster knows from CustomResourceDefinitions: the columns of those definitions.
//!
//! A column shows the first value at a simple path; lists as JSON text, as kubectl shows them.

use serde_json::Value;
use time::OffsetDateTime;

use super::{Column, NAME, Table, at, condition, created, list, name, text};

const AGE: Column = Column::typed(
    "Age",
    "date",
    "CreationTimestamp is a timestamp representing the server time when this object was created.",
);
const HOSTNAMES: Column = Column::text("Hostnames", "The names that the route is for.");

const PLAIN: Table = Table {
    columns: &[NAME, AGE],
    cells: |object, now| vec![name(object), created(object, now)],
};

const AUTHORIZATION_POLICY: Table = Table {
    columns: &[NAME, Column::text("Action", "The operation to take."), AGE],
    cells: |object, now| with(object, now, &["spec.action"]),
};

const PEER_AUTHENTICATION: Table = Table {
    columns: &[
        NAME,
        Column::text("Mode", "Defines the mTLS mode used for peer authentication."),
        AGE,
    ],
    cells: |object, now| with(object, now, &["spec.mtls.mode"]),
};

const VIRTUAL_SERVICE: Table = Table {
    columns: &[
        NAME,
        Column::text(
            "Gateways",
            "The names of gateways and sidecars that should apply these routes",
        ),
        Column::text("Hosts", "The destination hosts to which traffic is being sent"),
        AGE,
    ],
    cells: |object, now| with(object, now, &["spec.gateways", "spec.hosts"]),
};

const DESTINATION_RULE: Table = Table {
    columns: &[
        NAME,
        Column::text("Host", "The name of a service from the service registry"),
        AGE,
    ],
    cells: |object, now| with(object, now, &["spec.host"]),
};

const SERVICE_ENTRY: Table = Table {
    columns: &[
        NAME,
        Column::text("Hosts", "The hosts associated with the ServiceEntry"),
        Column::text("Location", "Whether the service is outside the mesh or part of it"),
        Column::text("Resolution", "Service resolution mode for the hosts"),
        AGE,
    ],
    cells: |object, now| with(object, now, &["spec.hosts", "spec.location", "spec.resolution"]),
};

const WORKLOAD_ENTRY: Table = Table {
    columns: &[
        NAME,
        AGE,
        Column::text("Address", "Address associated with the network endpoint."),
    ],
    cells: |object, now| vec![name(object), created(object, now), shown(object, "spec.address")],
};

const GATEWAY_CLASS: Table = Table {
    columns: &[
        NAME,
        Column::text("Controller", "The controller that manages gateways of this class."),
        Column::text("Accepted", "Whether the controller took the class."),
        AGE,
        Column::text("Description", "What the class is for.").wide(),
    ],
    cells: |object, now| {
        vec![
            name(object),
            shown(object, "spec.controllerName"),
            status(object, "Accepted"),
            created(object, now),
            shown(object, "spec.description"),
        ]
    },
};

const GATEWAY: Table = Table {
    columns: &[
        NAME,
        Column::text("Class", "The class of the gateway."),
        Column::text("Address", "The first address that it is reached at."),
        Column::text("Programmed", "Whether it is in force."),
        AGE,
    ],
    cells: |object, now| {
        let address = list(object, "status.addresses")
            .first()
            .map(|address| text(address, "value"));
        vec![
            name(object),
            shown(object, "spec.gatewayClassName"),
            address.map_or(Value::Null, Value::from),
            status(object, "Programmed"),
            created(object, now),
        ]
    },
};

const ROUTE: Table = Table {
    columns: &[NAME, HOSTNAMES, AGE],
    cells: |object, now| with(object, now, &["spec.hostnames"]),
};

/// The table of a kind; name and age where its definition has no columns.
pub(super) fn of(group: &str, kind: &str) -> Table {
    match (group, kind) {
        ("security.istio.io", "AuthorizationPolicy") => AUTHORIZATION_POLICY,
        ("security.istio.io", "PeerAuthentication") => PEER_AUTHENTICATION,
        ("networking.istio.io", "VirtualService") => VIRTUAL_SERVICE,
        ("networking.istio.io", "DestinationRule") => DESTINATION_RULE,
        ("networking.istio.io", "ServiceEntry") => SERVICE_ENTRY,
        ("networking.istio.io", "WorkloadEntry") => WORKLOAD_ENTRY,
        ("gateway.networking.k8s.io", "GatewayClass") => GATEWAY_CLASS,
        ("gateway.networking.k8s.io", "Gateway") => GATEWAY,
        ("gateway.networking.k8s.io", "HTTPRoute" | "GRPCRoute") => ROUTE,
        _ => PLAIN,
    }
}

/// Name, the values at some paths, age.
fn with(object: &Value, now: OffsetDateTime, paths: &[&str]) -> Vec<Value> {
    let mut cells = vec![name(object)];
    cells.extend(paths.iter().map(|path| shown(object, path)));
    cells.push(created(object, now));
    cells
}

fn shown(object: &Value, path: &str) -> Value {
    match at(object, path) {
        None | Some(Value::Null) => Value::Null,
        Some(Value::String(text)) => Value::from(text.as_str()),
        Some(value) => Value::from(value.to_string()),
    }
}

fn status(object: &Value, type_: &str) -> Value {
    match condition(object, type_) {
        "" => Value::Null,
        status => Value::from(status),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::line;

    #[test]
    fn custom_kinds_show_the_columns_of_their_definitions() {
        let check = |group: &str, plural: &str, spec: serde_json::Value, expected: &str| {
            let object = json!({"metadata": {"name": "a"}, "spec": spec});
            assert_eq!(line(group, plural, object), expected, "{plural}");
        };
        check(
            "security.istio.io",
            "authorizationpolicies",
            json!({"action": "DENY"}),
            "a | DENY | 5m",
        );
        check("security.istio.io", "authorizationpolicies", json!({}), "a | null | 5m");
        check(
            "security.istio.io",
            "peerauthentications",
            json!({"mtls": {"mode": "STRICT"}}),
            "a | STRICT | 5m",
        );
        check("security.istio.io", "requestauthentications", json!({}), "a | 5m");
        let entry = json!({"hosts": ["x", "y"], "location": "MESH_EXTERNAL", "resolution": "DNS"});
        let expected = r#"a | ["x","y"] | MESH_EXTERNAL | DNS | 5m"#;
        check("networking.istio.io", "serviceentries", entry, expected);
        check(
            "networking.istio.io",
            "virtualservices",
            json!({"hosts": ["*"]}),
            r#"a | null | ["*"] | 5m"#,
        );
        check(
            "networking.istio.io",
            "destinationrules",
            json!({"host": "x"}),
            "a | x | 5m",
        );
        check(
            "networking.istio.io",
            "workloadentries",
            json!({"address": "192.0.2.1"}),
            "a | 5m | 192.0.2.1",
        );
        check(
            "gateway.networking.k8s.io",
            "httproutes",
            json!({"hostnames": ["x"]}),
            r#"a | ["x"] | 5m"#,
        );
        let gateway = json!({
            "metadata": {"name": "w"}, "spec": {"gatewayClassName": "istio-waypoint"},
            "status": {"addresses": [{"value": "10.0.0.9"}], "conditions": [{"type": "Programmed", "status": "True"}]},
        });
        let expected = "w | istio-waypoint | 10.0.0.9 | True | 5m";
        assert_eq!(line("gateway.networking.k8s.io", "gateways", gateway), expected);
        let class = json!({"metadata": {"name": "w"}, "spec": {"controllerName": "x/y", "description": "d"}});
        assert_eq!(
            line("gateway.networking.k8s.io", "gatewayclasses", class),
            "w | x/y | null | 5m | d"
        );
    }
}
