//! Service addresses for whom the mesh does not carry: what kube-proxy does on a node, by nftables in the node's network
//! namespace. Traffic of the mesh is never addressed to a service when it gets here, and so is never translated.
//!
//! Without the program `nft` a service's address leads nowhere for pods that are not captured; its pods' addresses do.

use std::{
    fmt::Write,
    io::Write as _,
    net::IpAddr,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    layout::{node_name, node_netns},
    netns, preflight,
};

/// A port of a service's address, and where that leads.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Route {
    /// `namespace/name`.
    pub service: String,
    pub vip: IpAddr,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    pub port: u16,
    pub targets: Vec<(IpAddr, u16)>,
}

/// The rules for every service with an address. The same on every node.
pub(crate) fn rules(routes: &[Route]) -> String {
    let mut rules = String::new();
    for route in routes.iter().filter(|route| !route.targets.is_empty()) {
        rule(&mut rules, route).expect("writing to a String does not fail");
    }
    let mut table = "table inet undercurrent_services\ndelete table inet undercurrent_services\n".to_owned();
    if !rules.is_empty() {
        for (chain, hook) in [("from_pods", "prerouting"), ("from_node", "output")] {
            write!(
                table,
                "table inet undercurrent_services {{\n chain {chain} {{\n  type nat hook {hook} priority -100;\n{rules} }}\n}}\n"
            )
            .expect("writing to a String does not fail");
        }
    }
    table
}

fn rule(rules: &mut String, route: &Route) -> std::fmt::Result {
    let (vip, protocol, targets) = (route.vip, &route.protocol, &route.targets);
    let family = if vip.is_ipv4() { "ip" } else { "ip6" };
    write!(
        rules,
        "  {family} daddr {vip} {protocol} dport {} dnat {family} to ",
        route.port
    )?;
    if let [(address, number)] = targets.as_slice() {
        match address {
            IpAddr::V4(v4) => write!(rules, "{v4}:{number}")?,
            IpAddr::V6(v6) => write!(rules, "[{v6}]:{number}")?,
        }
    } else {
        write!(rules, "numgen random mod {} map {{ ", targets.len())?;
        for (index, (address, number)) in targets.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(rules, "{comma}{index} : {address} . {number}")?;
        }
        write!(rules, " }}")?;
    }
    writeln!(rules, " comment \"{}\"", route.service)
}

/// Puts the rules in place of the ones before, in one step.
pub(crate) fn apply(node: u8, rules: &str) -> Result<()> {
    if !preflight::has_program("nft") {
        return Ok(());
    }
    netns::inside(&node_netns(&node_name(node)), || {
        let mut command = Command::new("nft");
        command
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run nft")?;
        if let Some(mut stdin) = child.stdin.take() {
            // If it ended early its standard error says why.
            let _ = stdin.write_all(rules.as_bytes());
        }
        let output = child.wait_with_output().context("cannot wait for nft")?;
        if !output.status.success() {
            bail!(
                "nft refuses the services' rules: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    })
}
