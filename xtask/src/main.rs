//! The build's own commands. `cargo xtask demo` and `cargo xtask test` are the two that a newcomer needs: each brings
//! what it needs first, and says what it does.
//!
//! # What `test` costs
//!
//! Measured from nothing on two cores (Debian 12, everything to be fetched):
//!
//! | step | time |
//! |---|---|
//! | this program | 15 s |
//! | setup: packages; bpf-linker; cargo-deny | 1 min; 1 min; 1 min 20 s |
//! | eBPF programs | 20 s |
//! | clippy, all targets | 1 min 45 s |
//! | unit tests, built in the dev profile | 2 min 10 s |
//! | the release binary | 2 min |
//! | fuzz targets, a moment each | 1 min 30 s |
//!
//! Clippy and the tests share the dev profile, so build scripts (aws-lc's C code above all) run once for both. The
//! tests that start the binary start the release one, which `demo` and `bench` use as well: unoptimised cryptography
//! would make them slower than building it costs, and what is tested is what is shipped. Running the unit tests in the
//! release profile, too, would link each of some twenty test programs with LTO: dearer than one more set of
//! dependencies. Dependencies are compiled with `opt-level = 1` and no debug information in the dev profile, and CI
//! builds without the incremental cache that it would never read.

mod bench;
mod build;
mod demo;
mod preflight;
mod setup;
mod step;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use setup::Purpose;
use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set up, build, show, test and measure Undercurrent")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing on this machine; do nothing when all is there.
    Setup,
    /// Compile the eBPF programs.
    BuildEbpf,
    /// Build the release binary, with the eBPF programs inside.
    Build,
    /// From nothing to a mesh that is seen working.
    Demo {
        /// Passed on to `undercurrent playground demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Every check and every test.
    Test {
        /// Passed on to `cargo test`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        filter: Vec<String>,
    },
    /// Measure speed and cost, side by side with others.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// The checks that no compiler makes: lengths, words, headers, who depends on whom.
    Tidy,
}

#[derive(Subcommand)]
enum Bench {
    /// The L4 path: no mesh, undercurrent, Envoy, and other node proxies.
    L4(bench::L4),
    /// The control plane: many agents that learn a large mesh.
    Control(bench::Control),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            step::failed(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let workspace = Workspace::here();
    match command {
        Command::Setup => setup::run(&workspace, Purpose::ALL),
        Command::BuildEbpf => build::ebpf(&workspace),
        Command::Build => build::all(&workspace, &[Purpose::Build]),
        Command::Demo { arguments } => demo::run(&workspace, &arguments),
        Command::Test { filter } => test::run(&workspace, &filter),
        Command::Bench {
            what: Bench::L4(options),
        } => bench::l4(&workspace, &options),
        Command::Bench {
            what: Bench::Control(options),
        } => bench::control(&workspace, &options),
        Command::Tidy => tidy::run(&workspace),
    }
}
