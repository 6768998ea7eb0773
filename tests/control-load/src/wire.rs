//! The agents' end of the wire: as much of a response as they read, and how long it was.

use anyhow::Result;
use bytes::{Buf, Bytes};
use prost::Message;
use proto::discovery::DeltaDiscoveryRequest;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// As much of a response as every agent reads.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    pub type_url: String,
    #[prost(string, repeated, tag = "6")]
    pub removed: Vec<String>,
    #[prost(string, tag = "5")]
    pub nonce: String,
    #[prost(uint64, tag = "1000")]
    pub size: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Resource {
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(message, optional, tag = "2")]
    pub any: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Any {
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// Requests out, responses in.
pub struct Wire;

impl Codec for Wire {
    type Encode = DeltaDiscoveryRequest;
    type Decode = Response;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Wire {
    type Item = DeltaDiscoveryRequest;
    type Error = Status;

    fn encode(&mut self, request: DeltaDiscoveryRequest, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        request.encode(to).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Wire {
    type Item = Response;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Response>, Status> {
        let size = from.remaining() as u64;
        let response = Response::decode(from).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(Response { size, ..response }))
    }
}
