//! Ends all capture of a node and leaves nothing, whether an agent runs or not.

use std::{ffi::OsStr, fs, io, os::unix::ffi::OsStrExt, path::Path};

use abi::Restore;
use aya::maps::{HashMap, Map, MapData};

use crate::{
    error::{CaptureError, Tried},
    maps::Maps,
    netns::Netns,
    pins::{self, Pins},
    pod::put_back,
};

/// Removes the capture whose pins are there. To be called in the node's network namespace. Nothing there is no failure.
pub fn uninstall(pin_dir: &Path) -> Result<(), CaptureError> {
    let home = Netns::own().tried(|| "opening the node's network namespace".into())?;
    everything(&Pins::existing(pin_dir), &home, None)
}

pub(crate) fn everything(pins: &Pins, home: &Netns, maps: Option<&mut Maps>) -> Result<(), CaptureError> {
    let saved = match maps {
        Some(maps) => maps
            .restore_cookies()
            .into_iter()
            .filter_map(|cookie| Some((cookie, maps.restore(cookie)?)))
            .collect(),
        None => saved(&pins.maps().join("RESTORE")),
    };
    // The guards go first, but all links before the settings: no new connection is captured that could not be answered.
    for cookie in pins.pod_cookies() {
        let directory = pins.pod(cookie);
        pins::detach_all(&directory).tried(|| format!("detaching {}", directory.display()))?;
    }
    let _ = fs::remove_dir(pins.pods());
    pins::detach_all(&pins.links()).tried(|| format!("detaching {}", pins.links().display()))?;
    for (cookie, restore) in saved {
        restore_pod(home, cookie, &restore);
    }
    for name in pins::names(pins.root()).filter(|name| name.starts_with("maps-v")) {
        pins::remove_tree(&pins.root().join(name));
    }
    match fs::remove_dir(pins.root()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).tried(|| format!("removing {}", pins.root().display()))
        }
        _ => Ok(()),
    }
}

/// What an earlier agent saved, where its maps are of this version.
fn saved(pin: &Path) -> Vec<(u64, Restore)> {
    let Ok(data) = MapData::from_pin(pin) else {
        return Vec::new();
    };
    HashMap::<_, u64, Restore>::try_from(Map::HashMap(data))
        .map(|map| map.iter().filter_map(Result::ok).collect())
        .unwrap_or_default()
}

/// Puts back a pod's settings, if its namespace still lives where it was.
pub(crate) fn restore_pod(home: &Netns, cookie: u64, restore: &Restore) {
    match living(home, cookie, restore) {
        Some(netns) => {
            if let Err(error) = put_back(&netns, restore) {
                tracing::warn!(%error, netns = %netns.path().display(), "restoring a pod's settings");
            }
        }
        None => tracing::debug!(cookie, "a captured pod is gone: nothing to restore"),
    }
}

/// The pod's namespace, if it still is where it was.
pub(crate) fn living(home: &Netns, cookie: u64, restore: &Restore) -> Option<Netns> {
    let path: Vec<u8> = restore.netns.iter().copied().take_while(|byte| *byte != 0).collect();
    let netns = home.open(Path::new(OsStr::from_bytes(&path))).ok()?;
    (netns.cookie() == cookie).then_some(netns)
}
