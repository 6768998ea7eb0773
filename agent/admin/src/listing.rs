//! What the agent knows, as JSON that is written while it is read: a mesh of a hundred thousand workloads is never one text
//! in memory.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde_json::Value;

/// About how much is written in one go.
const CHUNK: usize = 64 << 10;

/// Values that come one after the other.
pub type Values = Box<dyn Iterator<Item = Value> + Send>;
/// The same with names.
pub type Entries = Box<dyn Iterator<Item = (String, Value)> + Send>;

/// JSON that is made while it is written.
pub enum Listing {
    /// A value that is there.
    Value(Value),
    /// An array.
    Values(Values),
    /// An object.
    Entries(Entries),
    /// An object of these.
    Sections(Vec<(&'static str, Listing)>),
}

/// A response's body, whole or streamed.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

type Pieces = Box<dyn Iterator<Item = String> + Send>;

impl Listing {
    /// Text that, put together, is the JSON.
    fn pieces(self) -> Pieces {
        let once = |text: &str| std::iter::once(text.to_owned());
        match self {
            Self::Value(value) => Box::new(std::iter::once(value.to_string())),
            Self::Values(values) => {
                let values = values
                    .enumerate()
                    .map(|(index, value)| format!("{}{value}", comma(index)));
                Box::new(once("[").chain(values).chain(once("]")))
            }
            Self::Entries(entries) => {
                let entries = entries.enumerate().map(|(index, (name, value))| {
                    let name = Value::String(name);
                    format!("{}{name}:{value}", comma(index))
                });
                Box::new(once("{").chain(entries).chain(once("}")))
            }
            Self::Sections(sections) => {
                let sections = sections.into_iter().enumerate().flat_map(|(index, (name, listing))| {
                    let name = format!("{}\"{name}\":", comma(index));
                    std::iter::once(name).chain(listing.pieces())
                });
                Box::new(once("{").chain(sections).chain(once("}\n")))
            }
        }
    }

    pub(crate) fn into_body(self) -> Body {
        let mut pieces = self.pieces();
        let chunks = std::iter::from_fn(move || {
            let mut chunk = String::new();
            while chunk.len() < CHUNK {
                match pieces.next() {
                    Some(piece) => chunk.push_str(&piece),
                    None => break,
                }
            }
            (!chunk.is_empty()).then(|| Ok(Frame::data(Bytes::from(chunk))))
        });
        StreamBody::new(stream::iter(chunks)).boxed_unsync()
    }
}

fn comma(index: usize) -> &'static str {
    if index == 0 { "" } else { "," }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn what_is_written_piece_by_piece_is_json() {
        let listing = Listing::Sections(vec![
            ("empty", Listing::Values(Box::new(std::iter::empty()))),
            (
                "many",
                Listing::Values(Box::new((0..50_000).map(|number| json!({"n": number})))),
            ),
            (
                "named",
                Listing::Entries(Box::new(
                    ["a\"b", "c"].into_iter().map(|name| (name.to_owned(), json!(1))),
                )),
            ),
            ("one", Listing::Value(json!("x"))),
        ]);
        let mut body = listing.into_body();
        let mut text = Vec::new();
        let mut frames = 0;
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.len() < 2 * CHUNK);
            text.extend_from_slice(&data);
            frames += 1;
        }
        assert!(frames > 3);
        let read: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(read["many"].as_array().unwrap().len(), 50_000);
        assert_eq!(
            (&read["empty"], &read["named"]["a\"b"], &read["one"]),
            (&json!([]), &json!(1), &json!("x"))
        );
    }
}
