//! TLS as the connections to RabbitMQ and Postgres have in common: what is checked of a server, and
//! who this client says it is. The files are read for each connection anew, so that a renewed
//! certificate needs no restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
pub use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{self, CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// One connection's TLS.
#[derive(Debug, Clone, PartialEq)]
pub struct Tls {
    pub check: Check,
    /// None where the server asks for none.
    pub identity: Option<Identity>,
}

/// What a server's certificate has to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Check {
    /// Anything: the connection is secret to those who listen, not to those who meddle.
    Nothing,
    /// Signed by one of these.
    Authority(Roots),
    /// And made out to the name that was connected to.
    Name(Roots),
}

/// The authorities that are trusted.
#[derive(Debug, Clone, PartialEq)]
pub enum Roots {
    /// The operating system's.
    System,
    /// Those in a PEM file.
    File(PathBuf),
}

/// A client certificate, with those between it and its authority, and its key; PEM files.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Tls {
    /// What a connection is opened with.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it should be.
    pub fn client_config(&self) -> anyhow::Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let unchecked_name = |roots| Arc::new(UncheckedName { roots, algorithms });
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = match &self.check {
            Check::Name(roots) => builder.with_root_certificates(roots.read()?),
            Check::Authority(roots) => builder
                .dangerous()
                .with_custom_certificate_verifier(unchecked_name(Some(roots.read()?))),
            Check::Nothing => builder
                .dangerous()
                .with_custom_certificate_verifier(unchecked_name(None)),
        };
        match &self.identity {
            None => Ok(builder.with_no_client_auth()),
            Some(identity) => {
                let (certificates, key) = identity.read(&provider)?;
                Ok(builder.with_client_auth_cert(certificates, key)?)
            }
        }
    }
}

impl Roots {
    /// # Errors
    /// As [`Tls::client_config`].
    pub fn read(&self) -> anyhow::Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        match self {
            Roots::File(path) => {
                for certificate in certificates(path)? {
                    roots
                        .add(certificate)
                        .with_context(|| path.display().to_string())?;
                }
            }
            Roots::System => {
                let found = rustls_native_certs::load_native_certs();
                // A system has odd ones among many that are not.
                roots.add_parsable_certificates(found.certs);
                ensure!(
                    !roots.is_empty(),
                    "the system has no root certificates{}",
                    found
                        .errors
                        .first()
                        .map(|error| format!(": {error}"))
                        .unwrap_or_default()
                );
            }
        }
        Ok(roots)
    }
}

impl Roots {
    /// What HTTP is spoken with, to a server whose certificate is made out to its name.
    ///
    /// # Errors
    /// As [`Tls::client_config`].
    pub fn for_http(&self) -> anyhow::Result<ureq::tls::TlsConfig> {
        let found = match self {
            Roots::File(path) => certificates(path)?,
            Roots::System => rustls_native_certs::load_native_certs().certs,
        };
        let roots = found
            .iter()
            .map(|one| ureq::tls::Certificate::from_der(one).to_owned());
        let roots: Vec<_> = roots.collect();
        ensure!(!roots.is_empty(), "the system has no root certificates");
        Ok(ureq::tls::TlsConfig::builder()
            .provider(ureq::tls::TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
            .root_certs(ureq::tls::RootCerts::new_with_certs(&roots))
            .build())
    }
}

impl Identity {
    /// Whether the files are there, and belong together.
    ///
    /// # Errors
    /// As [`Tls::client_config`].
    pub fn check(&self) -> anyhow::Result<()> {
        self.read(&ring::default_provider()).map(|_| ())
    }

    fn read(
        &self,
        provider: &CryptoProvider,
    ) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let certificates = certificates(&self.certificate)?;
        let file = self.key.display();
        let pem = fs::read(&self.key).with_context(|| file.to_string())?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
            pem::Error::NoItemsFound => anyhow!("{file}: no private key that is not encrypted"),
            error => anyhow!(error).context(file.to_string()),
        })?;
        CertifiedKey::from_der(certificates.clone(), key.clone_key(), provider)
            .with_context(|| format!("{file} as the key of {}", self.certificate.display()))?;
        Ok((certificates, key))
    }
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let file = || path.display().to_string();
    let pem = fs::read(path).with_context(file)?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .with_context(file)?;
    ensure!(
        !certificates.is_empty(),
        "{}: no certificate in PEM",
        file()
    );
    Ok(certificates)
}

/// Takes a certificate whatever name it is made out to and, without `roots`, whoever signed it.
#[derive(Debug)]
struct UncheckedName {
    roots: Option<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for UncheckedName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(roots) = &self.roots {
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(certificate)?,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        Ok(ServerCertVerified::assertion())
    }

    // That the server has the certificate's key is checked in any case: Postgres's password exchange
    // is bound to the certificate, which is worth nothing if somebody else can show it.

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::env;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use rstest::rstest;
    use rustls::{ClientConnection, ServerConfig, ServerConnection};
    use uuid::Uuid;

    use super::*;
    use crate::authority::{Authority, Issued, write};

    /// A folder with an authority's files, gone when dropped.
    struct Files {
        folder: PathBuf,
        authority: Authority,
    }

    impl Files {
        fn new() -> Files {
            let folder = env::temp_dir().join(format!("tls-{}", Uuid::new_v4()));
            fs::create_dir(&folder).unwrap();
            let authority = Authority::new();
            write(&folder, "ca.pem", &authority.pem());
            write(&folder, "other.pem", &Authority::new().pem());
            Files { folder, authority }
        }

