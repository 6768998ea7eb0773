//! DNS messages, as far as the proxy has to read and write them.
//!
//! What it answers itself are questions for A and AAAA; all else is [`Read::Other`] and passed on byte by byte, so nothing
//! of it is decoded here (`what_is_not_ours_is_told_apart_by_its_header_alone`). Whatever the bytes are, nothing panics
//! (`any_bytes_are_read_or_refused`, and the fuzz target `dns_message`).

use std::{collections::HashSet, net::IpAddr, time::Duration};

use hickory_proto::{
    op::{Edns, Message, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME},
    },
    serialize::binary::{BinDecodable, BinDecoder},
};

/// The length of a header.
const HEADER: usize = 12;

/// What may be sent over UDP to a client that does not say more (RFC 1035).
const PLAIN_UDP: usize = 512;

/// What we say that we take over UDP, and send at most: our datagrams do not leave the pod, but some resolvers' buffers
/// hold no more.
const OUR_UDP: u16 = 4096;

/// What a message over TCP holds at most.
const TCP: usize = u16::MAX as usize;

const QR: u8 = 0x80;
const RD: u8 = 0x01;
const CD: u8 = 0x10;

/// How a message came, and so what its answer may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// With its length before it.
    Tcp,
}

/// The family that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// A.
    V4,
    /// AAAA.
    V6,
}

impl Family {
    /// Whether an address is of it.
    pub fn has(self, ip: &IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }
}

/// What a client sent.
#[derive(Debug)]
pub enum Read {
    /// A question that the mesh may know the answer to.
    Address(Question),
    /// Anything else: for the name server.
    Other,
    /// Not a query. With what is to be answered, if anything.
    Malformed(Option<Vec<u8>>),
}

/// A question for addresses.
#[derive(Debug)]
pub struct Question {
    /// The name in lower case, without a final dot.
    pub host: String,
    /// Which addresses.
    pub family: Family,
}

/// Reads the header and, where it may be ours, the question.
pub fn read(bytes: &[u8]) -> Read {
    let Some(header) = bytes.first_chunk::<HEADER>() else {
        return Read::Malformed(None);
    };
    if header[2] & QR != 0 {
        // Never answer an answer.
        return Read::Malformed(None);
    }
    let opcode = (header[2] >> 3) & 0xf;
    let counts = [4, 6, 8].map(|at| u16::from_be_bytes([header[at], header[at + 1]]));
    if opcode != 0 || counts != [1, 0, 0] {
        return Read::Other;
    }
    let Some(question) = question(bytes) else {
        return Read::Malformed(Some(failure(bytes, ResponseCode::FormErr)));
    };
    let family = match question.query_type() {
        RecordType::A => Family::V4,
        RecordType::AAAA => Family::V6,
        _ => return Read::Other,
    };
    match host(question.name()) {
        Some(host) if question.query_class() == DNSClass::IN => Read::Address(Question { host, family }),
        _ => Read::Other,
    }
}

/// The first question.
fn question(bytes: &[u8]) -> Option<Query> {
    let mut decoder = BinDecoder::new(bytes);
    decoder.read_slice(HEADER).ok()?;
    Query::read(&mut decoder).ok()
}

/// A name in lower case, without a final dot; none if it has characters that no host name has.
fn host(name: &Name) -> Option<String> {
    let mut host = String::with_capacity(name.len());
    for label in name.iter() {
        if !label
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte))
        {
            return None;
        }
        if !host.is_empty() {
            host.push('.');
        }
        host.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
    (!host.is_empty()).then_some(host)
}

/// What is answered to a question for addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Answer {
    /// The name that the asked one stands for, where that is another.
    pub canonical: Option<String>,
    /// Addresses of the family that was asked for; none: the name is known and has none.
    pub addresses: Vec<IpAddr>,
}

/// Writes an answer; over UDP what does not fit is left out and said to be. None: the query is signed, or is not what
/// [`read`] took it for; the name server is to answer it.
pub fn answer(query: &[u8], answer: &Answer, ttl: Duration, transport: Transport) -> Option<Vec<u8>> {
    let Ok(query_message) = Message::from_vec(query) else {
        return Some(failure(query, ResponseCode::FormErr));
    };
    let question = query_message.queries.first()?;
    if query_message.signature.is_some() {
        return None;
    }
    let mut response = Message::response(query_message.metadata.id, OpCode::Query);
    response.metadata.recursion_desired = query_message.metadata.recursion_desired;
    response.metadata.checking_disabled = query_message.metadata.checking_disabled;
    response.metadata.recursion_available = true;
    response.metadata.authoritative = true;
    response.add_query(question.clone());
    let mut limit = TCP;
    if transport == Transport::Udp {
        limit = PLAIN_UDP;
    }
    let mut known = true;
    if let Some(asked) = &query_message.edns {
        if transport == Transport::Udp {
            limit = usize::from(asked.max_payload().min(OUR_UDP)).max(PLAIN_UDP);
        }
        known = asked.version() == 0;
        let mut edns = Edns::new();
        edns.set_version(0);
        edns.set_max_payload(OUR_UDP);
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        response.set_edns(edns);
    }
    if known {
        add_records(&mut response, question.name(), answer, ttl);
    } else {
        response.metadata.response_code = ResponseCode::BADVERS;
        response.metadata.authoritative = false;
    }
    fitting(response, limit)
}

