//! `watch`: what happens to the selected objects, as lines of JSON, for as long as the client stays.
//!
//! ```text
//! initial objects (ADDED) ─► initial-events-end (BOOKMARK) ─► changes … BOOKMARK … ─► end
//!  if asked for                 if asked for                          time is up, the server ends, or ERROR 410
//! ```
//! The stream is polled by its connection and owns no task: a client that goes away takes it along. A client that does
//! not read is held back by the connection's flow control, until the engine's history has gone past it and it is ended
//! with 410 (`engine`). Changes that are there at once leave in one piece.
//!
//! An object that a selector matches no longer is DELETED, one that it matches newly ADDED
//! (`a_change_of_labels_moves_objects_in_and_out`). An expired revision is an ERROR event with status 410, as in
//! Kubernetes.
//!
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{FutureExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tasks::{DrainMode, DrainSignal};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until},
};

use super::{
    accept::Shape,
    answer::{Answer, plain, shown, shown_value},
    call::Call,
    dispatch::Api,
    read, shape,
};
use crate::engine::{ApiError, Event, Expired, Object, Watch};

/// How often a quiet watch says how far it is.
const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
/// How long a watch stays if the client does not say: a little more for some, so that they do not all return together.
const STAY: Duration = Duration::from_secs(1800);
/// How much of what is there leaves in one piece.
const PIECE: usize = 32 << 10;

/// Starts a watch.
pub fn watch(api: &Api, call: Call) -> Result<Answer, ApiError> {
    if call.accepted.shape == Shape::AggregatedDiscovery {
        return Err(ApiError::not_acceptable("application/json"));
    }
    let permit = api.watchers.clone().try_acquire_owned().map_err(|_| {
        ApiError::too_many_requests("there are too many watches on this server: end some, or watch less", 5)
    })?;
    let (initial, since) = start(api, &call)?;
    let kind = call.resource.kind;
    let follows = api.engine.watch(kind.stored(), read::namespace(&call), since);
    let stay = call.query.timeout.unwrap_or_else(|| STAY + jitter());
    let mut bookmarks = interval_at(Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY);
    bookmarks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stream = Stream {
        initial_end: (call.query.initial_events == Some(true) && call.query.bookmarks).then_some(since),
        initial: initial.into(),
        follows,
        until: Instant::now() + stay,
        bookmarks,
        drain: api.drain.clone(),
        headers_shown: false,
        ended: false,
        call,
        _permit: permit,
    };
    let body = stream::unfold(stream, |mut stream| async move {
        let piece = stream.piece().await?;
        Some((Ok::<_, Infallible>(Frame::data(piece)), stream))
    });
    let mut answer = plain(200, "application/json", Bytes::new());
    *answer.body_mut() = StreamBody::new(body).boxed_unsync();
    Ok(answer)
}

/// What to show first, and from where on to follow.
fn start(api: &Api, call: &Call) -> Result<(Vec<Arc<Object>>, u64), ApiError> {
    let query = &call.query;
    let everything = match (query.initial_events, query.revision) {
        (Some(wanted), _) => {
            read::not_in_the_future(api, query.revision)?;
            wanted
        }
        // Of old, a watch from nowhere begins with what there is.
        (None, None | Some(0)) => true,
        (None, Some(since)) => return Ok((Vec::new(), since)),
    };
    if !everything {
        return Ok((
            Vec::new(),
            query
                .revision
                .filter(|since| *since > 0)
                .unwrap_or(api.engine.revision()),
        ));
    }
    let (revision, objects) = api.engine.list(call.resource.kind.stored(), read::namespace(call));
    Ok((objects, revision))
}

/// Up to as much again, by the clock's last digits: it need not be unpredictable.
fn jitter() -> Duration {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Duration::from_millis(u64::from(now.subsec_micros()) * STAY.as_secs() / 1000)
}

struct Stream {
    call: Call,
    initial: VecDeque<Arc<Object>>,
    /// The revision of the initial objects, while their end is still to be said.
    initial_end: Option<u64>,
    follows: Result<Watch, Expired>,
    until: Instant,
    bookmarks: Interval,
    drain: DrainSignal,
    /// Whether a table's columns were said.
    headers_shown: bool,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

/// What a stream has to wait for.
enum Next {
    Event(Result<Event, Expired>),
    Bookmark,
    End,
}

impl Stream {
    /// The next piece; `None` at the end.
    async fn piece(&mut self) -> Option<Bytes> {
        let mut piece = BytesMut::new();
        if self.ended {
            return None;
        }
        while piece.len() < PIECE
            && let Some(object) = self.initial.pop_front()
        {
            if read::selected(&self.call, &object) {
                self.put_object(&mut piece, "ADDED", &object);
            }
        }
        if self.initial.is_empty()
            && let Some(revision) = self.initial_end.take()
        {
            let end = json!({"k8s.io/initial-events-end": "true"});
            self.put_bookmark(&mut piece, revision, Some(end));
        }
        while piece.is_empty() && !self.ended {
            match self.next().await {
                Next::Event(event) => self.put_event(&mut piece, event),
                Next::Bookmark => self.say_where(&mut piece),
                Next::End => {
                    self.say_where(&mut piece);
                    self.ended = true;
                }
            }
        }
        self.put_what_is_there(&mut piece);
        (!piece.is_empty()).then(|| piece.freeze())
    }