        fn roots(&self, name: &str) -> Roots {
            Roots::File(self.folder.join(name))
        }

        fn server(&self, name: &str) -> ServerConnection {
            server(&self.authority.issue(name))
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.folder).unwrap();
        }
    }

    /// The other side of a connection.
    pub(crate) fn server(issued: &Issued) -> ServerConnection {
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap(),
            )
            .unwrap();
        ServerConnection::new(Arc::new(config)).unwrap()
    }

    /// What becomes of a handshake in memory.
    fn handshake(tls: &Tls, name: &str, mut server: ServerConnection) -> Result<(), Error> {
        let config = tls.client_config().unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        while client.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets().unwrap();
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut wire = wire.as_slice();
            while client.read_tls(&mut wire).unwrap() > 0 {
                client.process_new_packets()?;
            }
        }
        Ok(())
    }

    #[rstest]
    #[case::anything_goes(None, false, "localhost", "")]
    #[case::anything_goes_by_any_name(None, false, "elsewhere", "")]
    #[case::signed(Some("ca.pem"), false, "localhost", "")]
    #[case::signed_for_another_name(Some("ca.pem"), false, "elsewhere", "")]
    #[case::signed_by_a_stranger(Some("other.pem"), false, "localhost", "UnknownIssuer")]
    #[case::named(Some("ca.pem"), true, "localhost", "")]
    #[case::named_otherwise(Some("ca.pem"), true, "elsewhere", "not valid for name \"elsewhere\"")]
    #[case::an_address_is_no_name(Some("ca.pem"), true, "127.0.0.1", "not valid for name")]
    #[case::named_by_a_stranger(Some("other.pem"), true, "localhost", "UnknownIssuer")]
    fn a_server_is_checked(
        #[case] roots: Option<&str>,
        #[case] by_name: bool,
        #[case] name: &str,
        #[case] fault: &str,
    ) {
        let files = Files::new();
        let check = match roots.map(|roots| files.roots(roots)) {
            None => Check::Nothing,
            Some(roots) if by_name => Check::Name(roots),
            Some(roots) => Check::Authority(roots),
        };
        let tls = Tls {
            check,
            identity: None,
        };
        let outcome = handshake(&tls, name, files.server("localhost"));
        match outcome {
            Ok(()) => assert_eq!(fault, ""),
            Err(error) => {
                let text = error.to_string();
                assert!(!fault.is_empty() && text.contains(fault), "{text}");
            }
        }
    }

    /// As config/README.md has it.
    #[rstest]
    #[case::plain(IsCa::ExplicitNoCa, "")]
    #[case::marked_as_an_authority(IsCa::Ca(BasicConstraints::Unconstrained), "CaUsedAsEndEntity")]
    fn a_certificate_may_be_its_own_authority(#[case] is_ca: IsCa, #[case] fault: &str) {
        let files = Files::new();
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.is_ca = is_ca;
        let key = KeyPair::generate().unwrap();
        let own = Issued {
            certificate: params.self_signed(&key).unwrap().pem(),
            key: key.serialize_pem(),
        };
        write(&files.folder, "own.pem", &own.certificate);
        let tls = |check| Tls {
            check,
            identity: None,
        };
        handshake(&tls(Check::Nothing), "localhost", server(&own)).unwrap();
        let checked = tls(Check::Name(files.roots("own.pem")));
        match handshake(&checked, "localhost", server(&own)) {
            Ok(()) => assert_eq!(fault, ""),
            Err(error) => {
                let text = error.to_string();
                assert!(!fault.is_empty() && text.contains(fault), "{text}");
            }
        }
    }

    #[test]
    fn files_are_what_they_should_be_or_named() {
        let files = Files::new();
        let [one, two] = ["one", "two"].map(|name| files.authority.issue(name));
        let path = |name: &str| files.folder.join(name);
        write(&files.folder, "one.pem", &one.certificate);
        write(&files.folder, "one.key", &one.key);
        write(&files.folder, "two.key", &two.key);
        write(
            &files.folder,
            "broken.pem",
            "-----BEGIN CERTIFICATE-----\nhello\n",
        );
        write(&files.folder, "empty.pem", "");
        let encrypted = "ENCRYPTED PRIVATE KEY-----";
        write(
            &files.folder,
            "encrypted.key",
            &format!("-----BEGIN {encrypted}\nAAAA\n-----END {encrypted}\n"),
        );
        for (name, fault) in [
            ("absent.pem", "No such file"),
            ("broken.pem", "missing section end"),
            ("empty.pem", "no certificate in PEM"),
            ("one.key", "no certificate in PEM"),
        ] {
            let error = format!("{:#}", files.roots(name).read().unwrap_err());
            assert!(error.contains(fault) && error.contains(name), "{error}");
        }
        for (certificate, key, fault) in [
            ("one.pem", "one.key", ""),
            ("one.pem", "two.key", "two.key as the key of"),
            (
                "one.pem",
                "encrypted.key",
                "no private key that is not encrypted",
            ),
            ("one.pem", "absent.key", "No such file"),
            ("absent.pem", "one.key", "No such file"),
        ] {
            let identity = Identity {
                certificate: path(certificate),
                key: path(key),
            };
            match identity.check() {
                Ok(()) => assert_eq!(fault, ""),
                Err(error) => {
                    let text = format!("{error:#}");
                    assert!(!fault.is_empty() && text.contains(fault), "{text}");
                }
            }
        }
    }
}
