//! What was not taken, or not in full: which object, where it stands, which field, why, and what follows.

use std::{collections::BTreeSet, fmt};

/// Where an object stands among the manifests.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Place {
    /// The file, as its reader named it.
    pub file: String,
    /// The document in the file, from 1.
    pub document: usize,
    /// The item in the document's `List`, from 1.
    pub item: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, document {}", self.file, self.document)?;
        self.item.map_or(Ok(()), |item| write!(f, ", item {item}"))
    }
}

/// An object's name; parts that could not be read are empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ObjectRef {
    /// Such as `Pod`.
    pub kind: String,
    /// Empty for what has no namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.kind.is_empty() { "object" } else { &self.kind };
        match (self.namespace.is_empty(), self.name.is_empty()) {
            (_, true) => f.write_str(kind),
            (true, false) => write!(f, "{kind} {}", self.name),
            (false, false) => write!(f, "{kind} {}/{}", self.namespace, self.name),
        }
    }
}

/// Why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The text is not YAML.
    #[error("not YAML: {0}")]
    Syntax(String),
    /// A document that is no object.
    #[error("not a Kubernetes object: {0}")]
    NotAnObject(&'static str),
    /// A kind that nothing here acts upon.
    #[error("{0} is not a kind that is acted upon")]
    UnknownKind(String),
    /// The field's value can't be.
    #[error("{0}")]
    Invalid(String),
    /// The value is right, but nothing here can do it.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The field is not acted upon.
    #[error("not acted upon")]
    NotActedUpon,
    /// The same object once more.
    #[error("already defined at {0}")]
    Duplicate(Place),
    /// Another object of the same scope is older and wins.
    #[error("{0} is older and wins")]
    Conflict(ObjectRef),
    /// Another object of the same scope is older and wins for some of what both select.
    #[error("{older} is older and wins for what both select: {shared}")]
    Overlap {
        /// It.
        older: ObjectRef,
        /// What both select.
        shared: Shared,
    },
    /// A reference to what is not there.
    #[error("{0} is not there")]
    Missing(ObjectRef),
}

/// The names of what two objects select, in their order, each once; of many the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shared(BTreeSet<String>);

/// How many names are told.
const NAMED: usize = 3;

impl Extend<String> for Shared {
    fn extend<I: IntoIterator<Item = String>>(&mut self, names: I) {
        self.0.extend(names);
    }
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().take(NAMED).enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name}")?;
        }
        match self.0.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// What follows from a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// The object works; the field has no meaning here.
    Note,
    /// Nothing here acts upon the object: it is another's to enforce.
    Elsewhere,
    /// The object works in part, and what is left is the stricter part.
    Narrowed,
    /// The object holds for a part of what it selects, and another one for the rest.
    Divided,
    /// The object has no effect.
    Refused,
    /// The object is a policy that can't be enforced as written: what it selects is closed until it is mended.
    Closed,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::Elsewhere => "elsewhere",
            Self::Narrowed => "narrowed",
            Self::Divided => "divided",
            Self::Refused => "refused",
            Self::Closed => "closed",
        })
    }
}

/// One thing to tell the author of an object: its condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where the object stands; the default where it is the API that holds it.
    pub place: Place,
    /// Which object.
    pub object: ObjectRef,
    /// The field's path, such as `spec.containers[0].command`; empty where it is the object as a whole.
    pub field: String,
    /// Why.
    pub problem: Problem,
    /// What follows.
    pub effect: Effect,
}

impl Finding {
    /// Of an object: the field, why, and what follows.
    pub(crate) fn of(
        object: ObjectRef,
        place: &Place,
        (field, problem, effect): (impl Into<String>, Problem, Effect),
    ) -> Self {
        Self {
            place: place.clone(),
            object,
            field: field.into(),
            problem,
            effect,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.effect)?;
        if self.place != Place::default() {
            write!(f, "{}: ", self.place)?;
        }
        write!(f, "{}: ", self.object)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        self.problem.fmt(f)
    }
}
