//! How one value of an object is merged and owned.
//!
//! A walk over an object starts at [`Node::of_kind`] and goes down with [`Node::field`] and [`Node::element`]; what the
//! descriptions don't know is [`Node::Untyped`]: maps merge, lists are replaced, as Kubernetes does with types that it
//! deduces.

use serde_json::Value;

use super::{Field, ListKind, Shape, Type, document, root};
use crate::kinds::Kind;

/// What the descriptions say of a value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Node {
    /// Nothing.
    Untyped,
    /// Owned and replaced as a whole.
    Leaf,
    /// A struct, field by field.
    Struct(&'static Type),
    /// A map, key by key.
    Map(&'static Shape),
    /// A list of scalars, each by itself.
    Set,
    /// A list of structs, told apart by these keys.
    Keyed(&'static [&'static str], &'static Shape),
}

impl Node {
    /// A whole object.
    pub fn of_kind(kind: &Kind) -> Self {
        root(kind).map_or(Self::Untyped, Self::Struct)
    }

    fn of_field(field: &'static Field) -> Self {
        if field.atomic {
            return Self::Leaf;
        }
        match (&field.shape, &field.list) {
            (Shape::List(element), ListKind::Map(keys)) => Self::Keyed(keys, element),
            (Shape::List(_), ListKind::Set) => Self::Set,
            (shape, _) => Self::of_shape(shape),
        }
    }

    /// A value of a shape; lists are atomic, since only a field says otherwise.
    pub fn of_shape(shape: &'static Shape) -> Self {
        match shape {
            Shape::Scalar(_) | Shape::List(_) => Self::Leaf,
            Shape::Any => Self::Untyped,
            Shape::Map(element) => Self::Map(element),
            Shape::Struct(at) => match document().types.get(*at) {
                Some(type_) if !type_.atomic => Self::Struct(type_),
                _ => Self::Leaf,
            },
        }
    }

    /// What is under a name in a map or struct.
    pub fn field(self, name: &str) -> Self {
        match self {
            Self::Struct(type_) => type_.fields.get(name).map_or(Self::Untyped, Self::of_field),
            Self::Map(shape) => Self::of_shape(shape),
            _ => Self::Untyped,
        }
    }

    /// An element of a list.
    pub fn element(self) -> Self {
        match self {
            Self::Keyed(_, shape) => Self::of_shape(shape),
            _ => Self::Leaf,
        }
    }

    /// Whether a name is a field that the descriptions know.
    pub fn knows(self, name: &str) -> bool {
        matches!(self, Self::Struct(type_) if type_.fields.contains_key(name))
    }

    /// Whether a value of this kind is taken apart into its fields.
    pub fn splits_maps(self) -> bool {
        matches!(self, Self::Untyped | Self::Struct(_) | Self::Map(_))
    }

    /// Whether a value of this kind is taken apart into its elements.
    pub fn splits_lists(self) -> bool {
        matches!(self, Self::Set | Self::Keyed(..))
    }

    /// What a key of an element is when it is left out.
    pub fn default(self, key: &str) -> Option<Value> {
        let Self::Keyed(_, Shape::Struct(at)) = self else {
            return None;
        };
        let field = document().types.get(*at)?.fields.get(key)?;
        field.default.map(Value::from)
    }
}
