//! What the series hold, seen through a scrape.

use std::collections::BTreeMap;

use model::{Service, Workload};
use proptest::prelude::*;

use super::*;

fn workload(name: &str) -> Arc<Workload> {
    Arc::new(Workload {
        name: format!("{name}-6f7-x").as_str().into(),
        workload_name: name.into(),
        canonical_name: name.into(),
        namespace: "shop".into(),
        ..Workload::default()
    })
}

fn scraped(metrics: &Metrics, exposition: Exposition) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(metrics.clone()));
    exposition.write(&registry).unwrap()
}

/// The sum of a counter over all series whose line holds these texts.
fn sum(text: &str, name: &str, with: &[&str]) -> u64 {
    text.lines()
        .filter(|line| line.starts_with(&format!("{name}{{")) && with.iter().all(|part| line.contains(part)))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

fn traffic<'a>(source: &'a Arc<Workload>, destination: &'a Arc<Workload>) -> Traffic<'a> {
    Traffic {
        reporter: Direction::Outbound,
        source: Some(source),
        destination: Some(destination),
        service: None,
        peer: None,
    }
}

#[test]
fn a_series_has_istios_labels() {
    let metrics = Metrics::default();
    let (client, web) = (workload("client"), workload("web"));
    let service = Arc::new(Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        ..Service::default()
    });
    let peer = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let series = Recorder::new(metrics.clone()).series(&Traffic {
        service: Some(&service),
        peer: Some(&peer),
        ..traffic(&client, &web)
    });
    series.open();
    series.add_bytes(74, 61);
    series.close(ResponseFlag::None);
    insta::assert_snapshot!("series", scraped(&metrics, Exposition::Text));
    let open = scraped(&metrics, Exposition::OpenMetrics);
    assert!(
        open.contains("# TYPE istio_tcp_sent_bytes counter") && open.ends_with("# EOF\n"),
        "{open}"
    );
}

#[test]
fn what_is_not_known_is_unknown() {
    let metrics = Metrics::default();
    let nobody = Traffic {
        reporter: Direction::Inbound,
        source: None,
        destination: None,
        service: None,
        peer: None,
    };
    Recorder::new(metrics.clone()).series(&nobody).open();
    let text = scraped(&metrics, Exposition::Text);
    let line = text
        .lines()
        .find(|line| line.starts_with("istio_tcp_connections_opened_total{"));
    let line = line.unwrap();
    for (label, value) in line.split(['{', ',', '}']).filter_map(|pair| pair.split_once('=')) {
        let expected = match label {
            "reporter" => "\"destination\"",
            "request_protocol" => "\"tcp\"",
            "response_flags" => "\"-\"",
            _ => "\"unknown\"",
        };
        assert_eq!(value, expected, "{label} in {line}");
    }
}

#[test]
fn pods_of_a_deployment_share_a_series() {
    let metrics = Metrics::default();
    let recorder = Recorder::new(metrics.clone());
    let web = workload("web");
    for pod in 0..100 {
        let client = Arc::new(Workload {
            name: format!("client-{pod}").as_str().into(),
            ..(*workload("client")).clone()
        });
        recorder.series(&traffic(&client, &web)).open();
    }
    assert_eq!(metrics.len(), 1);
    let text = scraped(&metrics, Exposition::Text);
    assert_eq!(sum(&text, "istio_tcp_connections_opened_total", &[]), 100);
}

#[test]
fn a_series_ends_some_time_after_its_last_use() {
    let limits = Limits {
        series: 10,
        expiry: Duration::from_secs(600),
    };
    let metrics = Metrics::new(limits);
    let recorder = Recorder::new(metrics.clone());
    let (client, web) = (workload("client"), workload("web"));
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    let live = recorder.series(&traffic(&client, &web));
    for seconds in [10, 700, 5000] {
        recorder.sweep(after(seconds));
    }
    assert_eq!(metrics.len(), 1, "a connection lives");
    drop(live);
    recorder.sweep(after(5300));
    assert_eq!(metrics.len(), 1);
    recorder.sweep(after(5605));
    assert_eq!(metrics.len(), 0, "it was last seen in use at 5000");
    assert_eq!(
        sum(
            &scraped(&metrics, Exposition::Text),
            "istio_tcp_connections_opened_total",
            &[]
        ),
        0
    );
    // And begins again.
    recorder.series(&traffic(&client, &web)).open();
    assert_eq!(metrics.len(), 1);
}

