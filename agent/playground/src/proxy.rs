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
use k8s::{IntOrString, Objects, Service};

use crate::{
    layout::{node_name, node_netns},
    netns, preflight,
    state::{PodSlot, State, key},
};

/// The pods behind a service.
pub(crate) fn endpoints<'a>(state: &State, objects: &'a Objects, service: &Service) -> Vec<(&'a k8s::Pod, PodSlot)> {
    let selector = &service.spec.selector;
    let selected = objects.pods.iter().map(|(_, pod)| pod).filter(|pod| {
        !selector.is_empty()
            && pod.metadata.namespace == service.metadata.namespace
            && selector
                .iter()
                .all(|(name, value)| pod.metadata.labels.get(name) == Some(value))
    });
    selected
        .filter_map(|pod| Some((pod, *state.pods.get(&key(&pod.metadata))?)))
        .collect()
}

/// The rules for every service with an address. The same on every node.
pub(crate) fn rules(state: &State, objects: &Objects) -> String {
    let mut rules = String::new();
    for (_, service) in &objects.services {
        let endpoints = endpoints(state, objects, service);
        for vip in state.vips(service) {
            for port in &service.spec.ports {
                let targets: Vec<_> = endpoints
                    .iter()
                    .filter_map(|(pod, slot)| target(pod, *slot, port, vip))
                    .collect();
                if !targets.is_empty() {
                    let name = key(&service.metadata);
                    rule(&mut rules, vip, port, &targets, &name).expect("writing to a String does not fail");
                }
            }
        }
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

fn target(pod: &k8s::Pod, slot: PodSlot, port: &k8s::ServicePort, vip: IpAddr) -> Option<(IpAddr, u16)> {
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Number(number)) => *number,
        Some(IntOrString::Name(name)) => pod.named_port(name)?,
    };
    let address = slot
        .addresses()
        .into_iter()
        .find(|address| address.is_ipv4() == vip.is_ipv4())?;
    Some((address, number))
}

fn rule(
    rules: &mut String,
    vip: IpAddr,
    port: &k8s::ServicePort,
    targets: &[(IpAddr, u16)],
    name: &str,
) -> std::fmt::Result {
    let family = if vip.is_ipv4() { "ip" } else { "ip6" };
    let protocol = port.protocol.to_ascii_lowercase();
    write!(
        rules,
        "  {family} daddr {vip} {protocol} dport {} dnat {family} to ",
        port.port
    )?;
    if let [(address, number)] = targets {
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
    writeln!(rules, " comment \"{name}\"")
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
