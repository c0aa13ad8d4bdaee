//! The key scheme, from options, environment and files.

use std::{fs, path::Path};

use tower_api_key::{KeyScheme, key::KeyFormat};
use zeroize::Zeroizing;

use crate::{args::Options, failure::Failure};

type SecretBytes = Zeroizing<Vec<u8>>;

/// Builds the scheme with which keys are minted, hashed and inspected.
pub(crate) fn scheme(options: &Options) -> Result<KeyScheme, Failure> {
    let wrong = |error: &dyn std::fmt::Display| Failure::usage(error.to_string());
    let (brand, environment) = match &options.format {
        None => ("tak", "live"),
        Some(format) => format
            .split_once('_')
            .ok_or_else(|| Failure::usage("write --format as BRAND_ENV, for example acme_live"))?,
    };
    let mut format = KeyFormat::structured(brand, environment).map_err(|error| wrong(&error))?;
    let mint_secret = secret("TOWER_API_KEY_MINT_SECRET", options.mint_secret_file.as_deref())?;
    if let Some(secret) = mint_secret {
        format = format.with_mint_secret(&*secret).map_err(|error| wrong(&error))?;
    }
    for file in &options.retired_mint_secret_file {
        format = format.with_retired_mint_secret(&*read(file)?).map_err(|error| wrong(&error))?;
    }
    let mut builder = KeyScheme::builder().format(format);
    if let Some(length) = options.legacy_prefix_length {
        builder = builder.format(KeyFormat::first_chars(length).map_err(|error| wrong(&error))?);
    }
    if let Some(pepper) = secret("TOWER_API_KEY_PEPPER", options.pepper_file.as_deref())? {
        builder = builder.pepper(&*pepper);
    }
    builder.build().map_err(|error| wrong(&error))
}

/// Returns a secret from a file, or else from the environment.
fn secret(variable: &str, file: Option<&Path>) -> Result<Option<SecretBytes>, Failure> {
    if let Some(file) = file {
        return read(file).map(Some);
    }
    match std::env::var_os(variable) {
        None => Ok(None),
        Some(value) if value.is_empty() => {
            Err(Failure::usage(format!("{variable} is empty: set it, or unset it")))
        }
        Some(value) => Ok(Some(Zeroizing::new(value.into_encoded_bytes()))),
    }
}

/// Reads a secret from a file. A line end after it is not part of it.
fn read(file: &Path) -> Result<SecretBytes, Failure> {
    let bytes = fs::read(file)
        .map_err(|error| Failure::usage(format!("{} can't be read: {error}", file.display())))?;
    let mut bytes = Zeroizing::new(bytes);
    while bytes.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        bytes.pop();
    }
    if bytes.is_empty() {
        return Err(Failure::usage(format!("{} has no secret in it", file.display())));
    }
    Ok(bytes)
}
