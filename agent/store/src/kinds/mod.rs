//! The kinds that the API serves: one entry of a static table each.
//!
//! ```text
//! URL, kubectl ─► find(group, version, plural) ─► &'static Kind ─► engine (its storage), table, schema
//! ```
//! Knows names and scopes; not what an object of the kind may hold (`schema`, `admission`).
//!
//! Invariants:
//! - Plural, singular and short names of a group are unambiguous (`names_are_unambiguous`).
//! - What shares another kind's storage converts back and forth without loss (`events_convert_back_and_forth`).
//!
//! Failure: what is not in the table is `None`, which HTTP answers with 404.

mod convert;
mod table;

use std::{cmp::Ordering, fmt, hash};

pub use convert::{from_storage, to_storage};
pub use table::ALL;

/// Whether objects of a kind are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// In the engine, under the kind's own name.
    Stored,
    /// In the engine, as objects of another kind: group and plural of that one.
    As(&'static str, &'static str),
    /// Not at all: a question that is POSTed and answered, such as a TokenReview.
    Answered,
}

/// One kind of object. Two are equal when group and plural are.
#[derive(Debug)]
pub struct Kind {
    /// Such as `apps`; empty for the core.
    pub group: &'static str,
    /// Served versions, the preferred first.
    pub versions: &'static [&'static str],
    /// The version in which objects are kept.
    pub storage: &'static str,
    /// Such as `Deployment`.
    pub kind: &'static str,
    /// Such as `deployments`.
    pub plural: &'static str,
    /// Such as `deployment`.
    pub singular: &'static str,
    /// Such as `deploy`.
    pub short_names: &'static [&'static str],
    /// Such as `all`.
    pub categories: &'static [&'static str],
    /// Whether objects are in a namespace.
    pub namespaced: bool,
    /// Whether `status` is written through a subresource of its own.
    pub status_subresource: bool,
    /// Subresources besides `status`: name and kind of what is exchanged there, such as `token` and
    /// `authentication.k8s.io/v1 TokenRequest`.
    pub subresources: &'static [(&'static str, &'static str)],
    /// Whether and where its objects are kept.
    pub keeping: Keeping,
}

impl Kind {
    /// `apiVersion` of an object of this kind in a version: `apps/v1`, `v1`.
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() {
            return version.to_owned();
        }
        format!("{}/{version}", self.group)
    }

    /// `apiVersion` of the objects as they are kept.
    pub fn storage_api_version(&self) -> String {
        self.api_version(self.storage)
    }

    /// The kind whose storage holds this one's objects: nearly always itself.
    pub fn stored(&'static self) -> &'static Kind {
        match self.keeping {
            Keeping::As(group, plural) => by_plural(group, plural).unwrap_or(self),
            Keeping::Stored | Keeping::Answered => self,
        }
    }

    /// Whether there are objects to get, list and watch.
    pub fn is_stored(&self) -> bool {
        self.keeping != Keeping::Answered
    }

    /// `plural.group`, as messages name a kind; the plural alone for the core.
    pub fn resource(&self) -> String {
        if self.group.is_empty() {
            return self.plural.to_owned();
        }
        format!("{}.{}", self.plural, self.group)
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.plural == other.plural && self.group == other.group
    }
}

impl Eq for Kind {}

impl PartialOrd for Kind {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Kind {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.group, self.plural).cmp(&(other.group, other.plural))
    }
}

impl hash::Hash for Kind {
    fn hash<H: hash::Hasher>(&self, state: &mut H) {
        (self.group, self.plural).hash(state);
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.resource())
    }
}

/// The kind at a URL.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    by_plural(group, plural).filter(|kind| kind.versions.contains(&version))
}

/// The kind with a plural, whatever the version.
pub fn by_plural(group: &str, plural: &str) -> Option<&'static Kind> {
    ALL.iter().find(|kind| kind.group == group && kind.plural == plural)
}

/// The kind that an object says it is: `apps/v1`, `Deployment`.
pub fn of_object(api_version: &str, kind: &str) -> Option<&'static Kind> {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    let is_it = |known: &&Kind| known.group == group && known.kind == kind && known.versions.contains(&version);
    ALL.iter().find(is_it)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unambiguous() {
        let mut seen = BTreeSet::new();
        for kind in ALL {
            assert!(kind.versions.contains(&kind.storage), "{kind}");
            // Of Endpoints, singular and plural are one word.
            let names: BTreeSet<&str> = [kind.plural, kind.singular]
                .iter()
                .chain(kind.short_names)
                .copied()
                .collect();
            for name in names {
                assert!(seen.insert((kind.group, name)), "{kind}: {name} twice");
            }
        }
    }

    #[test]
    fn a_kind_is_found_by_url_and_by_what_an_object_says() {
        let deployment = find("apps", "v1", "deployments").unwrap();
        assert_eq!(of_object("apps/v1", "Deployment"), Some(deployment));
        assert_eq!(of_object("v1", "Pod").map(|kind| kind.plural), Some("pods"));
        assert_eq!(find("apps", "v1beta1", "deployments"), None);
        let events = find("events.k8s.io", "v1", "events").unwrap();
        assert_eq!(events.stored().group, "");
    }
}
