//! Two proxies and two applications on loopback, to profile the hot path without a lab.
//!
//! `cargo run --release -p hbone --example pair -- bulk|rr|crr|idle [CONNECTIONS] [SECONDS]`
//!
//! - `bulk`: each connection sends as much as it can
//! - `rr`: each connection asks 64 bytes, gets 64 bytes, asks again
//! - `crr`: the same, with a new connection for each
//! - `idle`: opens the connections, and says what they cost in memory
//!
//! Each of the four is a thread; what is reported is the two proxies' CPU time. Not a benchmark of the product: that is
//! `cargo xtask bench l4`, with capture, policy and a network between.

use std::{
    error::Error,
    future::Future,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use hbone::{
    Accepted, Config, ConnectRequest, Decision, Handler, IncomingRequest, Live, Pool, RelayEnd, TunnelKey, serve,
};
use identity::{Authority as _, Clock, Credentials, LocalAuthority, generate_root};
use model::{Authority, Identity, TrustDomain};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{LocalSet, spawn_local},
};

const MESSAGE: usize = 64;

/// Counts what the applications did, and tells them to stop.
#[derive(Default)]
struct Tally {
    bytes: AtomicU64,
    exchanges: AtomicU64,
    stop: AtomicBool,
}

#[derive(Clone)]
struct Dial;

impl Handler for Dial {
    type Context = ();

    async fn connect(&self, _: &Accepted, request: IncomingRequest) -> Decision<()> {
        let Ok(Authority::Address(address)) = request.authority else {
            return Decision::Refuse {
                status: 400,
                reason: None,
            };
        };
        match TcpStream::connect(address).await {
            Ok(application) => {
                let _ = application.set_nodelay(true);
                Decision::Accept {
                    application,
                    headers: vec![],
                    context: (),
                    live: Live::default(),
                }
            }
            Err(_) => Decision::Refuse {
                status: 503,
                reason: None,
            },
        }
    }

    fn relayed(&self, (): (), _: RelayEnd) {}
}

fn shard<F: Future<Output = ()>>(name: &str, work: impl FnOnce() -> F + Send + 'static) {
    let body = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        LocalSet::new().block_on(&runtime.expect("a runtime"), work());
    };
    thread::Builder::new().name(name.into()).spawn(body).expect("a thread");
}

