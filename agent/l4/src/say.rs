//! Log lines of which there could be too many: a few a second, and then how many were left out.

use std::{cell::Cell, time::Instant};

use crate::rate::Rate;

/// A few lines a second.
pub(crate) struct Say {
    rate: Rate,
    left_out: Cell<u64>,
}

impl Say {
    /// At most this many lines in a second.
    pub(crate) fn at_most(a_second: u32) -> Self {
        Self {
            rate: Rate::a_second(a_second),
            left_out: Cell::default(),
        }
    }

    /// Says it, unless it was said too often just now.
    pub(crate) fn say(&self, line: impl FnOnce()) {
        self.say_at(Instant::now(), line, |left_out| {
            tracing::warn!("{left_out} more lines like these were left out")
        });
    }

    fn say_at(&self, now: Instant, line: impl FnOnce(), more: impl FnOnce(u64)) {
        let (may, begun) = self.rate.may_at(now);
        if begun && self.left_out.get() > 0 {
            more(self.left_out.take());
        }
        if may {
            line();
        } else {
            self.left_out.set(self.left_out.get() + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_left_out_is_counted_and_said() {
        let say = Say::at_most(1);
        let (said, start) = (Cell::new(0), Instant::now());
        for _ in 0..1000 {
            say.say_at(start, || said.set(said.get() + 1), |_| panic!("too early"));
        }
        assert_eq!(said.get(), 1);
        let told = Cell::new(0);
        say.say_at(
            start + Duration::from_secs(1),
            || said.set(said.get() + 1),
            |left_out| told.set(left_out),
        );
        assert_eq!((said.get(), told.get()), (2, 999));
    }
}
