//! Hashes at rest: every kind that other services may have written, and what they are good for.

use proptest::prelude::*;
use tower_api_key::{denial::InvalidKey, key::KeyHash};

use crate::support::key_checker::{KeyChecker, Outcome, first_chars, scheme, structured};

const WRONG_SECRET: Outcome = Outcome::Invalid(InvalidKey::WrongSecret);

// All made with Python's `bcrypt`, `hashlib` and `hmac`, but those that say where they are from.
const KEY: &str = "sk-0123456789abcdef";
const BCRYPT: &str = "04$abcdefghijklmnopqrstuung5hpks1QNCP4u0m/XfkHnPxfCd.qSW";
const SHA_256: &str = "sha256$221df437bc4f8c4d9718bd7a9ec4c1021c72fd69dfb2a5f568ecf4607c824bee";
const TODAY: &str = "a pepper for today";
const YESTERDAY: &str = "a pepper from yesterday";
const BY_TODAY: &str =
    "hmac-sha256$8a613be4$3b409fb20da69ae68649fbd502f50ca55092549e860d9073a6b5b75aaab5dd4b";
const BY_YESTERDAY: &str =
    "hmac-sha256$d7625b26$a073b87c0d6e8e29c57565b42e1759f8c7857a811d9ae50ea7c61ca2939da9fa";
const BY_SOMEBODY: &str =
    "hmac-sha256$b430845b$c597d364c87f822c505e5cfdeb2109a4722a416027fe7459b7d867673b3de082";
/// Of `k` 72 times.
const BCRYPT_72: &str = "$2b$04$abcdefghijklmnopqrstuuxC5zBssI9/6x/6iWxqqDBY.Vv9oVG2q";
const BCRYPT_71: &str = "$2b$04$abcdefghijklmnopqrstuuQcYikPolskno5XuAZ2w9OTpbfePL9te";
/// Of `sk-` and `0123456789` 9 times, by way of the base64 of its SHA-256.
const PREHASHED: &str =
    "bcrypt-sha256$$2b$04$abcdefghijklmnopqrstuuamNNm8zuEDPKK6wPV4OdZY2uSzxy4om";
/// Of crypt_blowfish's own tests (`wrapper.c`).
const OPENWALL: &str = "$2a$05$abcdefghijklmnopqrstuu5s2v8.iXieOjg/.AySBTTZIIVFJeBui";
const OPENWALL_KEY: &str =
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";

fn peppered() -> tower_api_key::key::KeySchemeBuilder {
    scheme(first_chars(3)).pepper(TODAY).retired_pepper(YESTERDAY)
}

#[tokio::test]
async fn a_key_passes_by_every_kind_of_hash_and_a_wrong_one_by_none() {
    let long = format!("sk-{}", "0123456789".repeat(9));
    for (hash, key) in [
        (format!("$2a${BCRYPT}"), KEY),
        (format!("$2b${BCRYPT}"), KEY),
        (format!("$2y${BCRYPT}"), KEY),
        ("$2a$05$CCCCCCCCCCCCCCCCCCCCC.VGOzA784oUp/Z0DY336zx7pLYAy0lwK".into(), "U*U*"),
        (OPENWALL.into(), OPENWALL_KEY),
        (PREHASHED.into(), &long),
        (BY_TODAY.into(), KEY),
        (BY_TODAY.to_uppercase().replace("HMAC-SHA256", "hmac-sha256"), KEY),
        (BY_YESTERDAY.into(), KEY),
    ] {
        let checker = KeyChecker::new(peppered()).await;
        checker.store(&key[..3], &hash).await;
        assert_eq!(checker.try_key(key).await, (Outcome::Passes, 1), "{hash}");
        let wrong = format!("{}x", &key[..key.len() - 1]);
        assert_eq!(checker.try_key(&wrong).await, (WRONG_SECRET, 1), "{hash}");
    }
}

