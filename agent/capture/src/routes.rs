//! The pod's side of source addresses: what brings the application's answers to the agent's sockets back to them.
//!
//! The agent dials the application from the client's address, with mark 0x539. The application's socket inherits the
//! mark (`tcp_fwmark_accept`), and a rule routes what is marked to the loopback device. Where no application listens, the
//! kernel's own RST has to find the way back, too (`fwmark_reflect`). A pod that marks its own
//! sockets gets its own packets back, which is no way out; one that deletes these rules breaks its own inbound
//! connections until the next reconciliation.

use std::{fs, io, net::IpAddr, path::Path};

use abi::{MARK, MARK_MASK};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use crate::{diag::LO, netlink::Route};

/// The connection mark of what the agent dials to an application where iptables captures; Istio's number.
pub(crate) const CONNECTION_MARK: u32 = 0x111;

/// Istio's numbers.
const TABLE: u32 = 100;
const PRIORITY: u32 = 32764;
/// Another one than that: the kernel removes a rule by what is said of it alone.
const PRIORITY_OF_CARRIED: u32 = PRIORITY - 1;

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

const FWMARK_ACCEPT: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
const FWMARK_REFLECT: [&str; 2] = ["/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect"];
const CONF: &str = "/proc/sys/net/ipv4/conf";

/// Settings as they were before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Before {
    pub(crate) tcp_fwmark_accept: u32,
    pub(crate) rp_filter_all: u32,
    /// Of IPv4 and IPv6; [`abi::Restore::UNTOUCHED`] for a version that the kernel does not have.
    pub(crate) fwmark_reflect: [u32; 2],
}

/// Reads the settings that [`apply`] will change. Inside the pod's namespace.
pub(crate) fn before() -> io::Result<Before> {
    Ok(Before {
        tcp_fwmark_accept: read(Path::new(FWMARK_ACCEPT))?,
        rp_filter_all: read(&Path::new(CONF).join("all/rp_filter"))?,
        fwmark_reflect: [reflects(0)?, reflects(1)?],
    })
}

/// Makes it so; says what was not. Inside the pod's namespace.
pub(crate) fn apply(ip4: bool, ip6: bool) -> io::Result<Vec<&'static str>> {
    let mut repaired = Vec::new();
    if read(Path::new(FWMARK_ACCEPT))? != 1 {
        fs::write(FWMARK_ACCEPT, "1")?;
        repaired.push("tcp_fwmark_accept");
    }
    for (version, path) in FWMARK_REFLECT.into_iter().enumerate() {
        if reflects(version)? == 0 {
            fs::write(path, "1")?;
            repaired.push("fwmark_reflect");
        }
    }
    if ip4 && relax_rp_filter()? {
        repaired.push("rp_filter");
    }
    repaired.extend(route_marked(MARK, ip4, ip6)?);
    Ok(repaired)
}

/// Routes what has the mark to the loopback device; says what was not so. Inside the pod's namespace.
pub(crate) fn route_marked(mark: u32, ip4: bool, ip6: bool) -> io::Result<Vec<&'static str>> {
    let mut repaired = Vec::new();
    let mut route = Route::open()?;
    for (wanted, family) in [(ip4, AddressFamily::Inet), (ip6, AddressFamily::Inet6)] {
        if !wanted {
            continue;
        }
        if !has_rule(&mut route, family, mark)? {
            created(route.change(
                RouteNetlinkMessage::NewRule(rule(family, mark)),
                NLM_F_CREATE | NLM_F_EXCL,
            ))?;
            repaired.push("rule");
        }
        let message = RouteNetlinkMessage::NewRoute(local_route(family));
        if created(route.change(message, NLM_F_CREATE | NLM_F_EXCL))? {
            repaired.push("route");
        }
    }
    Ok(repaired)
}

/// Takes it back. Inside the pod's namespace.
pub(crate) fn remove(before: Before) -> io::Result<()> {
    let mut route = Route::open()?;
    for family in FAMILIES {
        remove_marked(&mut route, family, MARK)?;
    }
    fs::write(FWMARK_ACCEPT, before.tcp_fwmark_accept.to_string())?;
    for (path, value) in FWMARK_REFLECT.into_iter().zip(before.fwmark_reflect) {
        if value != abi::Restore::UNTOUCHED {
            fs::write(path, value.to_string())?;
        }
    }
    if before.rp_filter_all != abi::Restore::UNTOUCHED {
        // Each interface has had the effective value since; what `all` adds is the same.
        fs::write(Path::new(CONF).join("all/rp_filter"), before.rp_filter_all.to_string())?;
    }
    Ok(())
}

/// Routes the agent's own sockets of the loopback device to where they are: those that dial an application over IPv6 where
/// eBPF captures, and outlive that. IPv4 asks the local table without the device. Inside the pod's namespace.
pub(crate) fn route_carried() -> io::Result<()> {
    let request = RouteNetlinkMessage::NewRule(rule_of_carried());
    created(Route::open()?.change(request, NLM_F_CREATE | NLM_F_EXCL)).map(drop)
}