    async fn next(&mut self) -> Next {
        let event = async {
            match &mut self.follows {
                Ok(watch) => watch.next().await,
                Err(expired) => Err(*expired),
            }
        };
        tokio::select! {
            biased;
            _ = self.drain.reached(DrainMode::Graceful) => Next::End,
            () = sleep_until(self.until) => Next::End,
            event = event => Next::Event(event),
            _ = self.bookmarks.tick(), if self.call.query.bookmarks => Next::Bookmark,
        }
    }

    /// Adds events that are ready now.
    fn put_what_is_there(&mut self, piece: &mut BytesMut) {
        while piece.len() < PIECE && self.initial.is_empty() && !self.ended {
            let ready = match &mut self.follows {
                Ok(watch) => watch.next().now_or_never(),
                Err(_) => None,
            };
            let Some(event) = ready else { return };
            self.put_event(piece, event);
        }
    }

    fn put_event(&mut self, piece: &mut BytesMut, event: Result<Event, Expired>) {
        match event {
            Ok(event) => {
                if let Some((what, object)) = seen(&self.call, &event) {
                    self.put_object(piece, what, &object);
                }
            }
            Err(expired) => {
                let status = ApiError::from(expired).status();
                put(piece, "ERROR", status.to_string().as_bytes());
                self.ended = true;
            }
        }
    }

    fn put_object(&mut self, piece: &mut BytesMut, what: &str, object: &Object) {
        let (kind, version) = (self.call.resource.kind, self.call.resource.version);
        match self.call.accepted.shape {
            Shape::Table => {
                let rows = vec![shown_value(object, kind, version)];
                let mut table = shape::table(kind, rows, self.call.query.include, Some(object.revision));
                if std::mem::replace(&mut self.headers_shown, true) {
                    table["columnDefinitions"] = Value::Null;
                }
                put(piece, what, table.to_string().as_bytes());
            }
            Shape::Metadata | Shape::MetadataList => {
                let partial = shape::metadata(shown_value(object, kind, version));
                put(piece, what, partial.to_string().as_bytes());
            }
            Shape::Whole | Shape::AggregatedDiscovery => put(piece, what, &shown(object, kind, version)),
        }
    }

    /// Says how far this watch is, if it was asked to and has not fallen behind.
    fn say_where(&mut self, piece: &mut BytesMut) {
        let revision = self.follows.as_mut().ok().and_then(|watch| watch.bookmark());
        if let Some(revision) = revision.filter(|_| self.call.query.bookmarks && self.initial.is_empty()) {
            self.put_bookmark(piece, revision, None);
        }
    }

    fn put_bookmark(&self, piece: &mut BytesMut, revision: u64, annotations: Option<Value>) {
        let (kind, version) = (self.call.resource.kind, self.call.resource.version);
        let (api_version, name) = match self.call.accepted.shape {
            Shape::Table => ("meta.k8s.io/v1".to_owned(), "Table"),
            Shape::Metadata | Shape::MetadataList => ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadata"),
            Shape::Whole | Shape::AggregatedDiscovery => (kind.api_version(version), kind.kind),
        };
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if let Some(annotations) = annotations {
            metadata["annotations"] = annotations;
        }
        let object = json!({"kind": name, "apiVersion": api_version, "metadata": metadata});
        put(piece, "BOOKMARK", object.to_string().as_bytes());
    }
}

fn put(piece: &mut BytesMut, what: &str, object: &[u8]) {
    piece.put(&br#"{"type":""#[..]);
    piece.put(what.as_bytes());
    piece.put(&br#"","object":"#[..]);
    piece.put(object);
    piece.put(&b"}\n"[..]);
}

/// What a change is through a request's selectors.
fn seen(call: &Call, event: &Event) -> Option<(&'static str, Arc<Object>)> {
    let selected = |object: &Object| read::selected(call, object);
    match event {
        Event::Added(object) => selected(object).then(|| ("ADDED", object.clone())),
        Event::Deleted(object) => selected(object).then(|| ("DELETED", object.clone())),
        Event::Modified { object, before } => match (selected(before), selected(object)) {
            (true, true) => Some(("MODIFIED", object.clone())),
            (false, true) => Some(("ADDED", object.clone())),
            (true, false) => Some(("DELETED", last_seen(before, object.revision))),
            (false, false) => None,
        },
    }
}

/// The state that a selector matched last, with the revision of the change that ended this.
fn last_seen(before: &Object, revision: u64) -> Arc<Object> {
    let mut value = before.value();
    value["metadata"]["resourceVersion"] = revision.to_string().into();
    Arc::new(Object {
        revision,
        json: value.to_string().into(),
        ..before.clone()
    })
}
