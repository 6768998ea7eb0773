//! What is read and written, by example and by property.

use proptest::prelude::*;

use super::*;

fn query(name: &str, kind: RecordType, change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    change(&mut message);
    message.to_vec().unwrap()
}

fn edns(payload: u16, version: u8) -> Edns {
    let mut edns = Edns::new();
    edns.set_version(version).set_max_payload(payload).set_dnssec_ok(true);
    edns
}

fn addresses(count: u8) -> Answer {
    Answer {
        canonical: None,
        addresses: (0..count).map(|last| IpAddr::from([10, 0, 0, last])).collect(),
    }
}

const TTL: Duration = Duration::from_secs(30);

fn answered(query: &[u8], found: &Answer, transport: Transport) -> (usize, Message) {
    let bytes = answer(query, found, TTL, transport).unwrap();
    (bytes.len(), Message::from_vec(&bytes).unwrap())
}

/// The pod chose the id, and knows the port that is answered to.
#[test]
fn an_answer_to_another_question_is_none() {
    let asked = query("a.example.", RecordType::A, |_| {});
    let respond = |bytes: &[u8]| {
        let mut response = bytes.to_vec();
        response[2] |= QR;
        response
    };
    assert!(answers(&asked, &respond(&asked)));
    assert!(!answers(&asked, &asked), "a query");
    assert!(answers(&asked, &respond(&query("A.eXample.", RecordType::A, |_| {}))));
    for other in [
        query("b.example.", RecordType::A, |_| {}),
        query("a.example.", RecordType::AAAA, |_| {}),
        query("a.example.", RecordType::A, |message| message.metadata.id = 0x1235),
    ] {
        assert!(!answers(&asked, &respond(&other)));
    }
    // Some say only that they failed.
    let mut bare = respond(&asked[..HEADER]);
    bare[5] = 0;
    assert!(answers(&asked, &bare));
}

#[test]
fn what_is_not_ours_is_told_apart_by_its_header_alone() {
    let ours = query("Web.Shop.", RecordType::AAAA, |_| {});
    let Read::Address(question) = read(&ours) else {
        panic!("not ours")
    };
    assert_eq!((&*question.host, question.family), ("web.shop", Family::V6));
    for kind in [
        RecordType::SRV,
        RecordType::TXT,
        RecordType::PTR,
        RecordType::HTTPS,
        RecordType::ANY,
    ] {
        assert!(matches!(read(&query("a.b.", kind, |_| {})), Read::Other), "{kind}");
    }
    let chaos = query("a.b.", RecordType::A, |query| {
        query.queries[0].set_query_class(DNSClass::CH);
    });
    assert!(matches!(read(&chaos), Read::Other));
    let two = query("a.b.", RecordType::A, |query| {
        query.add_query(Query::new());
    });
    assert!(matches!(read(&two), Read::Other));
    let mut update = ours.clone();
    update[2] |= 5 << 3;
    assert!(matches!(read(&update), Read::Other));
    let mut response = ours.clone();
    response[2] |= QR;
    assert!(matches!(read(&response), Read::Malformed(None)));
    assert!(matches!(read(&ours[..11]), Read::Malformed(None)));
    let Read::Malformed(Some(refusal)) = read(&ours[..14]) else {
        panic!("a name that breaks off")
    };
    assert_eq!(
        Message::from_vec(&refusal).unwrap().metadata.response_code,
        ResponseCode::FormErr
    );
}

#[test]
fn an_answer_repeats_the_question_as_it_was_written() {
    let asked = query("wEb.ShOp.example.", RecordType::A, |_| {});
    let found = Answer {
        canonical: Some("web.shop".to_owned()),
        ..addresses(2)
    };
    let (_, message) = answered(&asked, &found, Transport::Udp);
    assert_eq!(message.metadata.id, 0x1234);
    assert!(message.metadata.authoritative && message.metadata.recursion_available);
    assert!(
        message.queries[0]
            .name()
            .eq_case(&Name::from_ascii("wEb.ShOp.example.").unwrap())
    );
    assert!(message.edns.is_none());
    assert_eq!(message.answers.len(), 3);
    assert!(message.answers.iter().all(|record| record.ttl == 30));
    assert_eq!(message.answers[0].name, *message.queries[0].name());
    assert_eq!(message.answers[1].name, Name::from_ascii("web.shop.").unwrap());
    let (_, message) = answered(&asked, &Answer::default(), Transport::Udp);
    assert_eq!(
        (message.metadata.response_code, message.answers.len()),
        (ResponseCode::NoError, 0)
    );
}