fn listen() -> io::Result<(std::net::TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

async fn each(listener: std::net::TcpListener, mut serve: impl FnMut(TcpStream)) {
    let listener = TcpListener::from_std(listener).expect("a nonblocking listener");
    while let Ok((socket, _)) = listener.accept().await {
        let _ = socket.set_nodelay(true);
        serve(socket);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mode = arguments.next().unwrap_or_else(|| "rr".into());
    let connections: usize = arguments.next().map_or(Ok(16), |text| text.parse())?;
    let seconds: u64 = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let domain = TrustDomain::default();
    let (certificate, key) = generate_root(&domain)?;
    let authority = LocalAuthority::from_pem(&certificate, &key)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let credentials = |account: &str| -> Result<Arc<Credentials>, Box<dyn Error>> {
        let identity: Identity = format!("spiffe://cluster.local/ns/demo/sa/{account}").parse()?;
        let issued = runtime.block_on(authority.issue(&identity))?;
        Ok(Arc::new(Credentials::new(identity, &domain, issued, &Clock::system())?))
    };
    let (client, server) = (credentials("client")?, credentials("server")?);
    let (application, application_address) = listen()?;
    let (far, far_address) = listen()?;
    let (near, near_address) = listen()?;
    let tally = Arc::new(Tally::default());

    let counted = tally.clone();
    let is_bulk = mode == "bulk";
    shard("app-server", move || {
        each(application, move |socket| {
            drop(spawn_local(answer(socket, is_bulk, counted.clone())))
        })
    });
    let tls = server.server_config();
    shard("proxy-server", move || {
        let (trigger, drain) = tasks::drain_channel();
        std::mem::forget(trigger);
        let config = Rc::new(Config::default());
        each(far, move |socket| {
            drop(spawn_local(serve(
                socket,
                tls.clone(),
                config.clone(),
                Dial,
                drain.clone(),
            )))
        })
    });
    let key = TunnelKey {
        source: client.identity().clone(),
        destination: vec![server.identity().clone()],
        workload: model::WorkloadUid::of_pod("Kubernetes", "shop", "server"),
        address: far_address,
    };
    shard("proxy-client", move || {
        let pool = Pool::new(Rc::new(Config::default()));
        each(near, move |socket| {
            drop(spawn_local(forward(
                socket,
                pool.clone(),
                key.clone(),
                client.clone(),
                application_address,
            )));
        })
    });
    let before = resident();
    let (asking, kind) = (tally.clone(), mode.clone());
    shard("app-client", move || async move {
        for _ in 0..connections {
            spawn_local(ask(near_address, kind.clone(), asking.clone()));
        }
        std::future::pending().await
    });
    report(&mode, connections, seconds, &tally, before);
    Ok(())
}

async fn forward(socket: TcpStream, pool: Pool, key: TunnelKey, credentials: Arc<Credentials>, target: SocketAddr) {
    let _ = socket.set_nodelay(true);
    let dial = || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let request = ConnectRequest {
        authority: Authority::Address(target),
        headers: vec![],
    };
    let relay = match pool.open(&key, &credentials, dial, request).await {
        Ok(stream) => stream.relay_watched(socket, Live::default()),
        Err(error) => return eprintln!("{error}"),
    };
    drop((pool, key, credentials));
    spawn_local(relay);
}

async fn answer(mut socket: TcpStream, is_bulk: bool, tally: Arc<Tally>) {
    let mut buffer = vec![0; if is_bulk { 512 << 10 } else { MESSAGE }];
    while let Ok(count @ 1..) = socket.read(&mut buffer).await {
        tally.bytes.fetch_add(count as u64, Relaxed);
        if !is_bulk && socket.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn ask(address: SocketAddr, mode: String, tally: Arc<Tally>) {
    let block = vec![1; if mode == "bulk" { 256 << 10 } else { 0 }];
    let mut message = [2; MESSAGE];
    loop {
        let Ok(mut socket) = TcpStream::connect(address).await else {
            return;
        };
        let _ = socket.set_nodelay(true);
        loop {
            let result = match mode.as_str() {
                "bulk" => socket.write_all(&block).await,
                _ => match socket.write_all(&message).await {
                    Ok(()) => socket.read_exact(&mut message).await.map(drop),
                    error => error,
                },
            };
            if let Err(error) = result {
                return eprintln!("{error}");
            }
            tally.exchanges.fetch_add(1, Relaxed);
            match mode.as_str() {
                "crr" => break,
                "idle" => std::future::pending().await,
                _ => {}
            }
            if tally.stop.load(Relaxed) {
                return;
            }
        }
    }
}

fn report(mode: &str, connections: usize, seconds: u64, tally: &Tally, before: u64) {
    thread::sleep(Duration::from_millis(700));
    if mode == "idle" {
        while tally.exchanges.load(Relaxed) < connections as u64 {
            thread::sleep(Duration::from_millis(50));
        }
        thread::sleep(Duration::from_millis(500));
        let grown = resident().saturating_sub(before);
        println!(
            "{connections} idle: {:.2} KiB each, all four parts",
            grown as f64 / 1024.0 / connections as f64
        );
        return;
    }
    let (start, cpu, bytes, exchanges) = (
        Instant::now(),
        cpu(),
        tally.bytes.load(Relaxed),
        tally.exchanges.load(Relaxed),
    );
    thread::sleep(Duration::from_secs(seconds));
    let elapsed = start.elapsed().as_secs_f64();
    let bytes = (tally.bytes.load(Relaxed) - bytes) as f64;
    let exchanges = (tally.exchanges.load(Relaxed) - exchanges) as f64;
    let used: Vec<_> = self::cpu()
        .into_iter()
        .zip(cpu)
        .map(|(now, then)| (now.0, now.1 - then.1))
        .collect();
    match mode {
        "bulk" => println!("{:.2} Gb/s", bytes * 8.0 / elapsed / 1e9),
        _ => println!("{:.0} per second", exchanges / elapsed),
    }
    for (name, nanoseconds) in used {
        let per = match mode {
            "bulk" => format!("{:.3} s/GB", nanoseconds as f64 / bytes),
            _ => format!("{:.3} s per 100,000", nanoseconds as f64 / exchanges / 1e4),
        };
        println!(
            "  {name:<14} {:>5.1} % of a core, {per}",
            nanoseconds as f64 / elapsed / 1e7
        );
    }
    tally.stop.store(true, Relaxed);
}

/// Nanoseconds on a CPU, by thread.
fn cpu() -> Vec<(String, u64)> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let time = |thread: std::fs::DirEntry| {
        let read = |file| std::fs::read_to_string(thread.path().join(file)).ok();
        let nanoseconds = read("schedstat")?.split(' ').next()?.parse().ok()?;
        Some((read("comm")?.trim().to_owned(), nanoseconds))
    };
    let mut times: Vec<_> = threads.filter_map(time).filter(|(name, _)| name != "pair").collect();
    times.sort();
    times
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
