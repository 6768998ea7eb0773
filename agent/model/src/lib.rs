//! The mesh's nouns as plain values: identities, workloads, services, policies, addresses.
//!
//! Knows nothing of where they come from (a file, xDS, Kubernetes) or of how they are used: no I/O, no clock, no async.
//! Everything here is cheap to clone and compares by value. The serialised form is that of the static file
//! (`undercurrent node --static`), whose names are ztunnel's for its local configuration, so that one file serves both.

mod address;
mod gateway;
mod identity;
mod pod_settings;
mod policy;
mod service;
mod settings;
mod sorted;
mod workload;

pub use address::{Authority, AuthorityError, OriginalDst, PeerAddr, canonical_ip, canonical_socket};
pub use gateway::{GatewayAddress, GatewayDestination, Unusable, WeightedWaypoint};
pub use identity::{Identity, IdentityError, NamespacedName, TrustDomain};
pub use pod_settings::{Exclusions, PodSettings};
pub use policy::{Action, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
pub use service::{
    AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, NetworkAddress, RoutingScope, Service,
    Visibility,
};
pub use settings::{MeshSettings, NonTcp, OutboundMode, OutboundTrafficPolicy};
pub use sorted::{PortMap, SortedMap};
pub use workload::{
    ApplicationTunnel, ApplicationTunnelProtocol, HealthStatus, Locality, NetworkMode, TunnelProtocol, Workload,
    WorkloadUid,
};
