//! Which objects of a kind are known, to tell after a listing which are gone, and which did not change. Pure.
//!
//! A watch that starts again lists everything: what is as it was costs nothing further, and what is not in the list was
//! deleted while nobody looked (`what_a_listing_lacks_is_gone`).

use std::collections::HashMap;

use kube::runtime::watcher::Event;

use super::object::Raw;

type Name = (Box<str>, Box<str>);

/// What an event comes to.
#[derive(Debug)]
pub enum Step {
    /// It is new, or other than before.
    Put(Box<Raw>),
    /// It is gone: namespace and name.
    Gone(Box<str>, Box<str>),
    /// All that there is has been told.
    Synced,
}

/// How far a kind was followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Its objects.
    pub count: usize,
    /// The last revision that was seen, deletions included. For comparison with the same API only.
    pub revision: u64,
}

#[derive(Debug)]
struct Entry {
    version: (Box<str>, Box<str>),
    listing: u32,
}

/// The objects of a kind.
#[derive(Debug, Default)]
pub struct Known {
    objects: HashMap<Name, Entry>,
    listing: u32,
    revision: u64,
    listed: bool,
}

impl Known {
    /// Whether all that there is was told once.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// How far this is.
    pub fn tally(&self) -> Tally {
        Tally {
            count: self.objects.len(),
            revision: self.revision,
        }
    }

    /// Takes an event in.
    pub fn take(&mut self, event: Event<Raw>) -> Vec<Step> {
        match event {
            Event::Init => {
                self.listing = self.listing.wrapping_add(1);
                Vec::new()
            }
            Event::Apply(raw) | Event::InitApply(raw) => self.put(raw),
            Event::Delete(raw) => {
                self.revision = self.revision.max(raw.revision());
                let name = (raw.namespace().into(), raw.name().into());
                let known = self.objects.remove(&name);
                known.map(|_| Step::Gone(name.0, name.1)).into_iter().collect()
            }
            Event::InitDone => self.sweep(),
        }
    }

    /// Nothing of the kind is there any more.
    pub fn clear(&mut self) -> Vec<Step> {
        self.listing = self.listing.wrapping_add(1);
        self.sweep()
    }

    fn put(&mut self, raw: Raw) -> Vec<Step> {
        self.revision = self.revision.max(raw.revision());
        let entry = Entry {
            version: raw.version(),
            listing: self.listing,
        };
        let name = (raw.namespace().into(), raw.name().into());
        let version = entry.version.clone();
        match self.objects.insert(name, entry) {
            Some(before) if before.version == version => Vec::new(),
            _ => vec![Step::Put(Box::new(raw))],
        }
    }

    fn sweep(&mut self) -> Vec<Step> {
        self.listed = true;
        let listing = self.listing;
        let gone = self.objects.extract_if(|_, entry| entry.listing != listing);
        let mut steps: Vec<_> = gone.map(|((namespace, name), _)| Step::Gone(namespace, name)).collect();
        steps.push(Step::Synced);
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(name: &str, version: u32) -> Raw {
        let text = format!(r#"{{"metadata": {{"name": "{name}", "uid": "u", "resourceVersion": "{version}"}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn tell(known: &mut Known, events: Vec<Event<Raw>>) -> Vec<String> {
        let steps = events.into_iter().flat_map(|event| known.take(event));
        let mut told: Vec<_> = steps
            .map(|step| match step {
                Step::Put(raw) => format!("+{}", raw.name()),
                Step::Gone(_, name) => format!("-{name}"),
                Step::Synced => "synced".into(),
            })
            .collect();
        told.sort();
        told
    }

    #[test]
    fn what_a_listing_lacks_is_gone() {
        use Event::{Apply, Delete, Init, InitApply, InitDone};
        let mut known = Known::default();
        let first = vec![Init, InitApply(raw("a", 1)), InitApply(raw("b", 2)), InitDone];
        assert_eq!(tell(&mut known, first), ["+a", "+b", "synced"]);
        let changes = vec![
            Apply(raw("a", 3)),
            Apply(raw("a", 3)),
            Delete(raw("b", 4)),
            Delete(raw("b", 4)),
        ];
        assert_eq!(tell(&mut known, changes), ["+a", "-b"]);
        // The listing breaks off and starts again.
        let again = vec![Init, InitApply(raw("c", 5)), Init, InitApply(raw("a", 3)), InitDone];
        assert_eq!(tell(&mut known, again), ["+c", "-c", "synced"]);
        assert_eq!(known.tally(), Tally { count: 1, revision: 5 });
        assert_eq!(known.clear().len(), 2);
        assert!(known.objects.is_empty());
    }
}
