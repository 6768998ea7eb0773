//! `pause` (hidden): a pod's first process. It makes the pod's view of the machine, says `ready`, and waits; its end is
//! the end of every process of the pod, since it is process 1 of their namespace.
//!
//! What a pod sees: this machine's files, read-only; fresh /proc, /sys, /dev, /tmp, /run, /var/tmp and /var/log; its
//! own /etc/hosts and /etc/resolv.conf; the binary as /run/undercurrent/bin/undercurrent. What it does not see: cgroups,
//! bpffs, other pods' and the agents' state, devices.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::Write,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::{
    fcntl::OFlag,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, sethostname},
};

use crate::{capabilities, launch::join_cgroup, layout::netns_path};

/// What the pod is to see.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PauseArgs {
    /// The cgroup to join.
    #[arg(long)]
    pub cgroup: PathBuf,
    /// The network namespace to join, by name.
    #[arg(long)]
    pub netns: String,
    /// The pod's host name.
    #[arg(long)]
    pub hostname: String,
    /// Its /etc/hosts.
    #[arg(long)]
    pub hosts: PathBuf,
    /// Its /etc/resolv.conf.
    #[arg(long)]
    pub resolv_conf: PathBuf,
    /// The undercurrent binary.
    #[arg(long)]
    pub binary: PathBuf,
    /// The directory that it must not see.
    #[arg(long)]
    pub hide: PathBuf,
}

/// Where a pod finds the undercurrent binary.
pub(crate) const BINARY_DIRECTORY: &str = "/run/undercurrent/bin";
const FRESH: [&str; 4] = ["/tmp", "/run", "/var/tmp", "/var/log"];
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// As container runtimes have it: to write there is to write to the machine.
const READ_ONLY: [&str; 5] = ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs"];
const MASKED: [&str; 4] = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/kallsyms"];

/// Runs `pause`; ends only by a signal.
pub(crate) fn run(args: &PauseArgs) -> Result<()> {
    let network = File::open(netns_path(&args.netns)).context("cannot open the pod's network namespace")?;
    join_cgroup(&args.cgroup)?;
    setns(&network, CloneFlags::CLONE_NEWNET).context("cannot join the pod's network namespace")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
        .context("cannot make the pod's namespaces (unshare)")?;
    sethostname(&args.hostname).context("cannot set the host name")?;
    mounts(args)?;
    std::env::set_current_dir("/").context("cannot change to /")?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block signals")?;
    capabilities::bound()?;
    let mut out = std::io::stdout();
    writeln!(out, "ready")
        .and_then(|()| out.flush())
        .context("cannot say that the pod is ready")?;
    loop {
        match signals.wait() {
            Ok(Signal::SIGTERM) => return Ok(()),
            _ => reap(),
        }
    }
}

fn reap() {
    while let Ok(status) = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}

fn mounts(args: &PauseArgs) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make / private")?;
    // Sources are held open: they may lie below what is hidden.
    let binary = Held::open(&args.binary)?;
    let hosts = Held::open(&args.hosts)?;
    let resolv_conf = Held::open(&args.resolv_conf)?;
    let devices: Vec<_> = DEVICES
        .iter()
        .filter_map(|name| Some((*name, Held::open(&Path::new("/dev").join(name)).ok()?)))
        .collect();
    read_only_root()?;
    for path in FRESH {
        if Path::new(path).is_dir() {
            tmpfs(path, "mode=1777", MsFlags::MS_NOSUID | MsFlags::MS_NODEV)?;
        }
    }
    if args.hide.is_dir() {
        tmpfs(&args.hide.to_string_lossy(), "mode=0000,size=4k", MsFlags::MS_RDONLY)?;
    }
    fs::create_dir_all(BINARY_DIRECTORY).with_context(|| format!("cannot create {BINARY_DIRECTORY}"))?;
    binary.bind(&Path::new(BINARY_DIRECTORY).join("undercurrent"), true)?;
    hosts.bind(Path::new("/etc/hosts"), false)?;
    resolv_conf.bind(
        &fs::canonicalize("/etc/resolv.conf").unwrap_or("/etc/resolv.conf".into()),
        true,
    )?;
    device_files(&devices)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("sysfs"), "/sys", Some("sysfs"), flags | MsFlags::MS_RDONLY, none).context("cannot mount /sys")?;
    // Last: what was held open is reached through the machine's own /proc.
    mount(Some("proc"), "/proc", Some("proc"), flags, none).context("cannot mount /proc")?;
    for path in READ_ONLY.iter().filter(|path| Path::new(path).exists()) {
        bind(Path::new(path), Path::new(path))?;
        remount_read_only(path, flags)?;
    }
    for path in MASKED.iter().filter(|path| Path::new(path).exists()) {
        bind(Path::new("/dev/null"), Path::new(path))?;
    }
    Ok(())
}