#[tokio::test]
async fn plain_bcrypt_takes_a_key_of_72_bytes_as_it_is_and_never_a_longer_one() {
    let (k71, k72, k73) = ("k".repeat(71), "k".repeat(72), "k".repeat(73));
    let table = [
        (BCRYPT_71, &k71[..], Outcome::Passes),
        (BCRYPT_71, &k72, WRONG_SECRET),
        (BCRYPT_72, &k71, WRONG_SECRET),
        (BCRYPT_72, &k72, Outcome::Passes),
        // What a check that cuts off would let through.
        (BCRYPT_72, &k73, WRONG_SECRET),
        (BCRYPT_72, &"k".repeat(512), WRONG_SECRET),
        (
            OPENWALL,
            &format!("{OPENWALL_KEY}chars after 72 are ignored").replace(' ', "_"),
            WRONG_SECRET,
        ),
    ]
    .map(|(hash, key, outcome)| (hash, key.to_owned(), outcome));
    for (hash, key, outcome) in table {
        let checker = KeyChecker::new(scheme(first_chars(3))).await;
        checker.store(&key[..3], hash).await;
        assert_eq!(checker.try_key(&key).await, (outcome, 1), "{} bytes", key.len());
    }
}

#[tokio::test]
async fn a_hash_that_is_made_here_takes_keys_of_any_length() {
    for size in [4, 71, 72, 73, 511, 512] {
        let key = "k".repeat(size);
        let hash = KeyHash::bcrypt(&key, 4).unwrap().expose_hash();
        let start = if size > 72 { "bcrypt-sha256$$2b$04$" } else { "$2b$04$" };
        assert!(hash.starts_with(start), "{hash}");
        let checker = KeyChecker::new(scheme(first_chars(3))).await;
        checker.store("kkk", &hash).await;
        assert_eq!(checker.try_key(&key).await, (Outcome::Passes, 1), "{size}");
        if size < 512 {
            assert_eq!(checker.try_key(&format!("{key}k")).await, (WRONG_SECRET, 1), "{size}");
        }
        assert_eq!(checker.try_key(&format!("{}x", &key[1..])).await, (WRONG_SECRET, 1), "{size}");
    }
    for cost in [0, 3, 15, 31, 32, u32::MAX] {
        assert!(KeyHash::bcrypt("k", cost).unwrap_err().to_string().contains("4 to 14"), "{cost}");
    }
}

#[tokio::test]
async fn a_prehashed_and_a_plain_hash_are_not_taken_for_each_other() {
    let key = format!("sk-{}", "0123456789".repeat(9));
    let digest = "UqKf5tTbyNAYxQTs1qf0IUXE0GmZW/+ZzNId7GHVQ1c";
    let plain = PREHASHED.strip_prefix("bcrypt-sha256$").unwrap();
    for (prefix, hash, presented, outcome) in [
        ("sk-", plain, &key[..], WRONG_SECRET),
        ("UqK", plain, digest, Outcome::Passes),
        ("UqK", PREHASHED, digest, WRONG_SECRET),
    ] {
        let checker = KeyChecker::new(scheme(first_chars(3))).await;
        checker.store(prefix, hash).await;
        assert_eq!(checker.try_key(presented).await, (outcome, 1));
    }
}

#[tokio::test]
async fn a_plain_sha_256_is_rejected_for_a_key_of_unknown_strength() {
    let lax = KeyChecker::new(peppered()).await;
    lax.store("sk-", SHA_256).await;
    assert_eq!(lax.try_key(KEY).await, (Outcome::Status(500), 1), "the row can't be used");
    assert_eq!(lax.try_key("sk-another").await, (Outcome::Status(500), 1));

    let checker = KeyChecker::new(scheme(structured("tak")).format(first_chars(3))).await;
    let key = checker.issue().await;
    assert_eq!(checker.try_key(&key).await, (Outcome::Passes, 1));
    // The same row under a format that does not know the key's strength.
    let lax = checker.beside(scheme(first_chars(19)).pepper(TODAY));
    lax.store(&key[..19], &KeyHash::sha256(&key).expose_hash()).await;
    assert_eq!(lax.try_key(&key).await, (Outcome::Status(500), 1));
}

