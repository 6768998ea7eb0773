//! Certificates from a CA elsewhere: what is asked, what is believed, and what happens while it is away.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod lab;

use std::sync::Arc;

use identity::{Authority as _, Clock, Credentials, Identities, IssueError, Issued, Trust};
use lab::{Lab, Mood, Root, nobody, web};
use model::TrustDomain;
use tonic::Status;
use x509_parser::prelude::{FromDer as _, X509CertificationRequest};

async fn refusal(lab: &Lab) -> IssueError {
    match lab.client().issue(&web()).await {
        Ok(_) => panic!("issued"),
        Err(error) => error,
    }
}

fn credentials(issued: Issued) -> Credentials {
    Credentials::new(web(), &TrustDomain::default(), issued, &Clock::system()).unwrap()
}

#[tokio::test]
async fn a_pods_certificate_is_asked_for_as_ztunnel_asks() {
    let lab = Lab::new().await;
    let issued = lab.client().issue(&web()).await.unwrap();
    let seen = lab.last();
    assert_eq!((seen.token.as_str(), seen.cluster.as_str()), ("Bearer one", "c1"));
    assert_eq!((seen.identity, seen.validity), (web().to_string(), 86400));
    let (_, pem) = x509_parser::pem::parse_x509_pem(seen.csr.as_bytes()).unwrap();
    let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
    csr.verify_signature().unwrap();
    assert!(format!("{:?}", csr.requested_extensions().unwrap().collect::<Vec<_>>()).contains(&web().to_string()));
    // The root that ends the answer is not presented to peers; the one of the file is trusted.
    assert_eq!((issued.chain.len(), issued.roots.len()), (1, 1));
    assert_eq!(*credentials(issued).identity(), web());
}

