//! Tokens, checked by the API once and remembered for a while.
//!
//! A token is reviewed at most once at a time, however many requests carry it (`many_requests_with_one_token_ask_once`),
//! and its answer is kept for a minute, never past its own end (`an_answer_is_not_kept_past_the_tokens_end`); a rejection
//! for some seconds. Kept are hashes, not tokens. Bounded: entries, reviews at once, and those that wait. A review goes on
//! if its caller leaves, for at most [`REVIEW_TIMEOUT`].

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{FutureExt, future::Shared};
use identity::Clock;
use tokio::sync::Semaphore;

use super::{AuthError, TokenUser};

/// How long the API may take.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
const KEPT: Duration = Duration::from_secs(60);
const REJECTION_KEPT: Duration = Duration::from_secs(5);
const MAX_TOKEN: usize = 16 * 1024;
const MAX_ENTRIES: usize = 16 * 1024;
const MAX_AT_ONCE: usize = 32;
const MAX_WAITING: usize = 1024;

/// Asks the API about a token.
pub trait Reviews: Send + Sync + 'static {
    /// Whom it speaks for; the audience was checked.
    fn review(&self, token: String) -> Pin<Box<dyn Future<Output = Result<TokenUser, AuthError>> + Send>>;
}

type Answer = Result<TokenUser, AuthError>;
type Pending = Shared<Pin<Box<dyn Future<Output = Answer> + Send>>>;
type Hash = [u8; 32];

enum Entry {
    Asked(Pending),
    Known(Answer, SystemTime),
}

/// The memory.
pub struct Tokens {
    reviews: Arc<dyn Reviews>,
    clock: Clock,
    entries: Arc<Mutex<Entries>>,
    at_once: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

#[derive(Default)]
struct Entries {
    by_hash: HashMap<Hash, Entry>,
    /// In the order of arrival, to forget the oldest first.
    order: VecDeque<Hash>,
}

impl Tokens {
    /// Nothing remembered.
    pub fn new(reviews: impl Reviews, clock: Clock) -> Self {
        Self {
            reviews: Arc::new(reviews),
            clock,
            entries: Arc::default(),
            at_once: Arc::new(Semaphore::new(MAX_AT_ONCE)),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }

    /// Whom a token speaks for.
    pub async fn check(&self, token: &str) -> Answer {
        let end = expiry(token)?;
        let now = self.clock.now();
        if end.is_some_and(|end| end <= now) {
            return Err(AuthError::Unauthenticated(
                "the token has expired; read it again from its file".into(),
            ));
        }
        let mut hash = Hash::default();
        hash.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        let pending = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            match entries.by_hash.get(&hash) {
                Some(Entry::Known(answer, until)) if *until > now => return answer.clone(),
                Some(Entry::Asked(pending)) => pending.clone(),
                Some(Entry::Known(..)) | None => {
                    let pending = self.ask(token.to_owned(), hash, end)?;
                    entries.put(hash, Entry::Asked(pending.clone()));
                    pending
                }
            }
        };
        pending.await
    }

    fn ask(&self, token: String, hash: Hash, end: Option<SystemTime>) -> Result<Pending, AuthError> {
        let busy = || AuthError::Unavailable("too many tokens are being checked; try again later".into());
        let place = self.waiting.clone().try_acquire_owned().map_err(|_| busy())?;
        let (reviews, at_once, clock) = (self.reviews.clone(), self.at_once.clone(), self.clock.clone());
        let entries = self.entries.clone();
        let task = tokio::spawn(async move {
            let review = async {
                let _turn = at_once.acquire_owned().await;
                reviews.review(token).await
            };
            let late = || AuthError::Unavailable("the Kubernetes API did not answer about the token in time".into());
            let answer = tokio::time::timeout(REVIEW_TIMEOUT, review)
                .await
                .unwrap_or_else(|_| Err(late()));
            drop(place);
            let until = keep(&answer, clock.now(), end);
            let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
            match until {
                Some(until) => entries.put(hash, Entry::Known(answer.clone(), until)),
                None => entries.forget(&hash),
            }
            answer
        });
        let failed = || AuthError::Unavailable("checking the token failed; try again".into());
        Ok(task
            .map(move |answer| answer.unwrap_or_else(|_| Err(failed())))
            .boxed()
            .shared())
    }
}

/// Until when an answer holds; none: it says nothing about the token.
fn keep(answer: &Answer, now: SystemTime, end: Option<SystemTime>) -> Option<SystemTime> {
    let until = match answer {
        Ok(_) => now + KEPT,
        Err(AuthError::Unauthenticated(_)) => now + REJECTION_KEPT,
        Err(_) => return None,
    };
    Some(end.map_or(until, |end| until.min(end)))
}

impl Entries {
    fn put(&mut self, hash: Hash, entry: Entry) {
        if self.by_hash.insert(hash, entry).is_none() {
            self.order.push_back(hash);
        }
        while self.order.len() > MAX_ENTRIES {
            if let Some(oldest) = self.order.pop_front() {
                self.by_hash.remove(&oldest);
            }
        }
    }

