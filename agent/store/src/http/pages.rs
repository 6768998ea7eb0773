//! Long lists in pages that all show one moment.
//!
//! The first page of a list keeps the whole list (objects are shared, so that costs pointers); `continue` finds it
//! again by kind, namespace and revision. At most [`MOST`] lists are kept, the oldest goes first: what is gone is a
//! 410, and the client lists anew (`a_list_that_is_gone_is_expired`).
//!
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#retrieving-large-results-sets-in-chunks>

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::{
    engine::{ApiError, Object},
    kinds::Kind,
};

/// How many lists are kept.
const MOST: usize = 32;

/// A list at one moment.
#[derive(Clone)]
pub struct Snapshot {
    /// The moment.
    pub revision: u64,
    /// What there was, sorted by namespace and name.
    pub objects: Arc<[Arc<Object>]>,
}

/// Where a list goes on: the revision, and the last object that was shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The moment that the list shows.
    #[serde(rename = "rv")]
    pub revision: u64,
    /// Of the last object.
    pub namespace: String,
    /// Of the last object.
    pub name: String,
}

impl Token {
    /// As a client carries it.
    pub fn encode(&self) -> String {
        // A struct of strings and a number is JSON always.
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    /// Reads what a client brings back.
    pub fn decode(text: &str) -> Result<Self, ApiError> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok();
        let token = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        token.ok_or_else(|| ApiError::bad_request("continue key is not valid: it is not one of this server's"))
    }
}

struct Kept {
    kind: &'static Kind,
    namespace: String,
    snapshot: Snapshot,
}

/// The lists that are kept.
#[derive(Default)]
pub struct Pages(Mutex<VecDeque<Kept>>);

impl Pages {
    /// Keeps a list of which only a part was shown.
    pub fn keep(&self, kind: &'static Kind, namespace: &str, snapshot: &Snapshot) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let there =
            |one: &Kept| one.kind == kind && one.namespace == namespace && one.snapshot.revision == snapshot.revision;
        if kept.iter().any(there) {
            return;
        }
        if kept.len() == MOST {
            kept.pop_front();
        }
        kept.push_back(Kept {
            kind,
            namespace: namespace.to_owned(),
            snapshot: snapshot.clone(),
        });
    }

    /// The list that a token goes on with.
    pub fn find(&self, kind: &'static Kind, namespace: &str, revision: u64) -> Result<Snapshot, ApiError> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept
            .iter()
            .find(|one| one.kind == kind && one.namespace == namespace && one.snapshot.revision == revision);
        found.map(|one| one.snapshot.clone()).ok_or_else(|| {
            ApiError::gone(
                "The provided continue parameter is too old to display a consistent list result. You must start a \
                 new list without the continue parameter.",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_plural;

    #[test]
    fn a_list_that_is_gone_is_expired() {
        let pods = by_plural("", "pods").unwrap();
        let pages = Pages::default();
        for revision in 0..=MOST as u64 {
            let objects = Arc::new([]) as Arc<[Arc<Object>]>;
            pages.keep(pods, "", &Snapshot { revision, objects });
        }
        assert_eq!(pages.find(pods, "", 0).err().unwrap().code, 410);
        assert!(pages.find(pods, "", 1).is_ok());
        assert!(pages.find(pods, "shop", 1).is_err());
    }

    #[test]
    fn tokens_are_read_back_and_others_refused() {
        let token = Token {
            revision: 7,
            namespace: "a".into(),
            name: "b".into(),
        };
        assert_eq!(Token::decode(&token.encode()).unwrap(), token);
        for bad in ["", "x", "!!", "bm9wZQ"] {
            assert_eq!(Token::decode(bad).unwrap_err().code, 400);
        }
    }
}
