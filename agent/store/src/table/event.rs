//! Events, in the form of either group.

use serde_json::Value;
use time::OffsetDateTime;

use super::{Column, Table, age, at, name, number, text};

pub(super) const TABLE: Table = Table {
    columns: &[
        Column::text(
            "Last Seen",
            "The time at which the most recent occurrence of this event was recorded.",
        ),
        Column::text("Type", "Normal or Warning."),
        Column::text("Reason", "Why this was done, in one word."),
        Column::text("Object", "The object that this is about."),
        Column::text("Subobject", "The part of it.").wide(),
        Column::text("Source", "Who says so.").wide(),
        Column::text("Message", "What happened."),
        Column::text("First Seen", "The time at which the event was first recorded.").wide(),
        Column::text("Count", "The number of times this event has occurred.").wide(),
        Column {
            name: "Name",
            ..super::NAME.wide()
        },
    ],
    cells,
};

/// The first of two forms that says anything.
fn either<'a>(event: &'a Value, core: &str, events: &str) -> &'a str {
    super::or(text(event, core), text(event, events))
}

fn cells(event: &Value, now: OffsetDateTime) -> Vec<Value> {
    let first = super::or(
        either(event, "firstTimestamp", "deprecatedFirstTimestamp"),
        text(event, "eventTime"),
    );
    let mut last = super::or(either(event, "lastTimestamp", "deprecatedLastTimestamp"), first);
    let mut count = number(event, "count").max(number(event, "deprecatedCount")).max(1);
    if at(event, "series").is_some_and(Value::is_object) {
        last = super::or(text(event, "series.lastObservedTime"), last);
        count = number(event, "series.count");
    }
    let kind = either(event, "involvedObject.kind", "regarding.kind").to_lowercase();
    let object = match either(event, "involvedObject.name", "regarding.name") {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let component = super::or(
        either(event, "source.component", "deprecatedSource.component"),
        either(event, "reportingComponent", "reportingController"),
    );
    let source = match either(event, "source.host", "deprecatedSource.host") {
        "" => component.to_owned(),
        host => format!("{component}, {host}"),
    };
    vec![
        Value::from(age::since(last, now)),
        Value::from(text(event, "type")),
        Value::from(text(event, "reason")),
        Value::from(object),
        Value::from(either(event, "involvedObject.fieldPath", "regarding.fieldPath")),
        Value::from(source),
        Value::from(either(event, "message", "note").trim()),
        Value::from(age::since(first, now)),
        Value::from(count),
        name(event),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::line;

    #[test]
    fn events_are_shown_in_either_form() {
        let core = json!({
            "metadata": {"name": "e"}, "type": "Warning", "reason": "BackOff", "message": " Back-off \n",
            "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{a}"},
            "firstTimestamp": "2026-11-22T03:00:00Z", "lastTimestamp": "2026-11-22T03:04:55Z", "count": 7,
            "source": {"component": "kubelet", "host": "n"},
        });
        let expected = "5s | Warning | BackOff | pod/p | spec.containers{a} | kubelet, n | Back-off | 5m | 7 | e";
        assert_eq!(line("", "events", core), expected);
        let new = json!({
            "metadata": {"name": "e"}, "type": "Normal", "reason": "Made", "note": "made",
            "regarding": {"kind": "Job", "name": "j"}, "eventTime": "2026-11-22T03:04:00.123456Z",
            "reportingController": "jobs",
        });
        let expected = "59s | Normal | Made | job/j |  | jobs | made | 59s | 1 | e";
        assert_eq!(line("events.k8s.io", "events", new.clone()), expected);
        let mut series = new;
        series["series"] = json!({"count": 3, "lastObservedTime": "2026-11-22T03:04:58Z"});
        assert!(line("events.k8s.io", "events", series).starts_with("2s | "));
    }
}
