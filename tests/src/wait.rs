//! Waiting for a condition, with a deadline that is only there to end a broken run.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How long anything may take that has no reason to take long.
pub const LONG: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(10);

/// Asks again and again until there is an answer; after [`LONG`] says what was waited for.
pub fn until<T>(what: &str, condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until_within(LONG, what, condition)
}

/// As [`until`], with a deadline of its own.
pub fn until_within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = condition()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {limit:?} in vain: {what}");
        }
        sleep(POLL);
    }
}

/// As [`until`], for a condition that is met or not.
pub fn until_true(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, || Ok(condition()?.then_some(())))
}
