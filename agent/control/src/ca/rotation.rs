//! From one authority to the next without an outage: what signs, what is trusted, and when either changes. Pure; time is
//! an argument.
//!
//! ```text
//!  wanted ≠ signing ──► announced: its root joins the bundle ──(overlap)──► it signs ──(overlap)──► the old root leaves
//!                       the old one signs                                   both are trusted
//! ```
//! A root that is trusted for as long as a certificate lives is known to every peer, since each got the bundle along with
//! its own certificate; only then does anything signed below it go out. And a root leaves the bundle only when nothing
//! signed below it is valid any more. So at each step every valid certificate verifies against every peer's bundle, also
//! one that is an overlap old (`certificates_verify_at_each_step_of_a_rotation`). A new intermediate below a trusted root
//! signs at once. The state is written to a Secret before it is in force, so that all replicas go through the same steps.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{
    material::{Material, MaterialError, fingerprint},
    pem,
};

/// The roots' stories, in the Secret of the state.
const STORY: &str = "state.json";
/// All roots, in the Secret of the state.
const BUNDLE: &str = "root-cert.pem";
const SIGNING: &str = "signing-";
const NEXT: &str = "next-";
/// The most roots that are trusted at once; the oldest retired ones leave first.
const MAX_ROOTS: usize = 64;

/// A root in the bundle.
#[derive(Clone, Debug, PartialEq)]
pub struct Root {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Since when it has been in the bundle.
    pub since: SystemTime,
    /// When it leaves, once nothing wants it any more.
    pub until: Option<SystemTime>,
}

/// What is in force.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Signs.
    pub signing: Material,
    /// Will sign, once its root is known everywhere.
    pub next: Option<Material>,
    /// Whom to trust.
    pub roots: Vec<Root>,
}

/// What a step did, in words for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    None,
    /// Another authority was announced: its root is trusted, it does not sign yet.
    Announced,
    /// Another authority signs.
    Switched,
    /// What was announced is not wanted any more.
    Withdrawn,
    /// The bundle changed otherwise.
    Roots,
}

impl State {
    /// The first one.
    pub fn new(wanted: Material, now: SystemTime) -> Self {
        let mut state = Self {
            signing: wanted,
            next: None,
            roots: Vec::new(),
        };
        state.keep_roots(Duration::ZERO, now);
        state
    }

    /// Certificates to trust.
    pub fn bundle(&self) -> Vec<CertificateDer<'static>> {
        self.roots.iter().map(|root| root.certificate.clone()).collect()
    }

    /// What is to be in force now, given what the Secrets want (none: they can't be used) and how long a certificate or a
    /// bundle may be around.
    pub fn step(&self, wanted: Option<&Material>, overlap: Duration, now: SystemTime) -> (Self, Step) {
        let mut after = self.clone();
        let wanted = wanted.or(self.next.as_ref());
        let mut step = match wanted {
            Some(wanted) if *wanted != self.signing => after.toward(wanted, overlap, now),
            _ if self.next.is_some() => {
                after.next = None;
                Step::Withdrawn
            }
            _ => Step::None,
        };
        after.keep_roots(overlap, now);
        if step == Step::None && after != *self {
            step = Step::Roots;
        }
        (after, step)
    }

    fn toward(&mut self, wanted: &Material, overlap: Duration, now: SystemTime) -> Step {
        let known = |root: &Root| root.certificate == *wanted.root() && root.since + overlap <= now;
        // Whoever trusts what signs today trusts what is below the same root. And what can't sign any more is no reason to
        // wait: better a peer that does not know the root than none.
        let same_root = wanted.root() == self.signing.root();
        if same_root || self.roots.iter().any(known) || self.signing.not_after() <= now {
            self.signing = wanted.clone();
            self.next = None;
            return Step::Switched;
        }
        if self.next.as_ref() == Some(wanted) {
            return Step::None;
        }
        self.next = Some(wanted.clone());
        Step::Announced
    }

    /// Roots of what signs and of what will are in; others leave after an overlap.
    fn keep_roots(&mut self, overlap: Duration, now: SystemTime) {
        let materials: Vec<&Material> = std::iter::once(&self.signing).chain(&self.next).collect();
        let wanted: Vec<CertificateDer<'static>> = materials
            .iter()
            .flat_map(|material| material.roots().iter().chain([material.root()]))
            .cloned()
            .collect();
        for certificate in &wanted {
            if !self.roots.iter().any(|root| root.certificate == *certificate) {
                self.roots.push(Root {
                    certificate: certificate.clone(),
                    since: now,
                    until: None,
                });
            }
        }
        for root in &mut self.roots {
            root.until = match root.until {
                _ if wanted.contains(&root.certificate) => None,
                Some(until) => Some(until),
                None => Some(now + overlap),
            };
        }
        self.roots.retain(|root| root.until.is_none_or(|until| until > now));
        while self.roots.len() > MAX_ROOTS {
            let Some(first) = self.roots.iter().position(|root| root.until.is_some()) else {
                break;
            };
            self.roots.remove(first);
        }
    }

    /// When the next step is due by time alone.
    pub fn due(&self, overlap: Duration) -> Option<SystemTime> {
        let switch = self.next.as_ref().and_then(|next| {
            let announced = self.roots.iter().find(|root| root.certificate == *next.root())?;
            Some((announced.since + overlap).min(self.signing.not_after()))
        });
        let retire = self.roots.iter().filter_map(|root| root.until);
        retire.chain(switch).min()
    }
}

