//! What would become of a connection, and why: the decisions of a real one, made by the same code on what is known now, with
//! the object behind each. Nothing is dialled; whether the application answers is for the application.
//!
//! ```text
//! capture ─► destination ─► route (mesh::Snapshot::resolve), egress (exit) ─► certificate ─► policy (verdict)
//! ```
//! The destination's agent decides by what *it* knows: [`Why::arrival`] is the question to ask it.

mod names;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use admin::why::{Arrival, Outcome, Question, Step, Why};
use identity::Identities;
use mesh::{Exit, Route, Snapshot};
use model::{Identity, OriginalDst, Policy, Service, Workload, WorkloadUid};
use names::{at, object_of, service_object, source_address};
use policy::{Facts, Origin};

use super::pods::PodView;

/// What the agent sees at one moment.
pub struct Seen {
    pub node: String,
    pub capture: &'static str,
    pub snapshot: Arc<Snapshot>,
    pub pods: Vec<PodView>,
    pub identities: Identities,
    /// The cluster's.
    pub domain: Arc<str>,
}

/// The way so far; `None` once it has ended.
type Goes<T> = Option<T>;

struct Way(Vec<Step>);

impl Way {
    fn step(&mut self, stage: &str, outcome: Outcome, text: impl Into<String>, object: Option<String>) {
        self.0.push(Step {
            stage: stage.to_owned(),
            outcome,
            text: text.into(),
            object,
        });
    }

    fn passes(&mut self, stage: &str, text: impl Into<String>, object: Option<String>) {
        self.step(stage, Outcome::Passes, text, object);
    }

    fn refused<T>(&mut self, stage: &str, text: impl Into<String>, object: Option<String>) -> Goes<T> {
        self.step(stage, Outcome::Refused, text, object);
        None
    }
}

/// Who comes to a workload, and at which address of it.
struct Comes {
    workload: Arc<Workload>,
    facts: Facts,
}

/// Where the agent takes a connection.
struct To {
    workload: Arc<Workload>,
    target: SocketAddr,
    mutual_tls: bool,
    /// Whether policy is for the agent of its node; else it is for the waypoint.
    judged: bool,
}

impl Seen {
    /// The whole way, as far as this agent knows it.
    ///
    /// # Errors
    /// The source or the destination is nobody that is known here.
    pub fn explain(&self, question: &Question) -> Result<Why, String> {
        let source = self.source(&question.source)?.clone();
        let (destination, dialled, about) = self.destination(&source, &question.destination, question.port)?;
        let mut way = Way(Vec::new());
        let comes = self.goes(&mut way, &source, dialled, about, &destination);
        let arrival = comes.flatten().map(|comes| {
            self.judge(&mut way, &comes);
            Arrival {
                node: comes.workload.node.to_string(),
                workload: comes.workload.uid.to_string(),
                identity: comes.facts.identity.as_ref().map(ToString::to_string),
                source: comes.facts.source,
                target: comes.facts.destination,
            }
        });
        Ok(Why {
            node: self.node.clone(),
            source: format!("{}/{}", source.namespace, source.name),
            // Of an address with colons the port is to be told.
            destination: match destination.parse() {
                Ok(ip) => SocketAddr::new(ip, question.port).to_string(),
                Err(_) => format!("{destination}:{}", question.port),
            },
            allowed: way.0.iter().all(|step| step.outcome != Outcome::Refused),
            steps: way.0,
            arrival,
        })
    }

    /// What becomes of a connection that comes to a pod of this node.
    ///
    /// # Errors
    /// The pod is none of this node, or its source's name is no identity.
    pub fn arrives(&self, arrival: &Arrival) -> Result<Vec<Step>, String> {
        let uid = WorkloadUid(arrival.workload.as_str().into());
        let workload = self
            .snapshot
            .workload(&uid)
            .ok_or_else(|| format!("the agent of {} does not know {uid} (yet)", self.node))?;
        let identity = arrival.identity.as_deref().map(str::parse::<Identity>).transpose();
        let comes = Comes {
            workload: workload.clone(),
            facts: Facts {
                identity: identity.map_err(|error| error.to_string())?,
                aliases: self.identities.trust().aliases(),
                source: arrival.source,
                destination: arrival.target,
            },
        };
        let mut way = Way(Vec::new());
        self.judge(&mut way, &comes);
        Ok(way.0)
    }

