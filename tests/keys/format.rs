//! How keys look: what parses, what is denied, and what never reaches the store.

use proptest::prelude::*;
use tower_api_key::{
    KeyScheme,
    denial::{InvalidKey, MalformedCredential, UnrecognizedKey},
    key::KeyFormat,
};

use crate::support::{
    counted::block_on,
    key_checker::{KeyChecker, Outcome, first_chars, scheme, structured},
    unknown_key, with_wrong_secret,
};

const MALFORMED_EMPTY: Outcome = Outcome::Malformed(MalformedCredential::Empty);
const FORBIDDEN_BYTES: Outcome = Outcome::Malformed(MalformedCredential::ForbiddenBytes);
const UNKNOWN_FORMAT: Outcome = unrecognized(UnrecognizedKey::UnknownFormat);
const WRONG_SHAPE: Outcome = unrecognized(UnrecognizedKey::WrongShape);
const WRONG_CHECK: Outcome = unrecognized(UnrecognizedKey::WrongCheck);
const TOO_LONG: Outcome = unrecognized(UnrecognizedKey::TooLong);
const UNKNOWN: Outcome = Outcome::Invalid(InvalidKey::Unknown);
const WRONG_SECRET: Outcome = Outcome::Invalid(InvalidKey::WrongSecret);

const fn unrecognized(reason: UnrecognizedKey) -> Outcome {
    Outcome::Invalid(InvalidKey::Unrecognized(reason))
}

/// Keys made by hand with Python's `zlib` and `hmac`, all with the same id and secret.
const BY_CRC_32: &str = "acme_live_0123456789_ABCDEFGHIJKLMNOPQRSTUV0m3Okk";
const BY_MINT_NOW: &str = "acme_live_0123456789_ABCDEFGHIJKLMNOPQRSTUVk6Ximp";
const BY_MINT_BEFORE: &str = "acme_live_0123456789_ABCDEFGHIJKLMNOPQRSTUV82Ai7g";
const MINT_NOW: &str = "the mint secret now";
const MINT_BEFORE: &str = "the mint secret before";

#[tokio::test]
async fn an_issued_key_is_branded_checked_and_fits_one_block_of_sha_256() {
    for (brand, environment) in [("tak", "live"), ("a", "b"), ("brand90", "prod123"), ("A1", "t")] {
        let checker =
            KeyChecker::new(scheme(KeyFormat::structured(brand, environment).unwrap())).await;
        let key = checker.issue().await;
        let rest = key.strip_prefix(&format!("{brand}_{environment}_")).unwrap();
        let (id, secret_and_check) = rest.split_once('_').unwrap();
        assert_eq!((id.len(), secret_and_check.len()), (10, 28), "{key}");
        assert!(rest.bytes().all(|byte| byte == b'_' || byte.is_ascii_alphanumeric()));
        assert!(key.len() <= 55);
        assert_eq!(checker.try_key(&key).await, (Outcome::Passes, 1));
        assert_ne!(checker.issue().await, key);
    }
}

