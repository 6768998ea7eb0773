//! Runs scenarios one after another on one mesh, and says what they came to in libtest's words.

use std::{
    io::Write,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::{Mesh, machine};

/// A scenario: its name is a sentence.
#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    pub run: fn(&Mesh) -> Result<()>,
}

/// A list of scenarios out of functions: `scenarios![one_thing_holds, another_holds]`.
#[macro_export]
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        pub const SCENARIOS: &[$crate::Scenario] = &[
            $($crate::Scenario { name: concat!(module_path!(), "::", stringify!($name)), run: $name },)*
        ];
    };
}

/// The mesh, once a scenario needed it; or why there is none.
#[derive(Default)]
struct Shared(Mutex<Option<Result<Mesh, String>>>);

/// Runs them all, as the command line asks.
pub fn run(themes: &[&[Scenario]]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One mesh: a scenario may kill an agent.
    arguments.test_threads = Some(1);
    let shared = Arc::new(Shared::default());
    let scenarios = themes.iter().copied().flatten().copied();
    let trials = scenarios.map(|scenario| trial(scenario, shared.clone())).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    conclusion.exit_code()
}

fn trial(scenario: Scenario, shared: Arc<Shared>) -> Trial {
    let name = scenario.name.split_once("::").map_or(scenario.name, |(_, name)| name);
    Trial::test(name, move || match machine::missing() {
        Some(why) => not_run(name, &why),
        None => shared
            .run(name, scenario.run)
            .map_err(|error| Failed::from(explained(&error))),
    })
}

impl Shared {
    fn run(&self, name: &str, run: fn(&Mesh) -> Result<()>) -> Result<()> {
        let mut mesh = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(_)) = &*mesh {
            anyhow::bail!("there is no mesh: see the first scenario");
        }
        let mesh = mesh.get_or_insert_with(|| {
            let started = Instant::now();
            let mesh = Mesh::up().map_err(|error| explained(&error));
            println!("(the mesh was made in {:.1} s)", started.elapsed().as_secs_f64());
            mesh
        });
        let mesh = mesh
            .as_ref()
            .map_err(|why| anyhow::anyhow!("there is no mesh: {why}"))?;
        let started = Instant::now();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(mesh)));
        let outcome = outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(anyhow::anyhow!("panicked: {}", text.unwrap_or_default()))
        });
        println!("({name}: {:.1} s)", started.elapsed().as_secs_f64());
        outcome.or_else(|error| {
            let logs = mesh.save_logs(name)?;
            Err(error).with_context(|| format!("logs are in {}", logs.display()))
        })
    }
}

/// An error with its causes, without a backtrace: the words say where it was.
fn explained(error: &anyhow::Error) -> String {
    let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
    causes.join("\n  because: ")
}

/// Says that a scenario can't run here: in CI that is a failure.
fn not_run(name: &str, why: &str) -> Result<(), Failed> {
    println!("not run: {name}: {why}");
    if let Some(path) = std::env::var_os("UNDERCURRENT_NOT_RUN") {
        let file = std::fs::File::options().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| writeln!(file, "{name}: {why}"));
    }
    if std::env::var_os("CI").is_some_and(|value| value == "true") {
        return Err(format!("not run: {why}").into());
    }
    Ok(())
}

/// For a part of a scenario that this machine can't show: says so, where the sum of all tests is made.
pub fn part_not_run(name: &str, why: &str) -> Result<()> {
    not_run(name, why).map_err(|_| anyhow::anyhow!("not run: {why}"))
}
