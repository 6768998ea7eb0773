//! The programs that are attached for one pod, each by a pinned link: found, attached, given to a newer agent.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use crate::{
    error::{CaptureError, Tried},
    netns::Netns,
    pins::{self, Pins},
    programs::Programs,
    sys::{self, AttachType, Attached, Target},
};

/// Gives the links of a pod the new programs. False: the pod is gone.
pub(crate) fn adopt(pins: &Pins, programs: &Programs, cookie: u64) -> io::Result<bool> {
    let directory = pins.pod(cookie);
    let mut alive = false;
    for name in pins::names(&directory) {
        let path = directory.join(&name);
        let Some(link) = sys::pinned(&path)? else {
            continue;
        };
        if name.starts_with(pins::UNFINISHED) {
            pins::detach(&path)?;
            continue;
        }
        let program = match name.split('-').next() {
            Some("steer") => &programs.steer,
            Some("proof") => &programs.proof,
            Some("guard") => &programs.guard,
            _ => continue,
        };
        if sys::link_attached(&link)?.is_gone() || sys::link_update(&link, program).is_err() {
            fs::remove_file(&path)?;
        } else if name == "steer" {
            alive = true;
        }
    }
    Ok(alive)
}

/// The hooks on the host side of a veth.
#[derive(Clone, Copy)]
pub(crate) enum Hook {
    Proof,
    Guard,
}

impl Hook {
    pub(crate) fn pin(self, directory: &Path, index: u32) -> PathBuf {
        directory.join(match self {
            Self::Proof => format!("proof-{index}"),
            Self::Guard => format!("guard-{index}"),
        })
    }
}

pub(crate) fn attach_tcx(directory: &Path, hook: Hook, index: u32, programs: &Programs) -> Result<bool, CaptureError> {
    let (program, kind) = match hook {
        Hook::Proof => (&programs.proof, AttachType::TcxEgress),
        Hook::Guard => (&programs.guard, AttachType::TcxIngress),
    };
    let path = hook.pin(directory, index);
    pins::attach(
        &path,
        program,
        Target::Interface(index),
        kind,
        Attached::Interface(index),
    )
    .tried(|| format!("attaching {}", path.display()))
}

pub(crate) fn attach_steer(directory: &Path, netns: &Netns, programs: &Programs) -> Result<bool, CaptureError> {
    let path = directory.join("steer");
    let attach = || -> io::Result<bool> {
        let inode = fs::File::open(netns.path())
            .and_then(|file| file.metadata())
            .map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata) as u32)?;
        let target = Target::File(netns.as_fd());
        pins::attach(
            &path,
            &programs.steer,
            target,
            AttachType::SkLookup,
            Attached::Netns(inode),
        )
    };
    attach().tried(|| format!("attaching {}", path.display()))
}
