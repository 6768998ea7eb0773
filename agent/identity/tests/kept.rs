//! Certificates on the disk: used at once after a start, and only if they still hold.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod lab;

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use identity::{Authority as _, CaClient, Clock, Identities, IssueError, Kept, Trust};
use lab::{Lab, Mood, Root, web};
use model::TrustDomain;
use tonic::Status;

/// An agent's authority after a start.
fn started(lab: &Lab) -> Kept<CaClient> {
    at(lab, Clock::system())
}

fn at(lab: &Lab, clock: Clock) -> Kept<CaClient> {
    Kept::new(lab.client(), &lab.path("kept"), &lab.path("roots"), clock).unwrap()
}

fn files(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(lab.path("kept")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// How often the CA was asked.
fn asked(lab: &Lab) -> usize {
    lab.fake.seen.lock().unwrap().len()
}

#[tokio::test]
async fn after_a_start_the_disk_is_enough_once() {
    let mut lab = Lab::new().await;
    let first = started(&lab).issue(&web()).await.unwrap();
    let [file] = &files(&lab)[..] else {
        panic!("{:?}", files(&lab))
    };
    assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(lab.path("kept")).unwrap().permissions().mode() & 0o777,
        0o700
    );
    lab.stop();
    let again = started(&lab);
    let found = again.issue(&web()).await.unwrap();
    assert_eq!((found.chain, found.roots), (first.chain, first.roots));
    assert_eq!(found.key.secret_der(), first.key.secret_der());
    // A rotation is the authority's.
    let Err(error) = again.issue(&web()).await else {
        panic!("issued")
    };
    assert!(matches!(error, IssueError::Unavailable(_)), "{error}");
    assert_eq!(files(&lab).len(), 1);
    // And it makes credentials that work.
    let identities = Identities::new(Arc::new(started(&lab)), TrustDomain::default(), Clock::system());
    identities.credentials(&web()).await.unwrap();
}

#[tokio::test]
async fn what_is_kept_is_used_only_if_it_still_holds() {
    let lab = Lab::new().await;
    started(&lab).issue(&web()).await.unwrap();
    let file = files(&lab).remove(0);
    let good = fs::read_to_string(&file).unwrap();
    let other: model::Identity = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
    started(&lab).issue(&other).await.unwrap();
    let others = files(&lab).into_iter().find(|path| *path != file).unwrap();
    let others = fs::read_to_string(others).unwrap();
    let torn = &good[..good.len() / 2];
    let certificate = &good[good.find("-----BEGIN CERTIFICATE").unwrap()..];
    for bad in ["", "nonsense", torn, &others, certificate, &"x".repeat(1 << 20)] {
        fs::write(&file, bad).unwrap();
        let before = asked(&lab);
        started(&lab).issue(&web()).await.unwrap();
        assert_eq!(asked(&lab), before + 1, "{bad:.80}");
    }
    // By a clock that was set back it has not begun yet.
    let early = SystemTime::now() - Duration::from_secs(600);
    let before = asked(&lab);
    at(&lab, Clock::of(move || early)).issue(&web()).await.unwrap();
    assert_eq!(asked(&lab), before, "the file was not used");
    // Over, or nearly.
    let late = SystemTime::now() + Duration::from_secs(24 * 3600 - 30);
    let (before, clock) = (asked(&lab), Clock::of(move || late));
    let _ = at(&lab, clock).issue(&web()).await;
    assert_eq!(asked(&lab), before + 1);
    // Under a root that is no longer one.
    started(&lab).issue(&web()).await.unwrap();
    let second = Root::new("second");
    *lab.fake.root.lock().unwrap() = second.clone();
    lab.write("roots", &second.pem());
    let before = asked(&lab);
    let issued = started(&lab).issue(&web()).await.unwrap();
    assert_eq!((asked(&lab), issued.roots.len()), (before + 1, 1));
}

#[tokio::test]
async fn without_roots_nothing_is_used_and_nothing_lost() {
    let lab = Lab::new().await;
    started(&lab).issue(&web()).await.unwrap();
    let roots = fs::read_to_string(lab.path("roots")).unwrap();
    lab.write("roots", "");
    let Err(error) = started(&lab).issue(&web()).await else {
        panic!("issued")
    };
    assert!(matches!(error, IssueError::Unavailable(_)), "{error}");
    lab.write("roots", &roots);
    let before = asked(&lab);
    started(&lab).issue(&web()).await.unwrap();
    assert_eq!(asked(&lab), before, "the file was lost");
}

#[tokio::test]
async fn what_is_refused_or_forgotten_or_nobodys_is_removed() {
    let lab = Lab::new().await;
    let kept = started(&lab);
    kept.issue(&web()).await.unwrap();
    lab.mood(Mood::Fails(Status::unavailable("later")));
    assert!(kept.issue(&web()).await.is_err());
    lab.mood(Mood::Fails(Status::unauthenticated("token expired")));
    assert!(kept.issue(&web()).await.is_err());
    assert_eq!(
        files(&lab).len(),
        1,
        "neither an absence nor the node's token is a refusal"
    );
    lab.mood(Mood::Fails(Status::permission_denied("no such pod on this node")));
    assert!(kept.issue(&web()).await.is_err());
    assert_eq!(files(&lab).len(), 0);
    lab.mood(Mood::Honest);
    let identities = Identities::new(
        Arc::new(started(&lab)),
        Trust::from(TrustDomain::default()),
        Clock::system(),
    );
    identities.credentials(&web()).await.unwrap();
    identities.forget(&web());
    assert_eq!(files(&lab).len(), 0);
    // Of a pod that went while no agent ran; and what was being written when one died.
    kept.issue(&web()).await.unwrap();
    fs::write(lab.path("kept/half.new"), "half").unwrap();
    let other: model::Identity = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
    let identities = Identities::new(Arc::new(started(&lab)), TrustDomain::default(), Clock::system());
    identities.credentials(&other).await.unwrap();
    identities.settled();
    let left: Vec<_> = files(&lab);
    assert!(
        matches!(&left[..], [one] if one.to_string_lossy().contains("other")),
        "{left:?}"
    );
    started(&lab).retain(&HashSet::new());
    assert_eq!(files(&lab).len(), 0);
}

#[tokio::test]
async fn a_disk_that_can_not_be_written_stops_nothing() {
    let lab = Lab::new().await;
    let kept = started(&lab);
    fs::remove_dir(lab.path("kept")).unwrap();
    kept.issue(&web()).await.unwrap();
    kept.retain(&HashSet::new());
}
