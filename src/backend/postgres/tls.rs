//! TLS to PostgreSQL with rustls, with the meaning of libpq's `sslmode`:
//! <https://www.postgresql.org/docs/current/libpq-ssl.html>.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Verification of the server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verification {
    /// No verification: the connection is encrypted, but the server is not authenticated.
    None,
    /// The certificate must be signed by a trusted authority.
    Chain,
    /// In addition, the certificate must be for the requested host.
    Full,
}

pub(super) struct TlsFault {
    pub(super) reason: &'static str,
    pub(super) source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Creates a connector with certificates from the file `root_cert`, or those of the system.
pub(super) fn connector(
    verification: Verification,
    root_cert: Option<&str>,
) -> Result<MakeRustlsConnect, TlsFault> {
    // The provider is passed explicitly, so that the process default is neither needed nor changed.
    let provider = Arc::new(ring::default_provider());
    let fault = |reason| move |error: Error| TlsFault { reason, source: Some(error.into()) };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(fault("TLS can't be set up"))?;
    let full = || -> Result<_, TlsFault> {
        let roots = Arc::new(root_certificates(root_cert)?);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
        verifier.build().map_err(|error| TlsFault {
            reason: "its certificates can't be used",
            source: Some(error.into()),
        })
    };
    let chain = match verification {
        Verification::Full => {
            let config = builder.with_webpki_verifier(full()?).with_no_client_auth();
            return Ok(MakeRustlsConnect::new(config));
        }
        Verification::Chain => Some(full()?),
        Verification::None => None,
    };
    let lenient = Arc::new(Lenient { chain, provider: Arc::clone(&provider) });
    let config = builder.dangerous().with_custom_certificate_verifier(lenient);
    Ok(MakeRustlsConnect::new(config.with_no_client_auth()))
}

fn root_certificates(file: Option<&str>) -> Result<RootCertStore, TlsFault> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(file) if file != "system" => {
            let unreadable = |error: rustls::pki_types::pem::Error| TlsFault {
                reason: "its sslrootcert is not a readable file of PEM certificates",
                source: Some(Box::new(error)),
            };
            for certificate in CertificateDer::pem_file_iter(file).map_err(unreadable)? {
                let added = roots.add(certificate.map_err(unreadable)?);
                added.map_err(|error| TlsFault {
                    reason: "its sslrootcert has a certificate that can't be used",
                    source: Some(error.into()),
                })?;
            }
        }
        _ => {
            // Some systems contain certificates that rustls can't parse; the others are still used.
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
    }
    if roots.is_empty() {
        return Err(TlsFault {
            reason: "there are no root certificates to verify with",
            source: None,
        });
    }
    Ok(roots)
}

/// A verifier that is less strict than that of rustls.
#[derive(Debug)]
struct Lenient {
    /// `None` accepts any certificate (`sslmode=require`, `prefer`); otherwise it must be of a trusted authority, for
    /// any host (`verify-ca`).
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        let Some(full) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        // The name is checked last, after the chain was verified.
        match full.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
