//! Configurations of a real Envoy that plays a waypoint: with HBONE terminated for it by the node's agent, which hands it a
//! PROXY header, and with HBONE of its own on both sides.
//!
//! What went through one says so: its answers have the header `x-waypoint` with the Envoy's name, and `x-client`.

use std::path::Path;

use serde_json::{Value, json};

/// Where an Envoy of the first kind takes the PROXY header, on the pod's loopback.
pub const BINDING: u16 = 15088;
/// Where each answers probes.
pub const READY: u16 = 15021;

/// A configuration of this type.
fn typed(type_: &str, more: Value) -> Value {
    let mut config = json!({"@type": format!("type.googleapis.com/envoy.{type_}")});
    if let (Some(config), Some(more)) = (config.as_object_mut(), more.as_object()) {
        config.extend(more.clone());
    }
    config
}

fn address(ip: &str, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

/// An HTTP connection manager with these routes.
fn http(routes: &Value, headers: &Value, more: Value) -> Value {
    let router =
        json!({"name": "router", "typed_config": typed("extensions.filters.http.router.v3.Router", json!({}))});
    let mut manager = typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "http",
            "http_filters": [router],
            "route_config": {"virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": routes, "response_headers_to_add": headers}]},
        }),
    );
    if let (Some(manager), Some(more)) = (manager.as_object_mut(), more.as_object()) {
        manager.extend(more.clone());
    }
    json!({"name": "http", "typed_config": manager})
}

/// What tells that it was there.
fn mark(name: &str) -> Value {
    let client = "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%";
    json!([{"header": {"key": "x-waypoint", "value": name}}, {"header": {"key": "x-client", "value": client}}])
}

fn to(cluster: &str) -> Value {
    json!([{"match": {"prefix": "/"}, "route": {"cluster": cluster}}])
}

fn ready() -> Value {
    let routes = json!([{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]);
    let chain = json!([{"filters": [http(&routes, &json!([]), json!({}))]}]);
    json!({"name": "ready", "address": address("0.0.0.0", READY), "filter_chains": chain})
}

/// An Envoy that is handed connections with a PROXY header and goes on to wherever that says.
pub fn handed(name: &str) -> Value {
    let header = typed("extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", json!({}));
    let chain = json!([{"filters": [http(&to("onward"), &mark(name), json!({}))]}]);
    json!({"static_resources": {
        "listeners": [
            {"name": "handed", "address": address("127.0.0.1", BINDING), "filter_chains": chain,
             "listener_filters": [{"name": "proxy", "typed_config": header}]},
            ready(),
        ],
        "clusters": [
            {"name": "onward", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s"}],
    }})
}

/// TLS with a certificate of the mesh's authority on this side and one demanded of the other.
fn tls(kind: &str, certificates: &Path) -> Value {
    let file = |name: &str| json!({"filename": certificates.join(name)});
    let mut config = typed(
        &format!("extensions.transport_sockets.tls.v3.{kind}"),
        json!({"common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": [{"certificate_chain": file("chain.pem"), "private_key": file("key.pem")}],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "validation_context": {"trusted_ca": file("roots.pem")},
        }}),
    );
    if kind == "DownstreamTlsContext" {
        config["require_client_certificate"] = json!(true);
    }
    json!({"name": "tls", "typed_config": config})
}

/// A listener inside the process, with this filter.
fn inner(name: &str, filter: &Value) -> Value {
    json!({"name": name, "internal_listener": {}, "filter_chains": [{"filters": [filter]}]})
}

/// A cluster of one endpoint.
fn cluster(name: &str, address: &Value) -> Value {
    let endpoints = json!([{"lb_endpoints": [{"endpoint": {"address": address}}]}]);
    json!({"name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints}})
}

/// A cluster of a listener inside the process.
fn internal(name: &str, listener: &str) -> Value {
    cluster(
        name,
        &json!({"envoy_internal_address": {"server_listener_name": listener}}),
    )
}

/// An Envoy that takes HBONE itself and goes on by HBONE to one pod's port. `certificates` has `chain.pem`, `key.pem` and
/// `roots.pem`.
pub fn native(name: &str, certificates: &Path, pod: &str, port: u16) -> Value {
    let connect = json!([{"match": {"connect_matcher": {}},
        "route": {"cluster": "inside", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}}]);
    let terminate = http(
        &connect,
        &json!([]),
        json!({"upgrade_configs": [{"upgrade_type": "CONNECT"}], "http2_protocol_options": {"allow_connect": true}}),
    );
    let chain = json!([{"filters": [terminate], "transport_socket": tls("DownstreamTlsContext", certificates)}]);
    let originate = typed(
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({"stat_prefix": "hbone", "cluster": "hbone", "tunneling_config": {"hostname": format!("{pod}:{port}")}}),
    );
    let http2 = typed(
        "extensions.upstreams.http.v3.HttpProtocolOptions",
        json!({"explicit_http_config": {"http2_protocol_options": {"allow_connect": true}}}),
    );
    let mut hbone = cluster("hbone", &address(pod, 15008));
    hbone["transport_socket"] = tls("UpstreamTlsContext", certificates);
    hbone["typed_extension_protocol_options"] =
        json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2});
    let internal_listener = typed("extensions.bootstrap.internal_listener.v3.InternalListener", json!({}));
    json!({
        "bootstrap_extensions": [{"name": "envoy.bootstrap.internal_listener", "typed_config": internal_listener}],
        "static_resources": {
            "listeners": [
                {"name": "hbone", "address": address("0.0.0.0", 15008), "filter_chains": chain},
                inner("inside", &http(&to("onward"), &mark(name), json!({}))),
                inner("originate", &json!({"name": "tcp", "typed_config": originate})),
                ready(),
            ],
            "clusters": [internal("inside", "inside"), internal("onward", "originate"), hbone],
        },
    })
}