    /// From the source to who is to take it; `Some(None)` where nobody of the mesh judges it.
    fn goes(
        &self,
        way: &mut Way,
        source: &Arc<Workload>,
        dialled: SocketAddr,
        about: Option<String>,
        name: &str,
    ) -> Goes<Option<Comes>> {
        let within = within(source, dialled);
        let captured = self.captured(way, source, dialled, within)?;
        way.passes("destination", format!("{dialled}"), about);
        let own = |address: &SocketAddr| source.workload_ips.contains(&address.ip());
        if captured && l4::OWN_PORTS.contains(&dialled.port()) && own(&dialled) {
            let text = "a port of the mesh's own proxy on the pod itself: it would go round in circles";
            return way.refused("route", text, None);
        }
        if within.is_some() {
            way.passes("route", "it does not leave the pod: nobody judges it", None);
            return Some(None);
        }
        if !captured {
            return Some(self.uncaptured(way, source, dialled));
        }
        let route = self.snapshot.resolve(source, OriginalDst(dialled), 0, &[]);
        self.may_leave(way, source, dialled, &route, name)?;
        let Some(To {
            workload,
            target,
            mutual_tls,
            judged,
        }) = self.routed(way, route)?
        else {
            return Some(None);
        };
        if mutual_tls {
            self.certified(way, source)?;
        }
        let facts = Facts {
            identity: mutual_tls.then(|| source.identity()),
            aliases: self.identities.trust().aliases(),
            source: source_address(source, target.ip()),
            destination: target,
        };
        Some((judged && workload.is_captured()).then_some(Comes { workload, facts }))
    }

    /// Whether the mesh lets the pod go there (`outboundTrafficPolicy`).
    fn may_leave(&self, way: &mut Way, source: &Workload, dialled: SocketAddr, route: &Route, name: &str) -> Goes<()> {
        // What a pod dials by a name it has learned by that name.
        let names = [Arc::from(name)];
        let names = if name.parse::<IpAddr>().is_ok() {
            &[][..]
        } else {
            &names
        };
        match self.snapshot.exit(source, dialled, route, names) {
            Exit::Open(_) => Some(()),
            _ if self.is_name_servers(source, dialled) => {
                way.passes(
                    "egress",
                    "DNS, which the agent carries for the pod wherever it is sent",
                    None,
                );
                Some(())
            }
            Exit::Closed(reason) => way.refused("egress", reason.to_string(), None),
            Exit::NotKnown => way.refused(
                "egress",
                mesh::RefuseReason::OutboundNotKnown(dialled).to_string(),
                None,
            ),
        }
    }

    /// Whether the pod's own name server has the connection: the agent.
    fn is_name_servers(&self, source: &Workload, dialled: SocketAddr) -> bool {
        let is_answered = |pod: &PodView| pod.uid == source.uid && pod.answers_dns;
        dialled.port() == l4::dns::PORT && self.pods.iter().any(is_answered)
    }

    /// Whether the pod's connections come to this agent.
    fn captured(&self, way: &mut Way, source: &Workload, dialled: SocketAddr, within: Option<&str>) -> Goes<bool> {
        let name = format!("{}/{}", source.namespace, source.name);
        let object = Some(format!("Pod {name}"));
        let view = self.pods.iter().find(|pod| pod.uid == source.uid);
        if let (Some(PodView { captured: true, .. }), Some(within)) = (view, within) {
            let text = format!("{dialled} is {within}, which is not captured");
            way.step("capture", Outcome::Notable, text, object);
            return Some(false);
        }
        match view {
            Some(PodView {
                captured: true,
                settings,
                ..
            }) if settings.exclusions.excludes_outbound(dialled.ip(), dialled.port()) => {
                let text = format!(
                    "the pod's annotations keep {dialled} out of the mesh: it is reached directly, in plaintext"
                );
                way.step("capture", Outcome::Notable, text, object);
                Some(false)
            }
            Some(PodView { captured: true, .. }) => {
                let how = if self.capture == "ebpf" { "eBPF" } else { self.capture };
                let text = format!("captured on {} by {how}, as {}", self.node, source.identity());
                way.passes("capture", text, object);
                Some(true)
            }
            Some(PodView {
                problem: Some(problem), ..
            }) => way.refused("capture", format!("to be captured and not yet: {problem}"), object),
            _ if source.is_captured() => way.refused(
                "capture",
                "in the mesh, and this agent was not told that it runs here",
                object,
            ),
            view => {
                // What it asks for and does not get.
                let notes = view
                    .filter(|view| !view.notes.is_empty())
                    .map(|view| view.notes.join("; "));
                let why = notes.unwrap_or_else(|| {
                    "neither it nor, where it says nothing, its namespace has istio.io/dataplane-mode=ambient"
                        .to_owned()
                });
                let text = format!(
                    "not in the mesh ({why}): its connections leave as they are, in plaintext and without an identity"
                );
                way.step("capture", Outcome::Notable, text, object);
                Some(false)
            }
        }
    }

