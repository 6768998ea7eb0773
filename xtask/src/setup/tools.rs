//! The programs that this project runs, why, and which Debian package has each.

/// What something is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Compiling.
    Build,
    /// The playground: demo and system tests.
    Run,
    /// The tests: `cargo deny`, `kubectl`, Envoy.
    Audit,
    /// The benchmarks.
    Bench,
}

impl Purpose {
    /// Everything.
    pub const ALL: &[Purpose] = &[Purpose::Build, Purpose::Run, Purpose::Audit, Purpose::Bench];
    /// What the demo needs.
    pub const DEMO: &[Purpose] = &[Purpose::Build, Purpose::Run];
    /// What the tests need.
    pub const TEST: &[Purpose] = &[Purpose::Build, Purpose::Run, Purpose::Audit];
    /// What the benchmarks need.
    pub const BENCH: &[Purpose] = &[Purpose::Build, Purpose::Run, Purpose::Bench];
}

/// A program from the system's packages.
pub struct Tool {
    /// Its name on the search path.
    pub program: &'static str,
    /// Debian's package.
    pub package: &'static str,
    /// Who needs it.
    pub purpose: Purpose,
    /// What for, in words.
    pub why: &'static str,
}

const fn tool(program: &'static str, package: &'static str, purpose: Purpose, why: &'static str) -> Tool {
    Tool {
        program,
        package,
        purpose,
        why,
    }
}

/// All of them.
pub const TOOLS: &[Tool] = &[
    tool("cc", "gcc", Purpose::Build, "compiles the cryptography library aws-lc"),
    tool("ip", "iproute2", Purpose::Run, "shows and tests network namespaces"),
    tool(
        "iptables",
        "iptables",
        Purpose::Run,
        "shows that pods have no rules; capture without eBPF",
    ),
    tool("nft", "nftables", Purpose::Run, "shows that pods have no rules"),
    tool("tcpdump", "tcpdump", Purpose::Run, "captures what the fabric carries"),
    tool("curl", "curl", Purpose::Run, "a client in pods"),
    tool("python3", "python3", Purpose::Run, "a client and server in pods"),
    tool("nginx", "nginx-light", Purpose::Run, "a server in pods"),
    tool("iperf3", "iperf3", Purpose::Run, "load in pods"),
    tool("wrk", "wrk", Purpose::Run, "load in pods"),
    tool(
        "openssl",
        "openssl",
        Purpose::Bench,
        "makes the certificates of the Envoys",
    ),
];