fn add_records(response: &mut Message, asked: &Name, answer: &Answer, ttl: Duration) {
    let ttl = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX);
    let mut owner = asked.clone();
    // A host name that is no name in DNS can't be asked for either.
    if let Some(canonical) = answer.canonical.as_ref().and_then(|name| name_of(name)) {
        response.add_answer(Record::from_rdata(owner, ttl, RData::CNAME(CNAME(canonical.clone()))));
        owner = canonical;
    }
    for address in &answer.addresses {
        let data = match address {
            IpAddr::V4(ip) => RData::A(A(*ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(*ip)),
        };
        response.add_answer(Record::from_rdata(owner.clone(), ttl, data));
    }
}

fn name_of(host: &str) -> Option<Name> {
    let mut name = Name::from_ascii(host).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// Encodes with as many records as there is room for.
fn fitting(mut response: Message, limit: usize) -> Option<Vec<u8>> {
    let bytes = response.to_vec().ok()?;
    if bytes.len() <= limit {
        return Some(bytes);
    }
    response.metadata.truncation = true;
    let records = std::mem::take(&mut response.answers);
    let empty = response.to_vec().ok()?.len();
    // All but the first one or two are of the same length, whose owner is a pointer.
    let each = match records.last().map(|record| &record.data) {
        Some(RData::AAAA(_)) => 28,
        _ => 16,
    };
    let room = limit.saturating_sub(empty) / each;
    response.answers = records.into_iter().take(room).collect();
    loop {
        let bytes = response.to_vec().ok()?;
        if bytes.len() <= limit || response.answers.is_empty() {
            return Some(bytes);
        }
        response.answers.pop();
    }
}

/// An answer that says only that there is none, with the question where it can be read. Of anything that is as long as
/// a header.
pub fn failure(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER);
    let at = |index: usize| query.get(index).copied().unwrap_or_default();
    let flags = (at(2) & (0x78 | RD)) | QR;
    bytes.extend([at(0), at(1), flags, QR | (at(3) & CD) | (code.low() & 0xf)]);
    let question = (at(4) == 0 && at(5) == 1).then(|| question_bytes(query)).flatten();
    bytes.extend([0, u8::from(question.is_some()), 0, 0, 0, 0, 0, 0]);
    bytes.extend(question.unwrap_or_default());
    bytes
}

/// The first question as it was written; none where it is compressed or broken.
fn question_bytes(query: &[u8]) -> Option<&[u8]> {
    let mut decoder = BinDecoder::new(query);
    decoder.read_slice(HEADER).ok()?;
    Query::read(&mut decoder).ok()?;
    query.get(HEADER..decoder.index())
}

/// Whether these bytes answer a query: the same id, and an answer to that question, where it says to which. An id alone is
/// no proof: the pod chose it, and could answer another question with it.
pub fn answers(query: &[u8], response: &[u8]) -> bool {
    if response.len() < HEADER || query.len() < HEADER || response[..2] != query[..2] || response[2] & QR == 0 {
        return false;
    }
    let asked = |bytes: &[u8]| match bytes[4..6] {
        [0, 0] => None,
        _ => question(bytes),
    };
    let answered = asked(response);
    answered.is_none() || answered == asked(query)
}

/// What an answer to a question for addresses tells: the name that was asked, its addresses at the end of the chain of
/// CNAMEs, and for how long.
pub fn learned(response: &[u8]) -> Option<(String, Vec<IpAddr>, Duration)> {
    let message = Message::from_vec(response).ok()?;
    if message.metadata.response_code != ResponseCode::NoError {
        return None;
    }
    let [question] = message.queries.as_slice() else {
        return None;
    };
    if !matches!(question.query_type(), RecordType::A | RecordType::AAAA) {
        return None;
    }
    // Servers write chains in order; one that does not is followed as far as it is written so.
    let mut names: HashSet<&Name> = HashSet::from([question.name()]);
    let (mut addresses, mut ttl) = (Vec::new(), u32::MAX);
    for record in &message.answers {
        if !names.contains(&record.name) {
            continue;
        }
        match &record.data {
            RData::CNAME(CNAME(target)) => drop(names.insert(target)),
            RData::A(A(ip)) => addresses.push(IpAddr::V4(*ip)),
            RData::AAAA(AAAA(ip)) => addresses.push(IpAddr::V6(*ip)),
            _ => continue,
        }
        ttl = ttl.min(record.ttl);
    }
    if addresses.is_empty() {
        return None;
    }
    Some((host(question.name())?, addresses, Duration::from_secs(ttl.into())))
}

#[cfg(test)]
mod tests;