/// How a root is told in the Secret.
#[derive(Serialize, Deserialize)]
struct Story {
    fingerprint: String,
    /// Seconds since 1970.
    since: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    until: Option<u64>,
}

impl State {
    /// As the values of a Secret.
    pub fn write(&self) -> Result<BTreeMap<String, Vec<u8>>, serde_json::Error> {
        let stories: Vec<Story> = self.roots.iter().map(story).collect();
        let mut values = BTreeMap::from([
            (STORY.to_owned(), serde_json::to_vec(&stories)?),
            (BUNDLE.to_owned(), pem::encode_all(&self.bundle()).into_bytes()),
        ]);
        values.extend(prefixed(SIGNING, &self.signing));
        if let Some(next) = &self.next {
            values.extend(prefixed(NEXT, next));
        }
        Ok(values)
    }

    /// From the values of a Secret. An ended signing certificate can't be read: what is wanted then starts anew.
    pub fn read(values: &BTreeMap<String, Vec<u8>>, now: SystemTime) -> Result<Self, MaterialError> {
        let failed = |key| move |problem: String| MaterialError { key, problem };
        let stories = values.get(STORY).ok_or_else(|| failed(STORY)("missing".into()))?;
        let stories: Vec<Story> = serde_json::from_slice(stories).map_err(|error| failed(STORY)(error.to_string()))?;
        let bundle = values.get(BUNDLE).ok_or_else(|| failed(BUNDLE)("missing".into()))?;
        let roots = pem::decode_all(bundle).map_err(failed(BUNDLE))?;
        let roots = roots.into_iter().map(|certificate| {
            let name = fingerprint(&certificate);
            let story = stories.iter().find(|story| story.fingerprint == name);
            Root {
                certificate,
                since: story.map_or(now, |story| instant(story.since)),
                until: story.and_then(|story| story.until).map(instant),
            }
        });
        let next = unprefixed(NEXT, values);
        Ok(Self {
            roots: roots.collect(),
            signing: Material::read(&unprefixed(SIGNING, values), now)?,
            next: match next.is_empty() {
                true => None,
                false => Some(Material::read(&next, now)?),
            },
        })
    }
}

