//! The control plane, seen from outside: started in a namespace of its own on the fabric, asked whether it is ready and
//! who has what.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cgroup,
    launch::Launch,
    layout::{CONTROL_NETNS, Layout, control_addresses},
    netns,
    process::{Process, last_lines, spawn_detached},
};

/// Its ports: xDS and the CA, and what people and probes ask.
const XDS_PORT: u16 = 15012;
const MONITORING_PORT: u16 = 15014;
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Where the agents find it.
pub(crate) fn address() -> String {
    SocketAddr::from((control_addresses()[0], XDS_PORT)).to_string()
}

/// Starts it, if it does not run.
pub(crate) fn start(layout: &Layout) -> Result<()> {
    let record = layout.process("control");
    if Process::read(&record).is_some_and(|process| process.is_alive()) {
        return Ok(());
    }
    let cgroup = cgroup::root()?.child("control");
    cgroup.kill()?;
    cgroup.create()?;
    let kubeconfig = layout.control().join("kubeconfig").to_string_lossy().into_owned();
    let fabric = control_addresses()[0];
    let words = [
        layout.binary().to_string_lossy().into_owned(),
        "control".to_owned(),
        format!("--kubeconfig={kubeconfig}"),
        format!("--xds={}", SocketAddr::from((fabric, XDS_PORT))),
        format!("--monitoring={}", SocketAddr::from((fabric, MONITORING_PORT))),
        format!("--cert-names={fabric}"),
    ];
    let mut launch = Launch::new(&cgroup.0);
    launch.netns = Some(CONTROL_NETNS);
    launch.session = true;
    let command = launch.command(&layout.binary(), &words);
    let log = layout.log("control");
    spawn_detached(command, &log, &log)?.write(&record)
}

/// Ends it by SIGKILL and waits until it is gone. Tells whether it ran.
pub(crate) fn stop(layout: &Layout) -> Result<bool> {
    let Some(process) = Process::read(&layout.process("control")) else {
        return Ok(false);
    };
    if !process.signal(Signal::SIGKILL) {
        return Ok(false);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while process.is_alive() {
        if Instant::now() > deadline {
            bail!("the control plane (process {}) does not end", process.pid);
        }
        sleep(Duration::from_millis(5));
    }
    Ok(true)
}

/// Waits until it is ready; fails with its last words if it ends or takes too long.
pub(crate) fn wait_ready(layout: &Layout, at_most: Duration) -> Result<()> {
    let deadline = Instant::now() + at_most;
    loop {
        let Err(error) = ask("/readyz") else { return Ok(()) };
        let log = || last_lines(&layout.log("control"), 15);
        if !Process::read(&layout.process("control")).is_some_and(|process| process.is_alive()) {
            bail!("the control plane ended:\n{}", log());
        }
        if Instant::now() > deadline {
            bail!("the control plane is not ready: {error:#}\n{}", log());
        }
        sleep(Duration::from_millis(20));
    }
}

/// Whom it serves, and what they have.
pub(crate) fn clients() -> Result<Value> {
    serde_json::from_str(&ask("/debug/syncz")?).context("the control plane's answer is not JSON")
}

/// Asks its monitoring port, from its own namespace.
fn ask(path: &str) -> Result<String> {
    let address = SocketAddr::from((control_addresses()[0], MONITORING_PORT));
    netns::inside(CONTROL_NETNS, || {
        let mut stream = TcpStream::connect_timeout(&address, ASK_TIMEOUT).context("it does not answer")?;
        stream.set_read_timeout(Some(ASK_TIMEOUT))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: control\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("it does not answer")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("it does not speak HTTP")?;
        if head.split(' ').nth(1) != Some("200") {
            bail!(
                "it answers {}: {}",
                head.lines().next().unwrap_or_default(),
                body.trim()
            );
        }
        Ok(body.to_owned())
    })
}
