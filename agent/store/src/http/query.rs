//! What the query string asks for, checked once at the door.
//!
//! Pure. Unknown parameters are passed over, as Kubernetes does; known ones that can't be read are a 400 that names
//! them (`a_parameter_that_cannot_be_read_is_named`), and so are combinations that have no meaning
//! (`combinations_without_meaning_are_refused`).
//!
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions>

use std::time::Duration;

use super::selector::{Fields, Labels};
use crate::{engine::ApiError, engine::Propagation, kinds::Kind};

/// How old or new what is shown has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// This revision.
    Exact,
    /// This revision or a later one.
    NotOlderThan,
}

/// What becomes of fields that the kind does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validation {
    /// They are passed over in silence.
    Ignore,
    /// The answer warns.
    Warn,
    /// The request is refused.
    Strict,
}

/// How much of each object a table's rows carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// Its metadata.
    Metadata,
    /// All.
    Object,
}

/// The parameters of a request for resources.
#[derive(Clone, Debug, PartialEq)]
pub struct Query {
    /// `labelSelector`.
    pub labels: Labels,
    /// `fieldSelector`.
    pub fields: Fields,
    /// `limit`; 0 is none.
    pub limit: usize,
    /// `continue`.
    pub next: String,
    /// `resourceVersion`; `None` where nothing is said.
    pub revision: Option<u64>,
    /// `resourceVersionMatch`.
    pub revision_match: Option<Match>,
    /// `watch`.
    pub watch: bool,
    /// `allowWatchBookmarks`.
    pub bookmarks: bool,
    /// `sendInitialEvents`.
    pub initial_events: Option<bool>,
    /// `timeoutSeconds`.
    pub timeout: Option<Duration>,
    /// `dryRun=All`.
    pub dry_run: bool,
    /// `fieldManager`.
    pub manager: String,
    /// `force`.
    pub force: bool,
    /// `fieldValidation`.
    pub validation: Validation,
    /// `includeObject`.
    pub include: IncludeObject,
    /// `propagationPolicy`.
    pub propagation: Option<Propagation>,
    /// `gracePeriodSeconds`.
    pub grace_period: Option<i64>,
}

/// The longest `timeoutSeconds` that means anything: a watch ends after a day at the latest.
const LONGEST: u64 = 24 * 3600;
/// The longest name of a field manager.
const MAX_MANAGER: usize = 128;

impl Query {
    /// Reads the query string of a request for this kind.
    pub fn parse(text: &str, kind: &Kind) -> Result<Self, ApiError> {
        let pairs = Pairs(form_urlencoded::parse(text.as_bytes()).into_owned().collect());
        let selector = |error: super::selector::SelectorError| ApiError::bad_request(error.to_string());
        let query = Self {
            labels: Labels::parse(pairs.get("labelSelector")).map_err(selector)?,
            fields: Fields::parse(pairs.get("fieldSelector"), kind.group, kind.plural).map_err(selector)?,
            limit: pairs.number("limit")?.unwrap_or(0),
            next: pairs.get("continue").to_owned(),
            revision: pairs.number("resourceVersion")?,
            revision_match: pairs.one_of(
                "resourceVersionMatch",
                &[("Exact", Match::Exact), ("NotOlderThan", Match::NotOlderThan)],
            )?,
            watch: pairs.flag("watch")?.unwrap_or(false),
            bookmarks: pairs.flag("allowWatchBookmarks")?.unwrap_or(false),
            initial_events: pairs.flag("sendInitialEvents")?,
            timeout: pairs
                .number("timeoutSeconds")?
                .filter(|seconds: &u64| *seconds > 0)
                .map(|seconds| Duration::from_secs(seconds.min(LONGEST))),
            dry_run: pairs.one_of("dryRun", &[("All", true)])?.unwrap_or(false),
            manager: pairs.get("fieldManager").to_owned(),
            force: pairs.flag("force")?.unwrap_or(false),
            validation: pairs
                .one_of(
                    "fieldValidation",
                    &[
                        ("Ignore", Validation::Ignore),
                        ("Warn", Validation::Warn),
                        ("Strict", Validation::Strict),
                    ],
                )?
                .unwrap_or(Validation::Warn),
            include: pairs
                .one_of(
                    "includeObject",
                    &[
                        ("None", IncludeObject::None),
                        ("Metadata", IncludeObject::Metadata),
                        ("Object", IncludeObject::Object),
                    ],
                )?
                .unwrap_or(IncludeObject::Metadata),
            propagation: pairs.one_of(
                "propagationPolicy",
                &[
                    ("Orphan", Propagation::Orphan),
                    ("Background", Propagation::Background),
                    ("Foreground", Propagation::Foreground),
                ],
            )?,
            grace_period: pairs.number("gracePeriodSeconds")?,
        };
        query.check()?;
        Ok(query)
    }