#[tokio::test]
async fn what_is_not_ours_to_use_is_refused_and_says_why() {
    let lab = Lab::new().await;
    let stranger = Root::new("stranger");
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (mood, says) in [
        (
            Mood::Misnamed("spiffe://cluster.local/ns/shop/sa/other"),
            "made out to spiffe://cluster.local/ns/shop/sa/other",
        ),
        (Mood::Misnamed("https://example.com"), "names no identity"),
        (Mood::Expired, "expired"),
        (Mood::Says(vec![]), "holds no certificate"),
        (Mood::Says(vec!["nonsense".to_owned()]), "holds no certificate"),
        (Mood::Says(vec![garbage.to_owned()]), "malformed"),
        (Mood::Says(vec![stranger.pem()]), "names no identity"),
        (Mood::Says(vec![stranger.pem(); 40]), "more than 32 certificates"),
    ] {
        lab.mood(mood);
        let error = refusal(&lab).await;
        assert!(matches!(error, IssueError::Unusable(_)), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    // The key is compared where key and certificate become credentials.
    lab.mood(Mood::OtherKey);
    let issued = lab.client().issue(&web()).await.unwrap();
    assert!(Credentials::new(web(), &TrustDomain::default(), issued, &Clock::system()).is_err());
}

#[tokio::test]
async fn a_refusal_is_told_from_an_absence() {
    let lab = Lab::new().await;
    for (status, refused) in [
        (Status::permission_denied("no such pod on this node"), true),
        (Status::unauthenticated("token expired"), false),
        (Status::invalid_argument("weak key"), true),
        (Status::unavailable("warming up"), false),
        (Status::internal("oops"), false),
        (Status::resource_exhausted("later"), false),
    ] {
        let message = status.message().to_owned();
        lab.mood(Mood::Fails(status));
        let error = refusal(&lab).await;
        assert_eq!(matches!(error, IssueError::Refused(_)), refused, "{error}");
        let absent = matches!(error, IssueError::Unavailable(_) | IssueError::Unauthenticated(_));
        assert_eq!(absent, !refused, "{error}");
        assert!(error.to_string().contains(&message), "{error}");
    }
}

#[tokio::test]
async fn a_silent_ca_is_unavailable() {
    let lab = Lab::new().await;
    let client = lab.client();
    client.issue(&web()).await.unwrap();
    lab.mood(Mood::Silent);
    // From here on time passes whenever nothing else happens.
    tokio::time::pause();
    let Err(error) = client.issue(&web()).await else {
        panic!("issued")
    };
    assert!(matches!(error, IssueError::Unavailable(_)), "{error}");
}

#[tokio::test]
async fn the_next_address_takes_over_and_one_that_is_back_is_used() {
    let mut lab = Lab::new().await;
    let dead = nobody().await;
    let client = lab.client_of(&[dead.clone(), format!("http://{}", lab.address)]);
    client.issue(&web()).await.unwrap();
    lab.stop();
    let away = loop {
        match client.issue(&web()).await {
            // The connection's end is not seen yet.
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert!(matches!(away, IssueError::Unavailable(_)), "{away}");
    let Err(away) = client.issue(&web()).await else {
        panic!("issued")
    };
    assert!(away.to_string().contains(&dead), "{away}");
    lab.start().await;
    client.issue(&web()).await.unwrap();
}

#[tokio::test]
async fn the_token_is_read_for_each_request() {
    let lab = Lab::new().await;
    let client = lab.client();
    client.issue(&web()).await.unwrap();
    lab.write("token", "two");
    client.issue(&web()).await.unwrap();
    assert_eq!(lab.last().token, "Bearer two");
    for bad in ["", " \n", "a\nb", "ü\u{7f}"] {
        lab.write("token", bad);
        let Err(error) = client.issue(&web()).await else {
            panic!("issued")
        };
        assert!(
            error.to_string().contains("this node's token cannot be used"),
            "{error}"
        );
    }
    std::fs::remove_file(lab.path("token")).unwrap();
    let Err(error) = client.issue(&web()).await else {
        panic!("issued")
    };
    assert!(error.to_string().contains("token"), "{error}");
}

#[tokio::test]
async fn a_new_root_counts_once_the_roots_file_has_it() {
    let lab = Lab::new().await;
    let client = lab.client();
    let first = lab.fake.root.lock().unwrap().clone();
    let second = Root::new("second");
    *lab.fake.root.lock().unwrap() = second.clone();
    let error = refusal(&lab).await;
    assert!(error.to_string().contains("does not chain to the roots in"), "{error}");
    lab.write("roots", &(first.pem() + &second.pem()));
    let issued = client.issue(&web()).await.unwrap();
    assert_eq!(issued.roots, [second.certificate.der().clone()]);
    lab.write("roots", "");
    let Err(error) = client.issue(&web()).await else {
        panic!("issued")
    };
    assert!(matches!(error, IssueError::Unavailable(_)), "{error}");
}

#[tokio::test]
async fn the_server_must_chain_to_the_roots_file_as_it_is_now() {
    let lab = Lab::new().await;
    let servers = Root::new("servers");
    let address = lab.tls(servers.server()).await;
    let client = lab.client_of(&[format!("https://{address}")]);
    let Err(error) = client.issue(&web()).await else {
        panic!("issued")
    };
    assert!(error.to_string().contains("invalid peer certificate"), "{error}");
    assert!(lab.fake.seen.lock().unwrap().is_empty(), "the token went to a stranger");
    let first = lab.fake.root.lock().unwrap().clone();
    lab.write("roots", &(first.pem() + &servers.pem()));
    client.issue(&web()).await.unwrap();
}

#[tokio::test]
async fn a_root_that_leaves_the_bundle_takes_its_certificates_along() {
    let lab = Lab::new().await;
    let trust = Trust::from(TrustDomain::default());
    trust.read_bundle(&lab.path("roots")).unwrap();
    let identities = Identities::new(Arc::new(lab.client()), trust.clone(), Clock::system());
    let rotation = tokio::spawn({
        let identities = identities.clone();
        async move { identities.rotate().await }
    });
    let mut issued = identities.issued();
    let first = identities.credentials(&web()).await.unwrap();
    let second = Root::new("second");
    *lab.fake.root.lock().unwrap() = second.clone();
    lab.write("roots", &second.pem());
    trust.read_bundle(&lab.path("roots")).unwrap();
    issued.wait_for(|count| *count == 2).await.unwrap();
    assert_ne!(identities.cached(&web()).unwrap().serial(), first.serial());
    rotation.abort();
}
