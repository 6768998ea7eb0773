//! How long ago, as Kubernetes writes it (`k8s.io/apimachinery/pkg/util/duration`).

use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};

/// The time between a timestamp and now; `<unknown>` without one.
pub(super) fn since(timestamp: &str, now: OffsetDateTime) -> String {
    read(timestamp).map_or_else(|| "<unknown>".to_owned(), |then| human(now - then))
}

pub(super) fn read(timestamp: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(timestamp, &Rfc3339).ok()
}

/// Two units at the most, fewer the longer it is.
pub(super) fn human(duration: Duration) -> String {
    let (seconds, minutes) = (duration.whole_seconds(), duration.whole_minutes());
    let hours = duration.whole_hours();
    let days = hours / 24;
    let two = |large: i64, unit: char, small: i64, smaller: char| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit}{small}{smaller}"),
    };
    match () {
        () if seconds < -1 => "<invalid>".to_owned(),
        () if seconds < 0 => "0s".to_owned(),
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => two(minutes, 'm', seconds % 60, 's'),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => two(hours, 'h', minutes % 60, 'm'),
        () if hours < 48 => format!("{hours}h"),
        () if days < 8 => two(days, 'd', hours % 24, 'h'),
        () if days < 365 * 2 => format!("{days}d"),
        () if days < 365 * 8 => two(days / 365, 'y', days % 365, 'd'),
        () => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn durations_are_written_as_in_kubernetes() {
        let check = |seconds: i64, expected: &str| assert_eq!(human(Duration::seconds(seconds)), expected);
        check(-5, "<invalid>");
        check(-1, "0s");
        check(0, "0s");
        check(119, "119s");
        check(120, "2m");
        check(125, "2m5s");
        check(600, "10m");
        check(10_799, "179m");
        check(10_800, "3h");
        check(3 * 3600 + 60, "3h1m");
        check(8 * 3600, "8h");
        check(47 * 3600, "47h");
        check(48 * 3600, "2d");
        check(49 * 3600, "2d1h");
        check(8 * 86_400, "8d");
        check(729 * 86_400, "729d");
        check(730 * 86_400, "2y");
        check(731 * 86_400, "2y1d");
        check(8 * 365 * 86_400, "8y");
        check(9 * 365 * 86_400 + 86_400, "9y");
        assert_eq!(since("", datetime!(2026-11-22 03:05:00 UTC)), "<unknown>");
        let now = datetime!(2026-11-22 03:05:00 UTC);
        assert_eq!(since("2026-11-22T04:04:30+01:00", now), "30s");
    }
}
