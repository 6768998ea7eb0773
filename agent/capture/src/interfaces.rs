//! Which interfaces a pod has, and where on the node they end.

use std::{collections::HashMap, io, net::IpAddr, os::fd::AsRawFd};

use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use crate::{netlink::Route, netns::Netns};

/// An interface of a network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// The index of the other end, or of the parent.
    pub(crate) link: Option<u32>,
    /// In which namespace that is, as this one numbers them; none where it is here.
    pub(crate) link_netns: Option<i32>,
    pub(crate) addresses: Vec<IpAddr>,
}

/// What an interface is, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Loopback,
    Veth,
    /// A device that software made: a bridge, a tunnel, a VLAN, ...
    Virtual,
    /// A device that no software made.
    Physical,
}

/// What is to be known of a pod's network before it can be captured.
#[derive(Debug, Clone)]
pub(crate) struct PodNetwork {
    pub(crate) interfaces: Vec<Interface>,
    /// The node's interfaces whose other end is in the pod, by the index of that other end.
    pub(crate) host_sides: HashMap<u32, u32>,
}

/// Looks at a pod's network, from the inside and from the node.
pub(crate) fn look(home: &Netns, pod: &Netns) -> io::Result<PodNetwork> {
    let interfaces = pod.enter(list)??;
    let (on_node, pod_id) = home.enter(|| -> io::Result<_> { Ok((list()?, netns_id(pod)?)) })??;
    let host_sides = on_node
        .iter()
        .filter(|interface| interface.kind == Kind::Veth && interface.link_netns == pod_id)
        .filter_map(|interface| Some((interface.link?, interface.index)))
        .collect();
    Ok(PodNetwork { interfaces, host_sides })
}

/// The addresses of a namespace's interfaces.
pub(crate) fn addresses(netns: &Netns) -> io::Result<Vec<IpAddr>> {
    let interfaces = netns.enter(list)??;
    Ok(interfaces
        .into_iter()
        .flat_map(|interface| interface.addresses)
        .collect())
}

/// The interfaces of the namespace that the thread is in.
fn list() -> io::Result<Vec<Interface>> {
    let mut route = Route::open()?;
    let mut addresses: HashMap<u32, Vec<IpAddr>> = HashMap::new();
    for message in route.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(message) = message
            && let Some(address) = address_of(&message)
        {
            addresses.entry(message.header.index).or_default().push(address);
        }
    }
    let links = route.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(interface(&link, &mut addresses)),
            _ => None,
        })
        .collect())
}

/// The interface's own address: IFA_LOCAL, or IFA_ADDRESS where the two are the same.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let find = |local| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(ip) if local => Some(*ip),
            AddressAttribute::Address(ip) if !local => Some(*ip),
            _ => None,
        })
    };
    find(true).or_else(|| find(false))
}

fn interface(link: &LinkMessage, addresses: &mut HashMap<u32, Vec<IpAddr>>) -> Interface {
    let mut found = Interface {
        index: link.header.index,
        name: String::new(),
        kind: if link.header.link_layer_type == LinkLayerType::Loopback {
            Kind::Loopback
        } else {
            Kind::Physical
        },
        link: None,
        link_netns: None,
        addresses: addresses.remove(&link.header.index).unwrap_or_default(),
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Link(index) => found.link = Some(*index),
            LinkAttribute::LinkNetNsId(id) => found.link_netns = Some(*id),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Veth) => found.kind = Kind::Veth,
                        LinkInfo::Kind(_) => found.kind = Kind::Virtual,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// The number that this namespace has for another.
fn netns_id(netns: &Netns) -> io::Result<Option<i32>> {
    use std::os::fd::AsFd;

    let mut message = NsidMessage::default();
    message
        .attributes
        .push(NsidAttribute::Fd(netns.as_fd().as_raw_fd() as u32));
    let answers = Route::open()?.get(RouteNetlinkMessage::GetNsId(message))?;
    Ok(answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewNsId(message) => message.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) if *id >= 0 => Some(*id),
            _ => None,
        }),
        _ => None,
    }))
}
