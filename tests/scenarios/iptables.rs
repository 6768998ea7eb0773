//! The same mesh where the kernel has no eBPF for it: captured by Istio's in-pod iptables rules. What applications see is
//! the same; what holds against a hostile pod is not, and is left out here with its reason.

mod bytes;
mod cluster;
mod dns;
mod encrypted;
mod endings;
mod enrolment;
mod exclusions;
mod fallback;
mod knowledge;
mod labels;
mod lifecycle;
mod limits;
mod policy;
mod probes;
mod reach;
mod services;
mod six;
mod stress;
mod upgrade;
mod waypoint;

use system_tests::suite;

/// What these rules can't do, by their nature.
const BUT: &[&str] = &[
    // They neither forbid nor count what is not TCP.
    "udp_and_icmp_are_dropped_where_that_is_set",
    // A probe is known by its address, which a host-network pod shares, and is translated to a link-local one.
    "a_process_of_the_node_sees_the_application_itself",
    "a_pod_with_the_nodes_network_is_refused",
    "without_an_agent_probes_are_answered_and_nobody_else_is_let_in",
    "a_captured_pod_has_no_firewall_rules",
    // A redirection does not look whether anybody listens: DNS waits for the next agent.
    "without_an_agent_name_servers_are_asked_directly",
];

fn main() -> std::process::ExitCode {
    let themes = [
        bytes::SCENARIOS,
        reach::SCENARIOS,
        encrypted::SCENARIOS,
        probes::SCENARIOS,
        policy::SCENARIOS,
        cluster::SCENARIOS,
        dns::SCENARIOS,
        services::SCENARIOS,
        labels::SCENARIOS,
        knowledge::SCENARIOS,
        exclusions::SCENARIOS,
        enrolment::SCENARIOS,
        waypoint::SCENARIOS,
        limits::SCENARIOS,
        endings::SCENARIOS,
        six::SCENARIOS,
        stress::SCENARIOS,
        fallback::SCENARIOS,
        upgrade::SCENARIOS,
        lifecycle::SCENARIOS,
    ];
    suite::run("iptables", &themes, BUT)
}
