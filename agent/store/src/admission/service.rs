//! Services: defaults, checks, and their addresses.
//!
//! ```text
//! families: what is asked for, or what is there ─► addresses: as before, as asked for, or a free one of each family
//! ```
//! See <https://kubernetes.io/docs/concepts/services-networking/dual-stack/>. Node ports and load balancers' addresses are
//! not given out.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::{
    Request,
    fields::{default, existing, items, keep, object, text},
};
use crate::engine::{Cause, Family, label};

const HEADLESS: &str = "None";
const PORT_RANGE: &str = "must be between 1 and 65535, inclusive";

pub(super) fn admit(request: &mut Request<'_, '_>, value: &mut Value) {
    let Some(spec) = object(value, &["spec"]) else {
        return;
    };
    defaults(spec);
    items(value, &["spec", "ports"]).for_each(default_port);
    let Some(spec) = existing(value, &["spec"]) else {
        return;
    };
    check(spec, &mut request.causes);
    if text(spec, "type") == "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            spec.remove(field);
        }
    } else if let Some(wanted) = addresses_wanted(request, spec) {
        allocate(request, spec, wanted);
    }
    // What a load balancer or the mesh says; begins with nothing, as `kubectl get` expects.
    if request.live.is_none() {
        object(value, &["status", "loadBalancer"]);
    }
}

