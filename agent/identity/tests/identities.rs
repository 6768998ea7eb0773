//! Certificates over time: fetched once, rotated, retried, never served expired. Time is tokio's, paused.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use identity::{
    Authority, Clock, Credentials, CredentialsError, Identities, IssueError, IssueFuture, LocalAuthority,
    PeerIdentityError, generate_root, peer_identity,
};
use model::{Identity, TrustDomain};
use tokio::{sync::Semaphore, time::advance};

const HOUR: Duration = Duration::from_secs(3600);

fn local(clock: &Clock) -> LocalAuthority {
    let (certificate, key) = generate_root(&TrustDomain::default()).unwrap();
    LocalAuthority::from_pem(&certificate, &key)
        .unwrap()
        .with_clock(clock.clone())
}

fn web() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

/// An authority that can be slow, fail, or lie.
struct Moody {
    inner: LocalAuthority,
    issued: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    /// One for each issue that may pass; closed when all may.
    gate: Semaphore,
    failing: Mutex<Option<IssueError>>,
    lies: Option<Identity>,
}

impl Moody {
    fn new(inner: LocalAuthority) -> Self {
        Self {
            inner,
            issued: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            gate: Semaphore::new(1_000_000),
            failing: Mutex::new(None),
            lies: None,
        }
    }

    fn issued(&self) -> usize {
        self.issued.load(SeqCst)
    }

    fn fail(&self, fails: bool) {
        *self.failing.lock().unwrap() = fails.then(|| IssueError::Unavailable("down".into()));
    }
}

impl Authority for Moody {
    fn issue<'a>(&'a self, identity: &'a Identity) -> IssueFuture<'a> {
        Box::pin(async move {
            let now = self.at_once.fetch_add(1, SeqCst) + 1;
            self.most_at_once.fetch_max(now, SeqCst);
            self.gate.acquire().await.unwrap().forget();
            self.at_once.fetch_sub(1, SeqCst);
            self.issued.fetch_add(1, SeqCst);
            let failing = self.failing.lock().unwrap().clone();
            match failing {
                Some(error) => Err(error),
                None => self.inner.issue(self.lies.as_ref().unwrap_or(identity)).await,
            }
        })
    }
}

fn setup() -> (Arc<Moody>, Identities, Clock) {
    let clock = Clock::tokio(SystemTime::now());
    let moody = Arc::new(Moody::new(local(&clock)));
    let identities = Identities::new(moody.clone(), TrustDomain::default(), clock.clone());
    (moody, identities, clock)
}

fn spawn_rotation(identities: &Identities) {
    let identities = identities.clone();
    tokio::spawn(async move { identities.rotate().await });
}

/// Time passes, and everyone has a turn.
async fn pass(duration: Duration) {
    let step = Duration::from_secs(20);
    let mut left = duration;
    while !left.is_zero() {
        let now = left.min(step);
        advance(now).await;
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        left -= now;
    }
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_at_once_share_one_fetch() {
    let (moody, identities, _) = setup();
    assert!(identities.cached(&web()).is_none());
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let identities = identities.clone();
            tokio::spawn(async move { identities.credentials(&web()).await.unwrap().serial().to_owned() })
        })
        .collect();
    let mut serials = Vec::new();
    for asked in asking {
        serials.push(asked.await.unwrap());
    }
    serials.dedup();
    assert_eq!((serials.len(), moody.issued()), (1, 1));
    assert_eq!(identities.cached(&web()).unwrap().serial(), serials[0]);
}