#[tokio::test]
async fn a_hash_under_a_pepper_that_nobody_has_is_a_bad_row_and_not_a_wrong_key() {
    for (scheme, hash, outcome) in [
        (peppered(), BY_SOMEBODY, Outcome::Status(500)),
        (scheme(first_chars(3)).pepper(TODAY), BY_YESTERDAY, Outcome::Status(500)),
        (scheme(first_chars(3)), BY_TODAY, Outcome::Status(500)),
        (scheme(first_chars(3)).pepper(YESTERDAY).retired_pepper(TODAY), BY_TODAY, Outcome::Passes),
    ] {
        let checker = KeyChecker::new(scheme).await;
        checker.store("sk-", hash).await;
        assert_eq!(checker.try_key(KEY).await, (outcome, 1), "{hash}");
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_checked_does_not_shadow_one_that_matches() {
    let checker = KeyChecker::new(peppered()).await;
    for hash in [BY_SOMEBODY, SHA_256, &format!("$2b${BCRYPT}")] {
        checker.store("sk-", hash).await;
    }
    assert_eq!(checker.try_key(KEY).await, (Outcome::Passes, 1));
    assert_eq!(checker.try_key("sk-wrong").await, (Outcome::Status(500), 1));
}

#[tokio::test]
async fn up_to_8_keys_may_share_their_first_characters() {
    let checker = KeyChecker::new(scheme(first_chars(3))).await;
    let keys: Vec<_> = (0..8).map(|n| format!("sk-key-number-{n}")).collect();
    for key in &keys {
        checker.store("sk-", &KeyHash::bcrypt(key, 4).unwrap().expose_hash()).await;
    }
    for key in &keys {
        assert_eq!(checker.try_key(key).await, (Outcome::Passes, 1), "{key}");
    }
    assert_eq!(checker.try_key("sk-key-number-8").await, (WRONG_SECRET, 1));
    checker.store("sk-", &KeyHash::bcrypt("sk-key-number-8", 4).unwrap().expose_hash()).await;
    assert_eq!(checker.try_key(&keys[7]).await, (Outcome::Passes, 1));
    assert_eq!(checker.try_key("sk-key-number-8").await, (Outcome::Status(500), 1), "the ninth");
}

#[tokio::test]
async fn new_keys_get_a_fast_hash_under_the_pepper_where_there_is_one() {
    for (scheme, retired) in [
        (scheme(structured("tak")), None),
        (scheme(structured("tak")).pepper(TODAY), Some(scheme(structured("tak")))),
    ] {
        let checker = KeyChecker::new(scheme).await;
        let key = checker.issue().await;
        assert_eq!(checker.try_key(&key).await, (Outcome::Passes, 1));
        if let Some(without_pepper) = retired {
            let outcome = checker.beside(without_pepper).try_key(&key).await;
            assert_eq!(outcome, (Outcome::Status(500), 1), "it is no plain SHA-256");
        }
    }
}

#[test]
fn a_text_that_is_no_hash_is_rejected_and_not_shown() {
    let bcrypt = format!("$2b${BCRYPT}");
    let digest = &SHA_256["sha256$".len()..];
    for text in [
        String::new(),
        "x".into(),
        KEY.into(),
        digest.into(),
        "sha256$".into(),
        format!("sha256${}", &digest[1..]),
        format!("{SHA_256}0"),
        format!("sha256$ {}", &digest[1..]),
        format!("sha256$+{}", &digest[1..]),
        format!("sha256$g{}", &digest[1..]),
        format!("sha256$é{}", &digest[2..]),
        format!("SHA256${digest}"),
        format!(" {SHA_256}"),
        format!("{SHA_256}\n"),
        "hmac-sha256$".into(),
        format!("hmac-sha256${digest}"),
        format!("hmac-sha256$${digest}"),
        format!("hmac-sha256$8a613be${digest}"),
        format!("hmac-sha256$8a613be4a${digest}"),
        format!("hmac-sha256$8a613beg${digest}"),
        format!("hmac-sha256$8a613be4${}", &digest[2..]),
        format!("{BY_TODAY}$"),
        "$2b$".into(),
        "$2b$04$".into(),
        bcrypt[..59].into(),
        format!("{bcrypt}x"),
        format!("{bcrypt} "),
        format!("{bcrypt}\n"),
        format!("$2x${BCRYPT}"),
        format!("$2c${BCRYPT}"),
        format!("$2${BCRYPT}"),
        format!("$1${BCRYPT}"),
        bcrypt.replace("$04$", "$4$"),
        bcrypt.replace("$04$", "$-4$"),
        bcrypt.replace("$04$", "$xx$"),
        bcrypt.replace("$04$", "$03$"),
        bcrypt.replace("$04$", "$15$"),
        bcrypt.replace("$04$", "$31$"),
        bcrypt.replace("$04$", "$99$"),
        bcrypt.replacen('a', "!", 1),
        bcrypt.replacen('a', "=", 1),
        bcrypt.replacen("ab", "é", 1),
        bcrypt.replacen("qS", "é", 1),
        bcrypt.replace("qSW", "qS="),
        "bcrypt-sha256$".into(),
        format!("bcrypt-sha256${digest}"),
        format!("bcrypt-sha256${SHA_256}"),
        format!("bcrypt-sha256${PREHASHED}"),
        PREHASHED.replace("$04$", "$20$"),
        "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaA".into(),
        "x".repeat(1 << 20),
    ] {
        let error = text.parse::<KeyHash>().expect_err(&text).to_string();
        assert!(error.contains(' ') && error.len() < 100, "{error}");
        assert!(text.len() < 16 || !error.contains(&text), "{error}");
    }
}

#[test]
fn a_bcrypt_cost_with_a_sign_is_rejected() {
    assert!(format!("$2b${BCRYPT}").replace("$04$", "$+4$").parse::<KeyHash>().is_err());
}

#[test]
fn every_hash_is_written_back_as_it_was_read_and_debug_does_not_show_it() {
    let bcrypt = ["$2a$", "$2b$", "$2y$"].map(|version| format!("{version}{BCRYPT}"));
    let others = [SHA_256, BY_TODAY, PREHASHED, BCRYPT_72].map(str::to_owned);
    for text in bcrypt.iter().chain(&others) {
        let hash: KeyHash = text.parse().unwrap();
        assert_eq!(hash.expose_hash(), *text);
        let shown = format!("{hash:?}");
        assert!(!shown.contains(&text[text.len() - 8..]) && shown.ends_with("…)"), "{shown}");
    }
    assert_eq!(KeyHash::sha256(KEY).expose_hash(), SHA_256);
}

proptest! {
    #[test]
    fn no_text_makes_a_hash_panic_and_a_hash_is_read_back_as_it_is_written(
        text in prop_oneof![
            any::<String>(),
            "(bcrypt-sha256\\$)?\\$2[abxy]?\\$[0-9+]{2}\\$[./A-Za-z0-9é]{50,54}",
            "(hmac-)?sha256\\$([0-9a-f]{8}\\$)?[0-9a-fA-F]{62,66}",
        ],
    ) {
        if let Ok(hash) = text.parse::<KeyHash>() {
            let written = hash.expose_hash();
            prop_assert!(written == text || written == text.to_lowercase());
            prop_assert_eq!(written.parse::<KeyHash>().unwrap(), hash);
        }
    }
}
