//! The manifests' files: what is checked and shown, and the documents that are applied as they are written.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use k8s::Objects;
use serde::Deserialize;
use serde_json::Value;

/// What a directory of manifests holds.
pub(crate) struct Manifests {
    /// As this project reads them, with what it finds.
    pub objects: Objects,
    /// As they are written.
    pub documents: Vec<Document>,
}

/// One object, as it is written.
pub(crate) struct Document {
    /// The file it stands in.
    pub file: String,
    pub value: Value,
}

/// All YAML and JSON below a directory, or one file.
pub(crate) fn read(path: &Path) -> Result<Manifests> {
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
    let objects = k8s::parse(texts.iter().map(|(name, text)| (name.as_str(), text.as_str())));
    let documents = texts.iter().flat_map(|(file, text)| documents(file, text)).collect();
    Ok(Manifests { objects, documents })
}

/// The objects of a file. What is no YAML is left out: [`k8s::parse`] names it.
fn documents(file: &str, text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    for document in k8s::documents(text) {
        let Ok(value) = serde_yaml_ng::Deserializer::from_str(document)
            .next()
            .map(Value::deserialize)
            .transpose()
        else {
            continue;
        };
        let Some(value) = value.filter(Value::is_object) else {
            continue;
        };
        let is_list = value["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
        let items = match value["items"].as_array() {
            Some(items) if is_list => items.clone(),
            _ => vec![value],
        };
        documents.extend(items.into_iter().map(|value| Document {
            file: file.to_owned(),
            value,
        }));
    }
    documents
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
