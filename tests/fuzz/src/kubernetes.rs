//! Objects, patches and requests of the Kubernetes API, from whoever may send them.
//!
//! Documents are JSON; where a target needs two, they are parted by a byte that is in no JSON (`\xff`).

use serde_json::Value;
use store::{
    http::{check_target, read_body},
    kinds,
    patch::{self, Manager},
    schema,
};
use time::OffsetDateTime;

/// The body of a request: its first byte chooses the media type. What is read is an object, and has known fields or not.
pub fn store_body(data: &[u8]) {
    let Some((first, body)) = data.split_first() else {
        return;
    };
    let media_type = match first % 3 {
        0 => "application/json",
        1 => "application/yaml",
        _ => "application/vnd.kubernetes.protobuf",
    };
    if let Ok(object) = read_body(media_type, body) {
        assert!(object.is_object());
        for kind in kinds::ALL {
            schema::unknown_fields(kind, &object);
        }
        schema::duplicate_fields(body);
    }
}

/// Path and query of a request: selectors, revisions, `continue`.
pub fn store_target(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let _ = check_target(path, query);
}

/// A patch of each type on any document: refused, or an object whose fields are somebody's.
pub fn store_patch(data: &[u8]) {
    let mut documents = data.split(|byte| *byte == 0xff);
    let mut next = || serde_json::from_slice::<Value>(documents.next()?).ok();
    let (Some(live), Some(sent)) = (next(), next()) else {
        return;
    };
    if !live.is_object() {
        return;
    }
    for (group, plural) in [
        ("", "pods"),
        ("", "services"),
        ("gateway.networking.k8s.io", "httproutes"),
        ("", "configmaps"),
    ] {
        let kind = kinds::by_plural(group, plural).expect("a kind of the table");
        let manager = Manager {
            name: "kubectl",
            api_version: "v1",
            subresource: "",
            now: OffsetDateTime::UNIX_EPOCH,
        };
        for after in [
            patch::json(&live, &sent),
            patch::merge(&live, &sent),
            patch::strategic(kind, &live, &sent),
            patch::apply(kind, Some(&live), &sent, &manager, true),
            patch::apply(kind, None, &sent, &manager, false),
        ]
        .into_iter()
        .flatten()
        {
            patch::update_managed(kind, Some(&live), &after, &manager);
        }
    }
}

/// An object as the control plane and the webhook read it.
pub fn kubernetes_object(data: &[u8]) {
    let Ok(object) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    for kind in k8s::live::Kind::ALL {
        let _ = k8s::live::read(kind, &object);
        let _ = k8s::live::validate(kind, &object);
    }
}