#[test]
fn sums_stay_right_when_there_are_too_many() {
    let limits = Limits {
        series: 10,
        ..Limits::default()
    };
    let metrics = Metrics::new(limits);
    let recorder = Recorder::new(metrics.clone());
    let web = workload("web");
    for number in 0..50 {
        let client = workload(&format!("client-{number}"));
        let series = recorder.series(&traffic(&client, &web));
        series.open();
        series.add_bytes(1, 2);
        series.close(ResponseFlag::Deny);
    }
    assert_eq!(metrics.len(), 10);
    let text = scraped(&metrics, Exposition::Text);
    assert_eq!(sum(&text, "istio_tcp_connections_opened_total", &[]), 50);
    assert_eq!(
        sum(
            &text,
            "istio_tcp_connections_failed_total",
            &["response_flags=\"DENY\""]
        ),
        50
    );
    assert_eq!(sum(&text, "istio_tcp_sent_bytes_total", &[]), 100);
    let overflow = ["source_workload=\"overflow\"", "reporter=\"source\""];
    assert_eq!(sum(&text, "istio_tcp_connections_opened_total", &overflow), 40);
    assert!(text.contains("undercurrent_metrics_overflowed_total 40"), "{text}");
    // When the ten have expired there is room again.
    recorder.sweep(Instant::now());
    recorder.sweep(Instant::now() + limits.expiry + Duration::from_secs(1));
    let client = workload("late");
    recorder.series(&traffic(&client, &web)).open();
    assert!(scraped(&metrics, Exposition::Text).contains("source_workload=\"late\""));
}

/// What is looked through is everything, under the lock that all threads share.
#[test]
fn connections_that_are_too_many_do_not_look_for_what_expired_each() {
    let limits = Limits {
        series: 10,
        ..Limits::default()
    };
    let metrics = Metrics::new(limits);
    let start = Instant::now();
    let web = workload("web");
    let series = |name: &str, after| metrics.series(&traffic(&workload(name), &web), start + after);
    for number in 0..10 {
        series(&format!("early-{number}"), Duration::ZERO);
    }
    let (mut looks, mut last) = (0, metrics.lock().swept);
    for number in 0..1000 {
        let after = limits.expiry / 2 + Duration::from_millis(number);
        assert!(matches!(series(&format!("late-{number}"), after), Found::Overflow(_)));
        let swept = metrics.lock().swept;
        looks += usize::from(swept != last);
        last = swept;
    }
    assert_eq!(looks, 1);
    // There is room again, with nobody who sweeps.
    let after = limits.expiry + limits.expiry / 2;
    assert!(matches!(series("later", after), Found::Own(_)));
    assert_eq!(metrics.len(), 1);
}

#[test]
fn the_process_is_described() {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Process));
    let text = Exposition::Text.write(&registry).unwrap();
    for name in [
        "process_cpu_seconds_total ",
        "process_resident_memory_bytes ",
        "process_open_fds ",
    ] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name} in {text}");
    }
}

proptest! {
    /// Whatever is recorded, by however many threads' recorders, with sweeps between: what is scraped is the sum of it.
    #[test]
    fn counters_are_what_was_recorded(
        connections in prop::collection::vec(
            (0..6usize, 0..6usize, any::<bool>(), 0..13usize, 0..1000u64, 0..1000u64, 0..3usize, any::<bool>()),
            0..200,
        ),
        cap in 1..40usize,
    ) {
        let metrics = Metrics::new(Limits { series: cap, ..Limits::default() });
        let recorders: Vec<_> = (0..3).map(|_| Recorder::new(metrics.clone())).collect();
        let workloads: Vec<_> = (0..6).map(|number| workload(&format!("w{number}"))).collect();
        let mut expected: BTreeMap<(bool, usize), u64> = BTreeMap::new();
        let (mut to_server, mut to_client) = (0, 0);
        for (from, to, inbound, flag, up, down, thread, sweep) in &connections {
            let reporter = if *inbound { Direction::Inbound } else { Direction::Outbound };
            let series = recorders[*thread].series(&Traffic { reporter, ..traffic(&workloads[*from], &workloads[*to]) });
            series.open();
            series.add_bytes(*up, *down);
            series.close(ResponseFlag::ALL[*flag]);
            *expected.entry((*inbound, *flag)).or_default() += 1;
            to_server += up;
            to_client += down;
            if *sweep {
                recorders[*thread].sweep(Instant::now());
            }
        }
        let text = scraped(&metrics, Exposition::Text);
        prop_assert!(metrics.len() <= cap);
        let count = connections.len() as u64;
        prop_assert_eq!(sum(&text, "istio_tcp_connections_opened_total", &[]), count);
        prop_assert_eq!(sum(&text, "istio_tcp_connections_closed_total", &[]), count);
        prop_assert_eq!(sum(&text, "istio_tcp_received_bytes_total", &[]), to_server);
        prop_assert_eq!(sum(&text, "istio_tcp_sent_bytes_total", &[]), to_client);
        for ((inbound, flag), count) in expected {
            let reporter = if inbound { "reporter=\"destination\"" } else { "reporter=\"source\"" };
            let flag = ResponseFlag::ALL[flag];
            let with = format!("response_flags=\"{}\"", flag.as_str());
            let with = [reporter, with.as_str()];
            prop_assert_eq!(sum(&text, "istio_tcp_connections_closed_total", &with), count);
            let failed = if flag.is_failure() { count } else { 0 };
            prop_assert_eq!(sum(&text, "istio_tcp_connections_failed_total", &with), failed);
        }
    }
}
