//! Formats and schemes that can't be built, and what they show of themselves.

use tower_api_key::{
    Authenticator, KeyManager, MemoryStore, NewKey, StoreError,
    key::{FormatError, KeyFormat, KeyHash, MintError, SchemeError},
    management::ManageError,
    record::{KeyRecord, User},
    store::{Answer, KeyStore, Lookup, StoredKey},
};

use crate::support::key_checker::{KeyChecker, first_chars, scheme, structured};

const MINT_NOW: &str = "the mint secret now";

#[test]
fn a_format_that_cannot_be_is_a_typed_error() {
    use FormatError::{
        NoCurrentMintSecret, NotBase62, NotStructured, PrefixLength, ShortMintSecret, TooLong,
    };
    for (brand, environment, error) in [
        ("", "live", NotBase62),
        ("tak", "", NotBase62),
        ("ta_k", "live", NotBase62),
        ("tak", "li-ve", NotBase62),
        ("ták", "live", NotBase62),
        ("tak ", "live", NotBase62),
        ("tak", "live\0", NotBase62),
        ("brand901", "prod123", TooLong),
        ("b", "01234567890123", TooLong),
    ] {
        assert_eq!(KeyFormat::structured(brand, environment).unwrap_err(), error, "{brand:?}");
    }
    for n in [0, 65, usize::MAX] {
        assert_eq!(KeyFormat::first_chars(n).unwrap_err(), PrefixLength);
    }
    assert!(KeyFormat::first_chars(1).is_ok() && KeyFormat::first_chars(64).is_ok());
    let short = "k".repeat(15);
    let minted = structured("tak").with_mint_secret("k".repeat(16)).unwrap();
    for (made, error) in [
        (structured("tak").with_mint_secret(&short), ShortMintSecret),
        (structured("tak").with_mint_secret(""), ShortMintSecret),
        (minted.with_retired_mint_secret(&short), ShortMintSecret),
        (structured("tak").with_retired_mint_secret(MINT_NOW), NoCurrentMintSecret),
        (first_chars(8).with_mint_secret(MINT_NOW), NotStructured),
    ] {
        assert_eq!(made.unwrap_err(), error);
        assert!(error.to_string().contains(' '));
        assert_eq!(SchemeError::from(error).to_string(), error.to_string());
    }
}

#[test]
fn a_scheme_that_cannot_be_is_a_typed_error() {
    use SchemeError::{Bounds, NoCurrentPepper, SameFormat, ShortPepper, UpgradeWithoutPepper};
    let new = || scheme(structured("tak"));
    let (long, short) = ("k".repeat(16), "k".repeat(15));
    for (made, error) in [
        (new().format(structured("tak")), SameFormat),
        (new().format(structured("tak").with_mint_secret(MINT_NOW).unwrap()), SameFormat),
        (new().pepper(&short), ShortPepper),
        (new().pepper(&long).retired_pepper(&short), ShortPepper),
        (new().retired_pepper(&long), NoCurrentPepper),
        (new().format(first_chars(8)).upgrade_hashes(), UpgradeWithoutPepper),
        (new().bcrypt_slots(0), Bounds),
        (new().bcrypt_slots(1025), Bounds),
        (new().bcrypt_queue(usize::MAX), Bounds),
    ] {
        assert_eq!(made.build().unwrap_err(), error);
        assert!(error.to_string().contains(' '));
    }
    assert!(new().format(first_chars(8)).upgrade_hashes().pepper(&long).build().is_ok());
    assert!(new().upgrade_hashes().build().is_ok());
}

#[test]
fn a_bound_beyond_measure_is_a_typed_error_and_no_panic() {
    for slots in [1 << 60, usize::MAX] {
        let made = scheme(structured("tak")).bcrypt_slots(slots).build();
        assert_eq!(made.unwrap_err(), SchemeError::Bounds);
    }
}

#[tokio::test]
async fn no_debug_output_shows_a_secret() {
    let format = structured("acme").with_mint_secret(MINT_NOW).unwrap();
    let builder = scheme(format.clone()).pepper("a pepper for today");
    let shown = format!("{format:?} {builder:?} {:?}", builder.clone().build().unwrap());
    assert!(shown.contains("acme_live") && !shown.contains(MINT_NOW) && !shown.contains("today"));
    let byte_list = format!("{:?}", MINT_NOW.as_bytes());
    assert!(!shown.contains(byte_list.trim_matches(['[', ']'])), "{shown}");

    let checker = KeyChecker::new(builder).await;
    let manager = KeyManager::new(checker.keys.clone());
    let issued = manager.issue(NewKey::new(checker.user.clone(), "key")).await.unwrap();
    let (shown, key) = (format!("{issued:?} {manager:?}"), issued.expose_secret());
    assert!(shown.contains(&issued.record().prefix) && !shown.contains(&key[20..]), "{shown}");
}

#[tokio::test]
async fn a_minted_key_is_let_in_by_a_store_that_has_its_id_and_its_hash() {
    /// The one key that there is.
    struct One(String, KeyHash);

    impl KeyStore for One {
        async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
            let record = KeyRecord::new(1, lookup.id(), User::new(7, "ada@example.com"));
            let key = StoredKey::new(record, self.1.clone());
            lookup.verify((lookup.id() == self.0).then_some(key)).await
        }
    }

    let both = || scheme(first_chars(8)).format(structured("acme"));
    let pepper = "a pepper for today";
    for (scheme, kind) in [(both(), "sha256$"), (both().pepper(pepper), "hmac-sha256$")] {
        let scheme = scheme.build().unwrap();
        let minted = scheme.mint().unwrap();
        assert!(minted.expose_secret().starts_with(&format!("acme_live_{}_", minted.lookup_id())));
        assert!(minted.hash().expose_hash().starts_with(kind));
        assert_ne!(scheme.mint().unwrap().expose_secret(), minted.expose_secret());
        let store = One(minted.lookup_id().to_owned(), minted.hash().clone());
        let node = Authenticator::builder(store).scheme(scheme).build();
        let caller = node.authenticate(minted.expose_secret()).await.unwrap();
        assert_eq!(caller.user().email, "ada@example.com");
    }
}

#[tokio::test]
async fn a_scheme_without_a_structured_format_mints_nothing() {
    let scheme = scheme(first_chars(8)).build().unwrap();
    assert_eq!(scheme.mint().unwrap_err(), MintError::NoMintableFormat);
    let manager = KeyManager::new(MemoryStore::new()).scheme(scheme);
    let error = manager.issue(NewKey::new(1, "key")).await.unwrap_err();
    assert!(matches!(error, ManageError::Mint(MintError::NoMintableFormat)), "{error:?}");
    assert_eq!(error.to_string(), MintError::NoMintableFormat.to_string());
}
