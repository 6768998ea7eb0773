//! Which replica writes conditions and ConfigMaps: the one that holds the Lease `undercurrent-control` in the root
//! namespace, by client-go's rules.
//!
//! A lease is taken over when it did not change for its duration by *our* clock, so clocks need not agree
//! (`a_lease_is_taken_over_only_after_it_stood_still`). Every write carries the version that was read. A holder that can't
//! renew stops leading well before another may take over. Given up on drain. Reading is by asking every few seconds: a
//! lease changes as often as that, and asking is its purpose.

use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tasks::{DrainMode, DrainSignal};
use tokio::sync::watch;

const NAME: &str = "undercurrent-control";
const DURATION: Duration = Duration::from_secs(15);
const RENEW_WITHIN: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(3);

/// What to do about the lease.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    Create,
    Renew,
    TakeOver,
    Wait,
}

/// What was seen of the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    holder: String,
    version: Option<String>,
    duration: Duration,
}

fn decide(lease: Option<&Seen>, me: &str, still_for: Duration) -> Action {
    match lease {
        None => Action::Create,
        Some(lease) if lease.holder == me => Action::Renew,
        Some(lease) if lease.holder.is_empty() || still_for >= lease.duration => Action::TakeOver,
        Some(_) => Action::Wait,
    }
}

/// Competes until drained; the receiver says whether this replica leads.
pub fn start(client: Client, namespace: &str, replica: &str, drain: DrainSignal) -> watch::Receiver<bool> {
    let (leads, receiver) = watch::channel(false);
    let candidate = Candidate {
        api: Api::namespaced(client, namespace),
        namespace: namespace.to_owned(),
        // Two processes of one name, as after a restart, are two candidates.
        me: format!("{replica}_{}", token()),
        leads,
        seen: None,
        since: Instant::now(),
        renewed: Instant::now(),
    };
    tokio::spawn(candidate.run(drain));
    receiver
}

fn token() -> String {
    let mut bytes = [0; 6];
    // Without random numbers the process id still tells replicas apart.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    let random: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{random}", std::process::id())
}

struct Candidate {
    api: Api<Lease>,
    namespace: String,
    me: String,
    leads: watch::Sender<bool>,
    seen: Option<Seen>,
    since: Instant,
    renewed: Instant,
}

impl Candidate {
    async fn run(mut self, mut drain: DrainSignal) {
        loop {
            let turn = tokio::time::timeout(RETRY, self.turn());
            match turn.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "cannot use the lease"),
                Err(_) => tracing::debug!("the API did not answer about the lease in time"),
            }
            if self.renewed.elapsed() > RENEW_WITHIN {
                self.lead(false);
            }
            tokio::select! {
                _ = drain.reached(DrainMode::Graceful) => break,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
        if *self.leads.borrow() {
            self.lead(false);
            let version = self.seen.as_ref().and_then(|seen| seen.version.clone());
            // If this fails, the others wait for the lease to end.
            let _ = tokio::time::timeout(RETRY, self.write("", version, false)).await;
        }
    }

    fn lead(&self, leads: bool) {
        if self
            .leads
            .send_if_modified(|before| std::mem::replace(before, leads) != leads)
        {
            tracing::info!(replica = self.me, leads, "leadership");
        }
    }

    async fn turn(&mut self) -> Result<(), kube::Error> {
        let found = self.api.get_opt(NAME).await?.as_ref().map(seen);
        if found != self.seen {
            self.seen = found;
            self.since = Instant::now();
        }
        let me = self.me.clone();
        let version = self.seen.as_ref().and_then(|seen| seen.version.clone());
        let written = match decide(self.seen.as_ref(), &self.me, self.since.elapsed()) {
            Action::Wait => {
                self.lead(false);
                return Ok(());
            }
            Action::Create => self.write(&me, None, true).await,
            Action::Renew => self.write(&me, version, false).await,
            Action::TakeOver => self.write(&me, version, true).await,
        };
        match written {
            Ok(lease) => {
                self.seen = Some(seen(&lease));
                (self.since, self.renewed) = (Instant::now(), Instant::now());
                self.lead(true);
                Ok(())
            }
            // Another one was faster: next time we see who.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn write(&self, holder: &str, version: Option<String>, acquire: bool) -> Result<Lease, kube::Error> {
        let now = Timestamp::try_from(SystemTime::now()).ok().map(MicroTime);
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(NAME.into()),
                namespace: Some(self.namespace.clone()),
                resource_version: version.clone(),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: if acquire { now.clone() } else { None },
                renew_time: now,
                ..LeaseSpec::default()
            }),
        };
        match version {
            Some(_) => self.api.replace(NAME, &PostParams::default(), &lease).await,
            None => self.api.create(&PostParams::default(), &lease).await,
        }
    }
}

fn seen(lease: &Lease) -> Seen {
    let spec = lease.spec.as_ref();
    let seconds = spec.and_then(|spec| spec.lease_duration_seconds);
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
    Seen {
        holder: spec.and_then(|spec| spec.holder_identity.clone()).unwrap_or_default(),
        version: lease.metadata.resource_version.clone(),
        duration: seconds.map_or(DURATION, Duration::from_secs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_over_only_after_it_stood_still() {
        let lease = |holder: &str| Seen {
            holder: holder.into(),
            version: None,
            duration: DURATION,
        };
        let act = |lease: Option<Seen>, seconds| decide(lease.as_ref(), "me", Duration::from_secs(seconds));
        assert_eq!(act(None, 0), Action::Create);
        assert_eq!(act(Some(lease("me")), 0), Action::Renew);
        assert_eq!(act(Some(lease("other")), 14), Action::Wait);
        assert_eq!(act(Some(lease("other")), 15), Action::TakeOver);
        assert_eq!(act(Some(lease("")), 0), Action::TakeOver);
    }
}
