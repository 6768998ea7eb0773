//! SPIFFE certificates: keys, the authority that signs them, rotation, and the TLS configurations made of them.
//!
//! ```text
//! Authority::issue ──> Issued ──checked──> Credentials ──> rustls::ServerConfig / ClientConfig
//!    ▲   ▲                                     ▲          judged by Trust: own domain, aliases, bundle of roots
//!    │   └── Identities: cache, rotation at half life, back-off, bounded parallel issue
//!    ├── LocalAuthority: a CA in this process
//!    ├── CaClient: CreateCertificate ──> Upstream: TLS to the control plane, several addresses
//!    └── Kept: another authority's certificates, on the disk for the next start
//! ```
//! Knows nothing of tunnels or of where workloads come from. What it promises:
//! - a certificate whose SPIFFE name is not the one asked for is never used (`a_wrong_name_is_refused`);
//! - an expired one is never served, neither from the cache (`an_expired_certificate_is_never_served`) nor accepted
//!   from a peer;
//! - TLS 1.3 only, AES-128-GCM before AES-256-GCM, the hybrid post-quantum X25519MLKEM768 before classic exchanges;
//! - a peer without exactly one identity of this trust domain, or of an alias of it, is refused, and the error says which of these it was.
//!
//! The only tasks are the caller's: [`Identities::rotate`] and [`Trust::follow_bundle`] run until they are dropped.
//!
//! See <https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md> and Istio's `CreateCertificate`.

mod authority;
mod ca;
mod clock;
mod credentials;
mod identities;
mod kept;
mod local;
mod peer;
mod proof;
mod tls;
mod trust;
mod upstream;

pub use authority::{Authority, IssueError, IssueFuture, Issued};
pub use ca::{CaClient, CaClientConfig};
pub use clock::Clock;
pub use credentials::{Credentials, CredentialsError};
pub use identities::{CertificateInfo, Identities, IdentityUnavailable};
pub use kept::Kept;
pub use local::{LocalAuthority, LocalAuthorityError, generate_root};
pub use peer::{PeerIdentityError, peer_identity};
pub use proof::Proof;
pub use tls::peer_identity_error;
pub use trust::{BundleError, Trust};
pub use upstream::{AddressError, ControlAddress, Upstream};
