//! TLS to PostgreSQL with rustls, as libpq's `sslmode` means it:
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

/// How closely the server's certificate is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verification {
    /// Not at all: encryption without knowing to whom.
    None,
    /// It was signed by a trusted authority.
    Chain,
    /// That, and it is for the host that was asked for.
    Full,
}

pub(super) struct TlsFault {
    pub(super) reason: &'static str,
    pub(super) source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Connects with certificates from the file `root_cert`, or those of the system.
pub(super) fn connector(
    verification: Verification,
    root_cert: Option<&str>,
) -> Result<MakeRustlsConnect, TlsFault> {
    // Given explicitly, so that the process default is neither needed nor changed.
    let provider = Arc::new(ring::default_provider());
    let fault = |reason| move |error: Error| TlsFault { reason, source: Some(error.into()) };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(fault("TLS can't be set up"))?;
    let config = if verification == Verification::None {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        let roots = Arc::new(root_certificates(root_cert)?);
        let full = WebPkiServerVerifier::builder_with_provider(roots, provider).build().map_err(
            |error| TlsFault {
                reason: "its certificates can't be used",
                source: Some(error.into()),
            },
        )?;
        match verification {
            Verification::Full => builder.with_webpki_verifier(full),
            _ => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyName(full))),
        }
    };
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
            // Some systems carry certificates that rustls can't read; the others still count.
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

/// `sslmode=require` and `prefer`: whatever certificate the server shows.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `sslmode=verify-ca`: a certificate of a trusted authority, for whatever host.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        // The name is looked at last, after the chain was found to be good.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
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
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
