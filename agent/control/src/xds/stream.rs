//! The task of one stream, and the body of its response. See `server`.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use hyper::body::Frame;
use tasks::DrainMode;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tonic::{Status, body::Body, codec::Streaming};

use super::{
    View,
    acknowledged::{Connected, Counters},
    admission::Waiting,
    codec::{Request, Response},
    connection::Peer,
    server::{Shared, leaving},
    session::{Event, Session},
};

/// A client and its task.
pub(super) struct Stream {
    pub(super) shared: Arc<Shared>,
    pub(super) session: Session,
    pub(super) connected: Connected,
    pub(super) outgoing: Outgoing,
    pub(super) states: watch::Receiver<u64>,
    /// Who it is, for the log.
    pub(super) label: String,
}

/// Why a stream ends.
#[derive(Debug)]
enum End {
    /// The client went.
    Gone,
    /// It said something that can't be read, or the connection failed.
    Broken(Status),
    /// It is told why.
    Told(Status),
    /// It does not take what it is sent: there is no way to tell it.
    Stuck,
}

impl Stream {
    /// Until the stream ends.
    pub(super) async fn run(mut self, mut requests: Streaming<Request>, waiting: Waiting) {
        let drain = self.shared.drain.clone();
        let parts = self.outgoing.parts.clone();
        let end = tokio::select! {
            end = self.serve(&mut requests, waiting) => end,
            () = parts.closed() => End::Gone,
            () = drained(drain) => End::Told(leaving()),
        };
        match end {
            End::Gone => tracing::debug!("xds: {} is gone", self.label),
            End::Broken(status) => {
                tracing::info!("xds: {}: the stream broke: {}", self.label, status.message());
                self.outgoing.end(status);
            }
            End::Told(status) => {
                tracing::info!("xds: {}: the stream is ended: {}", self.label, status.message());
                self.outgoing.end(status);
            }
            End::Stuck => {
                Counters::count(&self.shared.acknowledged.counters.dropped, 1);
                let waited = self.shared.config.acknowledge.as_secs_f32();
                tracing::warn!("xds: {} is dropped: it acknowledged nothing for {waited} s", self.label);
                self.outgoing.cut();
            }
        }
    }

    async fn serve(&mut self, requests: &mut Streaming<Request>, waiting: Waiting) -> End {
        // Nothing of what it says is read before its turn.
        let mut place: Option<OwnedSemaphorePermit> = Some(waiting.turn().await);
        let first = Instant::now() + self.shared.config.first;
        match tokio::time::timeout_at(first.into(), requests.message()).await {
            Ok(Ok(Some(request))) => {
                if let Some(end) = self.request(request) {
                    return end;
                }
            }
            Ok(Ok(None)) => return End::Gone,
            Ok(Err(status)) => return End::Broken(status),
            Err(_) => return End::Told(Status::deadline_exceeded("no request came")),
        }
        loop {
            if let Err(end) = self.respond() {
                return end;
            }
            let now = Instant::now();
            if now >= first || self.session.acknowledged() > 0 {
                place = None;
            }
            let first = place.is_some().then_some(first);
            let overdue = self.session.overdue();
            let wakes = [first, overdue, self.session.wakes(now)].into_iter().flatten().min();
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => if let Some(end) = self.request(request) {
                        return end;
                    },
                    Ok(None) => return End::Gone,
                    Err(status) => return End::Broken(status),
                },
                changed = self.states.changed() => if changed.is_err() {
                    return End::Told(leaving());
                },
                () = sleep_until(wakes) => if overdue.is_some_and(|overdue| overdue <= Instant::now()) {
                    return End::Stuck;
                },
            }
        }
    }

    fn request(&mut self, request: Request) -> Option<End> {
        if let Some(node) = &request.node
            && !node.id.is_empty()
        {
            let id: String = node.id.chars().take(256).collect();
            self.connected.named(&id);
            if !self.label.ends_with(&id) {
                self.label = format!("{} {id}", self.label);
                tracing::info!("xds: {} is connected", self.label);
            }
        }
        match self.session.request(request, Instant::now()) {
            Event::Understood => {}
            Event::Accepted(view, chunk) => self.connected.accepted(view, &chunk),
            Event::Refused(refusal) => {
                let names = refusal.resources.join(", ");
                tracing::warn!("xds: {} refuses {names}: {}", self.label, refusal.message);
                let generation = *self.states.borrow();
                self.connected.refused(refusal, generation);
            }
            Event::UnknownType(url) => {
                let url: String = url.chars().take(128).collect();
                tracing::debug!("xds: {} asks for {url}, which is not served", self.label);
            }
            Event::TooManyNames => {
                let most = self.shared.config.names;
                return Some(End::Told(Status::resource_exhausted(format!("more than {most} names"))));
            }
        }
        self.connected.acknowledged(self.session.acknowledged());
        None
    }

    fn respond(&mut self) -> Result<(), End> {
        self.states.borrow_and_update();
        let state = self.shared.cache.snapshot();
        while let Some(response) = self.session.next(&state, &self.shared.pushes, Instant::now()) {
            let (puts, removed) = response.chunk.counts();
            tracing::debug!(
                "xds: {} is sent {puts} {:?}, {removed} removed",
                self.label,
                response.view
            );
            let counters = &self.shared.acknowledged.counters;
            Counters::count(&counters.responses, 1);
            Counters::count(
                &counters.bytes,
                self.outgoing.send(&response).map_err(|Full| End::Stuck)?,
            );
        }
        self.connected.acknowledged(self.session.acknowledged());
        Ok(())
    }
}

