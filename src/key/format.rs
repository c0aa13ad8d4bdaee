//! Key formats: [`KeyFormat`] parses, checks and generates keys.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{
    KeyDigest,
    base62::{self, is_base62},
    inspect::{KeyCheck, StructuredText},
    mac::MacKey,
    presented::{KeyShape, PresentedKey},
};
use crate::denial::UnrecognizedKey;

/// A format of keys. Use structured keys for new keys; [`KeyFormat::first_chars`] accepts keys of an existing service.
///
/// A structured key is `BRAND_ENV_ID_SECRETCHECK`: a brand and an environment of your choice, a
/// public lookup id of 10 base 62 digits, a secret of 22 (131 bits from the operating system), and a
/// check of 6. It is at most 55 bytes long, so that its SHA-256 is one block (FIPS 180-4 §5.1.1: 64
/// bytes less 9 of padding).
///
/// The check is a CRC-32 by default. It catches typos, and lets secret scanners recognize a key without a look-up. With
/// [`KeyFormat::with_mint_secret`] it is a MAC, so that a key that was never issued is rejected without a look-up.
///
/// ```
/// use tower_api_key::key::KeyFormat;
///
/// let format = KeyFormat::structured("acme", "live")?;
/// # Ok::<(), tower_api_key::key::FormatError>(())
/// ```
#[derive(Clone)]
pub struct KeyFormat(Kind);

#[derive(Clone)]
enum Kind {
    Structured(Structured),
    FirstChars(usize),
}

#[derive(Clone)]
struct Structured {
    brand: Box<str>,
    environment: Box<str>,
    check: Check,
}

#[derive(Clone)]
enum Check {
    Crc32,
    /// The current mint secret, followed by the retired ones.
    Mint(Vec<MacKey>),
}

const ID_DIGITS: usize = 10;
const SECRET_DIGITS: usize = 22;
const CHECK_DIGITS: usize = 6;
const MAX_KEY_BYTES: usize = 55;
const MAX_NAME_BYTES: usize = MAX_KEY_BYTES - ID_DIGITS - SECRET_DIGITS - CHECK_DIGITS - 3;
const MIN_MINT_SECRET_BYTES: usize = 16;
const MAX_FIRST_CHARS: usize = 64;

/// The result of parsing a text in one format.
pub(super) enum Verdict {
    /// The text is a key of this format.
    Key(KeyShape),
    /// The text has this format's brand, but is not a valid key. No other format may accept it.
    Claimed(UnrecognizedKey),
    /// The text does not belong to this format.
    Foreign,
}

impl KeyFormat {
    /// Creates the format of keys that look like `BRAND_ENV_ID_SECRETCHECK`.
    ///
    /// # Errors
    ///
    /// If `brand` or `environment` is empty, is not base 62, or the two together are longer than 14
    /// bytes.
    pub fn structured(brand: &str, environment: &str) -> Result<Self, FormatError> {
        if [brand, environment].iter().any(|name| name.is_empty() || !is_base62(name)) {
            return Err(FormatError::NotBase62);
        }
        if brand.len() + environment.len() > MAX_NAME_BYTES {
            return Err(FormatError::TooLong);
        }
        Ok(Self(Kind::Structured(Structured {
            brand: brand.into(),
            environment: environment.into(),
            check: Check::Crc32,
        })))
    }

    /// Creates the format of existing keys whose first `n` characters are the lookup id. Several keys may share it;
    /// each of them is tried, at most 8.
    ///
    /// # Errors
    ///
    /// If `n` is 0 or more than 64.
    pub fn first_chars(n: usize) -> Result<Self, FormatError> {
        if n == 0 || n > MAX_FIRST_CHARS {
            return Err(FormatError::PrefixLength);
        }
        Ok(Self(Kind::FirstChars(n)))
    }

    /// Makes the check a MAC under `secret`. Every node that issues or accepts keys must have the secret. A forged key
    /// is then rejected without a look-up.
    ///
    /// # Errors
    ///
    /// If the secret is shorter than 16 bytes, or the format is not structured.
    pub fn with_mint_secret(self, secret: impl AsRef<[u8]>) -> Result<Self, FormatError> {
        self.add_mint_secret(secret.as_ref(), |secrets, secret| secrets.insert(0, secret))
    }

    /// Continues to accept keys whose check was made under `secret`, and mints none with it.
    ///
    /// # Errors
    ///
    /// The errors of [`KeyFormat::with_mint_secret`], which must be called first.
    pub fn with_retired_mint_secret(self, secret: impl AsRef<[u8]>) -> Result<Self, FormatError> {
        if !matches!(&self.0, Kind::Structured(Structured { check: Check::Mint(_), .. })) {
            return Err(FormatError::NoCurrentMintSecret);
        }
        self.add_mint_secret(secret.as_ref(), |secrets, secret| secrets.push(secret))
    }

