//! `why`: whether a connection may be, and what decides it, step by step. The source's agent says how it goes out, the
//! destination's, where it can be asked, how it is taken. Ends with 0 where it is allowed, with 1 where it is not, and with
//! another code where nobody can say.

use std::process::ExitCode;

use admin::{
    ClientError,
    why::{Outcome, Question, Step, Why},
};
use anyhow::{Context, Result, bail};

use super::{
    Agent, Reach, WIDTH, colours, print,
    table::{Cell, wrap},
};

/// The exit code where it is not known whether the connection is allowed.
const NOBODY_CAN_SAY: u8 = 2;

/// Options of `why`.
#[derive(clap::Args, Clone, Debug)]
pub struct WhyArgs {
    /// Who connects: NAMESPACE/POD, or an address of it.
    #[arg(value_name = "SRC")]
    source: String,
    /// To what: NAMESPACE/POD, a service's name as the source would write it, or an address; and the port.
    #[arg(value_name = "DST:PORT", value_parser = destination)]
    destination: (String, u16),
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

fn destination(text: &str) -> Result<(String, u16), String> {
    let (host, port) = text
        .rsplit_once(':')
        .ok_or("a port is missing: such as web:80, shop/web-0:8080, 10.0.0.7:443, [fd00::7]:443")?;
    let port: u16 = port.parse().map_err(|_| format!("{port:?} is not a port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match host.is_empty() || port == 0 {
        true => Err("expected DST:PORT".to_owned()),
        false => Ok((host.to_owned(), port)),
    }
}

/// Asks, shows, and tells by the exit code.
pub fn run(args: &WhyArgs) -> ExitCode {
    match answer(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(NOBODY_CAN_SAY)
        }
    }
}

/// Whether it is allowed.
fn answer(args: &WhyArgs) -> Result<bool> {
    let agents = args.reach.agents()?;
    let question = Question {
        source: args.source.clone(),
        destination: args.destination.0.clone(),
        port: args.destination.1,
    };
    let mut why = at_source(&agents, &question)?;
    let asked = at_destination(&agents, &mut why)?;
    match args.json {
        true => print(&(serde_json::to_string_pretty(&why)? + "\n"))?,
        false => print(&shown(&why, asked, colours()))?,
    }
    Ok(why.allowed)
}

/// The source's agent is the one that can answer; the others say that the pod is not theirs.
fn at_source(agents: &[Agent], question: &Question) -> Result<Why> {
    let mut refusals: Vec<String> = Vec::new();
    for agent in agents {
        match agent.post("/why", question) {
            Ok(why) => return Ok(why),
            Err(ClientError::Refused { text, .. }) => refusals.push(text),
            Err(error) => refusals.push(format!("{}: {error}", agent.trouble())),
        }
    }
    // That a name is unknown is what the source's own agent says; that the pod is elsewhere is all the others can.
    let elsewhere = |text: &String| text.contains("ask the agent there");
    refusals.sort_by_key(elsewhere);
    match refusals.into_iter().next() {
        Some(refusal) => bail!("{refusal}"),
        None => bail!("there is no agent to ask"),
    }
}

/// Has the destination's agent judge by what it knows. Tells whether it did.
fn at_destination(agents: &[Agent], why: &mut Why) -> Result<bool> {
    let Some(arrival) = &why.arrival else { return Ok(false) };
    let is_theirs = |agent: &&Agent| agent.node.as_ref() == Some(&arrival.node);
    let Some(agent) = agents.iter().find(is_theirs) else {
        return Ok(arrival.node == why.node);
    };
    let steps: Vec<Step> = match agent.post("/why/arrival", arrival) {
        // What is captured is refused then, and its node's agent is all there is to mend.
        Err(error @ ClientError::Connect { .. }) => vec![Step {
            stage: "arrival".to_owned(),
            outcome: Outcome::Refused,
            text: format!("nobody takes it: {error}"),
            object: Some(format!("Node {}", arrival.node)),
        }],
        answered => answered.with_context(|| agent.trouble())?,
    };
    why.steps.retain(|step| step.stage != "policy");
    why.steps.extend(steps);
    why.allowed = why.steps.iter().all(|step| step.outcome != Outcome::Refused);
    Ok(true)
}

fn shown(why: &Why, asked: bool, colours: bool) -> String {
    let title = format!("{} → {}", why.source, why.destination);
    let mut text = format!("{}\n\n", Cell::bold(title).shown(colours));
    for step in &why.steps {
        let mark = match step.outcome {
            Outcome::Passes => Cell::good("✓"),
            Outcome::Notable => Cell::warn("!"),
            Outcome::Refused => Cell::bad("✗"),
        };
        let head = format!("  {} {:12} ", mark.shown(colours), step.stage);
        let indent = " ".repeat(17);
        let lines = wrap(&step.text, WIDTH - 17);
        for (index, line) in lines.iter().enumerate() {
            let start = if index == 0 { &head } else { &indent };
            text.push_str(&format!("{start}{}\n", Cell::plain(line).shown(false)));
        }
        for line in step.object.iter().flat_map(|object| wrap(object, WIDTH - 17)) {
            text.push_str(&format!("{indent}{}\n", Cell::dim(line).shown(colours)));
        }
    }
    let last = why.steps.iter().find(|step| step.outcome == Outcome::Refused);
    text.push('\n');
    let verdict = match last {
        Some(step) => Cell::bad(format!("refused: {}", step.text)),
        None => Cell::good("allowed".to_owned()),
    };
    for line in wrap(&verdict.0, WIDTH) {
        text.push_str(&format!("{}\n", Cell(line, verdict.1).shown(colours)));
    }
    if let (Some(arrival), false) = (&why.arrival, asked) {
        let note = format!(
            "(policy as the agent of {} knows it; the agent of {} has the last word)",
            why.node, arrival.node
        );
        text.push_str(&format!("{}\n", Cell::dim(note).shown(colours)));
    }
    text
}

#[cfg(test)]
mod tests {
    use admin::why::Arrival;

