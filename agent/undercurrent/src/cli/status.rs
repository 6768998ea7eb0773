//! `status`: what an agent is at, on one page.

use admin::Status;
use anyhow::{Result, bail};

use super::{Reach, colours, page::page, print};

/// Options of `status`.
#[derive(clap::Args, Clone, Debug)]
pub struct StatusArgs {
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

/// Shows the status of each agent; fails where one does not answer.
pub fn run(args: &StatusArgs) -> Result<()> {
    let mut trouble = Vec::new();
    let mut all = Vec::new();
    for agent in args.reach.agents()? {
        match agent.get::<Status>("/status") {
            Ok(status) => all.push(status),
            Err(error) => trouble.push(format!("{error:#}")),
        }
    }
    if args.json {
        print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
    } else {
        let now = super::super::node::now();
        let pages: Vec<_> = all.iter().map(|status| page(status, now, colours())).collect();
        print(&pages.join("\n"))?;
    }
    if !trouble.is_empty() {
        bail!("{}", trouble.join("\n"));
    }
    Ok(())
}
