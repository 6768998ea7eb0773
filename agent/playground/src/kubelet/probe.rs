//! Probes, as a kubelet sends them: from the node, to the pod's address.
//!
//! Each try is on a thread of its own that ends by its timeout; one prober has at most one.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    process::Stdio,
    sync::mpsc::{Receiver, TryRecvError, channel},
    thread::sleep,
    time::{Duration, Instant},
};

use k8s::{Container, HttpGet, Probe};

use super::container::InPod;
use crate::launch::spawn_in_pod;

/// What is probed.
#[derive(Clone)]
pub(super) struct Target {
    pub address: Option<IpAddr>,
    pub run: InPod,
}

/// What a probe says.
pub(super) enum Verdict {
    /// Not often enough yet, either way.
    Undecided,
    /// It is well.
    Well,
    /// It is not, and why.
    Unwell(String),
}

/// A probe and what came of it.
pub(super) struct Prober {
    probe: Probe,
    container: Container,
    target: Target,
    due: Instant,
    running: Option<Receiver<Result<(), String>>>,
    successes: u32,
    failures: u32,
    last_failure: String,
}

impl Prober {
    pub fn new(probe: Probe, container: Container, target: Target) -> Self {
        Self {
            due: Instant::now() + Duration::from_secs(probe.initial_delay_seconds),
            probe,
            container,
            target,
            running: None,
            successes: 0,
            failures: 0,
            last_failure: String::new(),
        }
    }

    /// Sends a probe if one is due, takes the answer if one is there.
    pub fn step(&mut self) -> Verdict {
        if let Some(running) = &self.running {
            match running.try_recv() {
                Err(TryRecvError::Empty) => return Verdict::Undecided,
                Err(TryRecvError::Disconnected) => self.count(Err("the probe ended without an answer".to_owned())),
                Ok(answer) => self.count(answer),
            }
            self.running = None;
            return self.verdict();
        }
        if Instant::now() >= self.due {
            self.running = Some(self.send());
        }
        Verdict::Undecided
    }

    fn count(&mut self, answer: Result<(), String>) {
        let period = Duration::from_secs(self.probe.period_seconds);
        // Until it was well once a pod is asked more often, as kubelets of today do at the start.
        let soon = if self.successes == 0 {
            period.min(Duration::from_millis(200))
        } else {
            period
        };
        match answer {
            Ok(()) => {
                self.due = Instant::now() + period;
                (self.successes, self.failures) = (self.successes.saturating_add(1), 0);
            }
            Err(why) => {
                self.due = Instant::now() + soon;
                (self.successes, self.failures) = (0, self.failures.saturating_add(1));
                self.last_failure = why;
            }
        }
    }

    fn verdict(&self) -> Verdict {
        if self.successes >= self.probe.success_threshold.max(1) {
            Verdict::Well
        } else if self.failures >= self.probe.failure_threshold.max(1) {
            Verdict::Unwell(self.last_failure.clone())
        } else {
            Verdict::Undecided
        }
    }

    fn send(&self) -> Receiver<Result<(), String>> {
        let (sender, receiver) = channel();
        let (probe, container, target) = (self.probe.clone(), self.container.clone(), self.target.clone());
        std::thread::spawn(move || {
            // Nobody waits for it any more when the container ended meanwhile.
            let _ = sender.send(attempt(&probe, &container, &target));
        });
        receiver
    }
}

fn attempt(probe: &Probe, container: &Container, target: &Target) -> Result<(), String> {
    let timeout = Duration::from_secs(probe.timeout_seconds);
    let address = |port: &k8s::IntOrString| {
        let address = target.address.ok_or("the pod has no address")?;
        let port = container.port(port).ok_or("no such port")?;
        Ok::<_, String>(SocketAddr::new(address, port))
    };
    if let Some(get) = &probe.http_get {
        http(get, address(&get.port)?, timeout)
    } else if let Some(tcp) = &probe.tcp_socket {
        let address = address(&tcp.port)?;
        TcpStream::connect_timeout(&address, timeout)
            .map(drop)
            .map_err(|error| format!("{address}: {error}"))
    } else if let Some(exec) = &probe.exec {
        run(&exec.command, &target.run, timeout)
    } else {
        Ok(())
    }
}

fn http(get: &HttpGet, address: SocketAddr, timeout: Duration) -> Result<(), String> {
    let fail = |error: std::io::Error| format!("GET http://{address}{}: {error}", get.path);
    let mut stream = TcpStream::connect_timeout(&address, timeout).map_err(fail)?;
    stream.set_read_timeout(Some(timeout)).map_err(fail)?;
    stream.set_write_timeout(Some(timeout)).map_err(fail)?;
    let path = if get.path.starts_with('/') {
        get.path.clone()
    } else {
        format!("/{}", get.path)
    };
    let mut request =
        format!("GET {path} HTTP/1.1\r\nUser-Agent: kube-probe/undercurrent\r\nAccept: */*\r\nConnection: close\r\n");
    if !get
        .http_headers
        .iter()
        .any(|header| header.name.eq_ignore_ascii_case("host"))
    {
        request.push_str(&format!("Host: {address}\r\n"));
    }
    for header in &get.http_headers {
        request.push_str(&format!("{}: {}\r\n", header.name, header.value));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).map_err(fail)?;
    let mut head = Vec::new();
    let deadline = Instant::now() + timeout;
    let mut chunk = [0; 512];
    while !head.contains(&b'\n') && head.len() < 4096 {
        if Instant::now() > deadline {
            return Err(format!("GET http://{address}{path}: no answer in time"));
        }
        match stream.read(&mut chunk).map_err(fail)? {
            0 => break,
            count => head.extend_from_slice(&chunk[..count]),
        }
    }
    let status = String::from_utf8_lossy(&head);
    let code = status
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|code| code.parse::<u16>().ok());
    match code {
        Some(200..=399) => Ok(()),
        Some(code) => Err(format!("GET http://{address}{path}: status {code}")),
        None => Err(format!("GET http://{address}{path}: the answer is not HTTP")),
    }
}

fn run(words: &[String], target: &InPod, timeout: Duration) -> Result<(), String> {
    let mut command = target.command(words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = spawn_in_pod(target.pause, command).map_err(|error| format!("{error:#}"))?;
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("{}: {status}", words.join(" "))),
            Ok(None) if Instant::now() < deadline => sleep(Duration::from_millis(10)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{}: did not end in time", words.join(" ")));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn probe_of(answer: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let count = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let get = HttpGet {
            path: "/ok".to_owned(),
            port: k8s::IntOrString::Number(1),
            scheme: None,
            http_headers: vec![],
        };
        let result = http(&get, address, Duration::from_secs(5));
        let request = server.join().unwrap();
        assert!(
            request.starts_with("GET /ok HTTP/1.1\r\n") && request.ends_with("\r\n\r\n"),
            "{request}"
        );
        result
    }

    #[test]
    fn only_200_to_399_is_well() {
        assert_eq!(probe_of("HTTP/1.1 200 OK\r\n\r\n"), Ok(()));
        assert_eq!(probe_of("HTTP/1.1 302 Found\r\n\r\n"), Ok(()));
        assert!(probe_of("HTTP/1.1 503 No\r\n\r\n").unwrap_err().contains("status 503"));
        assert!(probe_of("hello").is_err());
        assert!(probe_of("").is_err());
    }
}
