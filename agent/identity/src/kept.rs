//! Certificates and keys on the disk, so that an agent that is restarted speaks for its pods at once: while the
//! authority is away, and without ten thousand nodes asking it at the same moment when it is not.
//!
//! ```text
//! issue(identity), the first since the start ─► file ─ usable ─────────────► Issued (rotated as if nothing had happened)
//!                                                 └ none, or not ─► authority ─► Issued ─► file
//! issue(identity), any later ─────────────────────────────────────► authority
//! ```
//! One file per identity, PEM, for root's eyes alone, in a directory that should be in memory. A file is used only if it is
//! for exactly the identity, is valid for a while yet, and chains to the roots file as it is now
//! (`what_is_kept_is_used_only_if_it_still_holds`). It is removed when the last pod of the identity goes and when the
//! authority refuses the identity; files of identities that no pod has after a start go with [`Authority::retain`].
//!
//! Under failure: a file that can't be read, is torn or is somebody else's is removed, and the authority asked; a file that
//! can't be written is said once per certificate, and the certificate used all the same.

use std::{
    collections::HashSet,
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use model::Identity;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::{
    Authority, Clock, IssueError, Issued,
    authority::IssueFuture,
    ca::{anchors, unusable},
    credentials::validity,
    peer::certificate_identity,
};

/// A certificate with less left than this is not worth starting with.
const LEAST_LEFT: Duration = Duration::from_secs(60);
/// Larger than any key with its chain.
const LARGEST_FILE: u64 = 256 << 10;

/// An authority whose certificates outlive the process.
pub struct Kept<A> {
    authority: A,
    directory: PathBuf,
    roots_file: PathBuf,
    clock: Clock,
    /// Those that were asked for since the start: the disk is not looked at again.
    asked: Mutex<HashSet<Identity>>,
}

impl<A: Authority> Kept<A> {
    /// Keeps what `authority` issues in `directory`, which is made if it is missing; only root may look into it. What is
    /// found there must chain to `roots_file`.
    pub fn new(authority: A, directory: &Path, roots_file: &Path, clock: Clock) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        Ok(Self {
            authority,
            directory: directory.to_owned(),
            roots_file: roots_file.to_owned(),
            clock,
            asked: Mutex::default(),
        })
    }

    fn asked(&self) -> MutexGuard<'_, HashSet<Identity>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn issue(&self, identity: &Identity) -> Result<Issued, IssueError> {
        let path = self.path(identity);
        let first = self.asked().insert(identity.clone());
        if first && path.exists() {
            match self.read(identity, &path) {
                Ok(issued) => return Ok(issued),
                // Nothing is wrong with it.
                Err(error @ IssueError::Unavailable(_)) => {
                    tracing::warn!(%identity, %error, "what is on the disk is not used")
                }
                Err(error) => {
                    tracing::warn!(%identity, %error, "what is on the disk is not used, and removed");
                    remove(&path);
                }
            }
        }
        let result = self.authority.issue(identity).await;
        match &result {
            Ok(issued) => {
                if let Err(error) = self.write(&path, issued) {
                    tracing::warn!(
                        %identity, %error, directory = %self.directory.display(),
                        "the certificate is not kept: after a restart the authority has to be there"
                    );
                }
            }
            Err(IssueError::Refused(_)) => remove(&path),
            Err(_) => {}
        }
        result
    }

    fn read(&self, identity: &Identity, path: &Path) -> Result<Issued, IssueError> {
        let pem = read_bounded(path).map_err(unusable)?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(unusable)?;
        let chain = CertificateDer::pem_slice_iter(&pem);
        let chain: Vec<_> = chain.collect::<Result<_, _>>().map_err(unusable)?;
        let leaf = chain.first().ok_or_else(|| unusable("it holds no certificate"))?;
        let found = certificate_identity(leaf).map_err(unusable)?;
        if found != *identity {
            return Err(unusable(format!("it is made out to {found}")));
        }
        let (_, _, not_after) = validity(leaf).map_err(unusable)?;
        if not_after < self.clock.now() + LEAST_LEFT {
            return Err(unusable("it is over, or nearly"));
        }
        let roots = anchors(&self.roots_file, &chain, &self.clock)?;
        Ok(Issued { chain, key, roots })
    }

    fn write(&self, path: &Path, issued: &Issued) -> io::Result<()> {
        let mut text = pem::encode(&pem::Pem::new("PRIVATE KEY", issued.key.secret_der()));
        for certificate in &issued.chain {
            text.push_str(&pem::encode(&pem::Pem::new("CERTIFICATE", certificate.as_ref())));
        }
        let fresh = path.with_extension("new");
        remove(&fresh);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(text.as_bytes())?;
        fs::rename(fresh, path)
    }

    /// Namespaces and accounts hold no `_` and no `/`; of a trust domain everything unusual is written as its bytes.
    fn path(&self, identity: &Identity) -> PathBuf {
        let mut name = String::new();
        for byte in identity.to_string().trim_start_matches("spiffe://").bytes() {
            match byte {
                b'/' => name.push('_'),
                byte if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' => name.push(byte.into()),
                byte => name.push_str(&format!("%{byte:02x}")),
            }
        }
        self.directory.join(name + ".pem")
    }
}

impl<A: Authority> Authority for Kept<A> {
    fn issue<'a>(&'a self, identity: &'a Identity) -> IssueFuture<'a> {
        Box::pin(Kept::issue(self, identity))
    }

    fn forget(&self, identity: &Identity) {
        self.asked().remove(identity);
        remove(&self.path(identity));
        self.authority.forget(identity);
    }

    fn retain(&self, identities: &HashSet<Identity>) {
        let wanted: HashSet<_> = identities.iter().map(|identity| self.path(identity)).collect();
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(%error, directory = %self.directory.display(), "cannot look for certificates of pods that went");
                return;
            }
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if !wanted.contains(&path) {
                remove(&path);
            }
        }
        self.authority.retain(identities);
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > LARGEST_FILE {
        return Err(io::Error::other("it is too large"));
    }
    fs::read(path)
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, file = %path.display(), "cannot remove a certificate");
    }
}
