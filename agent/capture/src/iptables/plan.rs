//! The rules that should be, as values, and what would make them so; nothing is done here.
//!
//! Rules are written as `iptables-save` prints them, so that what is there can be compared with what should be.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use abi::CAPTURE_PORTS;
use ipnet::IpNet;
use model::PodSettings;

/// Our chains begin with this; nothing else is touched.
const OURS: &str = "UNDERCURRENT_";

const PREROUTING: &str = "UNDERCURRENT_PRERT";
const OUTPUT: &str = "UNDERCURRENT_OUTPUT";
const POSTROUTING: &str = "UNDERCURRENT_POSTRT";

/// What a rule that redirects has to match: the first packet of a connection. A conntrack entry that begins in the
/// middle of a connection that is older than the rules would be redirected, too.
const OPENS: &str = "--tcp-flags FIN,SYN,RST,ACK SYN";
const NOT_OURS: &str = "-m mark ! --mark 0x539/0xfff";

/// What the kernel filters apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Family {
    Ip4,
    Ip6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::Ip4, Self::Ip6];

    pub(crate) fn of(address: IpAddr) -> Self {
        if address.to_canonical().is_ipv4() {
            Self::Ip4
        } else {
            Self::Ip6
        }
    }

    /// The address that probes seem to come from: Istio's, so that network policies written for it hold.
    pub(crate) fn probe_source(self) -> IpAddr {
        match self {
            Self::Ip4 => Ipv4Addr::new(169, 254, 7, 127).into(),
            Self::Ip6 => Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff).into(),
        }
    }

    fn loopback(self) -> &'static str {
        match self {
            Self::Ip4 => "127.0.0.1/32",
            Self::Ip6 => "::1/128",
        }
    }
}

/// An address as iptables prints it.
fn host(address: IpAddr) -> String {
    let length = if address.is_ipv4() { 32 } else { 128 };
    format!("{address}/{length}")
}

/// What becomes of connections that come into a pod: nat PREROUTING.
fn inbound(family: Family, settings: &PodSettings) -> Vec<String> {
    let (loopback, probe) = (family.loopback(), host(family.probe_source()));
    let mut rules = Vec::new();
    for interface in &settings.virtual_interfaces {
        rules.push(format!(
            "-i {interface} -p tcp -m tcp {OPENS} -j REDIRECT --to-ports 15001"
        ));
        rules.push(format!("-i {interface} -p tcp -j RETURN"));
    }
    if settings.bypass_inbound {
        return rules;
    }
    rules.push(format!("-s {probe} -p tcp -j ACCEPT"));
    let excluded = settings.exclusions.inbound_ports.iter();
    rules.extend(excluded.map(|port| format!("-p tcp -m tcp --dport {port} {NOT_OURS} -j ACCEPT")));
    rules.push(format!(
        "! -d {loopback} -p tcp -m tcp ! --dport 15008 {OPENS} {NOT_OURS} -j REDIRECT --to-ports 15006"
    ));
    rules
}

/// What becomes of connections that a pod opens: nat OUTPUT.
fn outbound(family: Family, settings: &PodSettings) -> Vec<String> {
    let (loopback, probe) = (family.loopback(), host(family.probe_source()));
    let mut rules = vec![
        format!("-d {probe} -p tcp -j ACCEPT"),
        "-p tcp -m mark --mark 0x111/0xfff -j ACCEPT".to_owned(),
        format!("! -d {loopback} -o lo -j ACCEPT"),
    ];
    let exclusions = &settings.exclusions;
    let ports = exclusions.outbound_ports.iter();
    rules.extend(ports.map(|port| format!("-p tcp -m tcp --dport {port} {NOT_OURS} -j ACCEPT")));
    let of_family = |ranges: &[IpNet]| -> Vec<IpNet> {
        let same = |range: &&IpNet| Family::of(range.addr()) == family;
        ranges.iter().filter(same).copied().collect()
    };
    // A range of everything is printed as no range.
    let to = |range: &IpNet| match range.prefix_len() {
        0 => String::new(),
        _ => format!("-d {range} "),
    };
    let ranges = of_family(&exclusions.outbound_ranges);
    rules.extend(
        ranges
            .iter()
            .map(|range| format!("{}-p tcp {NOT_OURS} -j ACCEPT", to(range))),
    );
    let redirect = format!("-p tcp -m tcp {OPENS} {NOT_OURS} -j REDIRECT --to-ports 15001");
    match exclusions.only_outbound_ranges.as_deref().map(of_family) {
        Some(only) if only.iter().all(|range| range.prefix_len() > 0) => {
            rules.push(format!("-d {loopback} -j ACCEPT"));
            rules.extend(only.iter().map(|range| format!("{}{redirect}", to(range))));
        }
        _ => rules.push(format!("! -d {loopback} {redirect}")),
    }
    rules
}

