//! Reads the descriptions of the types.
//!
//! ```text
//! @ apps io.k8s.api.apps.v1 apps/v1        file: short name, OpenAPI package, versions that its kinds are served in
//! Deployment * | What it is.               type; `*` a kind (apiVersion, kind, metadata are understood),
//!                                          `atomic` owned and replaced as a whole
//!  name! string =TCP map:a,b merge:a | …   field; `!` required, `=` default (of keys, of custom kinds; JSON without
//!                                          spaces where it is no text),
//!                                          lists: `map:KEYS`, `set`, else atomic; `atomic` also of maps,
//!                                          strategic merge: `merge[:KEY]`, `retainKeys`
//! ```
//! Types: `string bytes time micro-time quantity int-or-string int int64 number bool any`, `[]T`, `{}T`, a type of the
//! same file, or one of another: `core.PodSpec`.
//!
//! Invariant: what can't be read is a panic at first use, which `every_reference_resolves` meets in the tests: the
//! texts are part of the program.

use std::{collections::BTreeMap, sync::LazyLock};

/// The texts, in no order that matters.
pub(super) const TEXTS: &[&str] = &[
    include_str!("types/meta.txt"),
    include_str!("types/core.txt"),
    include_str!("types/apps.txt"),
    include_str!("types/batch.txt"),
    include_str!("types/discovery.txt"),
    include_str!("types/coordination.txt"),
    include_str!("types/events.txt"),
    include_str!("types/authentication.txt"),
    include_str!("types/authorization.txt"),
    include_str!("types/istio-meta.txt"),
    include_str!("types/istio-networking.txt"),
    include_str!("types/istio-security.txt"),
    include_str!("types/istio-telemetry.txt"),
    include_str!("types/istio-extensions.txt"),
    include_str!("types/gateway.txt"),
    include_str!("types/reference-grant.txt"),
];

/// A type: of a kind, or of a part of one.
#[derive(Debug)]
pub(crate) struct Type {
    /// `Deployment`.
    pub name: &'static str,
    /// `io.k8s.api.apps.v1`.
    pub package: &'static str,
    /// Of a kind, where it is served: group and version.
    pub served: Vec<(&'static str, &'static str)>,
    /// Owned and replaced as a whole.
    pub atomic: bool,
    /// For people.
    pub description: &'static str,
    /// Its fields.
    pub fields: BTreeMap<&'static str, Field>,
}

/// A field of a type.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    /// What it holds.
    pub shape: Shape,
    /// How the list's elements are told apart; of lists only.
    pub list: ListKind,
    /// A map or struct that is owned and replaced as a whole.
    pub atomic: bool,
    /// Strategic merge merges the list's elements (by key, or as a set where there is none).
    pub merge: bool,
    /// The key for that.
    pub merge_key: Option<&'static str>,
    /// Strategic merge keeps only the keys that the patch lists.
    pub retain_keys: bool,
    /// What a key of a list is when it is left out.
    pub default: Option<&'static str>,
    /// Whether it has to be there.
    pub required: bool,
    /// For people.
    pub description: &'static str,
}

/// How a list is merged and owned (`x-kubernetes-list-type`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ListKind {
    /// As a whole.
    Atomic,
    /// Each scalar by itself.
    Set,
    /// Each element, told apart by these fields.
    Map(Vec<&'static str>),
}

/// What a field holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Shape {
    /// A value without parts, by its name in the files.
    Scalar(&'static str),
    /// Anything.
    Any,
    /// A list of these.
    List(Box<Shape>),
    /// A map from strings to these.
    Map(Box<Shape>),
    /// A struct: place in [`Document::types`].
    Struct(usize),
}

/// All types.
#[derive(Debug)]
pub(crate) struct Document {
    /// In the order of the files.
    pub types: Vec<Type>,
    roots: BTreeMap<(&'static str, &'static str), usize>,
}

impl Document {
    /// A kind's type.
    pub fn root(&self, group: &str, kind: &str) -> Option<&Type> {
        // A kind's names are static, those asked for need not be.
        let found = self.roots.iter().find(|((g, k), _)| *g == group && *k == kind)?;
        self.types.get(*found.1)
    }
}

/// All types, read at first use.
pub(crate) fn document() -> &'static Document {
    static DOCUMENT: LazyLock<Document> = LazyLock::new(|| read(TEXTS));
    &DOCUMENT
}

const SCALARS: &[&str] = &[
    "string",
    "bytes",
    "time",
    "micro-time",
    "quantity",
    "int-or-string",
    "int",
    "int64",
    "number",
    "bool",
];

/// Where the names of types are looked up: (file, type) to its place.
type Names = BTreeMap<(&'static str, &'static str), usize>;

