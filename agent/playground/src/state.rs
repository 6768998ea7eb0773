//! What `up` was asked for, kept between commands.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    apply::Applied,
    files::write_atomically,
    layout::{Layout, node_name},
};

/// What `up` was asked for. It changes only under [`crate::owner::hold`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct State {
    pub nodes: u8,
    pub capture: String,
    pub access_log: String,
    pub manifests: PathBuf,
    /// The API's port on loopback.
    pub api_port: u16,
    /// What `up` wrote from the manifests: what is no longer there goes at the next.
    pub applied: Vec<Applied>,
    /// The search path of whoever called `up`: containers run programs of this machine.
    pub path: String,
    /// Whether `up` mounted /sys/fs/bpf, so that `down` unmounts it.
    pub mounted_bpffs: bool,
}

impl State {
    /// Reads it; none if the playground is not up.
    pub fn load(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.state();
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let state = serde_json::from_str(&text);
        state
            .map(Some)
            .with_context(|| format!("{} is damaged: take the playground down", path.display()))
    }

    /// Reads it, or says that the playground is not up.
    pub fn expect(layout: &Layout) -> Result<Self> {
        Self::load(layout)?.context("the playground is not up: undercurrent playground up --manifests DIR")
    }

    pub fn save(&self, layout: &Layout) -> Result<()> {
        write_atomically(&layout.state(), &serde_json::to_string_pretty(self)?)
    }

    pub fn node_names(&self) -> impl Iterator<Item = String> + use<> {
        (1..=self.nodes).map(node_name)
    }
}