#[test]
fn what_does_not_fit_is_left_out_and_said_to_be() {
    let plain = query("web.", RecordType::A, |_| {});
    let (length, message) = answered(&plain, &addresses(200), Transport::Udp);
    assert!(message.metadata.truncation && length <= 512 && length > 490, "{length}");
    for (payload, limit) in [(100, 512), (1232, 1232), (65535, 4096)] {
        let asked = query("web.", RecordType::A, |query| {
            query.set_edns(edns(payload, 0));
        });
        let (length, message) = answered(&asked, &addresses(255), Transport::Udp);
        assert!(length <= limit && length > limit - 40, "{payload}: {length}");
        assert_eq!(message.metadata.truncation, limit < 4096 || message.answers.len() < 255);
        assert!(message.edns.unwrap().flags().dnssec_ok);
        let (_, message) = answered(&asked, &addresses(255), Transport::Tcp);
        assert_eq!((message.metadata.truncation, message.answers.len()), (false, 255));
    }
    let later = query("web.", RecordType::A, |query| {
        query.set_edns(edns(1232, 1));
    });
    let (_, message) = answered(&later, &addresses(1), Transport::Udp);
    assert_eq!(
        (u16::from(message.metadata.response_code), message.answers.len()),
        (16, 0)
    );
}

#[test]
fn an_answer_teaches_the_name_that_was_asked() {
    let name = |text: &str| Name::from_ascii(text).unwrap();
    let mut message = Message::response(1, OpCode::Query);
    message.add_query(Query::query(name("Www.example.com."), RecordType::A));
    let cname = RData::CNAME(CNAME(name("edge.example.net.")));
    message.add_answer(Record::from_rdata(name("www.example.com."), 300, cname));
    message.add_answer(Record::from_rdata(
        name("edge.example.net."),
        20,
        RData::A(A([192, 0, 2, 1].into())),
    ));
    message.add_answer(Record::from_rdata(
        name("other.example."),
        1,
        RData::A(A([192, 0, 2, 9].into())),
    ));
    let expected = (
        "www.example.com".to_owned(),
        vec![IpAddr::from([192, 0, 2, 1])],
        Duration::from_secs(20),
    );
    assert_eq!(learned(&message.to_vec().unwrap()), Some(expected));
}

proptest! {
       #[test]
       fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
           try_all(&bytes);
       }

       #[test]
       fn a_query_with_any_change_is_read_or_refused(
           name in "[a-zA-Z][a-zA-Z0-9]{1,20}(\\.[a-z]{1,20}){0,6}",
           changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
           length in any::<prop::sample::Index>(),
       ) {
           let mut bytes = query(&format!("{name}."), RecordType::A, |query| {
query.set_edns(edns(1232, 0));
});
           for (at, byte) in changes {
               let at = at.index(bytes.len());
               bytes[at] = byte;
           }
           try_all(&bytes);
           try_all(&bytes[..length.index(bytes.len())]);
       }
   }

fn try_all(bytes: &[u8]) {
    match read(bytes) {
        Read::Address(_) => {
            for transport in [Transport::Udp, Transport::Tcp] {
                if let Some(answer) = answer(bytes, &addresses(100), TTL, transport) {
                    assert!(answers(bytes, &answer));
                    assert!(transport == Transport::Tcp || answer.len() <= usize::from(OUR_UDP));
                }
            }
            assert!(answers(bytes, &failure(bytes, ResponseCode::ServFail)));
        }
        Read::Malformed(Some(refusal)) => assert!(answers(bytes, &refusal)),
        Read::Other | Read::Malformed(None) => {}
    }
    let _ = learned(bytes);
}