/// What is right, so that changing a few bytes goes deep.
#[cfg(test)]
pub(crate) mod examples {
    pub(crate) const BODIES: &[&[u8]] = &[
        b"\0{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{\"name\":\"a\"},\"spec\":{\"containers\":[{\"name\":\"c\"}]}}",
        b"\x01a: {b: [1, &x 2]}\nc: *x\nd: |\n  e\n",
        b"\x02k8s\x00\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12\x0f\x0a\x03\x0a\x01a\x12\x08\x0a\x01x\x12\x03yyy\x1a\x00\"\x00",
        b"\x02k8s\x00\x0a\x09\x0a\x02v1\x12\x03Pod\x12\x10\x0a\x03\x0a\x01a\x12\x09\x12\x07\x0a\x01c\x12\x02im\x1a\x00\"\x00",
    ];
    pub(crate) const TARGETS: &[&[u8]] = &[
        b"/api/v1/namespaces/shop/pods?labelSelector=a+in+(b,c),!d,e!=f,g>1&fieldSelector=spec.nodeName%3Dn&limit=5",
        b"/apis/apps/v1/namespaces/a/deployments/b/scale?dryRun=All&fieldManager=x&force=true&fieldValidation=Strict",
        b"/api/v1/pods?watch=1&resourceVersion=7&resourceVersionMatch=NotOlderThan&sendInitialEvents=true&timeoutSeconds=9",
        b"/api/v1/pods?continue=eyJydiI6NywibmFtZXNwYWNlIjoiYSIsIm5hbWUiOiJiIn0",
    ];
    pub(crate) const PATCHES: &[&[u8]] = &[
        b"{\"metadata\":{\"name\":\"a\"},\"spec\":{\"containers\":[{\"name\":\"c\",\"ports\":[{\"containerPort\":1}]}]}}\xff{\"spec\":{\"$setElementOrder/containers\":[{\"name\":\"d\"},{\"name\":\"c\"}],\"containers\":[{\"$patch\":\"delete\",\"name\":\"c\"},{\"name\":\"d\",\"$retainKeys\":[\"name\"]}]}}",
        b"{\"data\":{\"a\":[1,2]}}\xff[{\"op\":\"copy\",\"from\":\"/data\",\"path\":\"/data/b\"},{\"op\":\"move\",\"from\":\"/data/a/0\",\"path\":\"/data/a/-\"},{\"op\":\"test\",\"path\":\"/x\",\"value\":null}]",
        b"{\"metadata\":{\"managedFields\":[{\"manager\":\"m\",\"operation\":\"Apply\",\"apiVersion\":\"v1\",\"fieldsType\":\"FieldsV1\",\"fieldsV1\":{\"f:spec\":{\"f:ports\":{\"k:{\\\"port\\\":80,\\\"protocol\\\":\\\"TCP\\\"}\":{\".\":{},\"f:port\":{}},\"v:1\":{}}}}}]},\"spec\":{\"ports\":[{\"port\":80}]}}\xff{\"metadata\":{\"name\":\"a\"},\"spec\":{\"ports\":[{\"port\":81,\"protocol\":\"UDP\"}]}}",
    ];
    pub(crate) const OBJECTS: &[&[u8]] = &[
        b"{\"metadata\":{\"name\":\"a\",\"namespace\":\"b\",\"labels\":{\"istio.io/use-waypoint\":\"w\"}},\"spec\":{\"selector\":{\"matchLabels\":{\"a\":\"b\"}},\"action\":\"DENY\",\"rules\":[{\"from\":[{\"source\":{\"principals\":[\"*\"],\"ipBlocks\":[\"10.0.0.0/8\"]}}],\"to\":[{\"operation\":{\"ports\":[\"80\"]}}]}]}}",
        b"{\"metadata\":{\"name\":\"a\"},\"spec\":{\"hosts\":[\"a.b\"],\"addresses\":[\"10.0.0.1\",\"fd00::/8\"],\"ports\":[{\"number\":80,\"protocol\":\"TCP\",\"targetPort\":8080}],\"resolution\":\"STATIC\",\"endpoints\":[{\"address\":\"10.1.1.1\"}]}}",
        b"{\"addressType\":\"IPv4\",\"endpoints\":[{\"addresses\":[\"10.0.0.1\"],\"conditions\":{\"ready\":true},\"targetRef\":{\"kind\":\"Pod\",\"name\":\"p\"}}],\"ports\":[{\"name\":\"\",\"port\":80}]}",
    ];
}

#[cfg(test)]
mod tests {
    use super::{examples::*, *};

    #[test]
    fn examples_are_right() {
        for body in BODIES {
            let media_type = [
                "application/json",
                "application/yaml",
                "application/vnd.kubernetes.protobuf",
            ];
            read_body(media_type[usize::from(body[0] % 3)], &body[1..]).expect("a body");
        }
        for target in TARGETS {
            let text = std::str::from_utf8(target).expect("text");
            let (path, query) = text.split_once('?').expect("a query");
            check_target(path, query).expect("a target");
        }
        for documents in PATCHES.iter().chain(OBJECTS) {
            for document in documents.split(|byte| *byte == 0xff) {
                serde_json::from_slice::<Value>(document).expect("JSON");
            }
        }
    }
}
