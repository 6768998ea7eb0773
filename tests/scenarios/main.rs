//! What the mesh must stand up to, one file for each theme. `cargo test -p system-tests THEME::` runs one of them.

mod bytes;
mod cluster;
mod dns;
mod egress;
mod encrypted;
mod endings;
mod enrolment;
mod escape;
mod exclusions;
mod hostile;
mod knowledge;
mod labels;
mod lifecycle;
mod limits;
mod policy;
mod probes;
mod reach;
mod roots;
mod services;
mod six;
mod stress;
mod telemetry;
mod upgrade;
mod waypoint;

use system_tests::suite;

fn main() -> std::process::ExitCode {
    // The lifecycle comes last: its last scenario takes the mesh down.
    let themes = [
        bytes::SCENARIOS,
        reach::SCENARIOS,
        encrypted::SCENARIOS,
        probes::SCENARIOS,
        policy::SCENARIOS,
        escape::SCENARIOS,
        hostile::SCENARIOS,
        cluster::SCENARIOS,
        services::SCENARIOS,
        dns::SCENARIOS,
        egress::SCENARIOS,
        labels::SCENARIOS,
        knowledge::SCENARIOS,
        telemetry::SCENARIOS,
        exclusions::SCENARIOS,
        enrolment::SCENARIOS,
        waypoint::SCENARIOS,
        upgrade::SCENARIOS,
        limits::SCENARIOS,
        endings::SCENARIOS,
        six::SCENARIOS,
        stress::SCENARIOS,
        roots::SCENARIOS,
        lifecycle::SCENARIOS,
    ];
    suite::run("ebpf", &themes, &[])
}