/// The rules that a namespace should have, of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rules(Vec<Table>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Table {
    name: &'static str,
    chains: Vec<Chain>,
}

/// A chain of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chain {
    name: &'static str,
    /// The kernel's chain that jumps to it.
    from: &'static str,
    /// Whether nothing may come before that jump.
    first: bool,
    rules: Vec<String>,
}

impl Rules {
    /// Those of a captured pod.
    pub(crate) fn of_pod(family: Family, settings: &PodSettings) -> Self {
        let chain = |name, from, rules| Chain {
            name,
            from,
            first: true,
            rules,
        };
        let keeps_mark = "-m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff".to_owned();
        let restores_mark =
            "-m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
                .to_owned();
        let mut tables = vec![
            Table {
                name: "mangle",
                chains: vec![
                    chain(PREROUTING, "PREROUTING", vec![keeps_mark]),
                    chain(OUTPUT, "OUTPUT", vec![restores_mark]),
                ],
            },
            Table {
                name: "nat",
                chains: vec![
                    chain(PREROUTING, "PREROUTING", inbound(family, settings)),
                    chain(OUTPUT, "OUTPUT", outbound(family, settings)),
                ],
            },
        ];
        if settings.forbid_non_tcp {
            let mut rules = Vec::new();
            if family == Family::Ip6 {
                // Without neighbour discovery there is no TCP either.
                rules.extend((133..=136).map(|kind| format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j RETURN")));
            }
            rules.push("! -o lo ! -p tcp -j DROP".to_owned());
            tables.push(Table {
                name: "filter",
                chains: vec![chain(OUTPUT, "OUTPUT", rules)],
            });
        }
        Self(tables)
    }

    /// Those of a pod that eBPF captures: what comes into it by its virtual interfaces goes to the agent.
    pub(crate) fn of_reroutes(family: Family, settings: &PodSettings, own: Option<IpAddr>) -> Self {
        let Some(own) = own.filter(|_| !settings.virtual_interfaces.is_empty()) else {
            return Self(Vec::new());
        };
        let own = SocketAddr::new(own, CAPTURE_PORTS[0]);
        debug_assert_eq!(Family::of(own.ip()), family);
        let rules = settings.virtual_interfaces.iter().flat_map(|interface| {
            [
                format!("-i {interface} -p tcp -m tcp {OPENS} -j DNAT --to-destination {own}"),
                format!("-i {interface} -p tcp -j RETURN"),
            ]
        });
        Self(vec![Table {
            name: "nat",
            chains: vec![Chain {
                name: PREROUTING,
                from: "PREROUTING",
                first: true,
                rules: rules.collect(),
            }],
        }])
    }

    /// The same where the agent is the pod's name server: Istio's rules for UDP. TCP to port 53 comes as all TCP does.
    ///
    /// What the agent asks name servers is in a conntrack zone of its own. Else it could have the ends of an earlier query
    /// of the pod's, and would be sent back to the agent.
    pub(crate) fn with_dns(mut self) -> Self {
        const TO_SERVER: &str = "-p udp -m mark --mark 0x539/0xfff -m udp --dport 53";
        let redirect = format!("! -o lo -p udp {NOT_OURS} -m udp --dport 53 -j REDIRECT --to-ports 15053");
        for table in &mut self.0 {
            let rule = match table.name {
                "nat" => redirect.clone(),
                "filter" => format!("{TO_SERVER} -j RETURN"),
                _ => continue,
            };
            let output = table.chains.iter_mut().filter(|chain| chain.name == OUTPUT);
            output.for_each(|chain| chain.rules.insert(0, rule.clone()));
        }
        let chain = |name, from, rule: String| Chain {
            name,
            from,
            first: true,
            rules: vec![rule],
        };
        let answers = format!("-p udp {NOT_OURS} -m udp --sport 53 -j CT --zone 1");
        self.0.push(Table {
            name: "raw",
            chains: vec![
                chain(PREROUTING, "PREROUTING", answers),
                chain(OUTPUT, "OUTPUT", format!("{TO_SERVER} -j CT --zone 1")),
            ],
        });
        self
    }

    /// Those of the node's own namespace: what its processes open to a captured pod comes from the address of probes.
    pub(crate) fn of_node(family: Family, pods: impl IntoIterator<Item = IpAddr>) -> Self {
        let source = family.probe_source();
        let rules: Vec<String> = pods
            .into_iter()
            .filter(|address| Family::of(*address) == family)
            .map(|address| {
                let pod = host(address.to_canonical());
                format!("-d {pod} -p tcp -m owner --socket-exists -m tcp {OPENS} -j SNAT --to-source {source}")
            })
            .collect();
        if rules.is_empty() {
            return Self(Vec::new());
        }
        Self(vec![Table {
            name: "nat",
            chains: vec![Chain {
                name: POSTROUTING,
                from: "POSTROUTING",
                first: false,
                rules,
            }],
        }])
    }

    /// What to give `iptables-restore --noflush`, where `saved` is what the namespace has; none where that is as it
    /// should be. Each table changes in one step.
    pub(crate) fn changes(&self, saved: &Saved) -> Option<String> {
        let mut text = String::new();
        for table in &self.0 {
            let found = saved.0.get(table.name);
            if found.is_some_and(|found| table.is_in(found)) {
                continue;
            }
            // Writing to a String does not fail.
            let _ = writeln!(text, "*{}", table.name);
            for chain in &table.chains {
                // Naming a chain empties it.
                let _ = writeln!(text, ":{} - [0:0]", chain.name);
                for rule in &chain.rules {
                    let _ = writeln!(text, "-A {} {rule}", chain.name);
                }
                if found.is_some_and(|found| chain.is_jumped_to(found)) {
                    continue;
                }
                for jump in found.into_iter().flat_map(|found| jumps(found, Some(chain))) {
                    let _ = writeln!(text, "-D {} {}", jump.0, jump.1);
                }
                let _ = writeln!(text, "-I {} 1 -j {}", chain.from, chain.name);
            }
            text.push_str("COMMIT\n");
        }
        // What an earlier setting needed and this one does not.
        for (name, found) in &saved.0 {
            if !self.0.iter().any(|table| table.name == name) {
                text.push_str(&removal_of(name, found).unwrap_or_default());
            }
        }
        (!text.is_empty()).then_some(text)
    }
}

impl Table {
    fn is_in(&self, found: &BTreeMap<String, Vec<String>>) -> bool {
        self.chains
            .iter()
            .all(|chain| found.get(chain.name) == Some(&chain.rules) && chain.is_jumped_to(found))
    }
}

impl Chain {
    fn is_jumped_to(&self, found: &BTreeMap<String, Vec<String>>) -> bool {
        let jump = format!("-j {}", self.name);
        let mut jumps = jumps(found, Some(self));
        let only = jumps
            .next()
            .is_some_and(|(from, rule)| from == self.from && rule == jump)
            && jumps.next().is_none();
        let is_first = || found.get(self.from).and_then(|rules| rules.first()) == Some(&jump);
        only && (!self.first || is_first())
    }
}

/// The jumps to a chain, or to any of ours, from chains that are not ours.
fn jumps<'a>(
    found: &'a BTreeMap<String, Vec<String>>,
    to: Option<&'a Chain>,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let leads_there = move |rule: &str| {
        let mut words = rule.split_whitespace();
        let target = words.find(|word| *word == "-j" || *word == "-g").and(words.next());
        target.is_some_and(|target| to.map_or(target.starts_with(OURS), |chain| target == chain.name))
    };
    found
        .iter()
        .filter(|(chain, _)| !chain.starts_with(OURS))
        .flat_map(move |(chain, rules)| {
            let there = rules.iter().filter(move |rule| leads_there(rule));
            there.map(move |rule| (chain.as_str(), rule.as_str()))
        })
}

