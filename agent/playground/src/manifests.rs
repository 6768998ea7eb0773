//! The manifests' files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use k8s::Objects;

/// All YAML and JSON below a directory, or one file.
pub(crate) fn read(path: &Path) -> Result<Objects> {
    let mut files = Vec::new();
    collect(path, &mut files).with_context(|| format!("cannot read {}", path.display()))?;
    if files.is_empty() {
        bail!("{}: there is no .yaml, .yml or .json file", path.display());
    }
    files.sort();
    let mut texts = Vec::new();
    for file in files {
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file
            .strip_prefix(path)
            .ok()
            .filter(|name| *name != Path::new(""))
            .unwrap_or(&file);
        texts.push((name.display().to_string(), String::from_utf8_lossy(&bytes).into_owned()));
    }
    Ok(k8s::parse(
        texts.iter().map(|(name, text)| (name.as_str(), text.as_str())),
    ))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if !path.is_dir() {
        fs::metadata(path)?;
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?.path();
        let is_manifest = entry
            .extension()
            .is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
        if entry.is_dir() || is_manifest {
            collect(&entry, files)?;
        }
    }
    Ok(())
}