#[tokio::test]
async fn nothing_that_is_malformed_or_forged_reaches_the_store() {
    let checker = KeyChecker::new(KeyScheme::builder().format(structured("tak"))).await;
    let key = checker.issue().await;
    let (head, check) = key.split_at(key.len() - 6);
    let body = &key["tak_live_".len()..];
    let turn = |c: char| if c == '0' { 'O' } else { '0' };
    let other_check: String = check.chars().map(turn).collect();
    let long = |size| format!("{key}{}", "0".repeat(size - key.len()));
    for (text, outcome) in [
        (String::new(), MALFORMED_EMPTY),
        (" \t ".into(), MALFORMED_EMPTY),
        ("k".into(), UNKNOWN_FORMAT),
        ("_".into(), UNKNOWN_FORMAT),
        ("k".repeat(71), UNKNOWN_FORMAT),
        ("k".repeat(72), UNKNOWN_FORMAT),
        ("k".repeat(73), UNKNOWN_FORMAT),
        ("k".repeat(511), UNKNOWN_FORMAT),
        ("k".repeat(512), UNKNOWN_FORMAT),
        ("k".repeat(513), TOO_LONG),
        ("k".repeat(1 << 20), TOO_LONG),
        (long(511), WRONG_SHAPE),
        (long(512), WRONG_SHAPE),
        (long(513), TOO_LONG),
        ("tak".into(), UNKNOWN_FORMAT),
        ("tak_".into(), WRONG_SHAPE),
        ("tak_live".into(), WRONG_SHAPE),
        ("tak_live_".into(), WRONG_SHAPE),
        ("tak_live__".into(), WRONG_SHAPE),
        (format!("tak_test_{body}"), WRONG_SHAPE),
        (format!("tak__{body}"), WRONG_SHAPE),
        (format!("tak_{body}"), WRONG_SHAPE),
        (format!("tak_LIVE_{body}"), WRONG_SHAPE),
        (format!("TAK_live_{body}"), UNKNOWN_FORMAT),
        (format!("takt_live_{body}"), UNKNOWN_FORMAT),
        (format!("xtak_live_{body}"), UNKNOWN_FORMAT),
        (format!("acme_live_{body}"), UNKNOWN_FORMAT),
        (format!("{key}0"), WRONG_SHAPE),
        (format!("{key}_"), WRONG_SHAPE),
        (key[..key.len() - 1].into(), WRONG_SHAPE),
        (format!("{head}{other_check}"), WRONG_CHECK),
        (format!("{head}{}", "0".repeat(6)), WRONG_CHECK),
        (key.replacen('_', "-", 1), UNKNOWN_FORMAT),
        (format!("{}-{}", &key[..30], &key[31..]), WRONG_SHAPE),
        (format!("{}é{}", &key[..30], &key[32..]), FORBIDDEN_BYTES),
        (format!("{}\0{}", &key[..30], &key[31..]), FORBIDDEN_BYTES),
        (format!("{key}\0"), FORBIDDEN_BYTES),
        (format!("{key}\n"), FORBIDDEN_BYTES),
        (format!("{key} {key}"), FORBIDDEN_BYTES),
    ] {
        assert_eq!(checker.try_key(&text).await, (outcome, 0), "{text:.80?}");
    }
}

#[tokio::test]
async fn a_digit_that_looks_like_another_is_denied_without_a_look_up() {
    let checker = KeyChecker::new(scheme(structured("acme"))).await;
    // The same key, misread.
    for (from, to) in [("0123", "O123"), ("0123", "o123"), ("123", "l23"), ("123", "I23")] {
        assert_eq!(checker.try_key(&BY_CRC_32.replacen(from, to, 1)).await, (WRONG_CHECK, 0));
    }
    for (from, to) in [("I", "l"), ("I", "1"), ("O", "0"), ("S", "5"), ("B", "8"), ("kk", "Kk")] {
        assert_eq!(checker.try_key(&BY_CRC_32.replacen(from, to, 1)).await, (WRONG_CHECK, 0));
    }
    // Cyrillic, Greek, full-width; a soft hyphen and a zero-width space.
    for (from, to) in [
        ("A", "А"),
        ("B", "Β"),
        ("0", "０"),
        ("a", "а"),
        ("_", "＿"),
        ("C", "C\u{ad}"),
        ("D", "D\u{200b}"),
    ] {
        assert_eq!(checker.try_key(&BY_CRC_32.replacen(from, to, 1)).await, (FORBIDDEN_BYTES, 0));
    }
}

#[tokio::test]
async fn a_key_with_the_right_check_is_looked_up_once_and_denied_for_its_secret() {
    let checker = KeyChecker::new(scheme(structured("tak"))).await;
    let key = checker.issue().await;
    assert_eq!(checker.try_key(&with_wrong_secret(&key)).await, (WRONG_SECRET, 1));
    assert_eq!(checker.try_key(&unknown_key()).await, (UNKNOWN, 1));
    assert_eq!(checker.try_key(&key).await, (Outcome::Passes, 1));
    assert_eq!(checker.try_key(&format!("\t {key} ")).await, (Outcome::Passes, 1));
}

