//! What was acknowledged is there: after a kill, and after the file was torn or altered, or else its owner is told.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use store::{Engine, Key, Kind, OpenError, kinds};

/// Set in the child that writes until it is killed.
const CHILD: &str = "STORE_TEST_CHILD";

fn kind(plural: &str) -> &'static Kind {
    kinds::by_plural("", plural).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap()
}

async fn create(engine: &Engine, name: &str) {
    let object = json!({"metadata": {"name": name}, "data": {"payload": name.repeat(50)}});
    engine.create(kind("configmaps"), "a", object, false).await.unwrap();
}

async fn namespace(engine: &Engine) {
    let namespace = json!({"metadata": {"name": "a"}});
    engine.create(kind("namespaces"), "", namespace, false).await.unwrap();
}

/// Not a test of its own: what [`a_kill_loses_no_acknowledged_write`] starts and kills.
#[test]
fn child_that_writes() {
    let Ok(directory) = std::env::var(CHILD) else {
        return;
    };
    runtime().block_on(async {
        let engine = Engine::open(Path::new(&directory)).unwrap();
        namespace(&engine).await;
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..8 {
            let engine = engine.clone();
            writers.spawn(async move {
                for index in 0.. {
                    let name = format!("w{writer}-{index}");
                    create(&engine, &name).await;
                    println!("acknowledged {name} at");
                }
            });
        }
        writers.join_all().await;
    });
}

#[test]
fn a_kill_loses_no_acknowledged_write() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child_that_writes", "--exact", "--nocapture"])
        .env(CHILD, directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = Vec::new();
    let take = |line: &str| Some(line.split_once("acknowledged ")?.1.strip_suffix(" at")?.to_owned());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for line in lines.by_ref().map_while(Result::ok) {
        acknowledged.extend(take(&line));
        if acknowledged.len() == 300 {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What it managed to say before it died counts as well.
    acknowledged.extend(lines.map_while(Result::ok).filter_map(|line| take(&line)));
    assert!(acknowledged.len() >= 300);
    let engine = Engine::open(directory.path()).unwrap();
    let mut newest = 0;
    for name in &acknowledged {
        let object = engine.get(&Key::new(kind("configmaps"), "a", name)).expect(name);
        assert_eq!(object.value()["data"]["payload"], name.repeat(50));
        newest = newest.max(object.revision);
    }
    assert!(engine.revision() >= newest);
    runtime().block_on(create(&engine, "after"));
}

/// Set in the child whose files may not grow.
const FULL: &str = "STORE_TEST_FULL";

/// Not a test of its own: what [`a_full_disk_is_named_and_loses_nothing_acknowledged`] starts.
#[test]
fn child_with_a_full_disk() {
    let Ok(directory) = std::env::var(FULL) else {
        return;
    };
    runtime().block_on(async {
        let engine = Engine::open(Path::new(&directory)).unwrap();
        namespace(&engine).await;
        let mut revision = 0;
        let error = loop {
            let name = format!("o{revision}");
            let object = json!({"metadata": {"name": name}, "data": {"payload": name.repeat(20_000)}});
            match engine.create(kind("configmaps"), "a", object, false).await {
                Ok(_) => println!("acknowledged {name} at"),
                Err(error) => break error,
            }
            revision += 1;
        };
        assert!(error.code == 500 && error.message.contains("objects.redb"), "{error}");
        assert_eq!(engine.list(kind("configmaps"), None).1.len(), revision, "reads go on");
        let object = json!({"metadata": {"name": "small"}});
        let again = engine.create(kind("configmaps"), "a", object, false).await.unwrap_err();
        assert!(
            again.message.contains("objects.redb") && again.message.contains("make room"),
            "{again}"
        );
        println!("told");

        // With room again, writes go on by themselves.
        let (_, most) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, most, most).unwrap();
        let mut watch = engine.watch(kind("configmaps"), None, engine.revision()).unwrap();
        let object = json!({"metadata": {"name": "o-after"}});
        while engine
            .create(kind("configmaps"), "a", object.clone(), false)
            .await
            .is_err()
        {
            tokio::task::yield_now().await;
        }
        println!("acknowledged o-after at");
        // What was refused is either not there, or told to watchers like any change.
        loop {
            let event = watch.next().await.unwrap();
            let name = event.object().key.name.clone();
            assert!(engine.get(&event.object().key).is_some(), "{name}");
            if &*name == "o-after" {
                break;
            }
        }
        let newest = engine
            .list(kind("configmaps"), None)
            .1
            .iter()
            .map(|object| object.revision)
            .max();
        assert_eq!(newest, Some(engine.revision()));
        println!("went on");
    });
}

#[test]
fn a_full_disk_is_named_and_loses_nothing_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    // A limit on the size of files, with the signal ignored, is a full disk for one process.
    let child = Command::new("sh")
        .args([
            "-c",
            r#"trap "" XFSZ; ulimit -S -f 16384; exec "$0" child_with_a_full_disk --exact --nocapture"#,
        ])
        .arg(std::env::current_exe().unwrap())
        .env(FULL, directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8(child.stdout).unwrap();
    assert!(
        text.contains("told") && text.contains("went on"),
        "{text}{}",
        String::from_utf8_lossy(&child.stderr)
    );
    let names: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once("acknowledged ")?.1.strip_suffix(" at"))
        .collect();
    assert!(!names.is_empty());
    let engine = Engine::open(directory.path()).unwrap();
    for name in names {
        assert!(engine.get(&Key::new(kind("configmaps"), "a", name)).is_some(), "{name}");
    }
}

#[test]
fn a_second_process_is_told_who_is_in_the_way() {
    let directory = tempfile::tempdir().unwrap();
    let _engine = Engine::open(directory.path()).unwrap();
    let error = Engine::open(directory.path()).err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("objects.redb"));
}

#[test]
fn a_torn_or_altered_file_is_read_whole_or_named() {
    let directory = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..200).map(|index| format!("o{index}")).collect();
    {
        let engine = Engine::open(directory.path()).unwrap();
        runtime().block_on(async {
            namespace(&engine).await;
            for name in &names {
                create(&engine, name).await;
            }
        });
    }
    let file = directory.path().join("objects.redb");
    let good = fs::read(&file).unwrap();
    let mut told = 0;
    let mut check = |what: &str, bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        match Engine::open(directory.path()) {
            Ok(engine) => {
                for name in &names {
                    let object = engine.get(&Key::new(kind("configmaps"), "a", name));
                    let payload = object.map(|object| object.value()["data"]["payload"].clone());
                    assert_eq!(payload, Some(name.repeat(50).into()), "{what}");
                }
            }
            Err(error) => {
                told += 1;
                let text = error.to_string();
                assert!(matches!(error, OpenError::Damaged { .. }), "{what}: {text}");
                assert!(
                    text.contains("objects.redb") && text.contains("put back a copy"),
                    "{what}: {text}"
                );
            }
        }
    };
    for part in [1, 17, 50, 90, 99] {
        check(&format!("cut to {part} %"), &good[..good.len() * part / 100]);
    }
    check("emptied", b"");
    for step in 0..60 {
        let mut bytes = good.clone();
        let at = (step * 104_729) % bytes.len();
        bytes[at] ^= 0x55;
        check(&format!("byte {at} altered"), &bytes);
    }
    for at in [0, 9, 64, 130, 300] {
        let mut bytes = good.clone();
        bytes[at] ^= 0xff;
        check(&format!("byte {at} of the header altered"), &bytes);
    }
    check("no such file", b"this is no store");
    assert!(told > 0, "some of that can't be repaired");
}
