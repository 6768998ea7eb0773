//! `get`: what agents know, as tables, JSON or YAML.

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};

use super::{
    Reach, bytes, colours, duration, print,
    table::{Cell, table},
};

/// Options of `get`.
#[derive(clap::Args, Clone, Debug)]
pub struct GetArgs {
    /// What to show.
    #[arg(value_enum, value_name = "KIND")]
    kind: Kind,
    /// Only what is of this namespace.
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Only workloads that run on this node.
    #[arg(long, value_name = "NODE")]
    on_node: Option<String>,
    /// How: as a table, a table with more columns, or everything as JSON or YAML.
    #[arg(long, short, value_enum, value_name = "FORM", default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Kind {
    /// What connections come from and go to.
    #[value(alias = "workload", alias = "w")]
    Workloads,
    /// Services and their endpoints.
    #[value(alias = "service", alias = "svc")]
    Services,
    /// L4 policies, as they are enforced.
    #[value(alias = "policy")]
    Policies,
    /// The certificates of this node's pods.
    #[value(alias = "certificate", alias = "certs")]
    Certificates,
    /// Live connections of this node's pods.
    #[value(alias = "connection", alias = "conns")]
    Connections,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Output {
    Table,
    Wide,
    Json,
    Yaml,
}

impl Kind {
    fn path(self) -> &'static str {
        match self {
            Self::Workloads => "/workloads",
            Self::Services => "/services",
            Self::Policies => "/policies",
            Self::Certificates => "/certificates",
            Self::Connections => "/connections",
        }
    }

    /// Whether each agent has its own.
    fn is_of_node(self) -> bool {
        matches!(self, Self::Certificates | Self::Connections)
    }
}

/// Shows what was asked for.
pub fn run(args: &GetArgs) -> Result<()> {
    let items = gather(args)?;
    let wide = args.output == Output::Wide;
    print(&match args.output {
        Output::Json => serde_json::to_string_pretty(&items)? + "\n",
        Output::Yaml => serde_yaml_ng::to_string(&items)?,
        Output::Table | Output::Wide if items.is_empty() => {
            let kind = clap::ValueEnum::to_possible_value(&args.kind);
            let kind = kind.as_ref().map_or("such objects", |value| value.get_name());
            format!("no {kind}\n")
        }
        Output::Table | Output::Wide => shown(args.kind, &items, wide, colours()),
    })
}

fn gather(args: &GetArgs) -> Result<Vec<Value>> {
    let agents = args.reach.agents()?;
    let (mut items, mut trouble, mut answered) = (Vec::new(), Vec::new(), false);
    for agent in &agents {
        match agent.get::<Vec<Value>>(args.kind.path()) {
            Ok(of_agent) => {
                answered = true;
                let named = of_agent.into_iter().map(|mut item| {
                    if let (Some(node), Value::Object(fields)) = (&agent.node, &mut item)
                        && args.kind.is_of_node()
                    {
                        fields.insert("agent".to_owned(), json!(node));
                    }
                    item
                });
                items.extend(named);
                // The mesh is the same for all.
                if !args.kind.is_of_node() {
                    break;
                }
            }
            Err(error) => trouble.push(format!("{error:#}")),
        }
    }
    if !answered {
        bail!("{}", trouble.join("\n"));
    }
    for trouble in trouble {
        eprintln!("{trouble}");
    }
    items.retain(|item| concerns(args, item));
    let key = |item: &Value| {
        [
            text(item, "agent"),
            text(item, "namespace"),
            text(item, "name"),
            text(item, "hostname"),
        ]
    };
    if args.kind != Kind::Connections {
        items.sort_by_key(key);
    }
    Ok(items)
}

fn concerns(args: &GetArgs, item: &Value) -> bool {
    let of_identity = || namespace_of_identity(&text(item, "identity")).map(str::to_owned);
    let of_pod = || text(item, "pod").rsplit('/').nth(1).map(str::to_owned);
    let namespace = match args.kind {
        Kind::Certificates => of_identity().unwrap_or_default(),
        Kind::Connections => of_pod().unwrap_or_default(),
        _ => text(item, "namespace"),
    };
    let in_namespace = args.namespace.as_ref().is_none_or(|wanted| namespace == *wanted);
    let on_node = args.on_node.as_ref().is_none_or(|wanted| text(item, "node") == *wanted);
    in_namespace && on_node
}