#[tokio::test]
async fn a_check_is_what_the_documentation_says_it_is() {
    let digest = "38d5de930c986036ba5f02b1103fb1662ec2db7985ab45e2b0fcd824a6ae32ad";
    let by_crc_32 = KeyChecker::new(scheme(structured("acme"))).await;
    by_crc_32.store("0123456789", &format!("sha256${digest}")).await;
    assert_eq!(by_crc_32.try_key(BY_CRC_32).await, (Outcome::Passes, 1));

    let minted = by_crc_32.beside(scheme(structured("acme").with_mint_secret(MINT_NOW).unwrap()));
    assert_eq!(minted.try_key(BY_MINT_NOW).await, (WRONG_SECRET, 1), "it is not the stored key");
    assert_eq!(minted.try_key(BY_CRC_32).await, (WRONG_CHECK, 0));
    assert_eq!(minted.try_key(BY_MINT_BEFORE).await, (WRONG_CHECK, 0));
    assert_eq!(by_crc_32.try_key(BY_MINT_NOW).await, (WRONG_CHECK, 0));
}

#[tokio::test]
async fn keys_of_a_retired_mint_secret_pass_and_no_new_ones_are_made_with_it() {
    let format = |secret| structured("acme").with_mint_secret(secret).unwrap();
    let before = KeyChecker::new(scheme(format(MINT_BEFORE))).await;
    let old_key = before.issue().await;
    let turning = format(MINT_NOW)
        .with_retired_mint_secret("a third mint secret")
        .and_then(|format| format.with_retired_mint_secret(MINT_BEFORE));
    let turning = before.beside(scheme(turning.unwrap()));
    let new_key = turning.issue().await;
    let now = before.beside(scheme(format(MINT_NOW)));

    for key in [&old_key, &new_key] {
        assert_eq!(turning.try_key(key).await, (Outcome::Passes, 1));
    }
    assert_eq!(now.try_key(&new_key).await, (Outcome::Passes, 1));
    assert_eq!(now.try_key(&old_key).await, (WRONG_CHECK, 0));
    assert_eq!(before.try_key(&new_key).await, (WRONG_CHECK, 0));
    // Whoever takes the CRC-32 for the check forges in vain.
    assert_eq!(turning.try_key(BY_CRC_32).await, (WRONG_CHECK, 0));
}

#[tokio::test]
async fn existing_keys_are_found_by_their_first_characters_whatever_their_length() {
    let pepper = "a pepper for today";
    let checker = KeyChecker::new(scheme(first_chars(8)).pepper(pepper)).await;
    for (key, outcome) in [
        ("k".repeat(7), (UNKNOWN_FORMAT, 0)),
        // There would be no secret.
        ("k".repeat(8), (UNKNOWN_FORMAT, 0)),
        ("k".repeat(9), (UNKNOWN, 1)),
        ("k".repeat(71), (UNKNOWN, 1)),
        ("k".repeat(511), (UNKNOWN, 1)),
        ("k".repeat(512), (UNKNOWN, 1)),
        ("k".repeat(513), (TOO_LONG, 0)),
        ("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~".into(), (UNKNOWN, 1)),
        ("kéy-of-somebody".into(), (FORBIDDEN_BYTES, 0)),
        ("key-of\0somebody".into(), (FORBIDDEN_BYTES, 0)),
        ("key of somebody".into(), (FORBIDDEN_BYTES, 0)),
    ] {
        assert_eq!(checker.try_key(&key).await, outcome, "{key:.20?}, {} bytes", key.len());
    }
}

#[tokio::test]
async fn a_key_of_a_configured_brand_never_falls_through_to_a_laxer_format() {
    let minted = structured("acme").with_mint_secret(MINT_NOW).unwrap();
    let test = KeyFormat::structured("acme", "test").unwrap();
    let lax = first_chars(8);
    let orders = [[lax.clone(), minted.clone(), test.clone()], [test, minted, lax]];
    for formats in orders {
        let scheme = formats.into_iter().fold(KeyScheme::builder(), |scheme, f| scheme.format(f));
        let checker = KeyChecker::new(scheme.pepper("a pepper for today")).await;
        // Rows that the laxer format would find, with a hash that nothing matches.
        let hash = format!("sha256${}", "0".repeat(64));
        for prefix in ["acme_liv", "acme_tes", "acme_pro", "acmelive"] {
            checker.store(prefix, &hash).await;
        }
        for (key, outcome) in [
            (BY_CRC_32, WRONG_CHECK),
            ("acme_live_short-and-not-structured", WRONG_SHAPE),
            ("acme_prod_0123456789_ABCDEFGHIJKLMNOPQRSTUV0m3Okk", WRONG_SHAPE),
            ("acme_test_0123456789_ABCDEFGHIJKLMNOPQRSTUV0m3Okk", WRONG_CHECK),
            ("acme_!", WRONG_SHAPE),
        ] {
            assert_eq!(checker.try_key(key).await, (outcome, 0), "{key}");
        }
        // No key of that brand: the laxer format may have it.
        assert_eq!(checker.try_key("acmelive-0123456789").await.1, 1);
        assert_eq!(checker.try_key("sk-0123456789abcdef").await, (UNKNOWN, 1));
    }
}

