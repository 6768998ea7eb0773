//! One call of a runtime, from its environment and configuration to its answer.

use std::{
    fmt,
    io::Read,
    time::{Duration, Instant},
};

use admin::{PodAdded, PodChecked, PodRemoved, ValidAttachments};
use serde::Serialize;

use super::{
    answer::{CniError, Code},
    request::{Command, Config, LogLevel, PodName, pod_name, versions},
};

/// For everything but ADD, which waits for the pod's capture.
const SHORT: Duration = Duration::from_secs(10);

/// How long an agent may be away: as long as an upgrade or a crash takes to hand the node over.
const AWAY: Duration = Duration::from_secs(8);
/// What is told of a pod whose start does not wait for the agent.
const IN_PASSING: Duration = Duration::from_secs(1);
/// Between two questions.
const BETWEEN: Duration = Duration::from_millis(50);

/// Looks up a variable of the environment; empty ones are not there.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Does what `CNI_COMMAND` says; the text for standard output.
pub fn run(environment: Environment<'_>, input: &mut dyn Read) -> Result<String, CniError> {
    let command = Command::parse(environment("CNI_COMMAND").as_deref())?;
    let config = match Config::read(input) {
        // VERSION must be answered to whoever asks.
        Err(_) if command == Command::Version => return Ok(versions("")),
        // A configuration that was broken meanwhile must not keep a pod from being taken down.
        Err(error) if command == Command::Del => {
            eprintln!("undercurrent-cni: DEL without a usable configuration: {error}");
            return Ok(String::new());
        }
        read => read?,
    };
    if !command.is_in(&config.cni_version) {
        let details = format!("{command:?} is not in version {} of CNI", config.cni_version);
        return Err(config.error(Code::IncompatibleVersion, "no such command in this version", details));
    }
    let call = Call { environment, config };
    match command {
        Command::Version => Ok(versions(&call.config.cni_version)),
        Command::Add => call.add(),
        Command::Check => call.check().map(|()| String::new()),
        Command::Del => {
            call.del();
            Ok(String::new())
        }
        Command::Gc => call.garbage().map(|()| String::new()),
        Command::Status => call.status().map(|()| String::new()),
    }
}

struct Call<'a> {
    environment: Environment<'a>,
    config: Config,
}