/// What `iptables-save` printed: the rules of each chain of each table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Saved(BTreeMap<String, BTreeMap<String, Vec<String>>>);

impl Saved {
    pub(crate) fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        let mut table: &mut BTreeMap<String, Vec<String>> = &mut BTreeMap::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = saved.0.entry(name.to_owned()).or_default();
            } else if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split(' ').next().unwrap_or_default();
                table.entry(name.to_owned()).or_default();
            } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
                table.entry(chain.to_owned()).or_default().push(rule.to_owned());
            }
        }
        saved
    }

    /// Whether queries to name servers come to an agent.
    pub(crate) fn has_dns(&self) -> bool {
        let mut rules = self.0.values().flat_map(BTreeMap::values).flatten();
        rules.any(|rule| rule.ends_with("--to-ports 15053"))
    }

    /// Whether there is any rule.
    pub(crate) fn has_rules(&self) -> bool {
        self.0
            .values()
            .flat_map(BTreeMap::values)
            .any(|rules| !rules.is_empty())
    }

    /// What to give `iptables-restore --noflush` to remove all that is ours; none if nothing is.
    pub(crate) fn removal(&self) -> Option<String> {
        let text: String = self
            .0
            .iter()
            .filter_map(|(name, found)| removal_of(name, found))
            .collect();
        (!text.is_empty()).then_some(text)
    }

    /// The same for what redirects alone.
    pub(crate) fn removal_of_redirects(&self) -> Option<String> {
        removal_of("nat", self.0.get("nat")?)
    }

    /// The pods that the node's rules are for.
    pub(crate) fn probed(&self) -> Vec<IpAddr> {
        let rules = self.0.get("nat").and_then(|chains| chains.get(POSTROUTING));
        let destination = |rule: &String| {
            let mut words = rule.split_whitespace();
            let address = words.find(|word| *word == "-d").and(words.next())?;
            address.split('/').next()?.parse().ok()
        };
        rules.into_iter().flatten().filter_map(destination).collect()
    }
}