fn namespace_of_identity(identity: &str) -> Option<&str> {
    identity.split('/').nth(4)
}

/// A field as text; empty where it is not there.
fn text(item: &Value, field: &str) -> String {
    match &item[field] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn list(item: &Value, field: &str) -> Vec<String> {
    let values = item[field].as_array().into_iter().flatten();
    values
        .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        .collect()
}

fn or_dash(text: String) -> Cell {
    match text.is_empty() {
        true => Cell::dim("-"),
        false => Cell::plain(text),
    }
}

fn shown(kind: Kind, items: &[Value], wide: bool, colours: bool) -> String {
    type Row = fn(&Value, bool) -> Vec<Cell>;
    let (header, row): (&[&str], Row) = match (kind, wide) {
        (Kind::Workloads, false) => (
            &["NAMESPACE", "NAME", "ADDRESS", "NODE", "PROTOCOL", "STATUS", "WAYPOINT"],
            workload,
        ),
        (Kind::Workloads, true) => (
            &[
                "NAMESPACE",
                "NAME",
                "ADDRESS",
                "NODE",
                "PROTOCOL",
                "STATUS",
                "WAYPOINT",
                "SERVICE ACCOUNT",
                "POLICIES",
                "UID",
            ],
            workload,
        ),
        (Kind::Services, false) => (
            &["NAMESPACE", "NAME", "ADDRESS", "PORTS", "ENDPOINTS", "WAYPOINT"],
            service,
        ),
        (Kind::Services, true) => (
            &[
                "NAMESPACE",
                "NAME",
                "ADDRESS",
                "PORTS",
                "ENDPOINTS",
                "WAYPOINT",
                "BALANCING",
                "HOSTNAME",
            ],
            service,
        ),
        (Kind::Policies, false) => (&["NAMESPACE", "NAME", "ACTION", "SCOPE", "RULES", "MADE FROM"], policy),
        (Kind::Policies, true) => (
            &["NAMESPACE", "NAME", "ACTION", "SCOPE", "RULES", "MADE FROM", "WHAT"],
            policy,
        ),
        (Kind::Certificates, _) => (&["IDENTITY", "STATE", "ENDS", "SERIAL", "AGENT"], certificate),
        (Kind::Connections, false) => (&["POD", "WAY", "PEER", "FOR", "SENT", "RECEIVED", "TLS"], connection),
        (Kind::Connections, true) => (
            &[
                "POD",
                "WAY",
                "PEER",
                "FOR",
                "SENT",
                "RECEIVED",
                "TLS",
                "SOURCE",
                "DESTINATION",
                "RULE",
                "TRACE",
            ],
            connection,
        ),
    };
    table(header, items.iter().map(|item| row(item, wide)).collect(), colours)
}

fn waypoint(item: &Value) -> Cell {
    or_dash(text(&item["waypoint"], "destination"))
}

fn workload(item: &Value, wide: bool) -> Vec<Cell> {
    let healthy = text(item, "status");
    let protocol = text(item, "protocol");
    let mut cells = vec![
        Cell::plain(text(item, "namespace")),
        Cell::plain(text(item, "name")),
        or_dash(list(item, "workloadIps").join(" ")),
        or_dash(text(item, "node")),
        match protocol.as_str() {
            "HBONE" => Cell::good(protocol),
            _ => Cell::dim(protocol),
        },
        match healthy.as_str() {
            "Healthy" => Cell::good(healthy),
            _ => Cell::bad(healthy),
        },
        waypoint(item),
    ];
    if wide {
        cells.push(or_dash(text(item, "serviceAccount")));
        cells.push(or_dash(list(item, "authorizationPolicies").join(" ")));
        cells.push(Cell::dim(text(item, "uid")));
    }
    cells
}

fn service(item: &Value, wide: bool) -> Vec<Cell> {
    let ports = item["ports"].as_object().into_iter().flatten();
    let ports = ports.map(|(port, target)| match target.as_u64() {
        Some(0) | None => port.clone(),
        Some(target) if target.to_string() == *port => port.clone(),
        Some(target) => format!("{port}→{target}"),
    });
    let endpoints = item["endpoints"].as_object().into_iter().flatten();
    let (all, healthy) = endpoints.fold((0, 0), |(all, healthy), (_, endpoint)| {
        (all + 1, healthy + usize::from(endpoint["status"] == "Healthy"))
    });
    let count = format!("{healthy}/{all}");
    let vips = list(item, "vips");
    let vips = vips.iter().map(|vip| vip.trim_start_matches('/')).collect::<Vec<_>>();
    let mut cells = vec![
        Cell::plain(text(item, "namespace")),
        Cell::plain(text(item, "name")),
        or_dash(vips.join(" ")),
        or_dash(ports.collect::<Vec<_>>().join(" ")),
        match (healthy, all) {
            (0, _) => Cell::bad(count),
            (healthy, all) if healthy < all => Cell::warn(count),
            _ => Cell::good(count),
        },
        waypoint(item),
    ];
    if wide {
        let balancing = &item["loadBalancing"];
        let mut words = vec![text(balancing, "mode")];
        words.extend(list(balancing, "routingPreference"));
        words.retain(|word| !word.is_empty());
        cells.push(or_dash(words.join(" ")));
        cells.push(Cell::dim(text(item, "hostname")));
    }
    cells
}

fn policy(item: &Value, wide: bool) -> Vec<Cell> {
    let dry = if item["dryRun"] == true { " (dry run)" } else { "" };
    let rules = item["rules"].as_array().map_or(0, Vec::len);
    let mut cells = vec![
        Cell::plain(text(item, "namespace")),
        Cell::plain(text(item, "name")),
        Cell::plain(format!("{}{dry}", text(item, "action").to_uppercase())),
        Cell::plain(text(item, "scope")),
        match (rules, item["action"] == "Allow") {
            (0, true) => Cell::warn("0: denies all"),
            (0, false) => Cell::warn("0: never matches"),
            _ => Cell::plain(rules.to_string()),
        },
        or_dash(text(item, "origin")),
    ];
    if wide {
        cells.push(Cell::dim(item["rules"].to_string()));
    }
    cells
}

fn certificate(item: &Value, _: bool) -> Vec<Cell> {
    let leaf = &item["certChain"][0];
    let state = text(item, "state");
    let error = text(item, "lastError");
    vec![
        Cell::plain(text(item, "identity")),
        match (state.as_str(), error.is_empty()) {
            ("Available", true) => Cell::good(state),
            ("Available", false) => Cell::warn(format!("{state}; the next: {error}")),
            (_, true) => Cell::bad(state),
            (_, false) => Cell::bad(format!("{state}: {error}")),
        },
        or_dash(text(leaf, "expirationTime").chars().take(19).collect()),
        or_dash(text(leaf, "serialNumber")),
        or_dash(text(item, "agent")),
    ]
}

fn connection(item: &Value, wide: bool) -> Vec<Cell> {
    let pod_of = |field: &str| {
        let uid = text(item, field);
        let mut parts: Vec<_> = uid.rsplit('/').take(2).map(str::to_owned).collect();
        parts.reverse();
        parts.join("/")
    };
    let outbound = item["direction"] == "outbound";
    let (peer, address) = match outbound {
        true => (pod_of("destinationWorkload"), text(item, "destination")),
        false => (pod_of("sourceWorkload"), text(item, "source")),
    };
    let number = |field: &str| item[field].as_u64().unwrap_or_default();
    let mut cells = vec![
        Cell::plain(pod_of("pod")),
        Cell::plain(if outbound { "to" } else { "from" }),
        Cell::plain(if peer.is_empty() { address } else { peer }),
        Cell::plain(duration(number("ageSeconds"))),
        Cell::plain(bytes(number("bytesSent"))),
        Cell::plain(bytes(number("bytesReceived"))),
        match item["peer"].is_string() {
            true => Cell::good("mutual"),
            false => Cell::warn("none"),
        },
    ];
    if wide {
        cells.push(Cell::plain(text(item, "source")));
        let target = text(item, "hboneTarget");
        cells.push(Cell::plain(if target.is_empty() {
            text(item, "destination")
        } else {
            target
        }));
        cells.push(or_dash(text(item, "rule")));
        cells.push(Cell::dim(text(item, "traceId")));
    }
    cells
}

#[cfg(test)]
mod tests;