async fn drained(mut drain: tasks::DrainSignal) {
    drain.reached(DrainMode::Graceful).await;
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}

/// What the task hands to the body.
enum Part {
    Response(Vec<Bytes>),
    End(Status),
    Cut,
}

/// More responses than may be in flight: can't happen while each is acknowledged before the next.
struct Full;

/// The task's end of the response.
pub(super) struct Outgoing {
    parts: mpsc::Sender<Part>,
    peer: Option<Peer>,
}

impl Outgoing {
    /// To a peer, with the response that carries it.
    pub(super) fn new(peer: Option<Peer>) -> (Self, http::Response<Body>) {
        // One response of each view, and the end.
        let (parts, receiver) = mpsc::channel(View::ALL.len() + 1);
        let mut response = http::Response::new(Body::new(Frames {
            parts: receiver,
            frames: VecDeque::new(),
            ended: false,
        }));
        let grpc = http::HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
        (Self { parts, peer }, response)
    }

    fn send(&self, response: &Response) -> Result<usize, Full> {
        let frames = response.frames();
        let bytes = frames.iter().map(Bytes::len).sum();
        match self.parts.try_send(Part::Response(frames)) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(Full),
            // `run` sees that it is closed.
            _ => Ok(bytes),
        }
    }

    fn end(&self, status: Status) {
        let _ = self.parts.try_send(Part::End(status));
    }

    fn cut(&self) {
        let _ = self.parts.try_send(Part::Cut);
        if let Some(peer) = &self.peer {
            peer.cut();
        }
    }
}

/// The body: frames of the responses, one after the other, and the status at the end.
struct Frames {
    parts: mpsc::Receiver<Part>,
    frames: VecDeque<Bytes>,
    ended: bool,
}

impl hyper::body::Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(frame))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            match ready!(self.parts.poll_recv(cx)) {
                Some(Part::Response(frames)) => self.frames = frames.into(),
                Some(Part::Cut) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(io::Error::other("the client takes nothing"))));
                }
                Some(Part::End(status)) => return self.trailers(&status),
                None => return self.trailers(&Status::ok("")),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

impl Frames {
    fn trailers(&mut self, status: &Status) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.ended = true;
        let mut trailers = http::HeaderMap::new();
        // A status with a header that can't be written ends the stream without one.
        let _ = status.add_header(&mut trailers);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
