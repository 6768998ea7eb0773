//! The wall clock as a value, so that a test can set it.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls_pki_types::UnixTime;

/// Tells the time of day: validity of certificates is measured with it, never with the system's clock directly.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The system's.
    pub fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    /// Whatever `now` answers.
    pub fn of(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// One that starts at `start` and goes on with tokio's time, which a test can pause and advance.
    pub fn tokio(start: SystemTime) -> Self {
        let origin = tokio::time::Instant::now();
        Self::of(move || start + origin.elapsed())
    }

    /// The time now.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}