/// Every file system that is mounted becomes read-only here; those that are replaced afterwards do not matter.
fn read_only_root() -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let replaced = ["/proc", "/sys", "/dev"];
    let mut points = BTreeSet::new();
    for line in table.lines() {
        // 36 35 98:0 /root /mount/point rw,noatime …
        let mut fields = line.split(' ').skip(4);
        if let (Some(point), Some(options)) = (fields.next(), fields.next()) {
            let kind = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').next());
            points.insert((unescape(point), options.to_owned(), kind.unwrap_or_default().to_owned()));
        }
    }
    for (point, options, kind) in points {
        if kind == "nsfs" {
            // A namespace that is mounted here would outlive its pod.
            let _ = umount2(point.as_str(), MntFlags::MNT_DETACH);
            continue;
        }
        if replaced.iter().any(|root| Path::new(&point).starts_with(root)) {
            continue;
        }
        let kept = options.split(',').fold(MsFlags::empty(), |flags, option| {
            flags
                | match option {
                    "nosuid" => MsFlags::MS_NOSUID,
                    "nodev" => MsFlags::MS_NODEV,
                    "noexec" => MsFlags::MS_NOEXEC,
                    "noatime" => MsFlags::MS_NOATIME,
                    "nodiratime" => MsFlags::MS_NODIRATIME,
                    "relatime" => MsFlags::MS_RELATIME,
                    _ => MsFlags::empty(),
                }
        });
        // A mount point below another one that hides it can't be reached, by nobody.
        if let Err(error) = remount_read_only(&point, kept)
            && point == "/"
        {
            return Err(error);
        }
    }
    Ok(())
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(point: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(point.to_owned(), |text, (code, character)| {
            text.replace(code, character)
        })
}

fn remount_read_only(path: &str, kept: MsFlags) -> Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | kept;
    let none = None::<&str>;
    mount(none, path, none, flags, none).with_context(|| format!("cannot make {path} read-only"))
}

fn tmpfs(path: &str, options: &str, flags: MsFlags) -> Result<()> {
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options))
        .with_context(|| format!("cannot mount a tmpfs on {path}"))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("cannot mount {} on {}", source.display(), target.display()))
}

fn device_files(devices: &[(&str, Held)]) -> Result<()> {
    tmpfs("/dev", "mode=755", MsFlags::MS_NOSUID)?;
    for (name, device) in devices {
        device.bind(&Path::new("/dev").join(name), true)?;
    }
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ];
    for (target, link) in links {
        std::os::unix::fs::symlink(target, link).with_context(|| format!("cannot link {link}"))?;
    }
    for directory in ["/dev/pts", "/dev/shm"] {
        fs::create_dir(directory).with_context(|| format!("cannot create {directory}"))?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(
        Some("devpts"),
        "/dev/pts",
        Some("devpts"),
        flags,
        Some("newinstance,ptmxmode=0666,mode=620"),
    )
    .context("cannot mount /dev/pts")?;
    tmpfs("/dev/shm", "mode=1777", MsFlags::MS_NOSUID | MsFlags::MS_NODEV)
}

/// A file held open by its place, to be mounted elsewhere.
struct Held(File, PathBuf);

impl Held {
    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_PATH.bits())
            .open(path);
        Ok(Self(
            file.with_context(|| format!("cannot open {}", path.display()))?,
            path.to_owned(),
        ))
    }

    fn bind(&self, target: &Path, create: bool) -> Result<()> {
        if create && !target.exists() {
            if let Some(directory) = target.parent() {
                // If that fails, so does the next step, which says why.
                let _ = fs::create_dir_all(directory);
            }
            File::create(target).with_context(|| format!("cannot create {}", target.display()))?;
        }
        let source = PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()));
        bind(&source, target).with_context(|| format!("cannot put {} in its place", self.1.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_spaces_are_read() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    }
}