    fn check(&self) -> Result<(), ApiError> {
        let refuse = |field: &str, why: &str| Err(ApiError::bad_request(format!("{field}: Forbidden: {why}")));
        if self.manager.len() > MAX_MANAGER || self.manager.chars().any(char::is_control) {
            return refuse("fieldManager", "it is a printable name of at most 128 bytes");
        }
        if self.watch {
            if self.initial_events.is_some() && self.revision_match != Some(Match::NotOlderThan) {
                return refuse(
                    "resourceVersionMatch",
                    "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
                );
            }
            if self.initial_events.is_none() && self.revision_match.is_some() {
                return refuse(
                    "resourceVersionMatch",
                    "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
                );
            }
            return Ok(());
        }
        if self.initial_events.is_some() {
            return refuse("sendInitialEvents", "sendInitialEvents is forbidden for list");
        }
        match self.revision_match {
            Some(_) if self.revision.is_none() => refuse(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ),
            Some(_) if !self.next.is_empty() => refuse(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden when continue is provided",
            ),
            Some(Match::Exact) if self.revision == Some(0) => refuse(
                "resourceVersionMatch",
                "resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"",
            ),
            _ => Ok(()),
        }
    }
}

struct Pairs(Vec<(String, String)>);

impl Pairs {
    fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value)
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let text = self.get(name);
        if text.is_empty() {
            return Ok(None);
        }
        text.parse()
            .map(Some)
            .map_err(|_| ApiError::bad_request(format!("{name}: Invalid value: {text:?}: it is not a number")))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        // `?watch` alone is a yes.
        let given = self
            .0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str());
        match given {
            None => Ok(None),
            Some("" | "1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
            Some(text) => Err(ApiError::bad_request(format!(
                "{name}: Invalid value: {text:?}: it is true or false"
            ))),
        }
    }

    fn one_of<T: Copy>(&self, name: &str, known: &[(&str, T)]) -> Result<Option<T>, ApiError> {
        let text = self.get(name);
        if text.is_empty() {
            return Ok(None);
        }
        let found = known.iter().find(|(word, _)| *word == text);
        found.map(|(_, value)| Some(*value)).ok_or_else(|| {
            let words: Vec<String> = known.iter().map(|(word, _)| format!("{word:?}")).collect();
            let words = words.join(", ");
            ApiError::bad_request(format!(
                "{name}: Unsupported value: {text:?}: supported values: {words}"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_plural;

    fn parse(text: &str) -> Result<Query, String> {
        Query::parse(text, by_plural("", "pods").unwrap()).map_err(|error| error.message)
    }

    #[test]
    fn parameters_mean_what_kubernetes_says() {
        let query = parse("labelSelector=app%3Dweb&limit=5&resourceVersion=7&dryRun=All&force=true&watch").unwrap();
        assert!(query.watch && query.dry_run && query.force && !query.labels.is_empty());
        assert_eq!((query.limit, query.revision), (5, Some(7)));
        let query = parse("unknown=1&timeoutSeconds=9&fieldSelector=metadata.name%3Da").unwrap();
        assert_eq!(query.timeout, Some(Duration::from_secs(9)));
        assert!(query.fields.matches("shop", "a", || unreachable!()));
        assert_eq!(query.validation, Validation::Warn);
    }

    #[test]
    fn a_parameter_that_cannot_be_read_is_named() {
        for text in [
            "limit=x",
            "limit=-1",
            "resourceVersion=abc",
            "watch=maybe",
            "dryRun=Some",
            "fieldValidation=strict",
            "propagationPolicy=x",
            "resourceVersionMatch=x",
            "gracePeriodSeconds=1s",
            "fieldManager=%00",
        ] {
            let name = text.split('=').next().unwrap();
            let error = parse(text).unwrap_err();
            assert!(error.contains(name), "{text}: {error}");
        }
        assert!(parse("labelSelector=a%20b").is_err() && parse("fieldSelector=spec.x%3D1").is_err());
    }

    #[test]
    fn combinations_without_meaning_are_refused() {
        for text in [
            "resourceVersionMatch=Exact",
            "resourceVersionMatch=Exact&resourceVersion=0",
            "resourceVersionMatch=NotOlderThan&resourceVersion=1&continue=x",
            "sendInitialEvents=true",
            "watch=true&sendInitialEvents=true",
            "watch=true&resourceVersionMatch=NotOlderThan",
        ] {
            assert!(parse(text).unwrap_err().contains("orbidden"), "{text}");
        }
        assert!(parse("watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan").is_ok());
    }
}
