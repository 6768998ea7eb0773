//! TLS 1.3 records (RFC 8446, 5) after the handshake: sealed and opened in place, without I/O.
//!
//! ```text
//!  23 3 3 length │ content … type [zeros] │ tag          23 application data, 21 alert, 22 handshake, as the inner type
//! ```
//! rustls shakes hands and keeps the secrets' schedule (its `kernel` module); this seals and opens. Compared to rustls'
//! own record layer it spares two copies and an allocation for each record, and a read takes many records at once.
//! What is written is gathered into an open record, which is sealed when it is full or flushed: what several streams
//! write in one turn is one record.
//!
//! Invariants: a nonce is used once (each seal and open counts); a key seals no more than [`KEY_LIMIT`] records before
//! it is updated (`keys_are_updated_by_each_side`); what does not open ends the tunnel
//! (`a_tampered_record_ends_the_tunnel`).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use bytes::BytesMut;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, Error, InvalidMessage, PeerMisbehaved, client::ClientConnectionData,
    kernel::KernelConnection, server::ServerConnectionData,
};

const HEADER: usize = 5;
const TAG: usize = 16;
/// The most that a record carries.
const LARGEST_CONTENT: usize = 16 << 10;
/// What padding and tag may add to it at most (5.2).
const LARGEST_EXPANSION: usize = 256;
/// Records that one key seals. The limit is 2^24.5 full ones for AES-GCM (5.5); rustls stops at 2^24.
const KEY_LIMIT: u64 = 1 << 23;
/// The only handshake messages that may come now are small, but for tickets, which are ignored.
const LARGEST_MESSAGE: usize = 64 << 10;
/// Key updates that a peer may ask for between two of its application records.
const MOST_UPDATES: u32 = 32;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// The secrets' schedule, of either side.
pub(crate) enum Schedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

impl Schedule {
    fn next_sealing(&mut self) -> Result<Key, Error> {
        let (sequence, secrets) = match self {
            Self::Client(kernel) => kernel.update_tx_secret()?,
            Self::Server(kernel) => kernel.update_tx_secret()?,
        };
        Key::new(sequence, secrets)
    }

    fn next_opening(&mut self) -> Result<Key, Error> {
        let (sequence, secrets) = match self {
            Self::Client(kernel) => kernel.update_rx_secret()?,
            Self::Server(kernel) => kernel.update_rx_secret()?,
        };
        Key::new(sequence, secrets)
    }
}

/// One direction's key, and its place in the sequence of nonces.
pub(crate) struct Key {
    aead: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Key {
    pub(crate) fn new(sequence: u64, secrets: ConnectionTrafficSecrets) -> Result<Self, Error> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(Error::General("a cipher suite that is not offered".into())),
        };
        let unusable = || Error::General("unusable traffic secrets".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unusable())?;
        Ok(Self {
            aead: LessSafeKey::new(key),
            iv: iv.as_ref().try_into().map_err(|_| unusable())?,
            sequence,
        })
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, counter) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= counter;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals what is written, at the end of the tunnel's out-buffer.
pub(crate) struct Sealer {
    key: Key,
    /// Content in the open record, which is the last in the buffer; 0 if none is open.
    open: usize,
    /// Records after which the key is updated.
    pub(crate) limit: u64,
}

impl Sealer {
    pub(crate) fn new(key: Key) -> Self {
        Self {
            key,
            open: 0,
            limit: KEY_LIMIT,
        }
    }

    /// Appends content; what fills a record is sealed, the rest stays open.
    pub(crate) fn write(&mut self, mut content: &[u8], buffer: &mut BytesMut) -> Result<(), Error> {
        while !content.is_empty() {
            if self.open == 0 {
                buffer.extend_from_slice(&[APPLICATION_DATA, 3, 3, 0, 0]);
            }
            let (now, later) = content.split_at(content.len().min(LARGEST_CONTENT - self.open));
            buffer.extend_from_slice(now);
            self.open += now.len();
            content = later;
            if self.open == LARGEST_CONTENT {
                self.seal(APPLICATION_DATA, buffer)?;
            }
        }
        Ok(())
    }

    /// Seals the open record, if there is one. Answers whether the key must be updated.
    pub(crate) fn finish(&mut self, buffer: &mut BytesMut) -> Result<bool, Error> {
        if self.open > 0 {
            self.seal(APPLICATION_DATA, buffer)?;
        }
        Ok(self.key.sequence >= self.limit)
    }

    /// Tells the peer that nothing more comes.
    pub(crate) fn close(&mut self, buffer: &mut BytesMut) -> Result<(), Error> {
        const CLOSE_NOTIFY: [u8; 2] = [1, 0];
        self.finish(buffer)?;
        self.message(ALERT, &CLOSE_NOTIFY, buffer)
    }

    /// Announces and takes the next key; the peer is not asked to do the same.
    pub(crate) fn update(&mut self, schedule: &mut Schedule, buffer: &mut BytesMut) -> Result<(), Error> {
        const UPDATE_NOT_REQUESTED: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
        self.finish(buffer)?;
        self.message(HANDSHAKE, &UPDATE_NOT_REQUESTED, buffer)?;
        self.key = schedule.next_sealing()?;
        Ok(())
    }

