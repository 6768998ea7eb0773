//! The table itself. A new kind is one entry here; what it may hold is said in `schema`.

use super::{Keeping, Kind};

const V1: &[&str] = &["v1"];
const ALL_CATEGORY: &[&str] = &["all"];
const ISTIO: &[&str] = &["istio-io", "networking-istio-io"];
const ISTIO_SECURITY: &[&str] = &["istio-io", "security-istio-io"];
const GATEWAY_API: &[&str] = &["gateway-api"];

/// Every kind that is served.
pub static ALL: &[Kind] = &[
    // Core.
    Kind {
        namespaced: false,
        status_subresource: true,
        subresources: &[("finalize", "v1 Namespace")],
        ..named("", "Namespace", "namespaces", "namespace", &["ns"])
    },
    Kind {
        namespaced: false,
        status_subresource: true,
        ..named("", "Node", "nodes", "node", &["no"])
    },
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        subresources: &[("binding", "v1 Binding"), ("eviction", "policy/v1 Eviction")],
        ..named("", "Pod", "pods", "pod", &["po"])
    },
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        ..named("", "Service", "services", "service", &["svc"])
    },
    named("", "Endpoints", "endpoints", "endpoints", &["ep"]),
    Kind {
        subresources: &[("token", "authentication.k8s.io/v1 TokenRequest")],
        ..named("", "ServiceAccount", "serviceaccounts", "serviceaccount", &["sa"])
    },
    named("", "Secret", "secrets", "secret", &[]),
    named("", "ConfigMap", "configmaps", "configmap", &["cm"]),
    named("", "Event", "events", "event", &["ev"]),
    // Workloads.
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        subresources: &[("scale", "autoscaling/v1 Scale")],
        ..named("apps", "Deployment", "deployments", "deployment", &["deploy"])
    },
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        subresources: &[("scale", "autoscaling/v1 Scale")],
        ..named("apps", "ReplicaSet", "replicasets", "replicaset", &["rs"])
    },
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        ..named("apps", "DaemonSet", "daemonsets", "daemonset", &["ds"])
    },
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        subresources: &[("scale", "autoscaling/v1 Scale")],
        ..named("apps", "StatefulSet", "statefulsets", "statefulset", &["sts"])
    },
    Kind {
        status_subresource: true,
        categories: ALL_CATEGORY,
        ..named("batch", "Job", "jobs", "job", &[])
    },
    // What the node agents and controllers tell each other.
    named(
        "discovery.k8s.io",
        "EndpointSlice",
        "endpointslices",
        "endpointslice",
        &[],
    ),
    named("coordination.k8s.io", "Lease", "leases", "lease", &[]),
    Kind {
        keeping: Keeping::As("", "events"),
        ..named("events.k8s.io", "Event", "events", "event", &["ev"])
    },
    // Questions.
    question("authentication.k8s.io", "TokenReview", "tokenreviews", "tokenreview"),
    question(
        "authentication.k8s.io",
        "SelfSubjectReview",
        "selfsubjectreviews",
        "selfsubjectreview",
    ),
    question(
        "authorization.k8s.io",
        "SubjectAccessReview",
        "subjectaccessreviews",
        "subjectaccessreview",
    ),
    question(
        "authorization.k8s.io",
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
        "selfsubjectaccessreview",
    ),
    question(
        "authorization.k8s.io",
        "SelfSubjectRulesReview",
        "selfsubjectrulesreviews",
        "selfsubjectrulesreview",
    ),
    // Istio.
    networking("VirtualService", "virtualservices", "virtualservice", &["vs"]),
    networking("DestinationRule", "destinationrules", "destinationrule", &["dr"]),
    networking("Gateway", "gateways", "gateway", &["gw"]),
    networking("ServiceEntry", "serviceentries", "serviceentry", &["se"]),
    networking("WorkloadEntry", "workloadentries", "workloadentry", &["we"]),
    networking("WorkloadGroup", "workloadgroups", "workloadgroup", &["wg"]),
    networking("Sidecar", "sidecars", "sidecar", &[]),
    security(
        "AuthorizationPolicy",
        "authorizationpolicies",
        "authorizationpolicy",
        &["ap"],
    ),
    security(
        "PeerAuthentication",
        "peerauthentications",
        "peerauthentication",
        &["pa"],
    ),
    security(
        "RequestAuthentication",
        "requestauthentications",
        "requestauthentication",
        &["ra"],
    ),
    Kind {
        status_subresource: true,
        categories: &["istio-io", "telemetry-istio-io"],
        ..named("telemetry.istio.io", "Telemetry", "telemetries", "telemetry", &[])
    },
    Kind {
        versions: &["v1alpha1"],
        storage: "v1alpha1",
        status_subresource: true,
        categories: &["istio-io", "extensions-istio-io"],
        ..named("extensions.istio.io", "WasmPlugin", "wasmplugins", "wasmplugin", &[])
    },
    // Gateway API.
    Kind {
        namespaced: false,
        ..gateway("GatewayClass", "gatewayclasses", "gatewayclass", &["gc"])
    },
    gateway("Gateway", "gateways", "gateway", &["gtw"]),
    gateway("HTTPRoute", "httproutes", "httproute", &[]),
    Kind {
        versions: V1,
        ..gateway("GRPCRoute", "grpcroutes", "grpcroute", &[])
    },
    Kind {
        versions: &["v1beta1"],
        storage: "v1beta1",
        status_subresource: false,
        ..gateway("ReferenceGrant", "referencegrants", "referencegrant", &["refgrant"])
    },
];

const fn named(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
) -> Kind {
    Kind {
        group,
        versions: V1,
        storage: "v1",
        kind,
        plural,
        singular,
        short_names,
        categories: &[],
        namespaced: true,
        status_subresource: false,
        subresources: &[],
        keeping: Keeping::Stored,
    }
}

/// A kind that is only POSTed.
const fn question(group: &'static str, kind: &'static str, plural: &'static str, singular: &'static str) -> Kind {
    Kind {
        namespaced: false,
        keeping: Keeping::Answered,
        ..named(group, kind, plural, singular, &[])
    }
}

const fn networking(
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
) -> Kind {
    Kind {
        versions: &["v1", "v1beta1", "v1alpha3"],
        status_subresource: true,
        categories: ISTIO,
        ..named("networking.istio.io", kind, plural, singular, short_names)
    }
}

const fn security(
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
) -> Kind {
    Kind {
        versions: &["v1", "v1beta1"],
        status_subresource: true,
        categories: ISTIO_SECURITY,
        ..named("security.istio.io", kind, plural, singular, short_names)
    }
}

const fn gateway(
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
) -> Kind {
    Kind {
        versions: &["v1", "v1beta1"],
        status_subresource: true,
        categories: GATEWAY_API,
        ..named("gateway.networking.k8s.io", kind, plural, singular, short_names)
    }
}