/// Whether there is what [`route_carried`] made. Inside the pod's namespace.
pub(crate) fn is_carried_routed() -> io::Result<bool> {
    is_there(&mut Route::open()?, &rule_of_carried())
}

/// Takes back what [`route_carried`] made, where it did. Inside the pod's namespace.
pub(crate) fn unroute_carried() -> io::Result<()> {
    removed(Route::open()?.change(RouteNetlinkMessage::DelRule(rule_of_carried()), 0))
}

/// Takes back what [`route_marked`] and [`route_carried`] made, where they did. Inside the pod's namespace.
pub(crate) fn unroute_marked(mark: u32) -> io::Result<()> {
    unroute_carried()?;
    let mut route = Route::open()?;
    for family in FAMILIES {
        // The rule is made first and removed last: without it the route is somebody else's.
        if has_rule(&mut route, family, mark)? {
            remove_marked(&mut route, family, mark)?;
        }
    }
    Ok(())
}

/// Whether what has the mark is routed to the loopback device, in any family. Inside the pod's namespace.
pub(crate) fn is_marked_routed(mark: u32) -> io::Result<bool> {
    let mut route = Route::open()?;
    for family in FAMILIES {
        if has_rule(&mut route, family, mark)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The two ways of capture have a mark each, and the route in common.
fn remove_marked(route: &mut Route, family: AddressFamily, mark: u32) -> io::Result<()> {
    let other = if mark == MARK { CONNECTION_MARK } else { MARK };
    if !has_rule(route, family, other)? {
        removed(route.change(RouteNetlinkMessage::DelRoute(local_route(family)), 0))?;
    }
    removed(route.change(RouteNetlinkMessage::DelRule(rule(family, mark)), 0))
}

/// Strict reverse-path filtering would drop the agent's connection to the application: it comes in through `lo` from
/// an address that is reached elsewhere. The effective value is the larger of `all` and the interface's own, so the
/// interfaces get the value of `all`, and `all` and `lo` get 0.
fn relax_rp_filter() -> io::Result<bool> {
    let conf = Path::new(CONF);
    let all = read(&conf.join("all/rp_filter"))?;
    let lo = read(&conf.join("lo/rp_filter"))?;
    if all.max(lo) != 1 {
        return Ok(false);
    }
    for entry in fs::read_dir(conf)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if name != "all" && name != "lo" {
            let file = path.join("rp_filter");
            if read(&file)? < all {
                fs::write(file, all.to_string())?;
            }
        }
    }
    fs::write(conf.join("lo/rp_filter"), "0")?;
    fs::write(conf.join("all/rp_filter"), "0")?;
    Ok(true)
}

/// `fwmark_reflect` of IPv4 (0) or IPv6 (1).
fn reflects(version: usize) -> io::Result<u32> {
    match read(Path::new(FWMARK_REFLECT[version])) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(abi::Restore::UNTOUCHED),
        other => other,
    }
}

fn read(path: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{} holds {text:?}", path.display())))
}

fn rule(family: AddressFamily, mark: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.table = TABLE as u8;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(TABLE),
    ];
    message
}

/// Of what is bound to the loopback device alone. Everything else that has the mark goes its usual way: where iptables
/// captures, what the agent dials to peers has it, too.
fn rule_of_carried() -> RuleMessage {
    let mut message = rule(AddressFamily::Inet6, MARK);
    for attribute in &mut message.attributes {
        if let RuleAttribute::Priority(priority) = attribute {
            *priority = PRIORITY_OF_CARRIED;
        }
    }
    message.attributes.push(RuleAttribute::Oifname("lo".to_owned()));
    message
}

fn has_rule(route: &mut Route, family: AddressFamily, mark: u32) -> io::Result<bool> {
    is_there(route, &rule(family, mark))
}

fn is_there(route: &mut Route, rule: &RuleMessage) -> io::Result<bool> {
    let mut request = RuleMessage::default();
    request.header.family = rule.header.family;
    let rules = route.dump(RouteNetlinkMessage::GetRule(request))?;
    Ok(rules.iter().any(|message| match message {
        RouteNetlinkMessage::NewRule(found) => {
            let mut wanted = rule.attributes.iter();
            wanted.all(|attribute| found.attributes.contains(attribute))
        }
        _ => false,
    }))
}

/// `local default dev lo table 100`.
fn local_route(family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = TABLE as u8;
    message.header.kind = RouteType::Local;
    message.header.scope = RouteScope::Host;
    message.header.protocol = RouteProtocol::Static;
    message.attributes = vec![RouteAttribute::Oif(LO), RouteAttribute::Table(TABLE)];
    message
}

/// Whether it is new; there already is no failure.
fn created(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gone already is no failure, and neither is a family that the namespace does not have.
fn removed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENODEV)
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// Whether an address can be the source of a connection to a target.
pub(crate) fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.to_canonical().is_ipv4() == b.to_canonical().is_ipv4()
}