    use super::*;

    fn step(stage: &str, outcome: Outcome, text: &str, object: Option<&str>) -> Step {
        Step {
            stage: stage.to_owned(),
            outcome,
            text: text.to_owned(),
            object: object.map(str::to_owned),
        }
    }

    #[test]
    fn a_refusal_names_the_step_and_the_object() {
        let why = Why {
            node: "node-1".to_owned(),
            source: "old/client".to_owned(),
            destination: "web.shop.svc.cluster.local:80".to_owned(),
            steps: vec![
                step(
                    "capture",
                    Outcome::Notable,
                    "not in the mesh: its connections leave as they are",
                    Some("Pod old/client"),
                ),
                step(
                    "policy",
                    Outcome::Refused,
                    "denied by PeerAuthentication shop/default: the peer came in plaintext, without an identity, which is \
                     what mutual TLS in mode STRICT is there to refuse",
                    Some(
                        "PeerAuthentication shop/default (as istio-system/istio_converted_static_strict), rule 1 of 1",
                    ),
                ),
            ],
            allowed: false,
            arrival: Some(Arrival {
                node: "node-2".to_owned(),
                workload: "Kubernetes//v1/Pod/shop/web-0".to_owned(),
                identity: None,
                source: "10.244.1.2".parse().unwrap(),
                target: "10.244.2.3:8080".parse().unwrap(),
            }),
        };
        let text = shown(&why, false, false);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        insta::assert_snapshot!(text);
    }

    #[test]
    fn a_destination_has_a_port() {
        assert_eq!(destination("web:80"), Ok(("web".to_owned(), 80)));
        assert_eq!(destination("[fd00::7]:443"), Ok(("fd00::7".to_owned(), 443)));
        assert_eq!(destination("shop/web-0:8080"), Ok(("shop/web-0".to_owned(), 8080)));
        for bad in ["web", "web:", ":80", "web:99999", "web:0"] {
            assert!(destination(bad).is_err(), "{bad}");
        }
    }
}