fn defaults(spec: &mut Map<String, Value>) {
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    if text(spec, "sessionAffinity") == "ClientIP" {
        default(
            spec,
            "sessionAffinityConfig",
            json!({"clientIP": {"timeoutSeconds": 10800}}),
        );
    }
    if text(spec, "type") != "ExternalName" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if ["NodePort", "LoadBalancer"].contains(&text(spec, "type")) {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
}

fn default_port(port: &mut Value) {
    let Some(port) = port.as_object_mut() else {
        return;
    };
    default(port, "protocol", "TCP");
    if let Some(own) = port.get("port").cloned() {
        default(port, "targetPort", own);
    }
}

fn check(spec: &Map<String, Value>, causes: &mut Vec<Cause>) {
    let types = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    let is = text(spec, "type");
    if !types.contains(&is) {
        causes.push(Cause::not_supported("spec.type", is, &types));
    }
    let affinities = ["ClientIP", "None"];
    if !affinities.contains(&text(spec, "sessionAffinity")) {
        causes.push(Cause::not_supported(
            "spec.sessionAffinity",
            text(spec, "sessionAffinity"),
            &affinities,
        ));
    }
    if is == "ExternalName" && text(spec, "externalName").is_empty() {
        causes.push(Cause::required("spec.externalName", ""));
    }
    let ports = spec
        .get("ports")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    if ports.is_empty() && is != "ExternalName" && text(spec, "clusterIP") != HEADLESS {
        causes.push(Cause::required("spec.ports", ""));
    }
    for (index, port) in ports.iter().enumerate() {
        check_port(index, port, ports, causes);
    }
}

fn check_port(index: usize, port: &Value, all: &[Value], causes: &mut Vec<Cause>) {
    let path = |field: &str| format!("spec.ports[{index}].{field}");
    let is_port = |value: &Value| value.as_i64().is_some_and(|number| (1..=65535).contains(&number));
    if !is_port(&port["port"]) {
        causes.push(Cause::invalid(path("port"), port["port"].clone(), PORT_RANGE));
    }
    let target = &port["targetPort"];
    if !is_port(target) && target.as_str().is_none_or(str::is_empty) {
        causes.push(Cause::invalid(path("targetPort"), target.clone(), PORT_RANGE));
    }
    let protocols = ["SCTP", "TCP", "UDP"];
    let protocol = port["protocol"].as_str().unwrap_or_default();
    if !protocols.contains(&protocol) {
        causes.push(Cause::not_supported(path("protocol"), protocol, &protocols));
    }
    let name = port["name"].as_str().unwrap_or_default();
    if name.is_empty() && all.len() > 1 {
        causes.push(Cause::required(path("name"), ""));
    } else if let Some(why) = label(name).filter(|_| !name.is_empty()) {
        causes.push(Cause::invalid(path("name"), name, why));
    }
    let before = &all[..index];
    if !name.is_empty() && before.iter().any(|other| other["name"] == name) {
        causes.push(Cause::duplicate(path("name"), name));
    }
    if before
        .iter()
        .any(|other| other["port"] == port["port"] && other["protocol"] == port["protocol"])
    {
        let same = json!({"protocol": protocol, "port": port["port"]});
        causes.push(Cause::duplicate(format!("spec.ports[{index}]"), same));
    }
}

/// The families of a service, each with the address that was asked for or that it has.
type Wanted = Vec<(Family, Option<IpAddr>)>;

/// Settles policy and families; `None` where that can't be, or where there is nothing to give out.
fn addresses_wanted(request: &mut Request<'_, '_>, spec: &mut Map<String, Value>) -> Option<Wanted> {
    carry_over(request.live, spec);
    let before = request.causes.len();
    let given = given(spec, &mut request.causes)?;
    check_unchanged(request, &given);
    let here = request.transaction.addresses().families();
    let families = families(spec, &given, &here, &mut request.causes);
    if request.causes.len() > before || families.is_empty() {
        return None;
    }
    let policy = match text(spec, "ipFamilyPolicy") {
        "" if families.len() > 1 => "RequireDualStack",
        "" => "SingleStack",
        given => given,
    };
    let policy = policy.to_owned();
    spec.insert("ipFamilyPolicy".to_owned(), policy.into());
    let names: Vec<&str> = families.iter().map(|family| family.name()).collect();
    spec.insert("ipFamilies".to_owned(), names.into());
    if given.first().is_some_and(|first| first == HEADLESS) {
        spec.insert("clusterIP".to_owned(), HEADLESS.into());
        spec.insert("clusterIPs".to_owned(), json!([HEADLESS]));
        return None;
    }
    let parsed: Vec<IpAddr> = given.iter().filter_map(|address| address.parse().ok()).collect();
    let of = |family: &Family| parsed.iter().copied().find(|address| Family::of(*address) == *family);
    Some(families.iter().map(|family| (*family, of(family))).collect())
}

/// An update that does not speak of addresses means those that are there.
fn carry_over(live: Option<&Value>, spec: &mut Map<String, Value>) {
    let Some(live) = live
        .map(|live| &live["spec"])
        .filter(|live| live["type"] != "ExternalName")
    else {
        return;
    };
    let is_same = ["", live["clusterIP"].as_str().unwrap_or_default()].contains(&text(spec, "clusterIP"));
    if is_same {
        keep(spec, "clusterIP", &live["clusterIP"]);
        keep(spec, "clusterIPs", &live["clusterIPs"]);
    }
    keep(spec, "ipFamilyPolicy", &live["ipFamilyPolicy"]);
    keep(spec, "ipFamilies", &live["ipFamilies"]);
    if text(spec, "ipFamilyPolicy") == "SingleStack" {
        // Back from two families: the second address is given back.
        for field in ["clusterIPs", "ipFamilies"] {
            let unchanged = spec.get(field) == Some(&live[field]);
            if let Some(list) = spec.get_mut(field).and_then(Value::as_array_mut).filter(|_| unchanged) {
                list.truncate(1);
            }
        }
    }
}

/// The addresses that the object names; `None` where they can't be.
fn given(spec: &Map<String, Value>, causes: &mut Vec<Cause>) -> Option<Vec<String>> {
    let one = text(spec, "clusterIP");
    let list = spec.get("clusterIPs").and_then(Value::as_array);
    let mut given: Vec<String> = list
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    if given.is_empty() && !one.is_empty() {
        given.push(one.to_owned());
    }
    let before = causes.len();
    if given.first().is_some_and(|first| first != one && !one.is_empty()) {
        causes.push(Cause::invalid(
            "spec.clusterIPs",
            given.clone(),
            "first value must match `clusterIP`",
        ));
    }
    let is_headless = given.iter().any(|address| address == HEADLESS);
    if given.len() > 2 || (is_headless && given.len() > 1) {
        let why = "may only hold up to 2 values, and 'None' not with others";
        causes.push(Cause::invalid("spec.clusterIPs", given.clone(), why));
    }
    for (index, address) in given.iter().enumerate().filter(|_| !is_headless) {
        if address.parse::<IpAddr>().is_err() {
            let field = format!("spec.clusterIPs[{index}]");
            let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            causes.push(Cause::invalid(field, address.as_str(), why));
        }
    }
    (causes.len() == before).then_some(given)
}

fn check_unchanged(request: &mut Request<'_, '_>, given: &[String]) {
    let was = request
        .live
        .and_then(|live| live["spec"]["clusterIPs"].as_array()?.first());
    if let (Some(was), Some(is)) = (was, given.first())
        && was != is.as_str()
    {
        let why = "may not change once set";
        request
            .causes
            .push(Cause::invalid("spec.clusterIPs[0]", given.to_vec(), why));
    }
}

/// The families that a service gets: those asked for, those of its addresses, or the first there is.
fn families(spec: &Map<String, Value>, given: &[String], here: &[Family], causes: &mut Vec<Cause>) -> Vec<Family> {
    let named = spec.get("ipFamilies").and_then(Value::as_array);
    let mut families: Vec<Family> = Vec::new();
    for (index, name) in named.into_iter().flatten().filter_map(Value::as_str).enumerate() {
        let field = format!("spec.ipFamilies[{index}]");
        match Family::parse(name) {
            None => causes.push(Cause::not_supported(field, name, &["IPv4", "IPv6"])),
            Some(family) if families.contains(&family) => causes.push(Cause::duplicate(field, name)),
            Some(family) if !here.contains(&family) => {
                causes.push(Cause::invalid(field, name, "not configured on this cluster"));
            }
            Some(family) => families.push(family),
        }
    }
    for address in given.iter().filter_map(|address| address.parse().ok()) {
        let family = Family::of(address);
        if !families.contains(&family) {
            if named.is_some_and(|named| !named.is_empty()) && text(spec, "ipFamilyPolicy") == "SingleStack" {
                let why = format!(
                    "expected an {} value as indicated by `ipFamilies`",
                    families.first().map_or("", |family| family.name())
                );
                causes.push(Cause::invalid("spec.clusterIPs[0]", address.to_string(), why));
                continue;
            }
            families.push(family);
        }
    }
    if families.is_empty() {
        families.extend(here.first());
    }
    let policy = text(spec, "ipFamilyPolicy");
    let rest = here.iter().copied().filter(|family| !families.contains(family));
    match policy {
        "" => {}
        "SingleStack" if families.len() > 1 => {
            let why = "when `ipFamilyPolicy` is SingleStack, only one family may be named";
            causes.push(Cause::invalid("spec.ipFamilyPolicy", policy, why));
        }
        "SingleStack" => {}
        "RequireDualStack" if here.len() < 2 => {
            let why = "this cluster is not configured for dual-stack services";
            causes.push(Cause::invalid("spec.ipFamilyPolicy", policy, why));
        }
        "PreferDualStack" | "RequireDualStack" => families.extend(rest.collect::<Vec<_>>()),
        _ => {
            let known = ["SingleStack", "PreferDualStack", "RequireDualStack"];
            causes.push(Cause::not_supported("spec.ipFamilyPolicy", policy, &known));
        }
    }
    families
}

/// Takes what is asked for, and a free one where nothing is.
fn allocate(request: &mut Request<'_, '_>, spec: &mut Map<String, Value>, wanted: Wanted) {
    let addresses = request.transaction.addresses();
    let mut taken = Vec::new();
    for (family, asked) in wanted {
        let fail = |asked: IpAddr, why: String| {
            let why = format!("failed to allocate IP {asked}: {why}");
            Cause::invalid("spec.clusterIPs", json!([asked]), why)
        };
        match asked {
            // Its own already, be the range another by now.
            Some(asked) if addresses.user(asked) == Some(request.key) => taken.push(asked),
            Some(asked) => match addresses.range(family) {
                Some(range) if !range.contains(&asked) => {
                    let why = format!(
                        "the provided IP ({asked}) is not in the valid range. The range of valid IPs is {range}"
                    );
                    request.causes.push(fail(asked, why));
                }
                _ if addresses.user(asked).is_some() => {
                    request
                        .causes
                        .push(fail(asked, "provided IP is already allocated".to_owned()));
                }
                _ => taken.push(asked),
            },
            None => match addresses.free(family) {
                Some(free) => taken.push(free),
                None => {
                    let why = "failed to allocate a serviceIP: range is full";
                    request.causes.push(Cause::invalid("spec.clusterIPs", json!([]), why));
                }
            },
        }
    }
    if let Some(first) = taken.first() {
        spec.insert("clusterIP".to_owned(), first.to_string().into());
        spec.insert("clusterIPs".to_owned(), json!(taken));
    }
}
