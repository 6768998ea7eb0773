//! Files as a run leaves them, and as accidents do.

use proptest::prelude::*;

use super::*;

fn header() -> Header {
    Header::new("wildcard", "", "Kubernetes")
}

fn put(name: &str, version: &str) -> Change {
    let message = format!("message {version}").into_bytes();
    Change::put(Type::Address, name.into(), version.into(), message.into())
}

fn write(directory: &Path, responses: Vec<Vec<Change>>) {
    // A writer each, since a writer writes what is pending when it ends.
    for changes in responses {
        let good = load(directory, &header()).unwrap().map(|(_, good)| good);
        let writer = StateWriter::start(directory, header(), good, true).unwrap();
        writer.record(changes);
    }
}

fn versions(directory: &Path) -> Vec<(String, String)> {
    let resources = load(directory, &header()).unwrap().unwrap().0;
    let all = resources.into_values().flatten();
    let mut all: Vec<_> = all.map(|(name, version, _)| (name, version)).collect();
    all.sort();
    all
}

fn pairs<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
    pairs
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .into()
}

#[test]
fn what_was_written_is_read_and_the_newest_counts() {
    let directory = tempfile::tempdir().unwrap();
    assert!(load(directory.path(), &header()).unwrap().is_none());
    write(
        directory.path(),
        vec![
            vec![put("a", "1"), put("b", "1"), put("c", "1")],
            vec![put("a", "2"), Change::remove(Type::Address, "b".into())],
            vec![Change::remove(Type::Authorization, "a".into())],
        ],
    );
    assert_eq!(versions(directory.path()), pairs([("a", "2"), ("c", "1")]));
    let (resources, _) = load(directory.path(), &header()).unwrap().unwrap();
    assert!(resources[&Type::Address].contains(&("a".into(), "2".into(), b"message 2".to_vec())));
}

#[test]
fn only_one_of_two_writes_and_nothing_is_missed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write(path, vec![vec![put("a", "1"), put("b", "1")]]);
    let good = || load(path, &header()).unwrap().map(|(_, good)| good);
    let former = StateWriter::start(path, header(), good(), true).unwrap();
    let new = StateWriter::start(path, header(), good(), false).unwrap();
    new.record(vec![put("a", "2"), put("c", "2")]);
    former.record(vec![put("a", "2")]);
    former.keeper().keep(false);
    former.record(vec![put("a", "3")]);
    drop(former);
    assert_ne!(
        versions(path).last(),
        Some(&("c".into(), "2".into())),
        "the new one has written"
    );
    new.keeper().keep(true);
    drop(new);
    assert_eq!(versions(path), pairs([("a", "2"), ("b", "1"), ("c", "2")]));
}

#[test]
fn who_is_in_charge_again_goes_on_with_what_the_other_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let former = StateWriter::start(path, header(), None, true).unwrap();
    former.record(vec![put("a", "1")]);
    former.keeper().keep(false);
    former.record(vec![put("b", "1")]);
    write(path, vec![vec![put("c", "1")]]);
    former.keeper().keep(true);
    drop(former);
    let found = versions(path);
    assert!(
        pairs([("b", "1"), ("c", "1")]).iter().all(|one| found.contains(one)),
        "{found:?}"
    );
}

#[test]
fn nothing_is_begun_anew_by_who_does_not_know_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write(path, vec![vec![put("a", "1")]]);
    let good = load(path, &header()).unwrap().map(|(_, good)| good);
    let new = StateWriter::start(path, header(), good, false).unwrap();
    new.record(vec![put("b", "1")]);
    std::fs::remove_file(path.join(FILE)).unwrap();
    new.keeper().keep(true);
    drop(new);
    assert!(load(path, &header()).unwrap().is_none());
}

#[test]
fn a_file_that_is_mostly_waste_is_rewritten() {
    let directory = tempfile::tempdir().unwrap();
    let large = |version: u32| {
        Change::put(
            Type::Address,
            "a".into(),
            version.to_string().into(),
            vec![b'x'; SLACK as usize / 4].into(),
        )
    };
    for version in 0..40 {
        write(directory.path(), vec![vec![large(version), put("b", "1")]]);
    }
    assert_eq!(versions(directory.path()), pairs([("a", "39"), ("b", "1")]));
    let length = fs::metadata(directory.path().join(FILE)).unwrap().len();
    assert!(length <= 3 * SLACK, "{length}");
}

#[test]
fn a_file_of_another_mesh_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), vec![vec![put("a", "1")]]);
    let other = Header::new("wildcard", "", "other");
    let error = load(directory.path(), &other).unwrap_err();
    assert!(matches!(error, LoadError::OfAnother { .. }), "{error}");
    drop(StateWriter::start(directory.path(), other.clone(), None, true).unwrap());
    assert!(load(directory.path(), &other).unwrap().unwrap().0.is_empty());
}

#[test]
fn what_a_crash_cut_short_does_not_count_and_is_written_over() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), vec![vec![put("a", "1")], vec![put("a", "2")]]);
    let file = directory.path().join(FILE);
    let bytes = fs::read(&file).unwrap();
    for cut in 1..20 {
        fs::write(&file, &bytes[..bytes.len() - cut]).unwrap();
        assert_eq!(versions(directory.path()), pairs([("a", "1")]));
    }
    write(directory.path(), vec![vec![put("b", "1")]]);
    assert_eq!(versions(directory.path()), pairs([("a", "1"), ("b", "1")]));
}

proptest! {
    #[test]
    fn damage_is_noticed_and_never_a_panic(
        at in 0..400usize, length in 0..8usize, new in proptest::collection::vec(any::<u8>(), 0..8)
    ) {
        let mut bytes = header().line();
        let mut states = vec![Vec::new()];
        for number in 0..6u32 {
            let changes = [put(&format!("n{}", number % 3), &number.to_string())];
            let of = |change: &Change| ((change.type_, change.name.clone()), change.clone());
            format::write_record(&changes.iter().map(of).collect(), &mut bytes).unwrap();
            let (latest, _) = format::read(&bytes, &header()).map_err(|_| "good").unwrap();
            let mut state: Vec<_> = latest.into_iter().map(|(key, value)| (key, value.0.to_owned())).collect();
            state.sort();
            states.push(state.into_iter().map(|((_, name), version)| (name.to_owned(), version)).collect());
        }
        let at = at.min(bytes.len());
        bytes.splice(at..(at + length).min(bytes.len()), new);
        if let Ok((latest, good)) = format::read(&bytes, &header()) {
            let mut state: Vec<_> =
                latest.into_iter().map(|((_, name), (version, _))| (name.to_owned(), version.to_owned())).collect();
            state.sort();
            // Whatever is used was the state once, unless nothing was damaged.
            assert!(states.contains(&state), "{state:?}");
            assert!(good <= bytes.len());
        }
    }
}
