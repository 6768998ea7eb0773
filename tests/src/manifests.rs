//! The manifests of the mesh under test: those of `tests/manifests`, with this machine's paths in them.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::machine;

/// A directory of manifests that a scenario may change.
pub struct Manifests {
    directory: tempfile::TempDir,
}

impl Manifests {
    /// Copies them to a directory of their own.
    pub fn load() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let from = machine::root().join("tests/manifests");
        for entry in fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))? {
            let path = entry?.path();
            let text = fs::read_to_string(&path)?;
            let text = text
                .replace("@SCRIPTS@", &machine::scripts().to_string_lossy())
                .replace("@PYTHON@", machine::python());
            fs::write(
                directory.path().join(path.file_name().context("a file has a name")?),
                text,
            )?;
        }
        Ok(Self { directory })
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Changes one.
    pub fn edit(&self, file: &str, change: impl FnOnce(String) -> String) -> Result<()> {
        let path = self.directory.path().join(file);
        let before = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, change(before)).with_context(|| format!("cannot write {}", path.display()))
    }
}
