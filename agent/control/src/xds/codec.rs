//! Requests in, responses out: the messages of incremental xDS, as frames of gRPC.
//!
//! A request is read with its names and versions as parts of the buffer that it came in: a client that comes back reports
//! each resource that it has, a hundred thousand of them.
//!
//! A response is a few bytes of the client's own (type, nonce) before bytes that all clients share: fields of a message
//! may come in any order, and a message in any number of HTTP frames. So a push to a thousand clients is encoded once and
//! is in memory once (`a_response_is_a_message_whatever_its_parts`).

use bytes::{BufMut, Bytes, BytesMut};
use proto::{
    Message,
    discovery::{DeltaDiscoveryResponse, Node, Status},
};
use tonic::codec::{DecodeBuf, Decoder};

use super::{View, push::Chunk};

/// `DeltaDiscoveryRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Request {
    #[prost(message, optional, tag = "1")]
    pub(super) node: Option<Node>,
    #[prost(string, tag = "2")]
    pub(super) type_url: String,
    #[prost(string, repeated, tag = "3")]
    pub(super) subscribe: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub(super) unsubscribe: Vec<String>,
    /// A map on the wire.
    #[prost(message, repeated, tag = "5")]
    pub(super) known: Vec<Known>,
    #[prost(string, tag = "6")]
    pub(super) nonce: String,
    #[prost(message, optional, tag = "7")]
    pub(super) error: Option<Status>,
}

/// A resource that the client has.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Known {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) name: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) version: Bytes,
}

/// Reads requests.
#[derive(Debug, Default)]
pub(super) struct Requests;

impl Decoder for Requests {
    type Item = Request;
    type Error = tonic::Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Request>, tonic::Status> {
        let read = Request::decode(source);
        read.map(Some)
            .map_err(|error| tonic::Status::invalid_argument(format!("not a DeltaDiscoveryRequest: {error}")))
    }
}

/// A response that is ready to go.
#[derive(Debug)]
pub(super) struct Response {
    /// What it answers for.
    pub(super) view: View,
    /// By which the client acknowledges it.
    pub(super) nonce: String,
    /// The state that it is on the way to.
    pub(super) generation: u64,
    /// Whether it is a part of that state, and the rest follows. Said by a `+` behind the generation, so that our agents
    /// show their traffic whole states; who does not know of it takes the parts one by one, as with any server.
    pub(super) more: bool,
    /// What it brings.
    pub(super) chunk: Chunk,
}

/// Below this, one copy is cheaper than many frames.
const COPIED: usize = 16 << 10;

impl Response {
    /// The frames of its gRPC message.
    pub(super) fn frames(&self) -> Vec<Bytes> {
        let head = DeltaDiscoveryResponse {
            system_version_info: format!("{}{}", self.generation, if self.more { "+" } else { "" }),
            type_url: self.view.url().to_owned(),
            nonce: self.nonce.clone(),
            ..Default::default()
        };
        let shared = self.chunk.segments(self.view);
        let shared_len: usize = shared.iter().map(Bytes::len).sum();
        let len = head.encoded_len() + shared_len;
        let copied = if shared_len <= COPIED { shared_len } else { 0 };
        let mut first = BytesMut::with_capacity(5 + head.encoded_len() + copied);
        // Not compressed.
        first.put_u8(0);
        first.put_u32(u32::try_from(len).expect("chunks are bounded far below"));
        head.encode(&mut first).expect("there is room");
        if copied > 0 {
            shared.iter().for_each(|segment| first.put_slice(segment));
            return vec![first.freeze()];
        }
        let shared = shared.into_iter().filter(|segment| !segment.is_empty());
        std::iter::once(first.freeze()).chain(shared).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use proto::discovery::DeltaDiscoveryRequest;

    use super::super::{entry::Entry, push::chunks, testing::workload};
    use super::*;

    #[test]
    fn a_response_is_a_message_whatever_its_parts() {
        for count in [0, 1, 500] {
            let entry = |n: u32| Arc::new(Entry::new(&workload(&n.to_string(), "10.0.0.1", &["ns/s"], n)));
            let puts: Vec<_> = (0..count).map(entry).collect();
            let mut all = chunks(View::Address, &puts, &["gone".into()], 1 << 20);
            let response = Response {
                view: View::Address,
                nonce: "7.1".to_owned(),
                generation: 9,
                more: count == 500,
                chunk: Chunk::Encoded(all.remove(0)),
            };
            let frames = response.frames();
            assert_eq!(frames.len() > 1, count == 500);
            let bytes = frames.concat();
            assert_eq!(bytes[..5], [&[0][..], &(bytes.len() as u32 - 5).to_be_bytes()].concat());
            let message = DeltaDiscoveryResponse::decode(&bytes[5..]).unwrap();
            assert_eq!(
                (message.resources.len() as u32, message.removed_resources.len()),
                (count, 1)
            );
            assert_eq!(
                (message.nonce.as_str(), message.system_version_info.as_str()),
                ("7.1", if count == 500 { "9+" } else { "9" })
            );
            assert_eq!(message.type_url, proto::ADDRESS_TYPE);
        }
    }

    #[test]
    fn a_request_is_read_as_the_protocol_writes_it() {
        let sent = DeltaDiscoveryRequest {
            type_url: proto::ADDRESS_TYPE.to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            resource_names_unsubscribe: vec!["a".to_owned()],
            initial_resource_versions: [("b".to_owned(), "1".to_owned())].into(),
            response_nonce: "n".to_owned(),
            error_detail: Some(Status {
                message: "no".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let read = Request::decode(sent.encode_to_vec().as_slice()).unwrap();
        assert_eq!(
            (read.type_url, read.subscribe, read.unsubscribe),
            (sent.type_url, vec!["*".into()], vec!["a".into()])
        );
        assert_eq!(
            (&read.known[0].name[..], &read.known[0].version[..]),
            (&b"b"[..], &b"1"[..])
        );
        assert_eq!((read.nonce.as_str(), read.error.unwrap().message.as_str()), ("n", "no"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::decode(bytes.as_slice());
        }
    }
}
