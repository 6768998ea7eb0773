//! What is peculiar to capture by iptables; everything else is shown by the scenarios of the other way, done again.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Result, anyhow, ensure};
use system_tests::{Mesh, machine, netns, scenarios};

scenarios![
    the_status_says_so_and_no_ebpf_is_pinned,
    a_process_of_the_node_has_the_address_of_probes,
    uninstall_leaves_nothing,
];

fn the_status_says_so_and_no_ebpf_is_pinned(mesh: &Mesh) -> Result<()> {
    for node in ["node-1", "node-2"] {
        let status = mesh.node(node).status()?;
        ensure!(status.capture.mode == "iptables", "{node}: {}", status.capture.mode);
        let pins = Path::new("/sys/fs/bpf/undercurrent").join(node);
        ensure!(!pins.exists(), "{} is there", pins.display());
    }
    let pod = mesh.pod("mesh", "server");
    let accept = netns::says(&pod.netns(), "sysctl", &["-n", "net.ipv4.tcp_fwmark_accept"])?;
    ensure!(accept.trim() == "0", "a setting of the other way is changed");
    ensure!(has_rules(&pod.netns())?, "{} has no rules", pod.key());
    Ok(())
}

fn has_rules(namespace: &str) -> Result<bool> {
    let mut said = String::new();
    for program in ["iptables-save", "ip6tables-save"] {
        said += &netns::says(namespace, program, &[])?;
    }
    Ok(said.lines().any(|line| line.starts_with("-A")))
}

fn a_process_of_the_node_has_the_address_of_probes(mesh: &Mesh) -> Result<()> {
    let strict = mesh.pod("strict", "http");
    for (address, expected) in strict
        .addresses()?
        .into_iter()
        .zip(["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"])
    {
        let answer = ask_from("uc-node-2", address)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{address}: {answer}");
        ensure!(answer.contains(expected), "{address}: {answer}");
    }
    Ok(())
}

fn ask_from(netns: &str, address: IpAddr) -> Result<String> {
    netns::inside(netns, || {
        let limit = Duration::from_secs(5);
        let mut conn = TcpStream::connect_timeout(&SocketAddr::new(address, 8011), limit)?;
        conn.set_read_timeout(Some(limit))?;
        conn.write_all(b"GET /healthz HTTP/1.1\r\nhost: probe\r\n\r\n")?;
        let mut answer = String::new();
        conn.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

fn uninstall_leaves_nothing(mesh: &Mesh) -> Result<()> {
    let (node, pod) = (mesh.node("node-2"), mesh.pod("mesh", "server"));
    ensure!(
        has_rules(&pod.netns())? && has_rules(&node.netns())?,
        "nothing to uninstall"
    );
    node.kill_agent()?;
    ensure!(has_rules(&pod.netns())?, "the rules went with the agent");
    let state = mesh.file("nodes/node-2/agent");
    let binary = machine::binary().map_err(|why| anyhow!(why))?;
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", &node.netns()])
        .arg(binary)
        .arg("uninstall");
    command
        .arg("--state-dir")
        .arg(state)
        .args(["--pin-dir", "/sys/fs/bpf/undercurrent/node-2"]);
    let output = command.output()?;
    ensure!(output.status.success(), "{output:?}");
    for namespace in [pod.netns(), node.netns()] {
        ensure!(!has_rules(&namespace)?, "rules are left in {namespace}");
    }
    let rules = netns::says(&pod.netns(), "ip", &["rule"])?;
    ensure!(!rules.contains("fwmark"), "{rules}");
    // The node's agent has lost its pods for good: the next scenario has another mesh.
    mesh.down()?;
    mesh.bring_up()
}
