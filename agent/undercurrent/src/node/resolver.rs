//! The addresses of names that are not the mesh's own (ServiceEntries with `resolution: DNS`), asked of the servers of
//! a resolv.conf, as ztunnel does with its pod's.
//!
//! Answers are kept for as long as they say, within [`KEPT`]; refusals for a few seconds; [`NAMES`] names at most. At
//! most [`AT_ONCE`] questions are under way, each for [`PATIENCE`] at the longest: a server that is slow or away costs
//! the connections that need it and nobody else. Questions for one name that come together are one question. The file
//! is read again when a question fails and the file has changed. Without a server every name is refused, in words.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, ResolveHosts, ResolverOpts},
    net::runtime::TokioRuntimeProvider,
    system_conf::parse_resolv_conf,
};
use l4::{Answer, Lookup, LookupError};
use tokio::{runtime::Handle, sync::Semaphore};

/// Names that are kept.
const NAMES: u64 = 4096;
/// How long an address is kept at least and at most, whatever its answer says.
const KEPT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// The same for the answer that there is none.
const KEPT_NONE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// Questions under way.
const AT_ONCE: usize = 256;
/// How long a question may take, with all that is tried for it: less than a connection may take to come to be.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one server may take.
const SERVER_PATIENCE: Duration = Duration::from_secs(2);

type Question = Shared<BoxFuture<'static, Result<Vec<IpAddr>, LookupError>>>;

/// Asks the servers of a resolv.conf. Its work is done on the runtime that it was made on.
pub struct NodeResolver(Arc<Inner>);

struct Inner {
    file: PathBuf,
    runtime: Handle,
    servers: Mutex<Servers>,
    under_way: Mutex<HashMap<Arc<str>, Question>>,
    permits: Semaphore,
}

/// The resolver of one version of the file.
#[derive(Clone)]
struct Servers {
    resolver: Result<TokioResolver, String>,
    /// Who they are, in words.
    named: Arc<str>,
    modified: Option<SystemTime>,
}

impl fmt::Debug for NodeResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeResolver({})", self.0.servers().named)
    }
}

impl NodeResolver {
    /// With the servers of this file; must be called on the runtime that is to do the work.
    pub fn new(file: &Path) -> Self {
        let servers = Servers::read(file);
        if let Err(problem) = &servers.resolver {
            tracing::warn!(file = %file.display(), problem, "names of ServiceEntries cannot be looked up");
        }
        Self(Arc::new(Inner {
            file: file.to_owned(),
            runtime: Handle::current(),
            servers: Mutex::new(servers),
            under_way: Mutex::default(),
            permits: Semaphore::new(AT_ONCE),
        }))
    }
}

impl Lookup for NodeResolver {
    fn addresses(&self, host: &Arc<str>) -> Answer {
        let inner = self.0.clone();
        let mut under_way = inner.under_way();
        if let Some(question) = under_way.get(host) {
            return Box::pin(question.clone());
        }
        let (asking, name) = (inner.clone(), host.clone());
        let task = inner.runtime.spawn(async move {
            let answer = asking.ask(&name).await;
            asking.under_way().remove(&name);
            answer
        });
        let host = host.clone();
        let lost = inner.error(&host, "the agent is shutting down");
        let question = task.map(|joined| joined.unwrap_or(Err(lost))).boxed().shared();
        // One that has been answered already is not put back: its task waits for this lock.
        under_way.insert(host, question.clone());
        Box::pin(question)
    }
}

impl Inner {
    async fn ask(&self, host: &Arc<str>) -> Result<Vec<IpAddr>, LookupError> {
        let asking = async {
            // Never closed.
            let _permit = self.permits.acquire().await.ok();
            let first = self.ask_now(host).await;
            if first.is_err() && self.reread() {
                return self.ask_now(host).await;
            }
            first
        };
        let answered = tokio::time::timeout(PATIENCE, asking).await;
        answered.unwrap_or_else(|_elapsed| Err(self.error(host, format!("no answer within {PATIENCE:?}"))))
    }

    async fn ask_now(&self, host: &Arc<str>) -> Result<Vec<IpAddr>, LookupError> {
        let resolver = self.servers().resolver.clone().map_err(|why| self.error(host, why))?;
        // The dot: no search domain is for it.
        let found = resolver.lookup_ip(format!("{}.", host.trim_end_matches('.'))).await;
        let addresses: Vec<IpAddr> = found.map_err(|error| self.error(host, error))?.iter().collect();
        if addresses.is_empty() {
            return Err(self.error(host, "it has no address"));
        }
        Ok(addresses)
    }

    /// Whether the file is another than the one that was read.
    fn reread(&self) -> bool {
        let now = modified(&self.file);
        if now == self.servers().modified {
            return false;
        }
        let read = Servers::read(&self.file);
        *self.servers.lock().unwrap_or_else(PoisonError::into_inner) = read;
        true
    }

    fn error(&self, host: &Arc<str>, reason: impl fmt::Display) -> LookupError {
        LookupError {
            host: host.clone(),
            resolver: self.servers().named,
            reason: reason.to_string(),
        }
    }

    fn servers(&self) -> Servers {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<Arc<str>, Question>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Servers {
    fn read(file: &Path) -> Self {
        let modified = modified(file);
        let read = std::fs::read(file).map_err(|error| error.to_string());
        let parsed = read.and_then(|text| parse_resolv_conf(text).map_err(|error| error.to_string()));
        let (resolver, servers) = match parsed {
            Ok((config, options)) => {
                let servers: Vec<_> = config
                    .name_servers()
                    .iter()
                    .map(|server| server.ip.to_string())
                    .collect();
                let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
                *builder.options_mut() = tuned(options);
                (builder.build().map_err(|error| error.to_string()), servers.join(", "))
            }
            Err(why) => (Err(why), "no server".to_owned()),
        };
        Self {
            resolver,
            named: format!("{servers}, of {}", file.display()).into(),
            modified,
        }
    }
}

fn tuned(mut options: ResolverOpts) -> ResolverOpts {
    options.timeout = options.timeout.min(SERVER_PATIENCE);
    options.attempts = options.attempts.clamp(1, 2);
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = NAMES;
    (options.positive_min_ttl, options.positive_max_ttl) = (Some(KEPT.0), Some(KEPT.1));
    (options.negative_min_ttl, options.negative_max_ttl) = (Some(KEPT_NONE.0), Some(KEPT_NONE.1));
    options
}

fn modified(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file).ok()?.modified().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_without_servers_is_named_and_read_again_when_it_changes() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        std::fs::write(&file, "search example\n").unwrap();
        let resolver = NodeResolver::new(&file);
        let host: Arc<str> = "api.example".into();
        let (first, second) = tokio::join!(resolver.addresses(&host), resolver.addresses(&host));
        let error = first.clone().unwrap_err().to_string();
        assert!(
            error.contains("api.example") && error.contains(&*file.to_string_lossy()),
            "{error}"
        );
        assert_eq!(first, second, "one question");
        assert!(resolver.0.under_way().is_empty());

        // Nobody answers at a documentation address; what matters is that it is asked.
        std::fs::write(&file, "nameserver 192.0.2.53\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(10);
        std::fs::File::options()
            .append(true)
            .open(&file)
            .unwrap()
            .set_modified(later)
            .unwrap();
        assert!(resolver.0.reread());
        assert!(resolver.0.servers().named.starts_with("192.0.2.53, of "));
        assert!(!resolver.0.reread());
    }
}