fn removal_of(table: &str, found: &BTreeMap<String, Vec<String>>) -> Option<String> {
    let chains: Vec<&String> = found.keys().filter(|name| name.starts_with(OURS)).collect();
    if chains.is_empty() {
        return None;
    }
    let mut text = format!("*{table}\n");
    for (from, rule) in jumps(found, None) {
        let _ = writeln!(text, "-D {from} {rule}");
    }
    for option in ["-F", "-X"] {
        for chain in &chains {
            let _ = writeln!(text, "{option} {chain}");
        }
    }
    text.push_str("COMMIT\n");
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD_4: &str = include_str!("golden/pod-4.rules");
    const POD_6: &str = include_str!("golden/pod-6.rules");
    const EXCLUDING_4: &str = include_str!("golden/excluding-4.rules");
    const EXCLUDING_6: &str = include_str!("golden/excluding-6.rules");
    const NODE_4: &str = include_str!("golden/node-4.rules");

    /// Regenerated by `UPDATE_GOLDEN=1 cargo test -p capture golden`.
    fn golden(name: &str, expected: &str, found: &str) {
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("src/iptables/golden")
                .join(name);
            std::fs::write(path, found).unwrap();
        } else {
            assert_eq!(found, expected, "{name}");
        }
    }

    fn forbidding() -> PodSettings {
        PodSettings {
            forbid_non_tcp: true,
            ..PodSettings::default()
        }
    }

    fn excluding() -> PodSettings {
        let range = |text: &str| text.parse::<IpNet>().unwrap();
        PodSettings {
            virtual_interfaces: vec!["docker0".to_owned()],
            exclusions: model::Exclusions {
                outbound_ranges: vec![range("10.9.0.0/16"), range("fd09::/16")],
                only_outbound_ranges: Some(vec![range("10.0.0.0/8"), range("::/0")]),
                outbound_ports: vec![5432],
                inbound_ports: vec![9090],
            },
            ..PodSettings::default()
        }
    }

    fn pods() -> Vec<IpAddr> {
        ["10.0.0.1", "fd00::1", "10.0.0.2"]
            .map(|ip| ip.parse().unwrap())
            .to_vec()
    }

    /// What a namespace has once it was given this: enough of `iptables-restore` for our own text.
    fn restored(before: &Saved, text: &str) -> Saved {
        let mut saved = before.clone();
        let mut table = String::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let chains = saved.0.entry(table.clone()).or_default();
            match words[0] {
                "COMMIT" => {}
                "-A" => chains.get_mut(words[1]).unwrap().push(words[2..].join(" ")),
                "-I" => chains
                    .entry(words[1].to_owned())
                    .or_default()
                    .insert(0, words[3..].join(" ")),
                "-D" => {
                    let rules = chains.get_mut(words[1]).unwrap();
                    let at = rules.iter().position(|rule| *rule == words[2..].join(" ")).unwrap();
                    rules.remove(at);
                }
                "-F" => chains.get_mut(words[1]).unwrap().clear(),
                "-X" => assert!(chains.remove(words[1]).unwrap().is_empty()),
                word if word.starts_with(':') => drop(chains.insert(word[1..].to_owned(), Vec::new())),
                word => word.strip_prefix('*').unwrap().clone_into(&mut table),
            }
        }
        saved.0.remove("");
        saved
    }

    #[test]
    fn golden_rules_of_a_pod_and_of_the_node() {
        let nothing = Saved::default();
        let text = |rules: Rules| rules.changes(&nothing).unwrap();
        golden(
            "pod-4.rules",
            POD_4,
            &text(Rules::of_pod(Family::Ip4, &PodSettings::default())),
        );
        golden("pod-6.rules", POD_6, &text(Rules::of_pod(Family::Ip6, &forbidding())));
        for (name, family, expected) in [
            ("excluding-4.rules", Family::Ip4, EXCLUDING_4),
            ("excluding-6.rules", Family::Ip6, EXCLUDING_6),
        ] {
            golden(name, expected, &text(Rules::of_pod(family, &excluding())));
        }
        golden("node-4.rules", NODE_4, &text(Rules::of_node(Family::Ip4, pods())));
    }

    #[test]
    fn what_is_as_it_should_be_is_not_changed() {
        for rules in [
            Rules::of_pod(Family::Ip4, &forbidding()),
            Rules::of_node(Family::Ip6, pods()),
        ] {
            let nothing = Saved::default();
            let saved = restored(&nothing, &rules.changes(&nothing).unwrap());
            assert_eq!(rules.changes(&saved), None);
        }
    }

    #[test]
    fn a_spoiled_chain_is_made_again_in_one_table_only() {
        let rules = Rules::of_pod(Family::Ip4, &PodSettings::default());
        let nothing = Saved::default();
        let good = restored(&nothing, &rules.changes(&nothing).unwrap());
        let spoil = |change: fn(&mut BTreeMap<String, Vec<String>>)| {
            let mut spoiled = good.clone();
            change(spoiled.0.get_mut("nat").unwrap());
            spoiled
        };
        for spoiled in [
            spoil(|nat| drop(nat.get_mut(OUTPUT).unwrap().pop())),
            spoil(|nat| nat.get_mut("OUTPUT").unwrap().clear()),
            spoil(|nat| nat.get_mut("OUTPUT").unwrap().insert(0, "-j ACCEPT".into())),
            spoil(|nat| nat.get_mut("OUTPUT").unwrap().push(format!("-j {OUTPUT}"))),
        ] {
            let changes = rules.changes(&spoiled).unwrap();
            assert!(!changes.contains("*mangle"), "{changes}");
            assert_eq!(rules.changes(&restored(&spoiled, &changes)), None);
        }
    }

    #[test]
    fn removal_leaves_what_is_not_ours() {
        let others = "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:THEIRS - [0:0]\n\
                      -A OUTPUT -d 10.1.1.1/32 -j THEIRS\n-A THEIRS -j ACCEPT\nCOMMIT\n";
        let before = Saved::parse(others);
        assert_eq!(before.removal(), None);
        let rules = Rules::of_pod(Family::Ip4, &forbidding());
        let captured = restored(&before, &rules.changes(&before).unwrap());
        let after = restored(&captured, &captured.removal().unwrap());
        assert_eq!(after.removal(), None);
        assert_eq!(after.0["nat"], before.0["nat"]);
        assert!(!after.0["mangle"].values().any(|rules| !rules.is_empty()));
    }

    #[test]
    fn what_is_not_needed_any_more_goes() {
        let nothing = Saved::default();
        let forbidding = Rules::of_pod(Family::Ip4, &forbidding());
        let saved = restored(&nothing, &forbidding.changes(&nothing).unwrap());
        let changes = Rules::of_pod(Family::Ip4, &PodSettings::default())
            .changes(&saved)
            .unwrap();
        assert!(
            changes.starts_with("*filter\n-D OUTPUT -j UNDERCURRENT_OUTPUT\n"),
            "{changes}"
        );
        let nodes = Rules::of_node(Family::Ip4, pods());
        let saved = restored(&nothing, &nodes.changes(&nothing).unwrap());
        assert_eq!(saved.probed(), [pods()[0], pods()[2]]);
        let nobody = Rules::of_node(Family::Ip4, []);
        let changes = nobody.changes(&saved).unwrap();
        assert!(!restored(&saved, &changes).has_rules(), "{changes}");
    }
}
