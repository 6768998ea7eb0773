//! What client and server say to each other: a 16-byte hello, then what it asked for.
//!
//! ```text
//! hello:  "load" | kind | reply-closes | 0 0 | request length (u32 BE) | response length (u32 BE)
//! requests:  hello, (request response)*        the server closes after the first response if asked to
//! upload:    hello, bytes, FIN                 the server answers with the count of bytes (u64 BE) and closes
//! ```

/// Length of a [`Hello`] on the wire.
pub const HELLO: usize = 16;

/// Requests and responses are no longer than this.
pub const MAX_MESSAGE: u32 = 64 * 1024;

const MAGIC: &[u8; 4] = b"load";

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Requests and responses of fixed lengths, one at a time.
    Requests {
        /// Bytes in a request.
        request: u32,
        /// Bytes in a response.
        response: u32,
        /// The server closes after the first response (so that the client's port is free at once).
        close: bool,
    },
    /// Bytes to the server until the client's FIN.
    Upload,
}

impl Kind {
    /// The hello that asks for this.
    pub fn encode(self) -> [u8; HELLO] {
        let mut out = [0; HELLO];
        out[..4].copy_from_slice(MAGIC);
        match self {
            Kind::Requests {
                request,
                response,
                close,
            } => {
                out[4] = 1;
                out[5] = u8::from(close);
                out[8..12].copy_from_slice(&request.to_be_bytes());
                out[12..16].copy_from_slice(&response.to_be_bytes());
            }
            Kind::Upload => out[4] = 2,
        }
        out
    }

    /// Reads a hello; `None` if it is not one, or asks for too much.
    pub fn decode(bytes: &[u8; HELLO]) -> Option<Kind> {
        if &bytes[..4] != MAGIC {
            return None;
        }
        let number = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        match bytes[4] {
            1 => {
                let (request, response) = (number(8), number(12));
                let fits = |length: u32| (1..=MAX_MESSAGE).contains(&length);
                (fits(request) && fits(response)).then_some(Kind::Requests {
                    request,
                    response,
                    close: bytes[5] != 0,
                })
            }
            2 => Some(Kind::Upload),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hello_survives_the_wire() {
        for kind in [
            Kind::Upload,
            Kind::Requests {
                request: 1,
                response: MAX_MESSAGE,
                close: true,
            },
        ] {
            assert_eq!(Kind::decode(&kind.encode()), Some(kind));
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused() {
        let hello = Kind::Requests {
            request: MAX_MESSAGE + 1,
            response: 1,
            close: false,
        }
        .encode();
        assert_eq!(Kind::decode(&hello), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_without_panic(bytes in any::<[u8; HELLO]>()) {
            let _ = Kind::decode(&bytes);
        }
    }
}
