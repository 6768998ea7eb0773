//! `cargo xtask demo`: from nothing to a mesh that is seen working.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::Purpose;
use crate::step::failed;
use crate::workspace::Workspace;
use crate::{build, preflight};

/// Installs, builds, and hands the terminal to `undercurrent playground demo`.
pub fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    build::all(workspace, Purpose::DEMO)?;
    let missing = preflight::missing();
    if !missing.is_empty() {
        for line in &missing {
            failed(&format!("missing: {line}"));
        }
        bail!(
            "the binary is built, the demo was not run; as root: {} playground demo",
            workspace.binary().display()
        );
    }
    let mut demo = Command::new(workspace.binary());
    demo.args(["playground", "demo"])
        .args(arguments)
        .current_dir(workspace.root());
    let status = demo
        .status()
        .with_context(|| format!("start {}", workspace.binary().display()))?;
    if !status.success() {
        bail!("the demo failed ({status})");
    }
    Ok(())
}
