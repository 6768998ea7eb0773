//! Texts and label sets, each kept once: a hundred thousand pods have a few thousand different ones.

use std::{borrow::Borrow, collections::HashSet, hash::Hash, sync::Arc};

use model::NamespacedName;

/// Labels, sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Labels(Box<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// A label's value; an empty one is as good as none.
    pub fn get(&self, key: &str) -> Option<&Arc<str>> {
        let at = self.0.binary_search_by(|(other, _)| (**other).cmp(key)).ok()?;
        Some(&self.0[at].1).filter(|value| !value.is_empty())
    }

    /// Whether all of `selector` is here.
    pub fn matches(&self, selector: &Self) -> bool {
        let has = |(key, value): &(Arc<str>, Arc<str>)| {
            let found = self.0.binary_search_by(|(other, _)| other.cmp(key));
            found.is_ok_and(|at| self.0[at].1 == *value)
        };
        selector.0.iter().all(has)
    }

    /// Whether all of a selector's labels are here.
    pub fn have_all(&self, selector: &std::collections::BTreeMap<String, String>) -> bool {
        let has = |(key, value): (&String, &String)| {
            let found = self.0.binary_search_by(|(other, _)| (**other).cmp(key));
            found.is_ok_and(|at| *self.0[at].1 == **value)
        };
        selector.iter().all(has)
    }

    /// Whether there are none: as a selector of services, this selects nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As a map, for the k8s crate's selectors.
    pub fn to_map(&self) -> std::collections::BTreeMap<String, String> {
        self.0
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect()
    }
}

/// Keeps each value once. What nobody else holds any longer goes when the set has doubled.
#[derive(Debug)]
struct Pool<T: ?Sized> {
    values: HashSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized + Eq + Hash> Pool<T> {
    fn get<Q: ?Sized + Eq + Hash>(&mut self, value: &Q, make: impl FnOnce() -> Arc<T>) -> Arc<T>
    where
        Arc<T>: Borrow<Q>,
    {
        if let Some(found) = self.values.get(value) {
            return found.clone();
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.sweep_at = (self.values.len() * 2).max(1024);
        }
        let made = make();
        self.values.insert(made.clone());
        made
    }
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self {
            values: HashSet::new(),
            sweep_at: 1024,
        }
    }
}

/// The texts and label sets of the index.
#[derive(Debug, Default)]
pub(super) struct Names {
    texts: Pool<str>,
    labels: Pool<Labels>,
}

impl Names {
    /// The text, kept once.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        self.texts.get(text, || text.into())
    }

    /// The name, its parts kept once.
    pub fn name(&mut self, namespace: &str, name: &str) -> NamespacedName {
        NamespacedName {
            namespace: self.text(namespace),
            name: self.text(name),
        }
    }

    /// The labels, kept once.
    pub fn labels<'a>(&mut self, labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Arc<Labels> {
        let labels = labels.into_iter();
        let mut labels: Vec<_> = labels.map(|(key, value)| (self.text(key), self.text(value))).collect();
        labels.sort();
        let labels = Labels(labels.into());
        self.labels.get(&labels, || Arc::new(labels.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn texts_that_nobody_holds_go() {
        let mut names = Names::default();
        let kept = names.text("kept");
        for index in 0..10_000 {
            names.text(&index.to_string());
        }
        assert!(names.texts.values.len() <= 1024);
        assert!(Arc::ptr_eq(&kept, &names.text("kept")));
    }

    #[test]
    fn selectors() {
        let mut names = Names::default();
        let mut of = |labels: &[(&str, &str)]| {
            let map: BTreeMap<String, String> = labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            names.labels(&map)
        };
        let (both, one, other) = (of(&[("a", "1"), ("b", "2")]), of(&[("b", "2")]), of(&[("b", "3")]));
        assert!(both.matches(&one) && !one.matches(&both) && !both.matches(&other) && one.matches(&of(&[])));
        assert!(Arc::ptr_eq(&one, &of(&[("b", "2")])));
    }
}
