//! One client's stream: what is sent next, over all that it subscribes to. No sockets; time is an argument.
//!
//! Make before break: what a state adds for a client is sent policies first and addresses then, for an address may name
//! a policy of its own state or an older one; policies that are gone are said last. So is that a policy, which held for a
//! namespace or the mesh, holds only for those that name it: before their addresses say so, it would hold for nobody.
//!
//! ```text
//! state n: policies put ─► addresses ─► policies removed,     an address never runs ahead of the policies on the wire,
//!                                       policies narrowed     what held stays until no address on it is older
//! state n+1:      policies put ─► …
//! ```
//! A stream is read in order, so what counts is what was sent before what. A client that subscribes to addresses is given
//! a moment to subscribe to policies, too ([`Limits::settle`]), before it is sent the first addresses.
//!
//! Invariants: `clients_converge`, `an_address_never_comes_before_its_policy`, `a_policy_leaves_after_the_last_address`,
//! `a_policy_is_narrowed_after_the_addresses_that_name_it`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    View,
    cache::Snapshot,
    codec::{Request, Response},
    push::{Chunk, Pushes},
    subscription::{Subscription, Verdict},
};

/// How much of a client's complaint is read, in characters.
const COMPLAINT: usize = 4096;

/// What a client may cost.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// The names that it may ask for, of each type.
    pub(super) names: usize,
    /// How long a response may wait to be acknowledged.
    pub(super) acknowledge: Duration,
    /// How long the first addresses wait for a subscription to policies.
    pub(super) settle: Duration,
}

/// One client.
#[derive(Debug)]
pub(super) struct Session {
    stream: u64,
    nonces: u64,
    limits: Limits,
    subscriptions: [Option<Subscription>; View::ALL.len()],
    /// When the responses in flight were sent.
    sent: [Option<Instant>; View::ALL.len()],
    settled: Option<Instant>,
}

/// A response that a client refused.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) view: View,
    /// In the client's words.
    pub(super) message: String,
    /// Those that the message names, or the first of the response.
    pub(super) resources: Vec<Arc<str>>,
}

/// What a request means for those who watch.
#[derive(Debug)]
pub(super) enum Event {
    /// A change of what is asked for, or nothing new.
    Understood,
    /// A response was taken: what it carried is in force there.
    Accepted(View, Chunk),
    /// A response was refused.
    Refused(Refusal),
    /// A type that is not served; it is not answered, as with istiod.
    UnknownType(String),
    /// It asks for more than is allowed: its stream is ended.
    TooManyNames,
}

impl Session {
    /// For a stream's number, which makes its nonces unlike those of others.
    pub(super) fn new(stream: u64, limits: Limits) -> Self {
        Self {
            stream,
            nonces: 0,
            limits,
            subscriptions: [None, None, None],
            sent: [None; View::ALL.len()],
            settled: None,
        }
    }

    /// The client says something.
    pub(super) fn request(&mut self, mut request: Request, now: Instant) -> Event {
        let Some(view) = View::from_url(&request.type_url) else {
            return Event::UnknownType(request.type_url);
        };
        let slot = &mut self.subscriptions[view as usize];
        let Some(subscription) = slot else {
            if request.known.len() > self.limits.names {
                return Event::TooManyNames;
            }
            let subscription = Subscription::new(view, &mut request);
            let names = slot.insert(subscription).names();
            let settles = now + self.limits.settle;
            self.settled.get_or_insert(settles);
            return self.within_limits(names);
        };
        let refused = request.error.as_ref();
        let refused = refused.map(|error| error.message.chars().take(COMPLAINT).collect::<String>());
        let verdict = subscription.answered(&request.nonce, refused.is_some());
        subscription.change(&request);
        let names = subscription.names();
        match (verdict, refused) {
            (Verdict::Accepted(chunk), _) => {
                self.sent[view as usize] = None;
                if names <= self.limits.names {
                    return Event::Accepted(view, chunk);
                }
            }
            (Verdict::Refused(chunk), message) => {
                self.sent[view as usize] = None;
                let message = message.unwrap_or_default();
                return Event::Refused(Refusal {
                    view,
                    resources: chunk.named_in(&message),
                    message,
                });
            }
            // About an older response, or about none: what it asks for counts all the same.
            (Verdict::Stale, _) => {}
        }
        self.within_limits(names)
    }

    fn within_limits(&self, names: usize) -> Event {
        if names > self.limits.names {
            Event::TooManyNames
        } else {
            Event::Understood
        }
    }

    /// What to send now, on the way to the newest state; to be called until there is nothing.
    pub(super) fn next(&mut self, newest: &Arc<Snapshot>, pushes: &Pushes, now: Instant) -> Option<Response> {
        let nonce = format!("{:x}.{:x}", self.stream, self.nonces + 1);
        let (view, chunk) = self.next_chunk(newest, pushes, &nonce, now)?;
        self.nonces += 1;
        self.sent[view as usize] = Some(now);
        let subscription = self.subscriptions[view as usize].as_ref();
        Some(Response {
            view,
            nonce,
            generation: newest.generation(),
            more: subscription.is_some_and(Subscription::is_midway),
            chunk,
        })
    }

    fn next_chunk(
        &mut self,
        newest: &Arc<Snapshot>,
        pushes: &Pushes,
        nonce: &str,
        now: Instant,
    ) -> Option<(View, Chunk)> {
        let new_nonce = || nonce.to_owned();
        let [address, workload, policies] = &mut self.subscriptions;
        if let Some(policies) = policies
            && let Some(chunk) = policies.next(newest, pushes, new_nonce)
        {
            return Some((View::Authorization, chunk));
        }
        let settled = self.settled.is_some_and(|settled| settled <= now);
        let ceiling = match policies {
            Some(policies) => policies.sent().cloned(),
            None => settled.then(|| Arc::clone(newest)),
        };
        // No policy may go before this generation of addresses is on the wire.
        let mut floor = u64::MAX;
        for (view, slot) in [(View::Address, address), (View::Workload, workload)] {
            let Some(subscription) = slot else { continue };
            if let Some(ceiling) = &ceiling
                && let Some(chunk) = subscription.next(ceiling, pushes, new_nonce)
            {
                return Some((view, chunk));
            }
            floor = floor.min(subscription.sent().map_or(0, |sent| sent.generation()));
        }
        if !settled && floor == u64::MAX {
            return None;
        }
        let chunk = policies.as_mut()?.release(floor, pushes, new_nonce)?;
        Some((View::Authorization, chunk))
    }

    /// When to call [`Session::next`] again though nothing happened.
    pub(super) fn wakes(&self, now: Instant) -> Option<Instant> {
        self.settled.filter(|settled| *settled > now)
    }

    /// When a response that is in flight has waited for too long.
    pub(super) fn overdue(&self) -> Option<Instant> {
        let oldest = self.sent.iter().flatten().min();
        oldest.map(|sent| *sent + self.limits.acknowledge)
    }

    /// The generation that the client acknowledged in all that it asked for; 0 at first.
    pub(super) fn acknowledged(&self) -> u64 {
        let subscriptions = self.subscriptions.iter().flatten();
        subscriptions.map(Subscription::acknowledged).min().unwrap_or(0)
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