fn read(texts: &[&'static str]) -> Document {
    let names = names(texts);
    let mut types: Vec<Type> = Vec::with_capacity(names.len());
    let mut roots = BTreeMap::new();
    for text in texts {
        let (file, package, served) = heading(text);
        for line in lines(text) {
            let (form, description) = line.split_once(" | ").unwrap_or((line, ""));
            if let Some(form) = form.strip_prefix(' ') {
                let (name, field) = field(&names, file, form, description);
                let last = types.last_mut().expect("a field follows its type");
                last.fields.insert(name, field);
                continue;
            }
            let mut words = form.split_whitespace();
            let name = words.next().expect("lines are not empty");
            let flags: Vec<&str> = words.collect();
            let is_kind = flags.contains(&"*");
            if is_kind {
                for (group, _) in &served {
                    roots.insert((*group, name), types.len());
                }
            }
            types.push(Type {
                name,
                package,
                served: if is_kind { served.clone() } else { Vec::new() },
                atomic: flags.contains(&"atomic"),
                description,
                fields: if is_kind { head(&names) } else { BTreeMap::new() },
            });
        }
    }
    Document { types, roots }
}

fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines()
        .filter(|line| !line.starts_with(['#', '@']) && !line.is_empty())
}

/// A file's short name, package, and the versions its kinds are served in.
fn heading(text: &'static str) -> (&'static str, &'static str, Vec<(&'static str, &'static str)>) {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("@ "))
        .expect("a file has a heading");
    let mut words = line.split_whitespace();
    let file = words.next().expect("a short name");
    let package = words.next().expect("a package");
    let served = words.next().unwrap_or_default().split(',').filter(|v| !v.is_empty());
    let served = served.map(|version| version.rsplit_once('/').unwrap_or(("", version)));
    (file, package, served.collect())
}

fn names(texts: &[&'static str]) -> Names {
    let mut names = Names::new();
    for text in texts {
        let (file, ..) = heading(text);
        for line in lines(text).filter(|line| !line.starts_with(' ')) {
            let name = line.split_whitespace().next().expect("lines are not empty");
            let at = names.len();
            let before = names.insert((file, name), at);
            assert!(before.is_none(), "{file}.{name} is described twice");
        }
    }
    names
}

/// What every kind begins with.
fn head(names: &Names) -> BTreeMap<&'static str, Field> {
    let field = |form, description| field(names, "meta", form, description);
    BTreeMap::from([
        field(
            "apiVersion string",
            "The version of this form of the object: group and version.",
        ),
        field("kind string", "What the object is."),
        field("metadata ObjectMeta", "Standard object's metadata."),
    ])
}

fn field(names: &Names, file: &'static str, form: &'static str, description: &'static str) -> (&'static str, Field) {
    let mut words = form.split_whitespace();
    let name = words.next().expect("a field has a name");
    let shape = shape(names, file, words.next().expect("a field has a type"));
    let mut field = Field {
        shape,
        list: ListKind::Atomic,
        atomic: false,
        merge: false,
        merge_key: None,
        retain_keys: false,
        default: None,
        required: name.ends_with('!'),
        description,
    };
    for word in words {
        match word.split_once(':').unwrap_or((word, "")) {
            ("map", keys) => field.list = ListKind::Map(keys.split(',').collect()),
            ("set", _) => field.list = ListKind::Set,
            ("atomic", _) => field.atomic = true,
            ("merge", key) => {
                field.merge = true;
                field.merge_key = (!key.is_empty()).then_some(key);
            }
            ("retainKeys", _) => field.retain_keys = true,
            _ => field.default = Some(word.strip_prefix('=').expect("a known word")),
        }
    }
    (name.trim_end_matches('!'), field)
}

fn shape(names: &Names, file: &'static str, word: &'static str) -> Shape {
    if let Some(element) = word.strip_prefix("[]") {
        return Shape::List(Box::new(shape(names, file, element)));
    }
    if let Some(element) = word.strip_prefix("{}") {
        return Shape::Map(Box::new(shape(names, file, element)));
    }
    if word == "any" {
        return Shape::Any;
    }
    if SCALARS.contains(&word) {
        return Shape::Scalar(word);
    }
    let of = word.split_once('.').unwrap_or((file, word));
    let at = names.get(&of).unwrap_or_else(|| panic!("{file}: no type {word}"));
    Shape::Struct(*at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kinds, schema};

    #[test]
    fn every_reference_resolves() {
        assert!(document().types.len() > 200);
    }

    #[test]
    fn every_kind_is_described() {
        for kind in kinds::ALL {
            let root = schema::root(kind).unwrap_or_else(|| panic!("{kind} is not described"));
            for version in kind.versions {
                assert!(root.served.contains(&(kind.group, version)), "{kind} in {version}");
            }
        }
    }

    #[test]
    fn every_key_of_a_list_is_a_field_of_its_elements() {
        for type_ in &document().types {
            for (name, field) in &type_.fields {
                let keys = match &field.list {
                    ListKind::Map(keys) => keys.clone(),
                    _ => Vec::new(),
                };
                for key in keys.into_iter().chain(field.merge_key) {
                    let Shape::List(element) = &field.shape else {
                        panic!("{}.{name} is no list", type_.name)
                    };
                    let Shape::Struct(element) = **element else {
                        panic!("{}.{name} holds no structs", type_.name)
                    };
                    let element = &document().types[element];
                    assert!(element.fields.contains_key(key), "{}.{name} has no {key}", type_.name);
                }
            }
        }
    }
}
