//! The labels and annotations that mean something here (istio/api `label/labels.yaml`, `annotation/annotations.yaml`).

/// Annotation of a pod, written by the node agent once its traffic is captured: `enabled`.
pub(super) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Annotation of a pod that has a sidecar.
pub(super) const SIDECAR: &str = "sidecar.istio.io/status";
/// Label: `http` says that it takes HBONE itself.
pub(super) const TUNNEL: &str = "networking.istio.io/tunnel";
/// Label: the network of its addresses.
pub(super) const NETWORK: &str = "topology.istio.io/network";
/// Label: the workload's name for telemetry.
pub(super) const WORKLOAD_NAME: &str = "service.istio.io/workload-name";
/// Labels: the canonical name, the first that is there.
pub(super) const CANONICAL_NAME: [&str; 3] = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
/// Labels: the canonical revision, the first that is there.
pub(super) const CANONICAL_REVISION: [&str; 3] = [
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
];
/// Label of an EndpointSlice: its Service.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Annotation: how a service's connections are spread.
pub(super) const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
/// Annotation: who sees a service.
pub(super) const EXPORT_TO: &str = "networking.istio.io/exportTo";
/// Label: the waypoint's name, or `none`.
pub(super) const USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// Label: the waypoint's namespace.
pub(super) const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// Label of a Gateway: `service`, `workload`, `all` or `none`.
pub(super) const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
/// Label of what was made for a Gateway: the controller.
pub(super) const MANAGED: &str = "gateway.istio.io/managed";
/// The controller of waypoints, as that label says it.
pub(super) const WAYPOINT_CONTROLLER: &str = "istio.io-mesh-controller";
/// Label of a Gateway's pods: the Gateway.
pub(super) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Annotation of a Gateway: how HBONE is handed to its pods, such as `PROXY/15088`.
pub(super) const INBOUND_BINDING: &str = "ambient.istio.io/waypoint-inbound-binding";
