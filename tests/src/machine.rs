//! What this machine has of what the scenarios need.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// The checkout.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// The scripts that run inside pods. Pods see the machine's files, but for `/tmp` and the like, where the checkout may
/// be: so they are copied to where a pod can read them, until [`remove_scripts`].
pub fn scripts() -> PathBuf {
    static COPIED: OnceLock<()> = OnceLock::new();
    COPIED.get_or_init(|| copy_scripts().expect("the scripts are copied to where pods see them"));
    copied_scripts()
}

fn copied_scripts() -> PathBuf {
    format!("/var/lib/undercurrent/system-tests-{}", std::process::id()).into()
}

fn copy_scripts() -> std::io::Result<()> {
    fs::create_dir_all(copied_scripts())?;
    for entry in fs::read_dir(root().join("tests/scripts"))? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            fs::copy(&path, copied_scripts().join(name))?;
        }
    }
    Ok(())
}

/// Removes what [`scripts`] copied.
pub fn remove_scripts() {
    // Nothing there is as good.
    let _ = fs::remove_dir_all(copied_scripts());
}

/// The program under test: given by `UNDERCURRENT_BIN` (or `UNDERCURRENT_BINARY`, as `cargo xtask test` calls it), else
/// the release build, else the debug build.
pub fn binary() -> Result<PathBuf, String> {
    for name in ["UNDERCURRENT_BIN", "UNDERCURRENT_BINARY"] {
        if let Some(given) = std::env::var_os(name) {
            let path = PathBuf::from(given);
            return path
                .exists()
                .then_some(path)
                .ok_or(format!("the binary that {name} names is not there"));
        }
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root().join("target"), |given| root().join(given));
    let built = ["release", "debug"].map(|profile| target.join(profile).join("undercurrent"));
    let found = built.into_iter().find(|path| path.exists());
    found.ok_or("the binary is not built (cargo xtask build)".to_owned())
}

/// What is missing for any scenario to run.
pub fn missing() -> Option<String> {
    if !fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0) {
        return Some("needs root".to_owned());
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("the kernel has no type information (CONFIG_DEBUG_INFO_BTF)".to_owned());
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    if !mounts.lines().any(|mount| mount.split(' ').nth(2) == Some("cgroup2")) {
        return Some("cgroup v2 is not mounted".to_owned());
    }
    if let Some(absent) = ["ip", "tcpdump", "python3", "nginx", "curl", "iperf3"]
        .into_iter()
        .find(|name| !has(name))
    {
        return Some(format!("the program {absent} is not installed (cargo xtask setup)"));
    }
    binary().err()
}

/// Envoy, where pods see it: the one that `UNDERCURRENT_ENVOY` names, else the one that `cargo xtask setup` fetches. The
/// reason, where there is none.
pub fn envoy() -> Result<PathBuf, String> {
    let given = std::env::var_os("UNDERCURRENT_ENVOY").map(PathBuf::from);
    let found = given.unwrap_or_else(|| root().join("target/tools/envoy/envoy/_bin/envoy"));
    if !found.exists() {
        return Err("Envoy is not here (cargo xtask setup)".to_owned());
    }
    let seen = scripts().join("envoy");
    if !seen.exists() {
        // A link costs nothing; from another file system it has to be a copy.
        let there = fs::hard_link(&found, &seen).or_else(|_| fs::copy(&found, &seen).map(drop));
        there.map_err(|error| format!("Envoy can't be put where pods see it: {error}"))?;
    }
    Ok(seen)
}

/// Where cgroup v2 is mounted.
pub fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mut fields = mounts.lines().map(|mount| mount.split(' '));
    fields.find_map(|mut mount| {
        let (_, path, kind) = (mount.next()?, mount.next()?, mount.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Whether a program is on the search path.
pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories
        .into_iter()
        .any(|directory| directory.join(program).is_file())
}

/// A Python that is not a wrapper script, and that any user may run.
pub fn python() -> &'static str {
    if Path::new("/usr/bin/python3").exists() {
        "/usr/bin/python3"
    } else {
        "python3"
    }
}
