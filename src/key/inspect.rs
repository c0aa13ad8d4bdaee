//! What a key shows without a store: [`KeyInspection`].

use super::{digest::KeyDigest, presented::token, scheme::KeyScheme};
use crate::denial::{MalformedCredential, UnrecognizedKey};

/// What can be read from a key without a store. It contains no part of the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyInspection {
    /// The format that the text has.
    pub format: InspectedFormat,
    /// The public lookup id; `None` for a text of an unknown format.
    pub lookup_id: Option<String>,
    /// The check at the end of the key.
    pub check: KeyCheck,
    /// Whether the scheme accepts the text as a key, or why not.
    pub accepted: Result<(), UnrecognizedKey>,
}

/// The format of an inspected key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InspectedFormat {
    /// A structured key. The scheme need not have a format with this brand and environment.
    Structured {
        /// The brand.
        brand: String,
        /// The environment.
        environment: String,
    },
    /// A key whose first characters, of this number, are the lookup id.
    FirstChars(usize),
    /// None of the formats of the scheme.
    Unknown,
}

/// The check of an inspected key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyCheck {
    /// Keys of this format have no check.
    None,
    /// The check is right, and is a CRC-32. A format with a mint secret does not accept it.
    Crc32,
    /// The check was made under the current mint secret.
    MintSecret,
    /// The check was made under a retired mint secret. The first one has the number 1.
    RetiredMintSecret(usize),
    /// The check is wrong, or was made under a mint secret that the scheme does not have.
    Wrong,
}

/// A text in the shape of a structured key.
pub(super) struct StructuredText<'a> {
    pub(super) brand: &'a str,
    pub(super) environment: &'a str,
    pub(super) id: &'a str,
    /// The text before the check.
    pub(super) checked: &'a str,
    pub(super) check: &'a str,
}

impl KeyScheme {
    /// Reads what a key shows without a store: format, brand, environment, lookup id, and the check with the mint secret
    /// that it was made under. It does not show whether the key exists.
    ///
    /// ```
    /// use tower_api_key::{KeyScheme, key::KeyCheck};
    ///
    /// let scheme = KeyScheme::default();
    /// let minted = scheme.mint()?;
    /// let shown = scheme.inspect(minted.expose_secret())?;
    /// assert_eq!(shown.lookup_id.as_deref(), Some(minted.lookup_id()));
    /// assert_eq!(shown.check, KeyCheck::Crc32);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the text is empty, or has bytes other than visible ASCII between white space.
    pub fn inspect(&self, text: &str) -> Result<KeyInspection, MalformedCredential> {
        let text = token(text.as_bytes())?;
        let accepted = self.parse(text, KeyDigest::of(text.as_bytes()));
        let accepted = accepted.map(|key| (key.id().to_owned(), key.is_structured));
        let shown = match (StructuredText::parse(text), &accepted) {
            (Some(key), Ok((_, true)) | Err(_)) => {
                let check = self.formats().iter().find_map(|format| format.check_of(&key));
                let (brand, environment) = (key.brand.to_owned(), key.environment.to_owned());
                KeyInspection {
                    format: InspectedFormat::Structured { brand, environment },
                    lookup_id: Some(key.id.to_owned()),
                    check: check
                        .unwrap_or_else(|| KeyCheck::without_secret(key.checked, key.check)),
                    accepted: Ok(()),
                }
            }
            (_, Ok((id, _))) => KeyInspection {
                format: self
                    .formats()
                    .iter()
                    .find_map(|format| format.lookup_id_chars())
                    .map_or(InspectedFormat::Unknown, InspectedFormat::FirstChars),
                lookup_id: Some(id.clone()),
                check: KeyCheck::None,
                accepted: Ok(()),
            },
            (None, Err(_)) => KeyInspection {
                format: InspectedFormat::Unknown,
                lookup_id: None,
                check: KeyCheck::None,
                accepted: Ok(()),
            },
        };
        Ok(KeyInspection { accepted: accepted.map(|_| ()), ..shown })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyFormat;

    fn minted(format: KeyFormat) -> String {
        let scheme = KeyScheme::builder().format(format).build().unwrap();
        scheme.mint().unwrap().expose_secret().to_owned()
    }

    fn format() -> KeyFormat {
        KeyFormat::structured("acme", "live").unwrap()
    }

    #[test]
    fn the_secret_that_a_key_was_minted_under_is_shown() {
        let [old, new, other] = ["old secret of mine", "new secret of mine", "a secret of others"];
        let rotated = format().with_mint_secret(new).unwrap();
        let rotated = rotated.with_retired_mint_secret(old).unwrap();
        let scheme = KeyScheme::builder().format(rotated).build().unwrap();
        let check = |key: &str| {
            let shown = scheme.inspect(key).unwrap();
            (shown.check, shown.accepted)
        };
        let under = |secret: &str| minted(format().with_mint_secret(secret).unwrap());
        assert_eq!(check(&under(new)), (KeyCheck::MintSecret, Ok(())));
        assert_eq!(check(&under(old)), (KeyCheck::RetiredMintSecret(1), Ok(())));
        let wrong = Err(UnrecognizedKey::WrongCheck);
        assert_eq!(check(&under(other)), (KeyCheck::Wrong, wrong));
        assert_eq!(check(&minted(format())), (KeyCheck::Crc32, wrong));
    }

    #[test]
    fn a_key_of_another_brand_is_recognized_but_not_accepted() {
        let key = minted(format());
        let shown = KeyScheme::default().inspect(&format!("  {key}\t")).unwrap();
        let (brand, environment) = ("acme".to_owned(), "live".to_owned());
        assert_eq!(shown.format, InspectedFormat::Structured { brand, environment });
        assert_eq!(shown.check, KeyCheck::Crc32);
        assert_eq!(shown.accepted, Err(UnrecognizedKey::UnknownFormat));
    }

    #[test]
    fn the_first_characters_of_a_legacy_key_are_shown_and_nothing_else() {
        let scheme = KeyScheme::builder().format(KeyFormat::first_chars(4).unwrap());
        let scheme = scheme.build().unwrap();
        let shown = scheme.inspect("abcd-very-secret").unwrap();
        assert_eq!(shown.format, InspectedFormat::FirstChars(4));
        assert_eq!(shown.lookup_id.as_deref(), Some("abcd"));
        assert!(!format!("{shown:?}").contains("secret"));
        let unknown = KeyScheme::default().inspect("abcd-very-secret").unwrap();
        assert_eq!((unknown.lookup_id, unknown.check), (None, KeyCheck::None));
        assert_eq!(scheme.inspect(" "), Err(MalformedCredential::Empty));
    }
}
