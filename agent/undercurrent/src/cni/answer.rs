//! What a plugin tells its runtime: a result, or an error as the specification wants it.

use std::{io::Write, process::ExitCode};

use serde::Serialize;

/// Error codes of the specification; from 100 on they are a plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The configuration's version is none that is spoken here.
    IncompatibleVersion = 1,
    /// The environment lacks something, or holds something unusable.
    InvalidEnvironment = 4,
    /// The configuration can't be read.
    Io = 5,
    /// The configuration is no JSON of the form.
    Decoding = 6,
    /// The configuration makes no sense.
    InvalidConfiguration = 7,
    /// A later try may work.
    TryAgainLater = 11,
    /// STATUS: the plugin can't serve ADD now.
    NotAvailable = 50,
    /// CHECK: the pod is not as it should be.
    NotCaptured = 100,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {details}")]
pub struct CniError {
    pub version: String,
    pub code: Code,
    /// Short, and the same each time.
    pub message: &'static str,
    /// What it was this time, and what to do.
    pub details: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ErrorResult<'a> {
    cni_version: &'a str,
    code: u32,
    msg: &'a str,
    details: &'a str,
}

/// Prints the outcome: text, or an error.
pub fn print(out: &mut impl Write, outcome: Result<String, CniError>) -> ExitCode {
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => {
            let result = ErrorResult {
                cni_version: &error.version,
                code: error.code as u32,
                msg: error.message,
                details: &error.details,
            };
            (serde_json::to_string(&result).unwrap_or_default(), ExitCode::FAILURE)
        }
    };
    // A runtime that reads no answer sees the exit code.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    code
}
