//! One kind of objects of the Kubernetes API, as its watch has them; and what other answers of the API say of one of them.
//!
//! ```text
//! listing: Init ─► InitApply … ─► InitDone ─► objects ◄─ Apply, Delete … (watch)
//!                                               ▲ only what is newer than what the watch said: Watched::answered
//! ```

use std::{cmp::Ordering, collections::BTreeMap};

use kube::{ResourceExt, runtime::watcher};
use model::NamespacedName;

/// What is known of one kind of objects, and what a listing under way has of it so far.
pub struct Watched<T> {
    objects: BTreeMap<NamespacedName, Held<T>>,
    listing: BTreeMap<NamespacedName, Held<T>>,
    pub synced: bool,
    pub problem: Option<String>,
}

/// An object, and which it is.
struct Held<T> {
    object: T,
    uid: Option<String>,
    version: Option<String>,
}

impl<T> Default for Watched<T> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            listing: BTreeMap::new(),
            synced: false,
            problem: None,
        }
    }
}

impl<T: PartialEq> Watched<T> {
    /// Takes an event over; whether anything is otherwise than before.
    pub fn take<K: ResourceExt>(
        &mut self,
        event: watcher::Result<watcher::Event<K>>,
        read: impl Fn(K) -> (NamespacedName, T),
    ) -> bool {
        match event {
            Err(error) => {
                let problem = Some(error.to_string());
                let new = self.problem != problem;
                self.problem = problem;
                return new;
            }
            Ok(watcher::Event::Init) => self.listing.clear(),
            Ok(watcher::Event::InitApply(object)) => {
                let (name, held) = held(object, read);
                self.listing.insert(name, held);
            }
            Ok(watcher::Event::InitDone) => {
                self.problem = None;
                let listed = std::mem::take(&mut self.listing);
                let new = !self.synced || !said(&self.objects).eq(said(&listed));
                (self.objects, self.synced) = (listed, true);
                return new;
            }
            Ok(watcher::Event::Apply(object)) => {
                let (name, held) = held(object, read);
                return self.put(name, held);
            }
            Ok(watcher::Event::Delete(object)) => return self.objects.remove(&read(object).0).is_some(),
        }
        false
    }

    /// Takes over what an answer of the API says of an object that the watch has, unless the watch has said something
    /// newer since. One that it has no more is gone.
    pub fn answered<K: ResourceExt>(&mut self, object: K, read: impl Fn(K) -> (NamespacedName, T)) -> bool {
        let (name, answer) = held(object, read);
        let known = self.objects.get(&name);
        let is_newer = known.is_some_and(|known| known.uid == answer.uid && answer.is_newer_than(known));
        is_newer && self.put(name, answer)
    }

    fn put(&mut self, name: NamespacedName, held: Held<T>) -> bool {
        let before = self.objects.get(&name);
        let new = before.is_none_or(|before| before.object != held.object);
        self.objects.insert(name, held);
        new
    }
}

impl<T> Watched<T> {
    pub fn get(&self, name: &NamespacedName) -> Option<&T> {
        self.objects.get(name).map(|held| &held.object)
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&NamespacedName, &T)> {
        said(&self.objects)
    }
}

impl<T> Held<T> {
    /// Not where that can't be told.
    fn is_newer_than(&self, other: &Self) -> bool {
        let versions = self.version.as_deref().zip(other.version.as_deref());
        versions.and_then(|(own, other)| compare(own, other)) == Some(Ordering::Greater)
    }
}

fn said<T>(objects: &BTreeMap<NamespacedName, Held<T>>) -> impl ExactSizeIterator<Item = (&NamespacedName, &T)> {
    objects.iter().map(|(name, held)| (name, &held.object))
}

fn held<K: ResourceExt, T>(object: K, read: impl Fn(K) -> (NamespacedName, T)) -> (NamespacedName, Held<T>) {
    let (uid, version) = (object.uid(), object.resource_version());
    let (name, object) = read(object);
    (name, Held { object, uid, version })
}

/// Which of two versions of an object is the later one. Other than decimal numbers, however long, they have no order:
/// <https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions>.
fn compare(a: &str, b: &str) -> Option<Ordering> {
    let is_number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() && !text.starts_with('0');
    match a == b {
        true => Some(Ordering::Equal),
        false => (is_number(a) && is_number(b)).then(|| (a.len(), a).cmp(&(b.len(), b))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_only_where_they_are_numbers() {
        let long = "184467440737095516160";
        for (a, b, expected) in [
            ("9", "10", Some(Ordering::Less)),
            ("10", "9", Some(Ordering::Greater)),
            (long, "18446744073709551615", Some(Ordering::Greater)),
            ("abc", "abc", Some(Ordering::Equal)),
            ("abc", "abd", None),
            ("7", "abd", None),
            ("", "7", None),
            ("07", "6", None),
            ("-7", "6", None),
        ] {
            assert_eq!(compare(a, b), expected, "{a:?} {b:?}");
        }
    }
}
