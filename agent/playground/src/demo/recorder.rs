//! The recording of the fabric while the demo's calls are made, by tcpdump.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::packets::Capture;
use crate::{
    exec::{PacketsArgs, tcpdump},
    layout::Layout,
    preflight,
    process::Process,
};

/// tcpdump on the fabric.
pub(super) struct Recorder {
    child: Option<Child>,
    path: PathBuf,
}

impl Recorder {
    pub fn start(layout: &Layout, path: PathBuf) -> Result<Self> {
        if !preflight::has_program("tcpdump") {
            return Ok(Self { child: None, path });
        }
        let args = PacketsArgs {
            write: Some(path.clone()),
            count: None,
            rest: vec!["--immediate-mode".into()],
        };
        let mut command = tcpdump(layout, &args)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run tcpdump")?;
        let mut said = String::new();
        if let Some(stderr) = child.stderr.take() {
            let mut lines = BufReader::new(stderr);
            while !said.contains("listening on") {
                let mut line = String::new();
                if lines.read_line(&mut line).context("cannot hear tcpdump")? == 0 {
                    bail!("tcpdump does not start: {}", said.trim());
                }
                said.push_str(&line);
            }
            // It goes on writing there, to nobody: it must not end by that.
            std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        }
        Ok(Self {
            child: Some(child),
            path,
        })
    }

    pub fn stop(mut self) -> Result<Option<Capture>> {
        let Some(mut child) = self.child.take() else {
            return Ok(None);
        };
        if let Some(process) = Process::of(i32::try_from(child.id())?) {
            process.signal(Signal::SIGINT);
        }
        child.wait().context("cannot wait for tcpdump")?;
        let bytes = fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(Some(Capture::parse(bytes)))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Ours until it was waited for.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
