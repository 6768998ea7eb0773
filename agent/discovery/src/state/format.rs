//! The bytes of the file.
//!
//! ```text
//! file   = header line ("undercurrent discovery state 1 <mode> <network> <cluster>\n"), records
//! record = length: u32 (of what follows the sum), sum: u64 (FNV-1a), changes
//! change = type: u8, put: u8, name: u32 and bytes, and if put: version: u32 and bytes, message: u32 and bytes
//! ```
//! Numbers are little-endian. The sum is against accidents, not against malice: who can write the file can replace the
//! agent.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
    path::PathBuf,
    sync::Arc,
};

use super::{Change, Latest, LoadError};
use crate::books::Type;

const MAGIC: &str = "undercurrent discovery state 1";
/// Longer header lines are not ours.
const HEADER_LENGTH: usize = 1024;
const RECORD_HEAD: usize = 12;
/// Of the file, while it is written.
const BUFFER: usize = 64 << 10;

/// Which agent's state it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header(String);

impl Header {
    pub(crate) fn new(mode: &str, network: &str, cluster: &str) -> Self {
        Self(format!("{MAGIC} {mode} {network:?} {cluster:?}"))
    }

    pub(super) fn line(&self) -> Vec<u8> {
        format!("{}\n", self.0).into_bytes()
    }
}

pub(super) enum FormatError {
    OfAnother { found: String, expected: String },
    Damaged { at: usize },
}

impl FormatError {
    pub(super) fn of(self, file: PathBuf) -> LoadError {
        match self {
            Self::OfAnother { found, expected } => LoadError::OfAnother { file, found, expected },
            Self::Damaged { at } => LoadError::Damaged { file, at },
        }
    }
}

/// FNV-1a, 64 bits.
struct Sum(u64);

impl Sum {
    const NOTHING: Self = Self(0xcbf2_9ce4_8422_2325);

    fn add(&mut self, bytes: &[u8]) {
        let next = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        self.0 = bytes.iter().fold(self.0, next);
    }
}

fn sum(bytes: &[u8]) -> u64 {
    let mut sum = Sum::NOTHING;
    sum.add(bytes);
    sum.0
}

/// Where bytes go.
type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

/// Writes one record of these changes; its length. They are gone through twice, since the head tells of what follows
/// and the first record of a large mesh is not to be in memory as well.
pub(super) fn write_record(changes: &BTreeMap<(Type, Arc<str>), Change>, to: impl Write) -> io::Result<u64> {
    let each = |sink: Sink<'_>| {
        changes.values().try_for_each(|change| {
            let put = change.put.as_ref();
            let put = put.map(|(version, message)| (&**version, &**message));
            write_change(sink, change.type_, &change.name, put)
        })
    };
    let (mut length, mut sum) = (0, Sum::NOTHING);
    each(&mut |bytes| {
        length += bytes.len();
        sum.add(bytes);
        Ok(())
    })?;
    let told = u32::try_from(length).map_err(|_| io::Error::other("a record of more than 4 GiB"))?;
    let mut to = BufWriter::with_capacity(BUFFER, to);
    to.write_all(&told.to_le_bytes())?;
    to.write_all(&sum.0.to_le_bytes())?;
    each(&mut |bytes| to.write_all(bytes))?;
    to.flush()?;
    Ok((RECORD_HEAD + length) as u64)
}

/// Writes records, of about this length each, of what is the latest of each.
pub(super) fn write_records(latest: &Latest<'_>, about: usize, mut to: impl Write) -> io::Result<()> {
    let mut bytes = vec![0; RECORD_HEAD];
    for ((type_, name), (version, message)) in latest {
        let mut append = |part: &[u8]| {
            bytes.extend_from_slice(part);
            Ok(())
        };
        write_change(&mut append, *type_, name, Some((version, message)))?;
        if bytes.len() >= about {
            seal(&mut bytes);
            to.write_all(&bytes)?;
            bytes.truncate(RECORD_HEAD);
        }
    }
    if bytes.len() > RECORD_HEAD {
        seal(&mut bytes);
        to.write_all(&bytes)?;
    }
    Ok(())
}

fn write_change(sink: Sink<'_>, type_: Type, name: &str, put: Option<(&str, &[u8])>) -> io::Result<()> {
    sink(&[type_ as u8, u8::from(put.is_some())])?;
    let mut write = |text: &[u8]| {
        let length = u32::try_from(text.len()).expect("a gRPC message is shorter than 4 GiB");
        sink(&length.to_le_bytes())?;
        sink(text)
    };
    write(name.as_bytes())?;
    if let Some((version, message)) = put {
        write(version.as_bytes())?;
        write(message)?;
    }
    Ok(())
}

fn seal(bytes: &mut [u8]) {
    let (head, body) = bytes.split_at_mut(RECORD_HEAD);
    head[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    head[4..].copy_from_slice(&sum(body).to_le_bytes());
}

/// What a file holds: the latest of each resource, and how many bytes of it are good. A last record that is cut short
/// does not count.
pub(super) fn read<'a>(bytes: &'a [u8], header: &Header) -> Result<(Latest<'a>, usize), FormatError> {
    let line = header.line();
    if !bytes.starts_with(&line) {
        let found = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let found = String::from_utf8_lossy(&found[..found.len().min(HEADER_LENGTH)]).into_owned();
        let expected = header.0.clone();
        return Err(FormatError::OfAnother { found, expected });
    }
    let (mut latest, mut at) = (Latest::new(), line.len());
    while let Some((body, end)) = next_record(bytes, at)? {
        read_record(body, &mut latest).ok_or(FormatError::Damaged { at })?;
        at = end;
    }
    Ok((latest, at))
}

/// The body of the record at an offset, and where it ends; none at the end of what is whole.
fn next_record(bytes: &[u8], at: usize) -> Result<Option<(&[u8], usize)>, FormatError> {
    let rest = &bytes[at..];
    let Some((head, rest)) = rest.split_first_chunk::<RECORD_HEAD>() else {
        return Ok(None);
    };
    let [l0, l1, l2, l3, sum_of @ ..] = *head;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let Some(body) = rest.get(..length) else {
        return Ok(None);
    };
    if sum(body) == u64::from_le_bytes(sum_of) {
        return Ok(Some((body, at + RECORD_HEAD + length)));
    }
    // A crash of the machine may leave the last record's length and not all of its bytes.
    if rest.len() == length {
        Ok(None)
    } else {
        Err(FormatError::Damaged { at })
    }
}

fn read_record<'a>(mut body: &'a [u8], latest: &mut Latest<'a>) -> Option<()> {
    while !body.is_empty() {
        let (&[type_, put], rest) = body.split_first_chunk()?;
        body = rest;
        let type_ = Type::ALL.into_iter().find(|known| *known as u8 == type_)?;
        let name = std::str::from_utf8(read_text(&mut body)?).ok()?;
        match put {
            0 => {
                latest.remove(&(type_, name));
            }
            1 => {
                let version = std::str::from_utf8(read_text(&mut body)?).ok()?;
                latest.insert((type_, name), (version, read_text(&mut body)?));
            }
            _ => return None,
        }
    }
    Some(())
}

fn read_text<'a>(body: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = body.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    *body = rest;
    Some(text)
}