#[tokio::test]
async fn keys_of_several_formats_are_accepted_and_new_ones_have_the_first_structured() {
    let formats = || KeyScheme::builder().format(first_chars(8)).format(structured("new"));
    let old = KeyChecker::new(scheme(structured("old"))).await;
    let old_key = old.issue().await;
    let checker = old.beside(formats().format(structured("old")));
    let new_key = checker.issue().await;
    assert!(new_key.starts_with("new_live_"));
    // The sha256$ hash of a structured key stands; under the laxer format alone it is no key of that kind.
    assert_eq!(checker.try_key(&new_key).await, (Outcome::Passes, 1));
    assert_eq!(checker.try_key(&old_key).await, (Outcome::Passes, 1));
    assert_eq!(old.try_key(&new_key).await, (UNKNOWN_FORMAT, 0));
    assert_eq!(old.beside(formats()).try_key(&old_key).await, (UNKNOWN, 1));
}

proptest! {
    #[test]
    fn every_issued_key_passes(
        brand in "[0-9A-Za-z]{1,7}", environment in "[0-9A-Za-z]{1,7}", minted in any::<bool>(),
    ) {
        block_on(async {
            let format = KeyFormat::structured(&brand, &environment).unwrap();
            let format = if minted { format.with_mint_secret(MINT_NOW).unwrap() } else { format };
            let checker = KeyChecker::new(scheme(format)).await;
            for _ in 0..4 {
                assert_eq!(checker.try_key(&checker.issue().await).await, (Outcome::Passes, 1));
            }
        });
    }

    #[test]
    fn a_key_with_one_wrong_or_two_swapped_characters_is_denied_without_a_look_up(
        at in 0..49_usize,
        wrong in prop_oneof![3 => "[0-9A-Za-z]", 1 => "[!-~]", 1 => "\\PC"],
        minted in any::<bool>(),
    ) {
        block_on(async {
            let format = structured("acme");
            let format = if minted { format.with_mint_secret(MINT_NOW).unwrap() } else { format };
            let checker = KeyChecker::new(KeyScheme::builder().format(format).format(KeyFormat::structured("acmf", "live").unwrap())).await;
            let key = checker.issue().await;
            let (before, after) = key.split_at(at);
            let (next, after) = after.split_at(1);
            let mistyped = format!("{before}{wrong}{after}");
            // A space at either end is taken off, and then one character is missing.
            if mistyped != key {
                let (outcome, asked) = checker.try_key(&mistyped).await;
                assert_ne!(outcome, Outcome::Passes);
                assert_eq!(asked, 0, "{key} {mistyped}");
            }
            let mut swapped = key.clone().into_bytes();
            swapped.swap(at, (at + 1) % key.len());
            let swapped = String::from_utf8(swapped).unwrap();
            if swapped != key {
                assert_eq!(checker.try_key(&swapped).await.1, 0, "{key} {swapped} {next}");
            }
        });
    }

    #[test]
    fn no_text_makes_a_format_panic_or_reach_the_store_without_a_right_check(
        text in prop_oneof![any::<String>(), "acme_?[a-z0-9_]{0,60}", "acme_live_[0-9A-Za-z]{10}_[0-9A-Za-z]{28}"],
    ) {
        block_on(async {
            let format = structured("acme").with_mint_secret(MINT_NOW).unwrap();
            let (outcome, asked) = KeyChecker::new(scheme(format)).await.try_key(&text).await;
            assert!(matches!(outcome, Outcome::Malformed(_) | Outcome::Invalid(_)), "{outcome:?}");
            assert_eq!(asked, 0);
            let lax = KeyChecker::new(scheme(first_chars(8))).await;
            let is_key = (9..=512).contains(&text.trim_matches([' ', '\t']).len()) && text.trim_matches([' ', '\t']).bytes().all(|b| b.is_ascii_graphic());
            assert_eq!(lax.try_key(&text).await.1, usize::from(is_key), "{text:?}");
        });
    }
}
