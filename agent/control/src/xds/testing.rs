//! Resources for this room's own tests.

use std::{collections::BTreeMap, sync::Arc};

use proto::{
    Message,
    security::{Authorization, Scope},
    workload::*,
};

use super::{Acknowledged, View, session};
use crate::resources::{Change, Resource, Type};

/// A workload; `content` makes it another one.
pub(crate) fn workload(uid: &str, address: &str, services: &[&str], content: u32) -> Resource {
    let ports = |name: &&str| ((*name).to_owned(), PortList::default());
    let workload = Workload {
        uid: uid.to_owned(),
        name: content.to_string(),
        services: services.iter().map(ports).collect::<BTreeMap<_, _>>(),
        ..Default::default()
    };
    let message = Address {
        r#type: Some(address::Type::Workload(workload)),
    };
    resource(Type::Address, uid, Some(address), message.encode_to_vec())
}

/// A service.
pub(crate) fn service(name: &str, address: &str, content: u32) -> Resource {
    let (namespace, hostname) = name.split_once('/').unwrap_or(("", name));
    let service = Service {
        name: content.to_string(),
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        ..Default::default()
    };
    let message = Address {
        r#type: Some(address::Type::Service(service)),
    };
    resource(Type::Address, name, Some(address), message.encode_to_vec())
}

/// A policy of the whole mesh.
pub(crate) fn policy(name: &str, content: u32) -> Resource {
    scoped(name, Scope::Global, content)
}

/// A policy.
pub(crate) fn scoped(name: &str, scope: Scope, content: u32) -> Resource {
    let policy = Authorization {
        name: content.to_string(),
        scope: scope.into(),
        ..Default::default()
    };
    resource(Type::Authorization, name, None, policy.encode_to_vec())
}

fn resource(type_: Type, name: &str, address: Option<&str>, message: Vec<u8>) -> Resource {
    Resource {
        type_,
        name: name.into(),
        aliases: address
            .map(|address| format!("/{address}").into())
            .into_iter()
            .collect(),
        message: message.into(),
    }
}

/// A client that is connected, and refuses a policy, until it is dropped.
pub(crate) fn refusing(all: &Arc<Acknowledged>, stream: u64, name: &str) -> impl Drop {
    let client = all.connect(stream, "sa".to_owned(), None);
    let refusal = session::Refusal {
        view: View::Authorization,
        message: "no".to_owned(),
        resources: vec![name.into()],
    };
    client.refused(refusal, 1);
    client.acknowledged(1);
    client
}

/// Its removal.
pub(crate) fn remove(type_: Type, name: &str) -> Change {
    Change::Remove {
        type_,
        name: name.into(),
    }
}
