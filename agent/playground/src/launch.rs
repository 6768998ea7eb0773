//! `launch` (hidden): becomes another program, in the cgroup and the namespaces that it belongs to.
//!
//! ```text
//! spawn ─> launch: join cgroup ─> setns net, uts, ipc, mnt ─> chdir ─> drop capabilities ─> setuid ─> exec
//! ```
//! A process of its own does this, since joining a cgroup or a mount namespace is for whole processes, and only an
//! exec'd one is sure to take nothing along. Joining a process namespace is for the parent: see [`spawn_in_pod`].

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Uid, setgid, setgroups, setsid, setuid},
};

use crate::{capabilities, layout::netns_path};

/// Where a process belongs.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct LaunchArgs {
    /// The cgroup to join.
    #[arg(long)]
    cgroup: PathBuf,
    /// The network namespace to join, by name.
    #[arg(long)]
    netns: Option<String>,
    /// The process whose mount, host name and IPC namespaces to join; its presence means that this is a pod.
    #[arg(long)]
    pod: Option<i32>,
    /// Numeric user.
    #[arg(long)]
    user: Option<u32>,
    /// Numeric group.
    #[arg(long)]
    group: Option<u32>,
    /// The directory to start in.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Leave the terminal's session.
    #[arg(long)]
    session: bool,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A command that launches: to be given environment and output, and spawned.
#[derive(Clone, Debug)]
pub(crate) struct Launch<'a> {
    pub cgroup: &'a Path,
    pub netns: Option<&'a str>,
    /// The pod's first process.
    pub pod: Option<i32>,
    pub user: Option<u32>,
    pub group: Option<u32>,
    pub directory: Option<&'a Path>,
    /// Leave the terminal's session, so that its signals go elsewhere.
    pub session: bool,
}

impl<'a> Launch<'a> {
    pub fn new(cgroup: &'a Path) -> Self {
        Self {
            cgroup,
            netns: None,
            pod: None,
            user: None,
            group: None,
            directory: None,
            session: false,
        }
    }

    pub fn command(&self, binary: &Path, program: &[String]) -> Command {
        let mut command = Command::new(binary);
        command.args(["playground", "launch", "--cgroup"]).arg(self.cgroup);
        if let Some(netns) = self.netns {
            command.args(["--netns", netns]);
        }
        let numbers = [
            ("--pod", self.pod.map(i64::from)),
            ("--user", self.user.map(i64::from)),
            ("--group", self.group.map(i64::from)),
        ];
        for (name, number) in numbers {
            if let Some(number) = number {
                command.arg(format!("{name}={number}"));
            }
        }
        if let Some(directory) = self.directory {
            command.arg("--directory").arg(directory);
        }
        if self.session {
            command.arg("--session");
        }
        command.arg("--").args(program);
        command
    }
}

/// Runs `launch`: does not return unless something failed.
pub(crate) fn run(args: &LaunchArgs) -> Result<()> {
    // Everything is opened before the first step that hides a path.
    let network = args.netns.as_deref().map(|name| open(&netns_path(name))).transpose()?;
    let of_pod = |kind: &str| {
        args.pod
            .map(|pid| open(Path::new(&format!("/proc/{pid}/ns/{kind}"))))
            .transpose()
    };
    let (mounts, names, ipc) = (of_pod("mnt")?, of_pod("uts")?, of_pod("ipc")?);
    join_cgroup(&args.cgroup)?;
    if args.session {
        setsid().context("cannot start a session (setsid)")?;
    }
    raise_file_limit();
    let joins = [
        (network, CloneFlags::CLONE_NEWNET),
        (names, CloneFlags::CLONE_NEWUTS),
        (ipc, CloneFlags::CLONE_NEWIPC),
        (mounts, CloneFlags::CLONE_NEWNS),
    ];
    for (file, kind) in joins {
        if let Some(file) = file {
            setns(&file, kind).with_context(|| format!("cannot join a namespace ({kind:?})"))?;
        }
    }
    if let Some(directory) = args.directory.as_deref().or(args.pod.map(|_| Path::new("/"))) {
        std::env::set_current_dir(directory)
            .with_context(|| format!("cannot change to the directory {}", directory.display()))?;
    }
    if args.pod.is_some() {
        capabilities::bound()?;
    }
    if let Some(group) = args.group.or(args.user) {
        setgroups(&[])
            .and_then(|()| setgid(Gid::from_raw(group)))
            .context("cannot change the group")?;
    }
    if let Some(user) = args.user {
        setuid(Uid::from_raw(user)).context("cannot change the user")?;
    }
    let Some((program, arguments)) = args.command.split_first() else {
        bail!("no program is given");
    };
    let error = Command::new(program).args(arguments).exec();
    eprintln!("cannot run {program}: {error}");
    // What a shell answers: 127 for what is not there, 126 for what can't be run.
    let not_there = error.kind() == std::io::ErrorKind::NotFound;
    std::process::exit(if not_there { 127 } else { 126 })
}

pub(crate) fn join_cgroup(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("cannot join the cgroup {}", cgroup.display()))
}

/// As container runtimes do: a program with many connections should not meet the shell's limit.
fn raise_file_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Without it the program merely has the limit that it was given.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// Spawns a command into a pod's process namespace. `setns` for that kind is for the children to come, so it is done by
/// a thread that has no other.
pub(crate) fn spawn_in_pod(pause: i32, command: Command) -> Result<Child> {
    let path = format!("/proc/{pause}/ns/pid");
    let file = open(Path::new(&path))?;
    spawn_from_thread(command, move || {
        setns(&file, CloneFlags::CLONE_NEWPID).context("cannot join the pod's processes")
    })
}

/// Spawns a command as the first process of a new process namespace.
pub(crate) fn spawn_first(command: Command) -> Result<Child> {
    spawn_from_thread(command, || {
        nix::sched::unshare(CloneFlags::CLONE_NEWPID).context("cannot make a process namespace (unshare)")
    })
}

fn spawn_from_thread(mut command: Command, first: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Child> {
    let thread = std::thread::spawn(move || {
        first()?;
        command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
