//! The pods that this agent was told of, kept in a directory so that a restarted agent finds them without being told
//! again. One file each, replaced in one step: a crash leaves the old one or the new one.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use model::NamespacedName;
use serde::{Deserialize, Serialize};

use super::kube_source::ApiPod;

/// A pod that the agent was told of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRecord {
    /// Its namespace and name.
    pub pod: NamespacedName,
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its sandbox, as the container runtime names it; empty where nobody said.
    #[serde(default)]
    pub container_id: String,
    /// Whether nobody told of it: the agent found it by its addresses.
    #[serde(default)]
    pub found: bool,
    /// Whether it is yet to be captured, or known, for the first time: nobody has let it start.
    #[serde(default)]
    pub starting: bool,
    /// Whether an agent captured it when this was last written; nothing: by one that did not say.
    #[serde(default)]
    pub captured: Option<bool>,
    /// Who it is, as the Kubernetes API said last; nothing where there is none.
    #[serde(default)]
    pub api: Option<ApiPod>,
}

impl PodRecord {
    /// Whether both are of one sandbox: if not, one of them is gone.
    pub fn is_same_sandbox(&self, other: &Self) -> bool {
        let sandbox = |record: &Self| {
            (
                record.netns.clone(),
                record.addresses.clone(),
                record.container_id.clone(),
            )
        };
        let uid = |record: &Self| record.api.as_ref().map(|api| api.uid.clone());
        sandbox(self) == sandbox(other) && (uid(self).is_none() || uid(other).is_none() || uid(self) == uid(other))
    }
}

/// The directory.
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Opens the directory and reads what is there. A file that can't be read is named and left alone.
    pub fn open(directory: &Path) -> io::Result<(Self, BTreeMap<NamespacedName, PodRecord>)> {
        fs::create_dir_all(directory)?;
        let records = Self {
            directory: directory.to_owned(),
        };
        let found = records.read()?;
        Ok((records, found))
    }

    /// Reads what is there. A file that can't be read is named and left alone.
    pub fn read(&self) -> io::Result<BTreeMap<NamespacedName, PodRecord>> {
        let mut pods = BTreeMap::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => drop(pods.insert(record.pod.clone(), record)),
                Err(error) => tracing::error!(file = %path.display(), %error, "a pod's record cannot be read"),
            }
        }
        Ok(pods)
    }

    /// Keeps a record.
    pub fn keep(&self, record: &PodRecord) -> io::Result<()> {
        let path = self.path(&record.pod);
        let fresh = path.with_extension("new");
        fs::write(&fresh, serde_json::to_vec_pretty(record)?)?;
        fs::rename(fresh, path)
    }

    /// Drops a record; one that is not there is none too many.
    pub fn drop_record(&self, pod: &NamespacedName) -> io::Result<()> {
        match fs::remove_file(self.path(pod)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Kubernetes names hold no `_`, so this is unique.
    fn path(&self, pod: &NamespacedName) -> PathBuf {
        self.directory.join(format!("{}_{}.json", pod.namespace, pod.name))
    }
}

fn read(path: &Path) -> io::Result<PodRecord> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_again_and_a_torn_file_spoils_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let (records, none) = Records::open(directory.path()).unwrap();
        assert!(none.is_empty());
        let record = |name: &str| PodRecord {
            pod: NamespacedName::new("shop", name),
            netns: "/var/run/netns/x".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            container_id: String::new(),
            found: false,
            starting: false,
            captured: None,
            api: None,
        };
        records.keep(&record("a")).unwrap();
        records.keep(&record("b")).unwrap();
        records.drop_record(&record("b").pod).unwrap();
        records.drop_record(&record("b").pod).unwrap();
        fs::write(directory.path().join("shop_torn.json"), "{\"pod\":").unwrap();
        let (_, found) = Records::open(directory.path()).unwrap();
        assert_eq!(found.into_values().collect::<Vec<_>>(), [record("a")]);
    }
}
