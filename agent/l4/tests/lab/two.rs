//! The smallest mesh: a client and a server, each on a node of its own.

use super::{Lab, LabPod};

/// A client and a server, each on a node of its own.
pub struct Two {
    pub lab: Lab,
    pub near: l4::Proxy,
    pub far: l4::Proxy,
    pub client: LabPod,
    pub server: LabPod,
}

/// Two nodes that know of each other.
pub fn two() -> Two {
    let mut lab = Lab::new();
    let (near, far) = (lab.proxy(), lab.proxy());
    let (client, server) = (lab.pod(&near, "client"), lab.pod(&far, "server"));
    lab.publish();
    Two {
        lab,
        near,
        far,
        client,
        server,
    }
}
