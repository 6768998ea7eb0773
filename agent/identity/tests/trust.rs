//! Handshakes between credentials: roots that change under them, and trust-domain aliases.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use identity::{Authority as _, Clock, Credentials, LocalAuthority, Proof, Trust, generate_root, peer_identity};
use model::{Identity, TrustDomain};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Side {
    root: String,
    trust: Trust,
    credentials: Credentials,
    chain: Vec<CertificateDer<'static>>,
}

async fn side(trust: Trust, identity: &str) -> Side {
    let (root, key) = generate_root(&TrustDomain::default()).unwrap();
    let authority = LocalAuthority::from_pem(&root, &key).unwrap();
    let identity: Identity = identity.parse().unwrap();
    let issued = authority.issue(&identity).await.unwrap();
    let chain = issued.chain.clone();
    let credentials = Credentials::under(identity, &trust, issued, &Clock::system()).unwrap();
    Side {
        root,
        trust,
        credentials,
        chain,
    }
}

/// A handshake with a byte each way, and who the server took the client for.
async fn handshake(client: &Side, server: &Side) -> Result<Identity, String> {
    dial(client, server, server.credentials.identity()).await
}

async fn dial(client: &Side, server: &Side, expected: &Identity) -> Result<Identity, String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (near, far) = tokio::io::duplex(1 << 16);
    let connector = TlsConnector::from(client.credentials.client_config(std::slice::from_ref(expected)));
    let acceptor = TlsAcceptor::from(server.credentials.server_config());
    let connecting = async {
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let mut stream = connector.connect(name, near).await?;
        stream.write_all(b"x").await?;
        stream.read_u8().await
    };
    let accepting = async {
        let mut stream = acceptor.accept(far).await?;
        stream.read_u8().await?;
        stream.write_all(b"y").await?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        Ok::<_, std::io::Error>(server.trust.normalize(peer_identity(certificates).unwrap()))
    };
    let (connected, accepted) = tokio::join!(connecting, accepting);
    let accepted = accepted.map_err(|error| error.to_string());
    connected.map_err(|error| format!("{error}, {accepted:?}"))?;
    accepted
}

fn own() -> Trust {
    Trust::from(TrustDomain::default())
}

const A: &str = "spiffe://cluster.local/ns/shop/sa/a";
const B: &str = "spiffe://cluster.local/ns/shop/sa/b";

#[tokio::test]
async fn a_changed_bundle_counts_for_the_next_handshake_in_both_directions() {
    let a = side(own(), A).await;
    let b = side(own(), B).await;
    assert!(handshake(&a, &b).await.is_err());
    // One of them knows both roots: the other does not yet.
    let both = a.root.clone() + &b.root;
    a.trust.set_bundle(both.as_bytes()).unwrap();
    assert!(handshake(&a, &b).await.is_err() && handshake(&b, &a).await.is_err());
    b.trust.set_bundle(both.as_bytes()).unwrap();
    handshake(&a, &b).await.unwrap();
    handshake(&b, &a).await.unwrap();
    // The old one goes: its holder is refused, at once and in both directions.
    b.trust.set_bundle(b.root.as_bytes()).unwrap();
    assert!(handshake(&a, &b).await.is_err() && handshake(&b, &a).await.is_err());
}

#[tokio::test]
async fn a_peer_under_a_root_that_left_is_no_longer_trusted() {
    let a = side(own(), A).await;
    let b = side(own(), B).await;
    let both = a.root.clone() + &b.root;
    let proof = |of: &Side| Proof::new(&of.chain);
    let (of_a, of_b) = (proof(&a), proof(&b));
    b.trust.set_bundle(both.as_bytes()).unwrap();
    assert!(b.credentials.still_trusts(&of_a) && b.credentials.still_trusts(&of_b));
    let mut left = b.trust.root_left();
    left.mark_unchanged();
    // One more is no loss.
    let (third, _) = generate_root(&TrustDomain::default()).unwrap();
    b.trust.set_bundle((both.clone() + &third).as_bytes()).unwrap();
    assert!(!left.has_changed().unwrap());
    b.trust.set_bundle((b.root.clone() + &third).as_bytes()).unwrap();
    assert!(left.has_changed().unwrap());
    assert!(!b.credentials.still_trusts(&of_a), "its root is gone");
    assert!(b.credentials.still_trusts(&of_b));
    assert!(!b.credentials.still_trusts(&Proof::default()), "nothing proves nothing");
    // Its own root stays trusted until the certificate is another.
    b.trust.set_bundle(third.as_bytes()).unwrap();
    assert!(b.credentials.still_trusts(&of_b));
    b.trust.set_bundle(both.as_bytes()).unwrap();
    assert!(b.credentials.still_trusts(&of_a), "and back");
}

#[tokio::test]
async fn a_peer_of_an_alias_is_one_of_the_mesh() {
    let alias = "spiffe://old.example/ns/shop/sa/a";
    let knows = Trust::new(TrustDomain::default(), [TrustDomain::new("old.example")]);
    let moved = side(
        Trust::new(TrustDomain::new("old.example"), [TrustDomain::default()]),
        alias,
    )
    .await;
    let here = side(knows, B).await;
    let both = moved.root.clone() + &here.root;
    for side in [&moved, &here] {
        side.trust.set_bundle(both.as_bytes()).unwrap();
    }
    assert_eq!(handshake(&moved, &here).await.unwrap(), A.parse().unwrap());
    // Dialled under the mesh's own name, it may answer with the alias.
    dial(&here, &moved, &A.parse().unwrap()).await.unwrap();
    // Whoever does not know the alias refuses.
    let strict = side(own(), B).await;
    strict.trust.set_bundle(both.as_bytes()).unwrap();
    moved.trust.set_bundle((both + &strict.root).as_bytes()).unwrap();
    let refused = handshake(&moved, &strict).await.unwrap_err();
    assert!(refused.contains("old.example"), "{refused}");
}
