//! The Swagger 2.0 document as the protobuf that kubectl takes it in, and in nothing else: before it applies a `List`.
//!
//! The messages are those of gnostic's `openapi.v2` (`OpenAPIv2.proto`), as far as a document of ours has their fields. A
//! value that has no type there (a default, an extension) is YAML, of which JSON is a part.

use serde_json::{Map, Value};

/// A message that is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: usize) {
        while number >= 0x80 {
            self.0.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn bytes(&mut self, field: usize, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len());
        self.0.extend(bytes);
    }

    fn message(mut self, field: usize, message: Self) -> Self {
        self.bytes(field, &message.0);
        self
    }

    fn messages(self, field: usize, messages: impl IntoIterator<Item = Self>) -> Self {
        messages.into_iter().fold(self, |all, one| all.message(field, one))
    }

    /// A text; nothing, where there is none.
    fn text(mut self, field: usize, text: &Value) -> Self {
        if let Some(text) = text.as_str() {
            self.bytes(field, text.as_bytes());
        }
        self
    }

    fn texts(self, field: usize, texts: &Value) -> Self {
        let texts = texts.as_array().into_iter().flatten();
        texts.fold(self, |all, text| all.text(field, text))
    }

    fn flag(mut self, field: usize, flag: &Value) -> Self {
        if flag == &Value::Bool(true) {
            self.varint(field << 3);
            self.0.push(1);
        }
        self
    }

    /// A message of the same name, if it is there.
    fn schema(self, field: usize, written: &Value) -> Self {
        match written.is_object() {
            true => self.message(field, schema(written)),
            false => self,
        }
    }

    /// What begins with `x-`.
    fn extensions(self, field: usize, written: &Value) -> Self {
        let extensions = fields(written).filter(|(name, _)| name.starts_with("x-"));
        self.messages(field, extensions.map(|(name, value)| named(name, any(value))))
    }
}

fn fields(written: &Value) -> impl Iterator<Item = (&String, &Value)> {
    written.as_object().into_iter().flat_map(Map::iter)
}

/// An entry of a map.
fn named(name: &str, value: Message) -> Message {
    let mut entry = Message::default();
    entry.bytes(1, name.as_bytes());
    entry.message(2, value)
}

fn any(value: &Value) -> Message {
    let mut any = Message::default();
    any.bytes(2, value.to_string().as_bytes());
    any
}

/// The document.
pub(super) fn document(written: &Value) -> Vec<u8> {
    let info = Message::default()
        .text(1, &written["info"]["title"])
        .text(2, &written["info"]["version"]);
    let paths = fields(&written["paths"]).map(|(path, item)| named(path, path_item(item)));
    let definitions = fields(&written["definitions"]).map(|(name, written)| named(name, schema(written)));
    Message::default()
        .text(1, &written["swagger"])
        .message(2, info)
        .message(8, Message::default().messages(2, paths))
        .message(9, Message::default().messages(1, definitions))
        .0
}

fn path_item(written: &Value) -> Message {
    let methods = [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("patch", 8)];
    let there = methods
        .into_iter()
        .filter_map(|(method, field)| Some((field, written.get(method)?)));
    let item = there.fold(Message::default(), |item, (field, written)| {
        item.message(field, operation(written))
    });
    item.messages(9, parameters(&written["parameters"]))
}

fn operation(written: &Value) -> Message {
    let responses = fields(&written["responses"]).map(|(code, written)| {
        let schema = Message::default().schema(1, &written["schema"]);
        let response = Message::default().text(1, &written["description"]).message(2, schema);
        named(code, Message::default().message(1, response))
    });
    Message::default()
        .text(3, &written["description"])
        .text(5, &written["operationId"])
        .texts(7, &written["consumes"])
        .messages(8, parameters(&written["parameters"]))
        .message(9, Message::default().messages(1, responses))
        .extensions(13, written)
}

fn parameters(written: &Value) -> impl Iterator<Item = Message> {
    let all = written.as_array().into_iter().flatten();
    all.map(|written| Message::default().message(1, parameter(written)))
}

fn parameter(written: &Value) -> Message {
    let start = Message::default();
    let (name, place) = (&written["name"], &written["in"]);
    let of = |required: Message, type_, unique| {
        let text = required.text(2, place).text(3, &written["description"]).text(4, name);
        text.text(type_, &written["type"]).flag(unique, &written["uniqueItems"])
    };
    match place.as_str() {
        Some("body") => {
            let body = Message::default().text(2, name).text(3, place);
            start.message(1, body.flag(4, &written["required"]).schema(5, &written["schema"]))
        }
        Some("path") => {
            let path = of(Message::default().flag(1, &written["required"]), 5, 19);
            start.message(2, Message::default().message(4, path))
        }
        _ => start.message(2, Message::default().message(3, of(Message::default(), 6, 20))),
    }
}

fn schema(written: &Value) -> Message {
    let mut schema = Message::default()
        .text(1, &written["$ref"])
        .text(2, &written["format"])
        .text(4, &written["description"]);
    if let Some(default) = written.get("default") {
        schema = schema.message(5, any(default));
    }
    schema = schema.texts(19, &written["required"]);
    if written["additionalProperties"].is_object() {
        schema = schema.message(21, Message::default().schema(1, &written["additionalProperties"]));
    }
    if written["type"].is_string() {
        schema = schema.message(22, Message::default().text(1, &written["type"]));
    }
    if written["items"].is_object() {
        schema = schema.message(23, Message::default().schema(1, &written["items"]));
    }
    let properties: Vec<_> = fields(&written["properties"])
        .map(|(name, written)| named(name, self::schema(written)))
        .collect();
    if !properties.is_empty() {
        schema = schema.message(25, Message::default().messages(1, properties));
    }
    schema.extensions(31, written)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_written_with_their_numbers() {
        let written = json!({"swagger": "2.0", "info": {"title": "t", "version": "v"}, "paths": {},
            "definitions": {"a": {"type": "string", "x-b": [1]}}});
        let expected = [
            &b"\x0a\x032.0"[..],
            b"\x12\x06\x0a\x01t\x12\x01v",
            b"\x42\x00",
            b"\x4a\x21\x0a\x1f\x0a\x01a\x12\x1a",
            b"\xb2\x01\x08\x0a\x06string",
            b"\xfa\x01\x0c\x0a\x03x-b\x12\x05\x12\x03[1]",
        ]
        .concat();
        assert_eq!(document(&written), expected);
    }

    #[test]
    fn lengths_beyond_a_byte_are_written_whole() {
        let text = "x".repeat(300);
        let message = Message::default().text(1, &json!(text));
        assert_eq!(message.0[..3], [0x0a, 0xac, 0x02]);
        assert_eq!(message.0.len(), 303);
    }
}