impl Call<'_> {
    fn required(&self, name: &'static str) -> Result<String, CniError> {
        (self.environment)(name).ok_or_else(|| {
            let details = format!("{name} is not set");
            self.config
                .error(Code::InvalidEnvironment, "the environment is incomplete", details)
        })
    }

    /// The pod, if it is one.
    fn pod(&self) -> Option<PodName> {
        let pod = pod_name((self.environment)("CNI_ARGS").as_deref());
        if pod.is_none() {
            self.say(LogLevel::Info, format_args!("no pod of Kubernetes: passed on"));
        }
        pod
    }

    fn is_excluded(&self, pod: &PodName) -> bool {
        self.config.exclude_namespaces.contains(&pod.namespace)
    }

    /// Answers with the previous result, as it came.
    fn add(&self) -> Result<String, CniError> {
        let container_id = self.required("CNI_CONTAINERID")?;
        let netns = self.required("CNI_NETNS")?;
        self.required("CNI_IFNAME")?;
        let ips = self.config.addresses()?;
        if let Some(pod) = self.pod() {
            let what = format!("{}/{}", pod.namespace, pod.name);
            let excluded = self.is_excluded(&pod);
            let event = PodAdded {
                netns: netns.into(),
                pod_name: pod.name,
                pod_namespace: pod.namespace,
                ips,
                container_id,
                pod_uid: pod.uid,
            };
            if excluded {
                self.mention(&what, "/cmdadd", &event);
            } else {
                self.ask(self.config.timeout(), "/cmdadd", Some(&event))
                    .map_err(|error| {
                        let details = format!("pod {what}: {error}");
                        self.config
                            .error(Code::TryAgainLater, "the pod is not in the mesh yet", details)
                    })?;
                self.say(LogLevel::Info, format_args!("{what}: captured, or not in the mesh"));
            }
        }
        let result = self.config.prev_result.as_ref();
        Ok(result.map_or_else(String::new, |result| result.get().to_owned()))
    }

    fn check(&self) -> Result<(), CniError> {
        self.required("CNI_CONTAINERID")?;
        let Some(pod) = self.pod().filter(|pod| !self.is_excluded(pod)) else {
            return Ok(());
        };
        let event = PodChecked {
            pod_name: pod.name,
            pod_namespace: pod.namespace,
        };
        self.ask(SHORT, "/cmdcheck", Some(&event)).map_err(|error| match error {
            admin::ClientError::Refused { text, .. } => {
                self.config.error(Code::NotCaptured, "the pod is not captured", text)
            }
            error => self
                .config
                .error(Code::TryAgainLater, "the agent does not answer", error.to_string()),
        })
    }

    /// Never fails: a pod must be able to go.
    fn del(&self) {
        let Some(pod) = self.pod() else { return };
        let what = format!("{}/{}", pod.namespace, pod.name);
        let excluded = self.is_excluded(&pod);
        let event = PodRemoved {
            pod_name: pod.name,
            pod_namespace: pod.namespace,
            container_id: (self.environment)("CNI_CONTAINERID").unwrap_or_default(),
        };
        if excluded {
            self.mention(&what, "/cmddel", &event);
        } else if let Err(error) = self.ask(SHORT, "/cmddel", Some(&event)) {
            let note = "the agent forgets the pod once its network namespace is gone";
            self.say(LogLevel::Error, format_args!("{what}: {error}; {note}"));
        }
    }

    fn garbage(&self) -> Result<(), CniError> {
        let Some(valid) = &self.config.valid_attachments else {
            let details = "there is no cni.dev/valid-attachments: without it nothing is garbage";
            return Err(self
                .config
                .error(Code::InvalidConfiguration, "GC without attachments", details));
        };
        let mut container_ids: Vec<_> = valid.iter().map(|attachment| attachment.container_id.clone()).collect();
        container_ids.sort();
        container_ids.dedup();
        self.ask(SHORT, "/gc", Some(&ValidAttachments { container_ids }))
            .map_err(|error| {
                self.config
                    .error(Code::TryAgainLater, "nothing was collected", error.to_string())
            })
    }

    fn status(&self) -> Result<(), CniError> {
        self.ask(SHORT, "/healthz/ready", None::<&()>).map_err(|error| {
            self.config
                .error(Code::NotAvailable, "the node agent is not ready", error.to_string())
        })
    }

    /// Tells of a pod of an excluded namespace, which goes on whatever the answer is: an agent that does not hear it finds the
    /// pod by itself.
    fn mention(&self, what: &str, path: &str, event: &impl Serialize) {
        let socket = &self.config.agent_socket;
        let told = Self::block_on(admin::within(IN_PASSING, socket, path, Some(event)));
        let told = told.map_or_else(|error| error.to_string(), |_text| "the agent knows".to_owned());
        self.say(
            LogLevel::Debug,
            format_args!("{what}: excluded namespace, passed on ({told})"),
        );
    }

    fn ask(&self, limit: Duration, path: &str, event: Option<&impl Serialize>) -> Result<(), admin::ClientError> {
        Self::block_on(self.ask_again(limit, path, event))
    }

    fn block_on<T>(asked: impl Future<Output = Result<T, admin::ClientError>>) -> Result<T, admin::ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| admin::ClientError::Broken(format!("cannot start a runtime: {error}")))?;
        runtime.block_on(asked)
    }

    /// Events are told again where the answer was lost: the agent takes them any number of times.
    async fn ask_again(
        &self,
        limit: Duration,
        path: &str,
        event: Option<&impl Serialize>,
    ) -> Result<(), admin::ClientError> {
        let (started, away) = (Instant::now(), limit.min(AWAY));
        loop {
            let left = limit.saturating_sub(started.elapsed());
            match admin::within(left, &self.config.agent_socket, path, event).await {
                Err(error) if error.may_pass() && started.elapsed() < away => tokio::time::sleep(BETWEEN).await,
                answered => return answered.map(drop),
            }
        }
    }

    fn say(&self, level: LogLevel, what: fmt::Arguments<'_>) {
        if level <= self.config.log_level {
            eprintln!("undercurrent-cni: {what}");
        }
    }
}
