//! The playground without the rest of the binary, for work on the playground itself.

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(clap::Subcommand)]
enum Role {
    /// As `undercurrent playground`.
    Playground(playground::Args),
}

fn main() -> anyhow::Result<()> {
    let Role::Playground(args) = Cli::parse().role;
    playground::run(args)
}
