//! What the client can read: JSON, YAML, a table, only metadata; from its `Accept`.
//!
//! Pure. The first acceptable entry that there is wins; protobuf and CBOR are passed over, since every client that
//! asks for them also takes JSON. If nothing fits, the answer is 406 (`what_nobody_can_write_is_not_acceptable`).

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `application/json`.
    Json,
    /// `application/yaml`.
    Yaml,
}

/// What of an object is in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All of it.
    Whole,
    /// A row of a `meta.k8s.io/v1` Table.
    Table,
    /// `PartialObjectMetadata`.
    Metadata,
    /// `PartialObjectMetadataList`.
    MetadataList,
    /// `APIGroupDiscoveryList`, v2.
    AggregatedDiscovery,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// How.
    pub format: Format,
    /// What.
    pub shape: Shape,
}

/// What to answer with for this `Accept` header; `None` is 406.
pub fn negotiate(accept: Option<&str>) -> Option<Accepted> {
    let Some(text) = accept.filter(|text| !text.trim().is_empty()) else {
        return Some(Accepted {
            format: Format::Json,
            shape: Shape::Whole,
        });
    };
    text.split(',').find_map(entry)
}

fn entry(text: &str) -> Option<Accepted> {
    let mut parts = text.split(';').map(str::trim);
    let format = match parts.next()?.to_ascii_lowercase().as_str() {
        "*/*" | "application/*" | "application/json" | "text/plain" | "text/*" => Format::Json,
        "application/yaml" => Format::Yaml,
        _ => return None,
    };
    let (mut kind, mut group, mut version) = ("", "", "");
    for part in parts {
        match part.split_once('=') {
            Some(("as", value)) => kind = value,
            Some(("g", value)) => group = value,
            Some(("v", value)) => version = value,
            Some(("q", value)) if value.parse::<f32>().is_ok_and(|quality| quality <= 0.0) => return None,
            _ => {}
        }
    }
    let shape = match (kind, group, version) {
        ("", ..) => Shape::Whole,
        ("Table", "meta.k8s.io", "v1") => Shape::Table,
        ("PartialObjectMetadata", "meta.k8s.io", "v1") => Shape::Metadata,
        ("PartialObjectMetadataList", "meta.k8s.io", "v1") => Shape::MetadataList,
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2") => Shape::AggregatedDiscovery,
        _ => return None,
    };
    Some(Accepted { format, shape })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(accept: &str, format: Format, shape: Shape) {
        assert_eq!(negotiate(Some(accept)), Some(Accepted { format, shape }), "{accept}");
    }

    #[test]
    fn the_first_that_there_is_wins() {
        check("", Format::Json, Shape::Whole);
        check("application/yaml", Format::Yaml, Shape::Whole);
        check(
            "application/vnd.kubernetes.protobuf,application/json",
            Format::Json,
            Shape::Whole,
        );
        check(
            "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,\
             application/json",
            Format::Json,
            Shape::Table,
        );
        check(
            "application/json;as=Table;v=v1beta1;g=meta.k8s.io, application/json",
            Format::Json,
            Shape::Whole,
        );
        check(
            "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
            Format::Json,
            Shape::MetadataList,
        );
        check(
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json",
            Format::Json,
            Shape::AggregatedDiscovery,
        );
        check("*/*", Format::Json, Shape::Whole);
    }

    #[test]
    fn what_nobody_can_write_is_not_acceptable() {
        assert_eq!(negotiate(Some("application/vnd.kubernetes.protobuf")), None);
        assert_eq!(negotiate(Some("application/json;q=0")), None);
        assert_eq!(negotiate(Some("image/png, text/html")), None);
    }
}