    /// A connection that the source's node does not touch: it comes in plaintext, by the address that the cluster's
    /// network gives it.
    fn uncaptured(&self, way: &mut Way, source: &Workload, dialled: SocketAddr) -> Option<Comes> {
        let route = self.snapshot.resolve(source, OriginalDst(dialled), 0, &[]);
        let (workload, target) = match route {
            Route::Tunnel { workload, target, .. } | Route::Plaintext { workload, target, .. } => (workload, target),
            // Who dials the pod itself gets there, and finds out.
            Route::Refused { .. } | Route::Waypoint { .. }
                if let Some(pod) = self.snapshot.workload_by_ip(dialled.ip()) =>
            {
                (pod.clone(), dialled)
            }
            Route::Refused { .. } | Route::Waypoint { .. } => {
                let text = "as the cluster's own network has it: the mesh's waypoints and refusals are not for it";
                way.step("route", Outcome::Notable, text, None);
                return None;
            }
            _ => {
                way.passes("route", "as the cluster's own network has it", None);
                return None;
            }
        };
        let text = format!(
            "as the cluster's own network has it, such as to {} in plaintext",
            at(&workload, target)
        );
        way.passes(
            "route",
            text,
            Some(format!("Pod {}/{}", workload.namespace, workload.name)),
        );
        let facts = Facts {
            identity: None,
            aliases: self.identities.trust().aliases(),
            source: source_address(source, target.ip()),
            destination: target,
        };
        Some(Comes { workload, facts }).filter(|comes| comes.workload.is_captured())
    }

    /// Where the agent takes it; `Some(None)` where that is nobody that the mesh knows.
    fn routed(&self, way: &mut Way, route: Route) -> Goes<Option<To>> {
        match route {
            Route::Refused { reason } => way.refused("route", reason.to_string(), None),
            Route::Unknown { wanted } => {
                let text = format!("nothing is known of {wanted} yet: a connection asks the control plane and waits");
                way.step("route", Outcome::Notable, text, None);
                Some(None)
            }
            Route::Passthrough { target } => {
                let text = format!("the mesh has nothing at {target}: passed through in plaintext");
                way.step("route", Outcome::Notable, text, None);
                Some(None)
            }
            Route::Plaintext {
                workload,
                service,
                target,
            } => {
                let (to, of) = (at(&workload, target), self.one_of(service.as_deref()));
                let text = format!("to {to}{of}, which is not in the mesh: in plaintext");
                way.step("route", Outcome::Notable, text, Some(object_of(&workload)));
                Some(Some(To {
                    workload,
                    target,
                    mutual_tls: false,
                    judged: true,
                }))
            }
            Route::Named {
                workload, host, port, ..
            } => {
                let text = format!(
                    "to {host}:{port}, looked up when a connection comes, in plaintext unless it is the mesh's"
                );
                way.step("route", Outcome::Notable, text, Some(object_of(&workload)));
                Some(None)
            }
            Route::Waypoint {
                workload,
                service,
                target,
                hbone,
                ..
            } => {
                let of = service
                    .map(|service| format!("of {}: ", service_object(&service)))
                    .unwrap_or_default();
                let text = format!(
                    "{of}by mutual TLS to the waypoint {} (HBONE at {hbone}), which takes it to {target}; what the waypoint \
                     does with it is not seen from here",
                    at(&workload, hbone)
                );
                way.passes("route", text, Some(object_of(&workload)));
                Some(Some(To {
                    workload,
                    target,
                    mutual_tls: true,
                    judged: false,
                }))
            }
            Route::Tunnel {
                workload,
                service,
                target,
                hbone,
            } => {
                let of = self.one_of(service.as_deref());
                let text = format!("to {}{of}, by mutual TLS (HBONE at {hbone})", at(&workload, target));
                way.passes("route", text, Some(object_of(&workload)));
                Some(Some(To {
                    workload,
                    target,
                    mutual_tls: true,
                    judged: true,
                }))
            }
        }
    }