    fn add_mint_secret(
        self,
        secret: &[u8],
        add: impl FnOnce(&mut Vec<MacKey>, MacKey),
    ) -> Result<Self, FormatError> {
        if secret.len() < MIN_MINT_SECRET_BYTES {
            return Err(FormatError::ShortMintSecret);
        }
        let Kind::Structured(mut structured) = self.0 else {
            return Err(FormatError::NotStructured);
        };
        let mut secrets = match structured.check {
            Check::Crc32 => Vec::new(),
            Check::Mint(secrets) => secrets,
        };
        add(&mut secrets, MacKey::new(secret));
        structured.check = Check::Mint(secrets);
        Ok(Self(Kind::Structured(structured)))
    }

    pub(super) fn is_structured(&self) -> bool {
        matches!(self.0, Kind::Structured(_))
    }

    /// Returns whether both formats accept the same keys.
    pub(super) fn clashes_with(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Kind::Structured(a), Kind::Structured(b)) => {
                a.brand == b.brand && a.environment == b.environment
            }
            (Kind::FirstChars(_), Kind::FirstChars(_)) => true,
            _ => false,
        }
    }

    /// Parses `text`, which is visible ASCII of bounded length.
    pub(super) fn judge(&self, text: &str) -> Verdict {
        match &self.0 {
            Kind::Structured(structured) => structured.judge(text),
            // A key that consists only of its lookup id has no secret.
            Kind::FirstChars(n) if text.len() > *n => {
                Verdict::Key(KeyShape { id: 0..*n, is_structured: false })
            }
            Kind::FirstChars(_) => Verdict::Foreign,
        }
    }

    /// Returns which check of this format a key has, if the format is structured and has the key's brand and environment.
    pub(super) fn check_of(&self, key: &StructuredText<'_>) -> Option<KeyCheck> {
        let Kind::Structured(Structured { brand, environment, check }) = &self.0 else {
            return None;
        };
        let is_own = **brand == *key.brand && **environment == *key.environment;
        is_own.then(|| check.of(key.checked, key.check))
    }

    /// Returns the number of first characters that are the lookup id, if this is not a structured format.
    pub(super) fn lookup_id_chars(&self) -> Option<usize> {
        match self.0 {
            Kind::Structured(_) => None,
            Kind::FirstChars(n) => Some(n),
        }
    }

    /// Generates a key, if keys are minted in this format. `id` is the lookup id; without it, a new one is generated.
    pub(super) fn generate(
        &self,
        id: Option<&str>,
    ) -> Option<Result<PresentedKey, getrandom::Error>> {
        match &self.0 {
            Kind::Structured(structured) => Some(structured.generate(id)),
            Kind::FirstChars(_) => None,
        }
    }
}

impl Structured {
    fn judge(&self, text: &str) -> Verdict {
        let Some(rest) = strip_word(text, &self.brand) else { return Verdict::Foreign };
        let Some(rest) = strip_word(rest, &self.environment) else {
            return Verdict::Claimed(UnrecognizedKey::WrongShape);
        };
        let body = rest.split_once('_').filter(|(id, secret_and_check)| {
            is_structured_id(id)
                && secret_and_check.len() == SECRET_DIGITS + CHECK_DIGITS
                && is_base62(secret_and_check)
        });
        if body.is_none() {
            return Verdict::Claimed(UnrecognizedKey::WrongShape);
        }
        let (checked, check) = text.split_at(text.len() - CHECK_DIGITS);
        if !self.check.accepts(checked, check) {
            return Verdict::Claimed(UnrecognizedKey::WrongCheck);
        }
        let id_start = text.len() - rest.len();
        let id = id_start..id_start + ID_DIGITS;
        Verdict::Key(KeyShape { id, is_structured: true })
    }

    fn generate(&self, lookup_id: Option<&str>) -> Result<PresentedKey, getrandom::Error> {
        // The full capacity is reserved, because a buffer that grows would leave a copy of a part of the key.
        let mut text = Zeroizing::new(String::with_capacity(MAX_KEY_BYTES));
        text.push_str(&self.brand);
        text.push('_');
        text.push_str(&self.environment);
        text.push('_');
        let id = text.len()..text.len() + ID_DIGITS;
        match lookup_id.filter(|id| is_structured_id(id)) {
            Some(id) => text.push_str(id),
            None => base62::push_random(&mut text, ID_DIGITS)?,
        }
        text.push('_');
        base62::push_random(&mut text, SECRET_DIGITS)?;
        let check = self.check.mint(&text);
        text.extend(check.map(char::from));
        let digest = KeyDigest::of(text.as_bytes());
        Ok(PresentedKey::new(&text, KeyShape { id, is_structured: true }, digest))
    }
}

