//! PEM text, to and from certificates.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, pem::PemObject};

/// One certificate as PEM.
pub fn encode(certificate: &CertificateDer<'_>) -> String {
    let body = STANDARD.encode(certificate);
    let mut text = String::with_capacity(body.len() + body.len() / 64 + 64);
    text.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// Several certificates, one after the other.
pub fn encode_all<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    certificates.into_iter().map(encode).collect()
}

/// Every certificate of a text; another section among them is an error.
pub fn decode_all(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for length in [0, 1, 47, 48, 49, 500] {
            let certificates = vec![
                CertificateDer::from(vec![7_u8; length]),
                CertificateDer::from(vec![9_u8; 3]),
            ];
            assert_eq!(decode_all(encode_all(&certificates).as_bytes()).unwrap(), certificates);
        }
    }

    #[test]
    fn a_torn_section_is_an_error() {
        assert!(decode_all(b"-----BEGIN CERTIFICATE-----\nAAAA\n").is_err());
    }
}
