//! Puts the plugin into a node's chain and keeps it there: some network plugins write their configuration anew.
//!
//! ```text
//! start ─► binary into --bin-dir ─► chain into the first *.conflist ─┬─ the directory changes, or a minute passes ─┐
//!                                                                    └───────────────◄─────────────────────────────┘
//! ```
//! Every file is replaced in one step. Told to end, it leaves the plugin in place, so that no pod starts uncaptured while
//! an agent is upgraded; `uninstall` takes it out. A chain is chosen as runtimes choose it: the first file by name. A
//! single plugin's `*.conf` is not turned into a chain; that is said, and looked at again.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use serde_json::{Value, json};

use super::{PLUGIN, conflist};

/// Looked at again after this even if nothing seems to have changed.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// Options of `undercurrent cni install` and `uninstall`.
#[derive(Args, Clone, Debug)]
pub struct InstallArgs {
    /// Where the runtime looks for configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Where the runtime looks for plugins.
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The node agent's socket, as the runtime sees it.
    #[arg(long, value_name = "FILE", default_value = "/var/run/undercurrent/agent.sock")]
    agent_socket: PathBuf,
    /// How long a pod's start waits for its capture.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout_seconds: u64,
    /// Namespaces whose pods start whether the agent answers or not: what the agent itself needs must not wait for it. With
    /// eBPF capture they can connect once the agent knows them: at once where one runs, else once one has found them. Whether
    /// they may be captured is the agent's option --exclude-namespaces.
    #[arg(long, value_name = "NAMESPACE", value_delimiter = ',', default_value = "kube-system")]
    exclude_namespaces: Vec<String>,
    /// Install and end, instead of keeping watch.
    #[arg(long)]
    once: bool,
}

/// Installs, and keeps watch unless told otherwise.
pub fn install(args: &InstallArgs) -> anyhow::Result<()> {
    fs::create_dir_all(&args.conf_dir).with_context(|| format!("cannot make {}", args.conf_dir.display()))?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let changes = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
    inotify
        .add_watch(&args.conf_dir, changes)
        .with_context(|| format!("cannot watch {}", args.conf_dir.display()))?;
    copy_binary(&args.bin_dir)?;
    loop {
        let installed = chain(args);
        if args.once {
            return installed;
        }
        if let Err(error) = installed {
            eprintln!("undercurrent-cni: not in the chain of plugins: {error:#}");
        }
        let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&inotify), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, wait) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for changes"),
        }
        // Which file changed does not matter.
        let _ = inotify.read_events();
    }
}

/// Takes the plugin out of every chain, then its binary away.
pub fn uninstall(args: &InstallArgs) -> anyhow::Result<()> {
    for file in configurations(&args.conf_dir)? {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        match conflist::unchained(&text) {
            Ok(Some(without)) => replace(&file, without.as_bytes())?,
            Ok(None) => {}
            Err(error) => eprintln!("undercurrent-cni: {} is left alone: {error}", file.display()),
        }
    }
    match fs::remove_file(args.bin_dir.join(PLUGIN)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("cannot remove the plugin"),
        _ => Ok(()),
    }
}

fn entry(args: &InstallArgs) -> Value {
    json!({
        "type": PLUGIN,
        "agentSocket": args.agent_socket,
        "timeoutSeconds": args.timeout_seconds,
        "excludeNamespaces": args.exclude_namespaces,
    })
}

fn chain(args: &InstallArgs) -> anyhow::Result<()> {
    let files = configurations(&args.conf_dir)?;
    let Some(first) = files.first() else {
        bail!("{} has no configuration (yet)", args.conf_dir.display());
    };
    if first.extension() != Some(OsStr::new("conflist")) {
        bail!("{} comes first and is a single plugin, not a chain", first.display());
    }
    let text = fs::read_to_string(first).with_context(|| first.display().to_string())?;
    match conflist::chained(&text, &entry(args)).with_context(|| first.display().to_string())? {
        None => Ok(()),
        Some(with) => {
            replace(first, with.as_bytes())?;
            eprintln!("undercurrent-cni: in the chain of {}", first.display());
            Ok(())
        }
    }
}

/// The files that a runtime looks at, in its order.
fn configurations(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let extension = path.extension().map(OsStr::as_bytes);
        if matches!(extension, Some(b"conflist" | b"conf" | b"json")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn copy_binary(directory: &Path) -> anyhow::Result<()> {
    let (own, installed) = (std::env::current_exe()?, directory.join(PLUGIN));
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let fresh = directory.join(format!(".{PLUGIN}.new"));
    fs::copy(&own, &fresh).with_context(|| format!("cannot copy the plugin to {}", directory.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    fs::rename(&fresh, &installed).with_context(|| format!("cannot put {} in place", installed.display()))
}

/// In one step, with the mode that the file had. The name in between is none that a runtime reads.
fn replace(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let mode = fs::metadata(path).map_or(0o600, |metadata| metadata.mode() & 0o777);
    let fresh = path.with_extension("undercurrent-new");
    fs::write(&fresh, contents).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
    fs::rename(&fresh, path).with_context(|| format!("cannot replace {}", path.display()))
}