/// Returns whether `id` has the shape of the lookup id of a structured key.
fn is_structured_id(id: &str) -> bool {
    id.len() == ID_DIGITS && is_base62(id)
}

fn strip_word<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    text.strip_prefix(word)?.strip_prefix('_')
}

impl Check {
    fn mint(&self, checked: &str) -> [u8; CHECK_DIGITS] {
        match self {
            Self::Crc32 => crc32(checked),
            Self::Mint(secrets) => {
                secrets.first().map_or_else(|| crc32(checked), |s| mac(s, checked))
            }
        }
    }

    fn accepts(&self, checked: &str, check: &str) -> bool {
        let equals = |expected: [u8; CHECK_DIGITS]| bool::from(expected.ct_eq(check.as_bytes()));
        match self {
            Self::Crc32 => equals(crc32(checked)),
            Self::Mint(secrets) => secrets.iter().any(|secret| equals(mac(secret, checked))),
        }
    }
}

impl Check {
    /// Returns the check that a key with a right one has.
    fn of(&self, checked: &str, check: &str) -> KeyCheck {
        let secrets: &[MacKey] = match self {
            Self::Crc32 => &[],
            Self::Mint(secrets) => secrets,
        };
        let equals = |expected: [u8; CHECK_DIGITS]| bool::from(expected.ct_eq(check.as_bytes()));
        match secrets.iter().position(|secret| equals(mac(secret, checked))) {
            Some(0) => KeyCheck::MintSecret,
            Some(number) => KeyCheck::RetiredMintSecret(number),
            None => KeyCheck::without_secret(checked, check),
        }
    }
}

impl KeyCheck {
    /// Returns the check of a key of which no mint secret is known.
    pub(super) fn without_secret(checked: &str, check: &str) -> Self {
        if crc32(checked) == *check.as_bytes() { Self::Crc32 } else { Self::Wrong }
    }
}

impl<'a> StructuredText<'a> {
    /// Splits a text in the shape of a structured key, of any brand and environment.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let mut words = text.split('_');
        let (brand, environment, id, rest) =
            (words.next()?, words.next()?, words.next()?, words.next()?);
        let is_shaped = words.next().is_none()
            && [brand, environment].iter().all(|name| !name.is_empty() && is_base62(name))
            && is_structured_id(id)
            && rest.len() == SECRET_DIGITS + CHECK_DIGITS
            && is_base62(rest);
        let (checked, check) = text.split_at_checked(text.len().checked_sub(CHECK_DIGITS)?)?;
        is_shaped.then_some(Self { brand, environment, id, checked, check })
    }
}

fn crc32(checked: &str) -> [u8; CHECK_DIGITS] {
    base62::digits(u64::from(crc32fast::hash(checked.as_bytes())))
}

/// Returns the first 8 bytes of HMAC-SHA-256 as 6 base 62 digits. A guess is right once in 2³⁵ attempts, and then only
/// reaches the look-up.
fn mac(secret: &MacKey, checked: &str) -> [u8; CHECK_DIGITS] {
    let tag = secret.mac_of(&[checked.as_bytes()]);
    base62::digits(tag.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

impl fmt::Debug for KeyFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Structured(Structured { brand, environment, check }) => {
                let check = match check {
                    Check::Crc32 => "CRC-32",
                    Check::Mint(_) => "MAC",
                };
                write!(f, "KeyFormat({brand}_{environment}_…, {check})")
            }
            Kind::FirstChars(n) => write!(f, "KeyFormat(first {n} characters)"),
        }
    }
}

/// The reason why a [`KeyFormat`] can't be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatError {
    /// The brand or the environment is empty or not base 62.
    NotBase62,
    /// The brand and the environment together are longer than 14 bytes.
    TooLong,
    /// The lookup id would have no characters, or more than 64.
    PrefixLength,
    /// A mint secret has fewer than 16 bytes.
    ShortMintSecret,
    /// A mint secret was given to a format that is not structured.
    NotStructured,
    /// A retired mint secret was given before a current one.
    NoCurrentMintSecret,
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotBase62 => {
                "the brand and the environment of a key must be letters and digits, at least one each"
            }
            Self::TooLong => "the brand and the environment of a key must be at most 14 bytes together",
            Self::PrefixLength => "a lookup id must have 1 to 64 characters",
            Self::ShortMintSecret => "a mint secret must have at least 16 bytes",
            Self::NotStructured => "only a structured format can have a mint secret",
            Self::NoCurrentMintSecret => "the current mint secret must be set before retired ones",
        })
    }
}

impl std::error::Error for FormatError {}
