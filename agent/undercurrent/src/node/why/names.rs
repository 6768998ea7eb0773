//! Who is meant: the workload, service or address behind what a person writes.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use l4::dns::{Family, Question, resolve};
use model::{Service, Workload, WorkloadUid, canonical_socket};

use super::Seen;

impl Seen {
    pub(super) fn source(&self, name: &str) -> Result<&Arc<Workload>, String> {
        let workload = self.workload(name).ok_or_else(|| {
            format!(
                "the agent of {} knows no workload {name}: give namespace/pod, or an address of it",
                self.node
            )
        })?;
        let is_here = *workload.node == *self.node || self.pods.iter().any(|pod| pod.uid == workload.uid);
        match is_here {
            true => Ok(workload),
            false => Err(format!(
                "{name} runs on {}: ask the agent there, for only it knows whether the pod is captured",
                workload.node
            )),
        }
    }

    fn workload(&self, name: &str) -> Option<&Arc<Workload>> {
        if let Ok(ip) = name.parse::<IpAddr>() {
            return self.snapshot.workload_by_ip(ip);
        }
        if let Some(workload) = self.snapshot.workload(&WorkloadUid(name.into())) {
            return Some(workload);
        }
        let (namespace, pod) = name.split_once('/')?;
        let local = self
            .pods
            .iter()
            .find(|known| *known.pod.namespace == *namespace && *known.pod.name == *pod);
        if let Some(workload) = local.and_then(|pod| self.snapshot.workload(&pod.uid)) {
            return Some(workload);
        }
        let mut workloads = self.snapshot.workloads();
        workloads.find(|workload| *workload.namespace == *namespace && *workload.name == *pod)
    }

    /// The address behind a name, and the object that it is of.
    pub(super) fn destination(
        &self,
        source: &Workload,
        name: &str,
        port: u16,
    ) -> Result<(String, SocketAddr, Option<String>), String> {
        if let Ok(ip) = name.trim_matches(['[', ']']).parse::<IpAddr>() {
            let object = match self.snapshot.workload_by_ip(ip) {
                Some(workload) => Some(match self.snapshot.service_before(source, workload, ip) {
                    Some(service) => service_object(service),
                    None => object_of(workload),
                }),
                None => self
                    .snapshot
                    .service_by_vip_in(ip, &source.namespace)
                    .map(service_object),
            };
            let dialled = canonical_socket(SocketAddr::new(ip, port));
            return Ok((name.to_owned(), dialled, object));
        }
        if name.contains('/') {
            let unknown = || format!("the agent of {} knows no pod {name}", self.node);
            let workload = self.workload(name).ok_or_else(unknown)?;
            let address = address_for(source, workload).ok_or_else(|| format!("{name} has no address"))?;
            return Ok((
                name.to_owned(),
                SocketAddr::new(address, port),
                Some(object_of(workload)),
            ));
        }
        let searched = self.searched(source, name);
        let Some(service) = self.service(source, &searched) else {
            let (host, ip) = self.answer(source, &searched).ok_or_else(|| {
                format!(
                    "no service is called {name} as seen from namespace {}: the pod's DNS would be asked; give an address",
                    source.namespace
                )
            })?;
            let object = self.snapshot.workload_by_ip(ip).map(|workload| object_of(workload));
            return Ok((host, SocketAddr::new(ip, port), object));
        };
        let vips = service
            .vips
            .iter()
            .filter(|vip| *vip.network == **self.snapshot.network());
        let vip = vips.map(|vip| vip.address).find(|ip| speaks(source, *ip));
        let headless = || {
            let mut endpoints = self.snapshot.endpoints(&service.key()).iter();
            endpoints.find_map(|endpoint| address_for(source, endpoint))
        };
        let address = vip.or_else(headless).ok_or_else(|| {
            format!(
                "{} has no address that {} can dial, and no healthy endpoint",
                service.key(),
                source.name
            )
        })?;
        let shown = service.hostname.to_string();
        Ok((shown, SocketAddr::new(address, port), Some(service_object(service))))
    }

    /// What a resolver with the pod's search domains asks for.
    fn searched(&self, source: &Workload, name: &str) -> [String; 4] {
        let (domain, name) = (&self.domain, name.trim_end_matches('.').to_ascii_lowercase());
        [
            name.clone(),
            format!("{name}.{}.svc.{domain}", source.namespace),
            format!("{name}.svc.{domain}"),
            format!("{name}.{domain}"),
        ]
    }

    fn service(&self, source: &Workload, searched: &[String; 4]) -> Option<&Arc<Service>> {
        let found = |host: &String| self.snapshot.service_by_host(host, &source.namespace);
        let wildcard = || self.snapshot.service_by_wildcard(&searched[0], &source.namespace);
        searched.iter().find_map(found).or_else(wildcard)
    }

    /// What the pods' name server answers to what is no service's own name: that of a headless service's pod.
    fn answer(&self, source: &Workload, searched: &[String; 4]) -> Option<(String, IpAddr)> {
        let families = source.workload_ips.iter().map(|own| match own.is_ipv4() {
            true => Family::V4,
            false => Family::V6,
        });
        let mut questions =
            families.flat_map(|family| searched.iter().cloned().map(move |host| Question { host, family }));
        questions.find_map(|question| {
            let found = resolve(&self.snapshot, source, &self.domain, &question, &mut || 0)?;
            Some((found.host, *found.answer.addresses.first()?))
        })
    }
}

fn speaks(source: &Workload, ip: IpAddr) -> bool {
    source.workload_ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4())
}

fn address_for(source: &Workload, workload: &Workload) -> Option<IpAddr> {
    workload.workload_ips.iter().copied().find(|ip| speaks(source, *ip))
}

pub(super) fn source_address(source: &Workload, to: IpAddr) -> IpAddr {
    let same = source.workload_ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
    same.or(source.workload_ips.first()).copied().unwrap_or(to)
}

pub(super) fn at(workload: &Workload, target: SocketAddr) -> String {
    format!("{}/{} ({target})", workload.namespace, workload.name)
}

pub(super) fn object_of(workload: &Workload) -> String {
    let kind = match workload.uid.0.contains("/Pod/") {
        true => "Pod",
        false => "Workload",
    };
    format!("{kind} {}/{}", workload.namespace, workload.name)
}

pub(super) fn service_object(service: &Arc<Service>) -> String {
    format!("Service {}/{} ({})", service.namespace, service.name, service.hostname)
}