    fn message(&mut self, kind: u8, message: &[u8], buffer: &mut BytesMut) -> Result<(), Error> {
        buffer.extend_from_slice(&[APPLICATION_DATA, 3, 3, 0, 0]);
        buffer.extend_from_slice(message);
        self.open = message.len();
        self.seal(kind, buffer)
    }

    fn seal(&mut self, kind: u8, buffer: &mut BytesMut) -> Result<(), Error> {
        let length = std::mem::take(&mut self.open) + 1 + TAG;
        buffer.extend_from_slice(&[kind]);
        let start = buffer.len() - (HEADER + length - TAG);
        let (header, content) = buffer[start..].split_at_mut(HEADER);
        header[3..].copy_from_slice(&(length as u16).to_be_bytes());
        let additional = Aad::from(<[u8; HEADER]>::try_from(&*header).map_err(|_| Error::EncryptError)?);
        let nonce = self.key.nonce();
        let tag = self
            .key
            .aead
            .seal_in_place_separate_tag(nonce, additional, content)
            .map_err(|_| Error::EncryptError)?;
        buffer.extend_from_slice(tag.as_ref());
        Ok(())
    }
}

/// What the front of the in-buffer holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Not a whole record yet.
    Partial,
    /// A record with this much content after [`Opener::HEADER`], and `rest` bytes after that; all to be cut off.
    Content {
        /// Application data.
        length: usize,
        /// Type, padding and tag.
        rest: usize,
    },
    /// A record that meant something to TLS only, of this length; to be cut off.
    Nothing(usize),
    /// The same; and we are asked for a new key of our own.
    UpdateRequested(usize),
    /// The peer has closed.
    Closed,
}

/// Opens what was read.
pub(crate) struct Opener {
    key: Key,
    /// A handshake message that is not complete.
    message: Vec<u8>,
    updates: u32,
}

impl Opener {
    pub(crate) const HEADER: usize = HEADER;

    pub(crate) fn new(key: Key) -> Self {
        Self {
            key,
            message: Vec::new(),
            updates: 0,
        }
    }

    /// Opens the first record in the buffer, in place.
    pub(crate) fn open(&mut self, buffer: &mut [u8], schedule: &mut Schedule) -> Result<Opened, Error> {
        let Some((header, rest)) = buffer.split_first_chunk_mut::<HEADER>() else {
            return Ok(Opened::Partial);
        };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != APPLICATION_DATA {
            return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType));
        }
        if length > LARGEST_CONTENT + LARGEST_EXPANSION {
            return Err(Error::InvalidMessage(InvalidMessage::MessageTooLarge));
        }
        let Some(sealed) = rest.get_mut(..length) else {
            return Ok(Opened::Partial);
        };
        let nonce = self.key.nonce();
        let content = self
            .key
            .aead
            .open_in_place(nonce, Aad::from(*header), sealed)
            .map_err(|_| Error::DecryptError)?;
        let Some(end) = content.iter().rposition(|&byte| byte != 0) else {
            return Err(Error::PeerMisbehaved(PeerMisbehaved::IllegalTlsInnerPlaintext));
        };
        if end > LARGEST_CONTENT {
            return Err(Error::PeerSentOversizedRecord);
        }
        match content[end] {
            APPLICATION_DATA if self.message.is_empty() => {
                self.updates = 0;
                Ok(Opened::Content {
                    length: end,
                    rest: length - end,
                })
            }
            ALERT => alert(&content[..end]),
            HANDSHAKE => {
                self.message.extend_from_slice(&content[..end]);
                let asked = self.messages(schedule)?;
                let whole = HEADER + length;
                Ok(if asked {
                    Opened::UpdateRequested(whole)
                } else {
                    Opened::Nothing(whole)
                })
            }
            _ => Err(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
        }
    }

    /// Acts on the complete handshake messages. Answers whether the peer asks for a new key of ours.
    fn messages(&mut self, schedule: &mut Schedule) -> Result<bool, Error> {
        let mut asked = false;
        while let Some(&[kind, high, middle, low]) = self.message.first_chunk() {
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            if length > LARGEST_MESSAGE {
                return Err(Error::InvalidMessage(InvalidMessage::HandshakePayloadTooLarge));
            }
            let Some(body) = self.message.get(4..4 + length) else {
                break;
            };
            match (kind, body) {
                // We resume nothing.
                (NEW_SESSION_TICKET, _) if matches!(schedule, Schedule::Client(_)) => {}
                (KEY_UPDATE, &[request @ (0 | 1)]) => {
                    self.updates += 1;
                    // The next record is under the next key, so nothing of the old may follow.
                    if self.message.len() > 4 + length || self.updates > MOST_UPDATES {
                        return Err(Error::PeerMisbehaved(PeerMisbehaved::KeyEpochWithPendingFragment));
                    }
                    self.key = schedule.next_opening()?;
                    asked |= request == 1;
                }
                _ => return Err(Error::InvalidMessage(InvalidMessage::UnexpectedMessage("handshake"))),
            }
            self.message.drain(..4 + length);
        }
        if self.message.is_empty() {
            self.message = Vec::new();
        }
        Ok(asked)
    }
}

fn alert(content: &[u8]) -> Result<Opened, Error> {
    match content {
        [_, 0] => Ok(Opened::Closed),
        [_, description] => Err(Error::AlertReceived(AlertDescription::from(*description))),
        _ => Err(Error::InvalidMessage(InvalidMessage::MissingData("alert"))),
    }
}
