//! A workload's certificate: what is in it, and for how long.
//!
//! One SPIFFE name, digitalSignature, server and client authentication, as in Istio; backdated by two minutes for peers
//! whose clocks are behind; never valid for longer than what signed it (`a_leaf_never_outlives_its_signer`). Time is an
//! argument.

use std::time::{Duration, SystemTime};

use model::Identity;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use super::material::Material;

/// How far back a validity begins.
pub const BACKDATED: Duration = Duration::from_secs(120);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The signing certificate, or one above it, has ended.
    #[error("the certificate authority's own certificate has ended")]
    SignerEnded,
    /// The library refused.
    #[error("cannot sign: {0}")]
    Library(#[from] rcgen::Error),
}

/// How long certificates are valid.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// Where the request names none.
    pub default: Duration,
    /// At the most.
    pub longest: Duration,
}

impl Default for Lifetimes {
    /// 24 hours, as Istio's.
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            default: day,
            longest: day,
        }
    }
}

impl Lifetimes {
    /// The lifetime for a request of so many seconds; none or less than that means the default.
    pub fn of_request(&self, seconds: i64) -> Duration {
        let asked = match u64::try_from(seconds) {
            Ok(0) | Err(_) => self.default,
            Ok(seconds) => Duration::from_secs(seconds),
        };
        asked.min(self.longest)
    }
}

/// A signed leaf, and what is said of it in the audit log.
#[derive(Debug)]
pub struct Leaf {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its serial number, in hex.
    pub serial: String,
    /// When it ends.
    pub not_after: SystemTime,
}

/// Signs a certificate for an identity and a key.
pub fn sign(
    material: &Material,
    key: &impl PublicKeyData,
    identity: &Identity,
    lifetime: Duration,
    now: SystemTime,
) -> Result<Leaf, SignError> {
    let name = SanType::URI(identity.to_string().try_into()?);
    issue(material, key, vec![name], lifetime, now)
}

/// Signs a certificate for names of the control plane's own server.
pub fn sign_server(
    material: &Material,
    key: &impl PublicKeyData,
    names: &[String],
    lifetime: Duration,
    now: SystemTime,
) -> Result<Leaf, SignError> {
    let names = names.iter().map(|name| match name.parse() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => Ok(SanType::DnsName(name.as_str().try_into()?)),
    });
    issue(
        material,
        key,
        names.collect::<Result<_, rcgen::Error>>()?,
        lifetime,
        now,
    )
}

/// A certificate for nobody, to see whether a material can sign.
pub(super) fn probe(material: &Material, now: SystemTime) -> Result<CertificateDer<'static>, SignError> {
    let key = KeyPair::generate()?;
    let name = SanType::URI("spiffe://probe/ns/probe/sa/probe".try_into()?);
    Ok(issue(material, &key, vec![name], Duration::from_secs(60), now)?.certificate)
}

fn issue(
    material: &Material,
    key: &impl PublicKeyData,
    names: Vec<SanType>,
    lifetime: Duration,
    now: SystemTime,
) -> Result<Leaf, SignError> {
    let not_after = (now + lifetime).min(material.not_after());
    if not_after <= now {
        return Err(SignError::SignerEnded);
    }
    let serial = serial();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = OffsetDateTime::from(now - BACKDATED);
    params.not_after = not_after.into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(key, material.issuer())?;
    Ok(Leaf {
        certificate: certificate.der().clone(),
        serial: serial.iter().map(|byte| format!("{byte:02x}")).collect(),
        not_after,
    })
}

/// A serial number that nobody guesses: positive, not zero, 128 bits.
pub(super) fn serial() -> [u8; 16] {
    let mut serial = [0x55; 16];
    // The system's random numbers do not fail once the process runs; if they did, keys could not be made either.
    if aws_lc_rs::rand::fill(&mut serial).is_err() {
        tracing::error!("the system has no random numbers for a serial number");
    }
    serial[0] = (serial[0] & 0x7f) | 0x40;
    serial
}

#[cfg(test)]
mod tests {
    use x509_parser::{extensions::GeneralName, prelude::FromDer};

    use super::{super::generate, *};
    use crate::ca::material::verify;

    fn material(now: SystemTime) -> Material {
        let root = generate::root("cluster.local", now).unwrap();
        Material::read(&generate::intermediate(&root, "cluster.local", &[], now).unwrap(), now).unwrap()
    }

    fn identity() -> Identity {
        "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
    }

    #[test]
    fn a_leaf_is_what_istio_would_sign() {
        let now = SystemTime::now();
        let material = material(now);
        let key = KeyPair::generate().unwrap();
        let leaf = sign(&material, &key, &identity(), Duration::from_secs(3600), now).unwrap();
        let intermediates: Vec<_> = material.intermediates().cloned().collect();
        verify(&leaf.certificate, &intermediates, material.roots(), now).unwrap();
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&leaf.certificate).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.public_key().raw, key.subject_public_key_info());
        let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert!(matches!(
            names.as_slice(),
            [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/cart")]
        ));
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth);
        let length = parsed.validity().not_after.timestamp() - parsed.validity().not_before.timestamp();
        assert_eq!(length, 3600 + 120);
        assert_eq!(parsed.raw_serial_as_string().replace(':', ""), leaf.serial);
    }

    #[test]
    fn two_leaves_of_one_key_have_two_serials() {
        let now = SystemTime::now();
        let (material, key) = (material(now), KeyPair::generate().unwrap());
        let serial = || {
            sign(&material, &key, &identity(), Duration::from_secs(60), now)
                .unwrap()
                .serial
        };
        assert_ne!(serial(), serial());
    }

    #[test]
    fn a_leaf_never_outlives_its_signer() {
        let now = SystemTime::now();
        let (material, key) = (material(now), KeyPair::generate().unwrap());
        let century = Duration::from_secs(100 * 365 * 86_400);
        let leaf = sign(&material, &key, &identity(), century, now).unwrap();
        assert_eq!(leaf.not_after, material.not_after());
        let late = material.not_after();
        assert!(matches!(
            sign(&material, &key, &identity(), century, late),
            Err(SignError::SignerEnded)
        ));
    }

    #[test]
    fn the_lifetime_is_what_was_asked_for_within_bounds() {
        let lifetimes = Lifetimes {
            default: Duration::from_secs(100),
            longest: Duration::from_secs(200),
        };
        let of = |seconds| lifetimes.of_request(seconds).as_secs();
        assert_eq!([of(0), of(-1), of(50), of(i64::MAX)], [100, 100, 50, 200]);
    }
}
