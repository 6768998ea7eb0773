//! The log of the kernel's programs, brought into the agent's own.

use std::io;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

use crate::error::CaptureError;

/// Lines that the programs wrote, waiting to be read. Somebody must [`run`](Self::run) it, or they are lost when the
/// ring of 128 KiB is full.
pub struct KernelLog(EbpfLogger<ToTracing>);

impl KernelLog {
    /// aya's number for "debug".
    pub(crate) const LEVEL: u8 = aya_log::Level::Debug as u8;

    pub(crate) fn of(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        EbpfLogger::init_with_logger(ebpf, ToTracing)
            .map(Self)
            .map_err(|_| CaptureError::Missing("AYA_LOGS"))
    }

    /// Writes each line to the log, until it is dropped.
    #[expect(unsafe_code, reason = "tokio can't know that the descriptor stays the same")]
    pub async fn run(self) -> io::Result<()> {
        // SAFETY: the logger owns its map's descriptor, returns the same one always and closes it only when dropped.
        let mut log = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE)? };
        loop {
            let mut ready = log.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

impl std::fmt::Debug for KernelLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KernelLog")
    }
}

/// The `log` crate's interface, which aya-log writes to.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args();
        match record.level() {
            log::Level::Error => tracing::error!(target: "ebpf", "{text}"),
            log::Level::Warn => tracing::warn!(target: "ebpf", "{text}"),
            log::Level::Info => tracing::info!(target: "ebpf", "{text}"),
            log::Level::Debug => tracing::debug!(target: "ebpf", "{text}"),
            log::Level::Trace => tracing::trace!(target: "ebpf", "{text}"),
        }
    }

    fn flush(&self) {}
}
