//! `/openapi/v2` and `/openapi/v3`: the documents of `schema`, as JSON.
//!
//! Each is made when somebody first asks for it, and kept as text from then on: kubectl asks for one before every
//! `apply`. Each has an `ETag`, so that who has it already gets a 304 (`who_has_a_document_is_not_sent_it_again`); under
//! the `hash` of the index it may be kept for good, since another document has another hash.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};

use super::{
    answer::{self, Answer},
    call::text,
};
use crate::{engine::ApiError, schema};

/// The documents that were asked for, by their place. Bounded: there are only so many.
static MADE: Mutex<Option<HashMap<String, Document>>> = Mutex::new(None);

#[derive(Clone)]
struct Document {
    text: Bytes,
    tag: HeaderValue,
}

/// The answer, if the path is one of these documents'.
pub fn answer(path: &str, query: &str, headers: &HeaderMap) -> Option<Answer> {
    let place = path.strip_prefix("/openapi/")?.trim_end_matches('/');
    let Some(document) = document(place) else {
        return Some(answer::refusal(&ApiError::no_such_resource()));
    };
    // The protobuf forms are not made: who takes only those has to do without.
    let accept = text(headers, header::ACCEPT);
    let known = ["json", "*/*", "application/*"];
    if !accept.is_empty() && !known.iter().any(|known| accept.contains(known)) {
        return Some(answer::refusal(&ApiError::not_acceptable("application/json")));
    }
    let tag = document.tag.to_str().unwrap_or_default();
    let has_it = text(headers, header::IF_NONE_MATCH)
        .split(',')
        .any(|known| known.trim().trim_start_matches("W/") == tag);
    let mut answer = if has_it {
        let mut answer = answer::json_text(304, "");
        answer.headers_mut().remove(header::CONTENT_TYPE);
        answer
    } else {
        answer::json_text(200, document.text)
    };
    let headers = answer.headers_mut();
    headers.insert(header::ETAG, document.tag);
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    let hash = query.split('&').find_map(|pair| pair.strip_prefix("hash="));
    if hash == Some(schema::openapi_hash()) {
        let for_good = HeaderValue::from_static("private, max-age=31536000, immutable");
        headers.insert(header::CACHE_CONTROL, for_good);
    }
    Some(answer)
}

fn document(place: &str) -> Option<Document> {
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let made = made.get_or_insert_with(HashMap::new);
    if let Some(document) = made.get(place) {
        return Some(document.clone());
    }
    let value = match place.split('/').collect::<Vec<_>>().as_slice() {
        ["v2"] => schema::openapi_v2(),
        ["v3"] => schema::openapi_v3_index(),
        ["v3", "api", version] => schema::openapi_v3("", version)?,
        ["v3", "apis", group, version] if !group.is_empty() => schema::openapi_v3(group, version)?,
        _ => return None,
    };
    let text = value.to_string();
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let document = Document {
        text: text.into(),
        tag: HeaderValue::from_str(&format!("\"{:016X}\"", hasher.finish())).ok()?,
    };
    made.insert(place.to_owned(), document.clone());
    Some(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str, query: &str, known: &str) -> Answer {
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_NONE_MATCH, HeaderValue::from_str(known).unwrap());
        answer(path, query, &headers).unwrap()
    }

    #[test]
    fn who_has_a_document_is_not_sent_it_again() {
        for path in ["/openapi/v2", "/openapi/v3", "/openapi/v3/apis/apps/v1"] {
            let first = get(path, "", "");
            assert_eq!(first.status(), 200, "{path}");
            let tag = first.headers()[header::ETAG].to_str().unwrap().to_owned();
            for known in [tag.clone(), format!("W/{tag}, \"x\"")] {
                assert_eq!(get(path, "", &known).status(), 304, "{path}");
            }
            assert_eq!(get(path, "", "\"other\"").status(), 200, "{path}");
        }
        let hash = format!("hash={}", schema::openapi_hash());
        let kept = get("/openapi/v3/api/v1", &hash, "");
        assert!(
            kept.headers()[header::CACHE_CONTROL]
                .to_str()
                .unwrap()
                .contains("immutable")
        );
        let other = get("/openapi/v3/api/v1", "hash=0", "");
        assert!(
            other.headers()[header::CACHE_CONTROL]
                .to_str()
                .unwrap()
                .contains("no-cache")
        );
    }

    #[test]
    fn what_is_not_there_is_not_kept() {
        for path in [
            "/openapi/v4",
            "/openapi/v3/apis/x/v1",
            "/openapi/v3/apis//v1",
            "/openapi/",
        ] {
            assert_eq!(get(path, "", "").status(), 404, "{path}");
        }
        let made = MADE.lock().unwrap();
        assert!(made.as_ref().is_none_or(|made| made.keys().all(|place| place != "v4")));
    }
}