    fn one_of(&self, service: Option<&Service>) -> String {
        let Some(service) = service else { return String::new() };
        let (healthy, unhealthy) = (
            self.snapshot.endpoints(&service.key()).len(),
            self.snapshot.unhealthy_endpoints(&service.key()).len(),
        );
        let one = match healthy {
            1 => ", its only healthy endpoint".to_owned(),
            _ => format!(", one of {healthy} healthy endpoints"),
        };
        match unhealthy {
            0 => one,
            1 => format!("{one} (1 is not)"),
            _ => format!("{one} ({unhealthy} are not)"),
        }
    }

    fn certified(&self, way: &mut Way, source: &Workload) -> Goes<()> {
        let identity = source.identity();
        let Some(credentials) = self.identities.cached(&identity) else {
            let why = self.identities.last_error(&identity);
            let why = why.map_or_else(|| "it was not asked for yet".to_owned(), |error| error.to_string());
            return way.refused("certificate", format!("no certificate for {identity}: {why}"), None);
        };
        let left = credentials
            .not_after()
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        let text = format!(
            "of {identity}, good for another {}",
            crate::cli::duration(left.as_secs())
        );
        way.passes("certificate", text, None);
        Some(())
    }

    /// The annotation by which plaintext gets to the application, past the agent. What comes by mutual TLS never does.
    fn let_past(&self, comes: &Comes) -> Option<&'static str> {
        let port = comes.facts.destination.port();
        if comes.facts.identity.is_some() || l4::OWN_PORTS.contains(&port) {
            return None;
        }
        let is_it = |pod: &&PodView| pod.captured && pod.uid == comes.workload.uid;
        let settings = &self.pods.iter().find(is_it)?.settings;
        let excluded = settings.exclusions.inbound_ports.contains(&port);
        let of_port = excluded.then_some(k8s::EXCLUDE_INBOUND_PORTS);
        of_port.or(settings.bypass_inbound.then_some(k8s::BYPASS_INBOUND))
    }

    /// The destination's policies, where they apply.
    fn judge(&self, way: &mut Way, comes: &Comes) {
        if let Some(annotation) = self.let_past(comes) {
            let text = format!(
                "{annotation} of {}/{} keeps port {} out of the mesh: plaintext reaches the application, and no policy \
                 applies",
                comes.workload.namespace,
                comes.workload.name,
                comes.facts.destination.port()
            );
            way.step("policy", Outcome::Notable, text, Some(object_of(&comes.workload)));
            return;
        }
        let verdict = self.snapshot.verdict(&comes.facts, &comes.workload);
        if let Some(rehearsed) = &verdict.dry_run {
            let text = format!("with the policies in dry run: {}", rehearsed.reason);
            way.step("policy", Outcome::Notable, text, None);
        }
        let words = verdict.reason.to_string();
        let policies = self.snapshot.policies_for(&comes.workload).filter_map(Result::ok);
        let mut enforced = policies.filter(|policy| !policy.dry_run);
        let behind = enforced
            .find(|policy| words.contains(&Origin::from(*policy).to_string()) && policy::matches(&comes.facts, policy));
        let outcome = if verdict.allowed {
            Outcome::Passes
        } else {
            Outcome::Refused
        };
        way.step("policy", outcome, words, behind.map(resource));
    }
}

/// What is dialled of the pod itself, and so does not come to the agent; but for the agent's own ports there.
fn within(source: &Workload, dialled: SocketAddr) -> Option<&'static str> {
    let ip = dialled.ip();
    if ip.is_loopback() || ip.is_unspecified() {
        return Some("the pod's loopback");
    }
    let own = source.workload_ips.contains(&ip) && !l4::OWN_PORTS.contains(&dialled.port());
    own.then_some("the pod's own address")
}

fn resource(policy: &Policy) -> String {
    match &policy.origin {
        Some(origin) => format!("{origin} (as {})", policy.key()),
        None => format!("AuthorizationPolicy {}", policy.key()),
    }
}
