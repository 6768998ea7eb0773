//! `/openapi/v2` and `/openapi/v3`: the documents of `schema`, as JSON; the first in protobuf, too, which is all that
//! kubectl takes of it.
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
static MADE: Mutex<Option<HashMap<(String, Form), Document>>> = Mutex::new(None);

/// How clients call the protobuf form of the second version, and how servers do.
const V2_PROTOBUF: [&str; 2] = [
    "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
];

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    Json,
    Protobuf,
}

#[derive(Clone)]
struct Document {
    text: Bytes,
    type_: &'static str,
    tag: HeaderValue,
}

/// The answer, if the path is one of these documents'.
pub fn answer(path: &str, query: &str, headers: &HeaderMap) -> Option<Answer> {
    let place = path.strip_prefix("/openapi/")?.trim_end_matches('/');
    let accept = text(headers, header::ACCEPT);
    let takes = |kinds: &[&str]| kinds.iter().any(|kind| accept.contains(kind));
    let form = match accept.is_empty() || takes(&["json", "*/*", "application/*"]) {
        true => Form::Json,
        false if place == "v2" && takes(&V2_PROTOBUF) => Form::Protobuf,
        // The protobuf forms of the third version are not made: nobody takes only those.
        false => return Some(answer::refusal(&ApiError::not_acceptable("application/json"))),
    };
    let Some(document) = document(place, form) else {
        return Some(answer::refusal(&ApiError::no_such_resource()));
    };
    let tag = document.tag.to_str().unwrap_or_default();
    let has_it = text(headers, header::IF_NONE_MATCH)
        .split(',')
        .any(|known| known.trim().trim_start_matches("W/") == tag);
    let mut answer = match has_it {
        true => answer::json_text(304, ""),
        false => answer::json_text(200, document.text),
    };
    let headers = answer.headers_mut();
    match has_it {
        true => _ = headers.remove(header::CONTENT_TYPE),
        false => _ = headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(document.type_)),
    }
    headers.insert(header::ETAG, document.tag);
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    let hash = query.split('&').find_map(|pair| pair.strip_prefix("hash="));
    if hash == Some(schema::openapi_hash()) {
        let for_good = HeaderValue::from_static("private, max-age=31536000, immutable");
        headers.insert(header::CACHE_CONTROL, for_good);
    }
    Some(answer)
}

fn document(place: &str, form: Form) -> Option<Document> {
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let made = made.get_or_insert_with(HashMap::new);
    let key = (place.to_owned(), form);
    if let Some(document) = made.get(&key) {
        return Some(document.clone());
    }
    let (text, type_) = match form {
        Form::Json => (json(place)?.to_string().into(), "application/json"),
        Form::Protobuf => (schema::openapi_v2_protobuf().into(), V2_PROTOBUF[1]),
    };
    let text: Bytes = text;
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let document = Document {
        text,
        type_,
        tag: HeaderValue::from_str(&format!("\"{:016X}\"", hasher.finish())).ok()?,
    };
    made.insert(key, document.clone());
    Some(document)
}

fn json(place: &str) -> Option<serde_json::Value> {
    Some(match place.split('/').collect::<Vec<_>>().as_slice() {
        ["v2"] => schema::openapi_v2(),
        ["v3"] => schema::openapi_v3_index(),
        ["v3", "api", version] => schema::openapi_v3("", version)?,
        ["v3", "apis", group, version] if !group.is_empty() => schema::openapi_v3(group, version)?,
        _ => return None,
    })
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
    fn the_second_version_is_given_in_protobuf_to_who_takes_nothing_else() {
        let get = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_str(accept).unwrap());
            let answer = answer("/openapi/v2", "", &headers).unwrap();
            let type_ = answer.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
            (
                answer.status().as_u16(),
                type_,
                answer.headers().get(header::ETAG).cloned(),
            )
        };
        for protobuf in V2_PROTOBUF {
            let (status, type_, tag) = get(protobuf);
            assert_eq!((status, &*type_), (200, V2_PROTOBUF[1]));
            let (status, type_, json) = get(&format!("{protobuf}, application/json"));
            assert_eq!((status, &*type_), (200, "application/json"));
            assert_ne!(json, tag, "another form is another document");
        }
        assert_eq!(get("application/xml").0, 406);
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
        assert!(
            made.as_ref()
                .is_none_or(|made| made.keys().all(|(place, _)| place != "v4"))
        );
    }
}
