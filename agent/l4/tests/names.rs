//! Workloads that have only a name: looked up, tried in turn, and refused in words.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use l4::{Answer, Config, Lookup, LookupError, Proxy};
use lab::{Lab, LabPod, echo, expect_echo, expect_refused, new_address};
use model::{NamespacedName, Workload, WorkloadUid};
use tokio::net::TcpListener;

/// A DNS server, played; a name that it does not know is one that it never answers for.
#[derive(Debug, Default)]
struct Known(HashMap<&'static str, Result<Vec<IpAddr>, &'static str>>);

impl Lookup for Known {
    fn addresses(&self, host: &Arc<str>) -> Answer {
        let host = host.clone();
        match self.0.get(&*host).cloned() {
            Some(answer) => Box::pin(std::future::ready(answer.map_err(|reason| LookupError {
                host,
                resolver: "192.0.2.53".into(),
                reason: reason.to_owned(),
            }))),
            None => Box::pin(std::future::pending()),
        }
    }
}

struct Out {
    lab: Lab,
    proxy: Proxy,
    client: LabPod,
    service: SocketAddr,
}

/// A client, and a service `api` whose endpoints have these names, at this port.
fn out(names: &[&'static str], port: u16, known: Known) -> Out {
    let mut lab = Lab::new();
    let proxy = lab.proxy_with(Config {
        lookup: Arc::new(known),
        connect_timeout: Duration::from_millis(400),
        ..Config::default()
    });
    let client = lab.pod(&proxy, "client");
    let service = lab.service("api", 443, port, &[]);
    for name in names {
        let key = NamespacedName::new("shop", "api.shop.svc.cluster.local");
        lab.contents.workloads.push(Workload {
            uid: WorkloadUid((*name).into()),
            name: (*name).into(),
            namespace: "shop".into(),
            hostname: (*name).into(),
            services: [(key, [(443, port)].into())].into_iter().collect(),
            ..Workload::default()
        });
    }
    lab.publish();
    Out {
        lab,
        proxy,
        client,
        service,
    }
}

async fn outside() -> SocketAddr {
    let listener = TcpListener::bind(SocketAddr::new(new_address(), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    echo(listener);
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_with_a_dead_address_is_reached_by_the_next() {
    let address = outside().await;
    // The first one refuses, the second does not answer (a documentation address), the third serves.
    let ips = vec![new_address(), "192.0.2.1".parse().unwrap(), address.ip()];
    let known = Known(HashMap::from([("api.example", Ok(ips))]));
    let out = out(&["api.example"], address.port(), known);
    let mut socket = out.client.dial(out.service).await.unwrap();
    expect_echo(&mut socket, b"outside").await;
    drop(socket);
    let line = out.lab.line(&["outbound", "dst.workload=\"api.example\""]);
    assert!(line.contains(&format!("dst.addr={address}")), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_of_a_name_whose_addresses_all_fail_is_of_one_of_them() {
    let [first, second] = [new_address(), new_address()];
    let known = Known(HashMap::from([("api.example", Ok(vec![first, second]))]));
    let out = out(&["api.example"], 9, known);
    expect_refused(out.client.dial(out.service).await).await;
    let address = SocketAddr::new(first, 9);
    out.lab.line(&[
        "outbound",
        "dst.workload=\"api.example\"",
        &format!("dst.addr={address}"),
        &format!("{address} could not be connected to"),
    ]);
}

/// As TCP ServiceEntries are written: what they are matched by is the real address, or a range around it.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_leads_to_its_services_own_address_is_reached_there() {
    let address = outside().await;
    for (port, target) in [(address.port(), address.port()), (443, address.port())] {
        let known = Known(HashMap::from([("api.example", Ok(vec![address.ip()]))]));
        let mut out = out(&["api.example"], target, known);
        let service = out.lab.contents.services.last_mut().unwrap();
        service.vips = vec![format!("/{}", address.ip()).parse().unwrap()];
        service.ports = [(port, target)].into();
        let key = service.key();
        let workload = out.lab.contents.workloads.last_mut().unwrap();
        workload.services = [(key, [(port, target)].into())].into_iter().collect();
        out.lab.publish();
        let mut socket = out.client.dial(SocketAddr::new(address.ip(), port)).await.unwrap();
        expect_echo(&mut socket, b"outside").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_nobody_knows_is_refused_in_words_and_another_endpoint_tried() {
    let address = outside().await;
    let known = || {
        Known(HashMap::from([
            ("no.example", Err("no such name")),
            ("api.example", Ok(vec![address.ip()])),
        ]))
    };
    let bad = out(&["no.example"], address.port(), known());
    expect_refused(bad.client.dial(bad.service).await).await;
    bad.lab
        .line(&["the name no.example could not be looked up (192.0.2.53): no such name"]);
    let slow = out(&["slow.example"], address.port(), known());
    expect_refused(slow.client.dial(slow.service).await).await;
    slow.lab
        .line(&["slow.example could not be looked up", "it was not answered within"]);

    let both = out(&["no.example", "api.example"], address.port(), known());
    for _ in 0..8 {
        let mut socket = both.client.dial(both.service).await.unwrap();
        expect_echo(&mut socket, b"the other").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_leads_into_the_mesh_goes_as_the_mesh_says() {
    let server = new_address();
    let known = Known(HashMap::from([("api.example", Ok(vec![server]))]));
    let mut out = out(&["api.example"], 8080, known);
    let pod = out.lab.pod_at(&out.proxy, "server", server);
    out.lab.publish();
    echo(pod.listen(8080).await);
    let mut socket = out.client.dial(out.service).await.unwrap();
    expect_echo(&mut socket, b"in a tunnel").await;
    drop(socket);
    out.lab.line(&["outbound", "dst.workload=\"server\"", "dst.hbone_addr"]);
}
