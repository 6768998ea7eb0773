//! What makes no sense is refused by name, whatever it is, and harms nobody.

use serde_json::{Value, json};
use store::{Key, http::Limits, kinds};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::raw::{Hostile, reply};

const MAPS: &str = "/api/v1/namespaces/shop/configmaps";
const MERGE: &str = "application/merge-patch+json";
const PATCHES: &[&str] = &[
    MERGE,
    "application/json-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

async fn server() -> Hostile {
    let server = Hostile::start(Limits::default()).await;
    let map = json!({"metadata": {"name": "a"}, "data": {"x": "y"}});
    let made = server
        .ask("POST", MAPS, "application/json", map.to_string().as_bytes())
        .await;
    assert_eq!(made.status, 201, "{made:?}");
    server
}

fn nested(count: usize) -> String {
    format!("{}1{}", r#"{"a":"#.repeat(count), "}".repeat(count))
}

#[tokio::test]
async fn bodies_that_make_no_sense_are_refused() {
    let server = server().await;
    let (dashes, questions) = ("- ".repeat(100_000), "? ".repeat(100_000));
    let deep_list = "[".repeat(100_000);
    let deep_map = nested(100_000);
    let anchors = format!(
        "a: &a [x,x,x,x,x,x,x,x,x]\n{}",
        (b'b'..=b'z')
            .map(|letter| {
                let (this, last) = (char::from(letter), char::from(letter - 1));
                format!("{this}: &{this} [*{last},*{last},*{last},*{last},*{last},*{last},*{last},*{last}]\n")
            })
            .collect::<String>()
    );
    let bodies: &[&[u8]] = &[
        b"",
        b"{",
        b"null",
        b"[]",
        b"\"x\"",
        b"1e999",
        b"{\"metadata\": {\"name\": \"\xff\xfe\"}}",
        b"{\"metadata\": {\"name\": \"\\ud800\"}}",
        b"{\"metadata\": 1}",
        b"{\"metadata\": {\"name\": {}}}",
        b"{\"metadata\": {\"name\": \"a\", \"labels\": [1]}}",
        b"{\"metadata\": {\"name\": \"../../etc/passwd\"}}",
        b"{\"metadata\": {\"name\": \"a/b\"}}",
        b"{\"metadata\": {\"name\": \"x\", \"resourceVersion\": \"-1\"}}",
        b"{\"kind\": 1}",
        b"k8s\0",
        b"k8s\0\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        deep_list.as_bytes(),
        deep_map.as_bytes(),
        anchors.as_bytes(),
        dashes.as_bytes(),
        questions.as_bytes(),
    ];
    for body in bodies {
        for media_type in [
            "application/json",
            "application/yaml",
            "application/vnd.kubernetes.protobuf",
        ] {
            let reply = server.ask("POST", MAPS, media_type, body).await;
            let start = &body[..body.len().min(40)];
            assert!(
                (400..500).contains(&reply.status) && reply.text.contains("\"kind\":\"Status\""),
                "{media_type} {start:?}: {reply:?}"
            );
        }
        for media_type in PATCHES {
            let path = format!("{MAPS}/a?fieldManager=x");
            let reply = server.ask("PATCH", &path, media_type, body).await;
            let start = &body[..body.len().min(40)];
            // A merge patch of nothing but an odd name is refused; one that says nothing new is no change.
            assert!(
                reply.status < 500 && reply.status >= 200,
                "{media_type} {start:?}: {reply:?}"
            );
        }
    }
    assert!(server.is_well().await);
}

#[tokio::test]
async fn the_wrong_media_type_is_a_415() {
    let server = server().await;
    for media_type in [
        "application/cbor",
        "text/html",
        "application/x-www-form-urlencoded",
        "\u{fc}",
        "application/json-patch+json",
    ] {
        assert_eq!(
            server.ask("POST", MAPS, media_type, b"{}").await.status,
            415,
            "{media_type}"
        );
    }
    for media_type in [
        "",
        "application/json",
        "application/cbor",
        "application/apply-patch+cbor",
    ] {
        let path = format!("{MAPS}/a");
        assert_eq!(
            server.ask("PATCH", &path, media_type, b"{}").await.status,
            415,
            "{media_type}"
        );
    }
    let policies = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies/x";
    let reply = server
        .ask("PATCH", policies, "application/strategic-merge-patch+json", b"{}")
        .await;
    assert_eq!(reply.status, 415, "{reply:?}");
}

#[tokio::test]
async fn queries_that_make_no_sense_are_refused() {
    let server = server().await;
    for query in [
        "resourceVersion=x",
        "resourceVersion=-1",
        "resourceVersion=18446744073709551616",
        "resourceVersion=1&resourceVersionMatch=Sometimes",
        "limit=-1",
        "limit=x",
        "continue=x",
        "continue=%ff%fe",
        "continue=e30",
        "continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6LTF9",
        "labelSelector=a%20in%20(",
        "labelSelector=!!a",
        "labelSelector=a%00b",
        "fieldSelector=spec.x=1",
        "fieldSelector==",
        "watch=maybe",
        "timeoutSeconds=forever",
        "watch=1&sendInitialEvents=1",
    ] {
        let reply = server.get(&format!("{MAPS}?{query}")).await;
        assert!(matches!(reply.status, 400 | 410), "{query}: {reply:?}");
    }
    // One that was never, as after the loss of a data directory: a watcher is told to list anew, a list to wait.
    let watched = server
        .get(&format!("{MAPS}?watch=1&resourceVersion=18446744073709551615"))
        .await;
    assert!(
        watched.status == 200 && watched.text.contains("\"code\":410"),
        "{watched:?}"
    );
    let listed = server
        .get(&format!("{MAPS}?resourceVersion=18446744073709551615"))
        .await;
    assert!(
        listed.status == 504 && listed.text.contains("Too large resource version"),
        "{listed:?}"
    );
}

#[tokio::test]
async fn paths_lead_nowhere_else() {
    let server = server().await;
    for path in [
        "/api/v1/namespaces/shop/configmaps/..%2f..%2fsecrets%2fa",
        "/api/v1/namespaces/..%2fshop/configmaps/a",
        "/api/v1/namespaces/shop%2fconfigmaps/configmaps/a",
        "/api/v1/namespaces/shop/configmaps/%00",
        "/api/v1/namespaces/shop/configmaps/%ff%fe",
        "/api/v1/namespaces/shop/configmaps/a/../../secrets",
        "/apis/../api/v1/namespaces",
        "/healthz/../api/v1/secrets",
        "/openapi/v3/apis/../../pki",
        "/%2e%2e/%2e%2e/etc/passwd",
    ] {
        let reply = server.get(path).await;
        assert!(matches!(reply.status, 200 | 404), "{path}: {reply:?}");
        assert!(
            reply.status == 404 || path.starts_with("/healthz/"),
            "{path}: {reply:?}"
        );
    }
    let long = server
        .get(&format!("/api/v1/namespaces/shop/configmaps/{}", "a".repeat(20_000)))
        .await;
    assert_eq!(long.status, 404);
    assert!(server.is_well().await);
}

#[tokio::test]
async fn nothing_grows_or_nests_past_what_can_be_read_back() {
    let server = server().await;
    let path = format!("{MAPS}/a?fieldValidation=Ignore");
    // Each as deep as its reader takes, all together deeper.
    for count in [90, 110, 120, 126] {
        let mut body = json!({});
        body["x"] = serde_json::from_str(&nested(count)).unwrap_or(Value::Null);
        for (method, media_type) in [("PUT", "application/json"), ("PATCH", MERGE), ("PATCH", PATCHES[2])] {
            let reply = server.ask(method, &path, media_type, body.to_string().as_bytes()).await;
            assert!(matches!(reply.status, 200 | 400 | 422), "{count} {method}: {reply:?}");
        }
    }
    // A little more each time, until it is enough.
    let mut refused = None;
    for index in 0..8 {
        let patch = json!({"data": {format!("k{index}"): "x".repeat(700_000)}}).to_string();
        let reply = server.ask("PATCH", &path, MERGE, patch.as_bytes()).await;
        if reply.status != 200 {
            refused = Some(reply);
            break;
        }
    }
    let refused = refused.unwrap();
    assert_eq!(refused.status, 413, "{}", &refused.text[..300]);
    let copies: Vec<Value> = (0..40)
        .map(|index| json!({"op": "copy", "from": "/data", "path": format!("/data/c{index}")}))
        .collect();
    let bomb = server
        .ask("PATCH", &path, PATCHES[1], json!(copies).to_string().as_bytes())
        .await;
    assert_eq!(bomb.status, 422, "{}", bomb.text);
    // What is there is whole.
    let key = Key::new(kinds::by_plural("", "configmaps").unwrap(), "shop", "a");
    let object = server.engine.get(&key).unwrap();
    assert_eq!(object.value()["metadata"]["name"], "a");
    assert!(object.json.len() <= 3 << 20);
}

#[tokio::test]
async fn garbage_on_the_socket_ends_only_its_connection() {
    let server = server().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\x16\x03\x01\xff\xff\x01",
        b"\x16\x03\x01\0\x05\x01\0\0\x01\0",
        &[0; 4096],
        b"\x80\x2e\x01\x03\x01",
    ] {
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        socket.shutdown().await.unwrap();
        let _ = socket.read_to_end(&mut Vec::new()).await;
    }
    for (protocol, bytes) in [
        ("http/1.1", &b"\0\0\0\0\r\n\r\n"[..]),
        ("http/1.1", b"GET /healthz HTTP/9.9\r\n\r\n"),
        (
            "http/1.1",
            b"POST /api/v1/namespaces HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        ),
        (
            "http/1.1",
            b"POST /api/v1/namespaces HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        ),
        (
            "h2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        ),
        ("h2", b"GET / HTTP/1.1\r\n\r\n"),
    ] {
        let mut connection = server.connect_with(&[protocol]).await.unwrap();
        connection.write_all(bytes).await.unwrap();
        connection.shutdown().await.unwrap();
        let said = reply(&mut connection).await;
        assert!(said.status == 0 || said.status >= 400, "{said:?}");
    }
    assert!(server.is_well().await);
}

#[tokio::test]
async fn thousands_of_watches_are_told_and_let_go() {
    let server = Hostile::start(Limits {
        watches: 2000,
        ..Limits::default()
    })
    .await;
    let mut watchers = Vec::new();
    for _ in 0..2000 {
        let maps = kinds::by_plural("", "configmaps").unwrap();
        watchers.push(
            server
                .engine
                .watch(maps, Some("shop"), server.engine.revision())
                .unwrap(),
        );
    }
    let map = json!({"metadata": {"name": "a"}});
    let made = server
        .ask("POST", MAPS, "application/json", map.to_string().as_bytes())
        .await;
    assert_eq!(made.status, 201);
    for mut watcher in watchers {
        assert_eq!(&*watcher.next().await.unwrap().object().key.name, "a");
    }
    assert!(server.is_well().await);
}