    fn forget(&mut self, hash: &Hash) {
        self.by_hash.remove(hash);
        self.order.retain(|other| other != hash);
    }
}

/// The `exp` of a JWT that nobody has checked yet: good for refusing early and for forgetting in time, nothing else.
fn expiry(token: &str) -> Result<Option<SystemTime>, AuthError> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: Option<u64>,
    }
    let bad = || AuthError::Unauthenticated("the token is not a JSON web token; send a service account's".into());
    if token.len() > MAX_TOKEN {
        return Err(bad());
    }
    let mut parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(bad());
    };
    let claims = URL_SAFE_NO_PAD.decode(claims).map_err(|_| bad())?;
    let claims: Claims = serde_json::from_slice(&claims).map_err(|_| bad())?;
    Ok(claims
        .exp
        .and_then(|exp| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(exp))))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use model::NamespacedName;
    use tokio::sync::Notify;

    use super::*;

    /// Answers when told to, and counts.
    struct Api {
        asked: AtomicUsize,
        go: Notify,
        answer: Answer,
    }

    impl Reviews for Arc<Api> {
        fn review(&self, _: String) -> Pin<Box<dyn Future<Output = Answer> + Send>> {
            let api = self.clone();
            Box::pin(async move {
                api.asked.fetch_add(1, Ordering::SeqCst);
                api.go.notified().await;
                api.answer.clone()
            })
        }
    }

    fn api(answer: Answer) -> Arc<Api> {
        Arc::new(Api {
            asked: AtomicUsize::new(0),
            go: Notify::new(),
            answer,
        })
    }

    fn user() -> TokenUser {
        TokenUser {
            account: NamespacedName::new("a", "b"),
            pod: None,
        }
    }

    fn token(exp: u64) -> String {
        format!("e30.{}.x", URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{exp}}}")))
    }

    fn clock(at: &Arc<AtomicUsize>) -> Clock {
        let at = at.clone();
        Clock::of(move || SystemTime::UNIX_EPOCH + Duration::from_secs(at.load(Ordering::SeqCst) as u64))
    }

    #[tokio::test]
    async fn many_requests_with_one_token_ask_once() {
        let api = api(Ok(user()));
        let tokens = Tokens::new(api.clone(), clock(&Arc::default()));
        let token = token(1000);
        let requests = futures_util::future::join_all((0..100).map(|_| tokens.check(&token)));
        let (answers, ()) = tokio::join!(requests, async { api.go.notify_one() });
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!(tokens.check(&token).await, Ok(user()));
        assert_eq!(api.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn an_answer_is_not_kept_past_the_tokens_end() {
        let (api, now) = (api(Ok(user())), Arc::new(AtomicUsize::new(10)));
        let tokens = Tokens::new(api.clone(), clock(&now));
        api.go.notify_one();
        assert!(tokens.check(&token(30)).await.is_ok());
        now.store(29, Ordering::SeqCst);
        assert!(tokens.check(&token(30)).await.is_ok());
        now.store(30, Ordering::SeqCst);
        assert!(matches!(
            tokens.check(&token(30)).await,
            Err(AuthError::Unauthenticated(_))
        ));
        assert_eq!(api.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn an_answer_is_asked_for_again_after_a_while() {
        let (api, now) = (api(Ok(user())), Arc::new(AtomicUsize::new(0)));
        let tokens = Tokens::new(api.clone(), clock(&now));
        for second in [0, 59, 60, 61] {
            now.store(second, Ordering::SeqCst);
            api.go.notify_one();
            assert!(tokens.check(&token(1000)).await.is_ok());
        }
        assert_eq!(api.asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn that_the_api_is_away_is_not_remembered() {
        let api = api(Err(AuthError::Unavailable("away".into())));
        let tokens = Tokens::new(api.clone(), clock(&Arc::default()));
        for asked in 1..4 {
            api.go.notify_one();
            assert!(matches!(
                tokens.check(&token(1000)).await,
                Err(AuthError::Unavailable(_))
            ));
            assert_eq!(api.asked.load(Ordering::SeqCst), asked);
        }
    }

    #[tokio::test]
    async fn what_is_no_token_is_refused_without_asking() {
        let api = api(Ok(user()));
        let tokens = Tokens::new(api.clone(), clock(&Arc::default()));
        let long = "x".repeat(MAX_TOKEN + 1);
        for token in ["", "a.b", "a.b.c.d", "e30.!.x", "e30.e30=.x", &long] {
            assert!(
                matches!(tokens.check(token).await, Err(AuthError::Unauthenticated(_))),
                "{token}"
            );
        }
        assert_eq!(api.asked.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn the_oldest_is_forgotten_first() {
        let mut entries = Entries::default();
        for number in 0..MAX_ENTRIES as u64 + 5 {
            let mut hash = Hash::default();
            hash[..8].copy_from_slice(&number.to_le_bytes());
            entries.put(hash, Entry::Known(Ok(user()), SystemTime::UNIX_EPOCH));
        }
        assert_eq!((entries.by_hash.len(), entries.order.len()), (MAX_ENTRIES, MAX_ENTRIES));
        assert!(!entries.by_hash.contains_key(&Hash::default()));
    }
}
