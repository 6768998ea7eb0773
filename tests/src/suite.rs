//! Runs scenarios one after another on one mesh, and says what they came to in libtest's words.

use std::{
    fs::File,
    io::Write,
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Instant,
};

use anyhow::Result;
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

/// What `playground` says if there is another one than ours: its names are the machine's, and it is not ours to end.
const OCCUPIED: &str = "there can be only one";

/// The mesh, once a scenario needed it; or why there is none.
struct Shared {
    mesh: Mutex<Option<Result<Mesh, String>>>,
    capture: &'static str,
}

/// Runs them all, as the command line asks, on a mesh that captures in this way; but for those, by name, that can't hold
/// with it.
pub fn run(capture: &'static str, themes: &[&[Scenario]], but: &[&str]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One mesh: a scenario may kill an agent.
    arguments.test_threads = Some(1);
    let shared = Arc::new(Shared {
        mesh: Mutex::default(),
        capture,
    });
    let scenarios = themes.iter().copied().flatten().copied();
    let scenarios = scenarios.filter(|scenario| !but.iter().any(|name| scenario.name.ends_with(name)));
    let trials = scenarios.map(|scenario| trial(scenario, shared.clone())).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared.mesh.lock().unwrap_or_else(PoisonError::into_inner).take());
    machine::remove_scripts();
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
        let mut mesh = self.mesh.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = mesh.is_none();
        let mesh = mesh.get_or_insert_with(|| {
            let started = Instant::now();
            let mesh = Mesh::up(self.capture).map_err(|error| explained(&error));
            note(&format!(
                "the mesh was made in {:.1} s",
                started.elapsed().as_secs_f64()
            ));
            mesh
        });
        let mesh = match mesh {
            Ok(mesh) => mesh,
            Err(why) if why.contains(OCCUPIED) => {
                return part_not_run(name, "somebody's playground is up; take it down");
            }
            Err(why) if is_first => anyhow::bail!("there is no mesh: {why}"),
            Err(_) => anyhow::bail!("there is no mesh: see the first scenario"),
        };
        let started = Instant::now();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(mesh)));
        let outcome = outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(anyhow::anyhow!("panicked: {}", text.unwrap_or_default()))
        });
        note(&format!("{name}: {:.1} s", started.elapsed().as_secs_f64()));
        outcome.map_err(|error| match mesh.save_logs(name) {
            Ok(logs) => error.context(format!("logs are in {}", logs.display())),
            Err(_) => error,
        })
    }
}

/// What may interest a reader of a good run, too: `target/system-tests/notes.txt` has it, the terminal does not.
pub fn note(line: &str) {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let directory = machine::root().join("target/system-tests");
        std::fs::create_dir_all(&directory).ok()?;
        File::options()
            .create(true)
            .append(true)
            .open(directory.join("notes.txt"))
            .ok()
    });
    if let Some(mut file) = file.as_ref() {
        // Notes are for convenience: without them the run is as good.
        let _ = writeln!(file, "{line}");
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
        let file = File::options().create(true).append(true).open(path);
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