fn story(root: &Root) -> Story {
    Story {
        fingerprint: fingerprint(&root.certificate),
        since: seconds(root.since),
        until: root.until.map(seconds),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A number from outside: one beyond all times is the end of this century's.
fn instant(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(4_102_444_800))
}

fn prefixed(prefix: &str, material: &Material) -> impl Iterator<Item = (String, Vec<u8>)> {
    let values = material.write();
    values
        .into_iter()
        .map(move |(key, value)| (format!("{prefix}{key}"), value))
}

fn unprefixed(prefix: &str, values: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let of_prefix = values
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value)));
    of_prefix.map(|(key, value)| (key.to_owned(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;

    use super::{super::generate, *};
    use crate::ca::{leaf, material::verify};

    const OVERLAP: Duration = Duration::from_secs(24 * 3600);
    const HOUR: Duration = Duration::from_secs(3600);

    /// Whole seconds, as they are stored.
    fn now() -> SystemTime {
        instant(seconds(SystemTime::now()))
    }

    fn material(now: SystemTime) -> Material {
        below(&generate::root("cluster.local", now).unwrap(), now)
    }

    fn below(root: &BTreeMap<String, Vec<u8>>, now: SystemTime) -> Material {
        Material::read(&generate::intermediate(root, "cluster.local", &[], now).unwrap(), now).unwrap()
    }

    /// A peer: a certificate, and the bundle that came with it.
    struct Peer {
        leaf: CertificateDer<'static>,
        intermediates: Vec<CertificateDer<'static>>,
        bundle: Vec<CertificateDer<'static>>,
        issued: SystemTime,
    }

    fn peer(state: &State, now: SystemTime) -> Peer {
        let key = KeyPair::generate().unwrap();
        let identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        Peer {
            leaf: leaf::sign(&state.signing, &key, &identity, OVERLAP, now)
                .unwrap()
                .certificate,
            intermediates: state.signing.intermediates().cloned().collect(),
            bundle: state.bundle(),
            issued: now,
        }
    }

    #[test]
    fn certificates_verify_at_each_step_of_a_rotation() {
        let start = now();
        let (old, new) = (material(start), material(start));
        let mut state = State::new(old.clone(), start);
        let (mut peers, mut steps) = (vec![peer(&state, start)], Vec::new());
        for hour in 1..80 {
            let now = start + HOUR * hour;
            let wanted = if hour < 5 { &old } else { &new };
            let (after, step) = state.step(Some(wanted), OVERLAP, now);
            state = State::read(&after.write().unwrap(), now).unwrap();
            assert!(state == after, "what is stored is what is in force");
            if step != Step::None {
                steps.push((hour, step));
            }
            peers.retain(|peer| peer.issued + OVERLAP > now);
            peers.push(peer(&state, now));
            for server in &peers {
                for client in &peers {
                    verify(&client.leaf, &client.intermediates, &server.bundle, now).unwrap();
                }
            }
        }
        assert_eq!(steps, [(5, Step::Announced), (29, Step::Switched), (53, Step::Roots)]);
        assert_eq!(state.bundle(), [new.root().clone()]);
        assert!(state.signing == new);
    }

    #[test]
    fn a_new_intermediate_below_a_known_root_signs_at_once() {
        let start = now();
        let root = generate::root("cluster.local", start).unwrap();
        let state = State::new(below(&root, start), start);
        let wanted = below(&root, start + HOUR);
        let (after, step) = state.step(Some(&wanted), OVERLAP, start + HOUR);
        assert_eq!(step, Step::Switched);
        assert_eq!(after.bundle(), state.bundle());
    }

    #[test]
    fn a_root_that_the_user_announced_before_is_not_announced_again() {
        let start = now();
        let new_root = generate::root("cluster.local", start).unwrap();
        let other = generate::root_certificate(&new_root).unwrap();
        let old_root = generate::root("cluster.local", start).unwrap();
        let both = generate::intermediate(&old_root, "cluster.local", &[other], start).unwrap();
        let state = State::new(Material::read(&both, start).unwrap(), start);
        assert_eq!(state.roots.len(), 2);
        let later = start + OVERLAP;
        let (_, step) = state.step(Some(&below(&new_root, later)), OVERLAP, later);
        assert_eq!(step, Step::Switched);
    }

    #[test]
    fn going_back_withdraws_what_was_announced_but_its_root_stays_for_an_overlap() {
        let start = now();
        let (old, new) = (material(start), material(start));
        let state = State::new(old.clone(), start);
        let (state, _) = state.step(Some(&new), OVERLAP, start);
        let (state, step) = state.step(Some(&old), OVERLAP, start + HOUR);
        assert_eq!(
            (step, state.next.is_none(), state.roots.len()),
            (Step::Withdrawn, true, 2)
        );
        assert_eq!(state.due(OVERLAP), Some(start + HOUR + OVERLAP));
        let (state, _) = state.step(Some(&old), OVERLAP, start + HOUR + OVERLAP);
        assert_eq!(state.bundle(), [old.root().clone()]);
    }

    #[test]
    fn without_a_usable_source_what_is_in_force_goes_on() {
        let start = now();
        let (old, new) = (material(start), material(start));
        let state = State::new(old, start);
        assert_eq!(state.step(None, OVERLAP, start + HOUR), (state.clone(), Step::None));
        let (announced, _) = state.step(Some(&new), OVERLAP, start);
        let (switched, step) = announced.step(None, OVERLAP, start + OVERLAP);
        assert_eq!(step, Step::Switched);
        assert!(switched.signing == new);
    }

    #[test]
    fn an_ended_signer_is_replaced_without_waiting() {
        let start = now();
        let state = State::new(material(start), start);
        let end = state.signing.not_after();
        let (_, step) = state.step(Some(&material(end)), OVERLAP, end);
        assert_eq!(step, Step::Switched);
    }
}
