//! A connection in Istio's counters: opened once, closed once, its bytes when it ends and, while it lives, whenever somebody
//! scrapes. What it is counted under is looked up once, when it is joined or, if it never was, when it fails, and ends some
//! time after its last use, whether somebody scrapes or not (`counters_that_nobody_scrapes_end`).

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use telemetry::{Direction, ResponseFlag, Series, Traffic};

use crate::{connection::Live, shard::Shard};

/// What of a connection has been counted.
#[derive(Default)]
pub(crate) struct Counting {
    series: RefCell<Option<Arc<Series>>>,
    /// Bytes that the pod sent and received, as far as they are in the series.
    counted: Cell<(u64, u64)>,
}

impl Live {
    /// The two ends are joined.
    pub(crate) fn count_opened(&self) {
        let series = self.series();
        series.open();
        self.counting.series.replace(Some(series));
    }

    /// The connection ended, or did not come to be; then it counts as opened, too, so that what is open is the
    /// difference.
    pub(crate) fn count_closed(&self, flag: ResponseFlag) {
        if self.counting.series.borrow().is_none() {
            self.count_opened();
        }
        self.count_bytes();
        if let Some(series) = self.counting.series.take() {
            series.close(flag);
        }
    }

    /// Adds what was moved since the last time.
    pub(crate) fn count_bytes(&self) {
        let series = self.counting.series.borrow();
        let Some(series) = &*series else { return };
        let (sent, received) = self.bytes();
        let (sent_before, received_before) = self.counting.counted.replace((sent, received));
        let (sent, received) = (
            sent.saturating_sub(sent_before),
            received.saturating_sub(received_before),
        );
        match self.direction {
            Direction::Outbound => series.add_bytes(sent, received),
            Direction::Inbound => series.add_bytes(received, sent),
        }
    }

    fn series(&self) -> Arc<Series> {
        let known = self.known.borrow();
        self.shard.recorder.series(&Traffic {
            reporter: self.direction,
            source: known.source_workload.as_ref(),
            destination: known.destination_workload.as_ref(),
            service: known.service.as_ref(),
            peer: known.peer.as_ref(),
        })
    }
}

/// Sweeps for as long as the shard lives. One that carries nothing sleeps once all series have ended, its own and others'.
pub(crate) async fn sweep(shard: Rc<Shard>) {
    loop {
        // A connection that came and went before this had its turn has left a handle.
        while shard.connections.borrow().is_empty() && shard.recorder.is_empty() {
            shard.stirred.notified().await;
        }
        tokio::time::sleep(shard.config.sweep).await;
        shard.recorder.sweep(Instant::now());
    }
}

impl Shard {
    /// Everybody's bytes as of now; and what nobody used for long ends.
    pub(crate) fn count_all(&self) {
        for (_, live) in self.connections.borrow().iter() {
            live.count_bytes();
        }
        self.recorder.sweep(Instant::now());
    }
}