#[tokio::test(start_paused = true)]
async fn fetches_are_bounded() {
    let (moody, identities, _) = setup();
    moody.gate.forget_permits(1_000_000);
    let asking: Vec<_> = (0..40)
        .map(|n| {
            let identities = identities.clone();
            let identity: Identity = format!("spiffe://cluster.local/ns/shop/sa/web-{n}").parse().unwrap();
            tokio::spawn(async move { identities.credentials(&identity).await.map(drop) })
        })
        .collect();
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    moody.gate.add_permits(100);
    for asked in asking {
        asked.await.unwrap().unwrap();
    }
    assert_eq!(moody.most_at_once.load(SeqCst), 8);
    assert_eq!(identities.list().len(), 40);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_rotated_after_half_of_its_life() {
    let (moody, identities, clock) = setup();
    spawn_rotation(&identities);
    let first = identities.credentials(&web()).await.unwrap();
    assert!(first.not_before() < clock.now());
    pass(11 * HOUR).await;
    assert_eq!(identities.cached(&web()).unwrap().serial(), first.serial());
    pass(4 * HOUR).await;
    let second = identities.cached(&web()).unwrap();
    assert_ne!(second.serial(), first.serial());
    assert_eq!(moody.issued(), 2);
    pass(15 * HOUR).await;
    assert_eq!(moody.issued(), 3);
    identities.forget(&web());
    assert!(identities.cached(&web()).is_none());
    pass(48 * HOUR).await;
    assert_eq!(moody.issued(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_never_served() {
    let (moody, identities, clock) = setup();
    spawn_rotation(&identities);
    let first = identities.credentials(&web()).await.unwrap();
    moody.fail(true);
    pass(23 * HOUR).await;
    // The rotation fails, the old one serves on.
    assert_eq!(identities.cached(&web()).unwrap().serial(), first.serial());
    assert!(identities.list()[0].last_error.is_some());
    pass(HOUR + Duration::from_secs(60)).await;
    assert!(clock.now() > first.not_after());
    assert!(identities.cached(&web()).is_none());
    let error = identities.credentials(&web()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "no certificate for spiffe://cluster.local/ns/shop/sa/web: the certificate authority is unavailable: down"
    );
    // It comes back by itself.
    moody.fail(false);
    pass(Duration::from_secs(200)).await;
    assert!(identities.cached(&web()).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_down_is_not_asked_by_everyone() {
    let (moody, identities, _) = setup();
    moody.fail(true);
    for _ in 0..100 {
        assert!(identities.credentials(&web()).await.is_err());
    }
    assert_eq!(moody.issued(), 1);
    pass(Duration::from_secs(2)).await;
    moody.fail(false);
    identities.credentials(&web()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_does_not_answer_is_unavailable() {
    let (moody, identities, _) = setup();
    moody.gate.forget_permits(1_000_000);
    let error = identities.credentials(&web()).await.unwrap_err();
    assert!(matches!(error.reason, IssueError::Unavailable(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_waiting_does_not_keep_others_from_it() {
    let (moody, identities, _) = setup();
    moody.gate.forget_permits(1_000_000);
    let wanted = web();
    let given_up = tokio::time::timeout(Duration::from_secs(1), identities.credentials(&wanted)).await;
    assert!(given_up.is_err());
    moody.gate.add_permits(10);
    identities.credentials(&web()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_all_gave_up_waiting_for_is_fetched_all_the_same() {
    let (moody, identities, _) = setup();
    moody.gate.forget_permits(1_000_000);
    let wanted = web();
    for _ in 0..20 {
        let patience = Duration::from_millis(10);
        let given_up = tokio::time::timeout(patience, identities.credentials(&wanted)).await;
        assert!(given_up.is_err());
    }
    moody.gate.add_permits(1);
    pass(Duration::from_secs(1)).await;
    assert!(identities.cached(&wanted).is_some());
    assert_eq!(moody.issued(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_name_is_refused() {
    let clock = Clock::system();
    let mut moody = Moody::new(local(&clock));
    moody.lies = Some("spiffe://cluster.local/ns/shop/sa/other".parse().unwrap());
    let identities = Identities::new(Arc::new(moody), TrustDomain::default(), clock);
    let error = identities.credentials(&web()).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("made out to spiffe://cluster.local/ns/shop/sa/other"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_authority_near_its_end_is_not_asked_in_a_loop() {
    let clock = Clock::tokio(SystemTime::now());
    // Backdated by more than what is left: half of its life is over when it comes.
    let moody = Arc::new(Moody::new(local(&clock).with_lifetime(Duration::from_secs(60))));
    let identities = Identities::new(moody.clone(), TrustDomain::default(), clock);
    spawn_rotation(&identities);
    identities.credentials(&web()).await.unwrap();
    pass(Duration::from_secs(600)).await;
    assert!((10..40).contains(&moody.issued()), "{}", moody.issued());
    assert!(identities.cached(&web()).is_some());
}

#[tokio::test]
async fn credentials_say_what_they_are() {
    let clock = Clock::system();
    let authority = local(&clock);
    let issued = authority.issue(&web()).await.unwrap();
    assert_eq!(peer_identity(&issued.chain), Ok(web()));
    assert!(matches!(
        peer_identity(&issued.roots),
        Err(PeerIdentityError::NotAnIdentity(names)) if names.is_empty()
    ));
    let credentials = Credentials::new(web(), &TrustDomain::default(), issued, &clock).unwrap();
    let life = credentials
        .not_after()
        .duration_since(credentials.not_before())
        .unwrap();
    assert_eq!(life, 24 * HOUR + Duration::from_secs(120));
    assert!(credentials.serial().len() > 8);
    assert_eq!(credentials.server_config().alpn_protocols, [b"h2"]);
    let client = credentials.client_config(&[web()]);
    assert!(!client.enable_sni);
    // Another key than the certificate's.
    let mut mixed = authority.issue(&web()).await.unwrap();
    mixed.key = authority.issue(&web()).await.unwrap().key;
    let error = Credentials::new(web(), &TrustDomain::default(), mixed, &clock).unwrap_err();
    assert!(matches!(error, CredentialsError::Unusable(_)), "{error}");
    let late = Clock::of(|| SystemTime::now() + 25 * HOUR);
    let issued = authority.issue(&web()).await.unwrap();
    let error = Credentials::new(web(), &TrustDomain::default(), issued, &late).unwrap_err();
    assert!(matches!(error, CredentialsError::Expired), "{error}");
}

#[tokio::test(start_paused = true)]
async fn one_success_wakes_those_who_wait() {
    let (moody, identities, _) = setup();
    spawn_rotation(&identities);
    moody.fail(true);
    let waiting: Vec<Identity> = (0..20)
        .map(|n| format!("spiffe://cluster.local/ns/shop/sa/w{n}").parse().unwrap())
        .collect();
    for identity in &waiting {
        identities.want(identity);
    }
    pass(Duration::from_secs(1)).await;
    assert!(matches!(
        identities.last_error(&waiting[0]),
        Some(IssueError::Unavailable(_))
    ));
    // Long enough that every back-off is at its longest.
    pass(Duration::from_secs(300)).await;
    let asked = moody.issued();
    pass(Duration::from_secs(100)).await;
    let rate = moody.issued() - asked;
    assert!((100..400).contains(&rate), "{rate} in 100 s");
    moody.fail(false);
    let mut issued = identities.issued();
    issued.wait_for(|count| *count > 0).await.unwrap();
    let first = tokio::time::Instant::now();
    issued.wait_for(|count| *count == 20).await.unwrap();
    assert!(first.elapsed() < Duration::from_secs(1), "{:?}", first.elapsed());
    for identity in &waiting {
        assert!(identities.cached(identity).is_some());
    }
}

/// A clock that goes with tokio's, and can be set.
fn settable() -> (Arc<Moody>, Identities, Clock, impl Fn(i64)) {
    let (offset, going) = (Arc::new(AtomicI64::new(0)), Clock::tokio(SystemTime::now()));
    let set = offset.clone();
    let clock = Clock::of(move || {
        let seconds = offset.load(SeqCst);
        let by = Duration::from_secs(seconds.unsigned_abs());
        match seconds < 0 {
            true => going.now() - by,
            false => going.now() + by,
        }
    });
    let moody = Arc::new(Moody::new(local(&clock)));
    let identities = Identities::new(moody.clone(), TrustDomain::default(), clock.clone());
    (moody, identities, clock, move |hours| set.store(hours * 3600, SeqCst))
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_forward_has_certificates_fetched_once() {
    let (moody, identities, clock, set) = settable();
    spawn_rotation(&identities);
    let first = identities.credentials(&web()).await.unwrap();
    set(48);
    assert!(identities.cached(&web()).is_none(), "it is over");
    pass(Duration::from_secs(80)).await;
    let second = identities.cached(&web()).unwrap();
    assert!(second.serial() != first.serial() && second.not_after() > clock.now());
    pass(HOUR).await;
    assert_eq!(moody.issued(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_has_certificates_fetched_once() {
    let (moody, identities, clock, set) = settable();
    spawn_rotation(&identities);
    let first = identities.credentials(&web()).await.unwrap();
    set(-48);
    assert!(first.not_before() > clock.now());
    assert!(
        identities.cached(&web()).is_some(),
        "until there is another one it is served"
    );
    pass(Duration::from_secs(80)).await;
    let second = identities.cached(&web()).unwrap();
    assert!(
        second.not_before() < clock.now(),
        "peers whose clock was set, too, would refuse it"
    );
    pass(HOUR).await;
    assert_eq!(moody.issued(), 2);
    // A clock that is only kept right is not one that was set.
    pass(10 * HOUR).await;
    assert_eq!(moody.issued(), 2);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_certificate_does_not_wait_for_a_clock_that_was_set_back() {
    let (moody, identities, _, set) = settable();
    spawn_rotation(&identities);
    moody.fail(true);
    identities.credentials(&web()).await.unwrap_err();
    moody.fail(false);
    set(-48);
    pass(Duration::from_secs(80)).await;
    assert!(identities.cached(&web()).is_some(), "it waits for two days");
}

#[tokio::test(start_paused = true)]
async fn an_authority_whose_clock_is_ahead_is_not_asked_in_a_loop() {
    let ahead = Clock::tokio(SystemTime::now() + 48 * HOUR);
    let moody = Arc::new(Moody::new(local(&ahead)));
    let identities = Identities::new(moody.clone(), TrustDomain::default(), Clock::tokio(SystemTime::now()));
    spawn_rotation(&identities);
    identities.credentials(&web()).await.unwrap();
    pass(HOUR).await;
    assert!(
        (2..=25).contains(&moody.issued()),
        "asked {} times in an hour",
        moody.issued()
    );
}
