//! Where a key sits in a request, and what each spelling of it is answered.

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderName, header::AUTHORIZATION};
use proptest::prelude::*;
use tower_api_key::{
    ApiKeyAuthLayer, Denial,
    denial::MalformedCredential,
    key::KeyHash,
    middleware::Credential,
    record::{KeyRecord, User},
    store::{Attribution, KeyRepository, StoredKey},
};

use crate::support::{
    auth_outcome::{
        A, Anonymous, AuthOutcome, Fields, InvalidRequest, InvalidToken, NoCredential, Passes, X,
        auth_outcome, check,
    },
    counted::{Counted, block_on},
    fixture, get, old_and_new_keys, send, unknown_key, with_wrong_secret,
};

#[tokio::test]
async fn a_bearer_key_passes_in_every_spelling_that_the_grammar_has() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "Bearer KEY")], Passes),
        (&[(A, "bearer KEY")], Passes),
        (&[(A, "BEARER KEY")], Passes),
        (&[(A, "bEaReR     KEY")], Passes),
        (&[(A, "  Bearer KEY  ")], Passes),
        (&[(A, "\tBearer KEY \t")], Passes),
        (&[("Authorization", "Bearer KEY")], Passes),
        (&[(X, "KEY")], Passes),
        (&[("X-API-Key", " \tKEY\t ")], Passes),
    ];
    check(&setting.layer(), &setting, table).await;
}

#[tokio::test]
async fn an_authorization_field_that_breaks_the_grammar_is_an_invalid_request() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "")], InvalidRequest),
        (&[(A, " \t ")], InvalidRequest),
        (&[(A, "Bearer")], InvalidRequest),
        (&[(A, "Bearer ")], InvalidRequest),
        (&[(A, "bearer   \t")], InvalidRequest),
        (&[(A, "Bearer\tKEY")], InvalidRequest),
        (&[(A, "Bearer,KEY")], InvalidRequest),
        (&[(A, "Bearer: KEY")], InvalidRequest),
        (&[(A, "\"Bearer\" KEY")], InvalidRequest),
        (&[(A, "@ KEY")], InvalidRequest),
        (&[(A, "Béarer KEY")], InvalidRequest),
        (&[(A, "Bearer KEY more")], InvalidRequest),
        (&[(A, "Bearer KEY\tmore")], InvalidRequest),
        (&[(A, "Bearer KEY, Basic dTpw")], InvalidRequest),
        (&[(A, "Bearer KEYé")], InvalidRequest),
        (&[(A, "Bearer \u{a0}KEY")], InvalidRequest),
        (&[(A, "Bearer KEY\u{200b}")], InvalidRequest),
        (&[(X, "")], InvalidRequest),
        (&[(X, " ")], InvalidRequest),
        (&[(X, "KEY KEY")], InvalidRequest),
        (&[(X, "КЕУ")], InvalidRequest),
    ];
    check(&setting.layer(), &setting, table).await;
}

#[tokio::test]
async fn a_tab_between_the_scheme_and_the_key_is_an_invalid_request() {
    // RFC 9110 §11.4: `auth-scheme 1*SP token68`. White space of other kinds is around the field alone.
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] =
        &[(&[(A, "Bearer \tKEY")], InvalidRequest), (&[(A, "Bearer  \t KEY")], InvalidRequest)];
    check(&setting.layer(), &setting, table).await;
}

#[tokio::test]
async fn another_scheme_alone_counts_as_no_credential() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[], NoCredential),
        (&[("accept", "*/*")], NoCredential),
        (&[(A, "Basic dTpw")], NoCredential),
        (&[(A, "Basic")], NoCredential),
        (&[(A, "Digest username=\"KEY\", realm=\"api\"")], NoCredential),
        (&[(A, "Negotiate")], NoCredential),
        (&[(A, "Bearerx")], NoCredential),
        (&[(A, "Token tak_live_x")], NoCredential),
        (&[(A, "Token KEYx")], NoCredential),
        (&[(A, "Basic dTpw"), (X, "KEY")], Passes),
        (&[(A, "Token OTHER"), (X, "KEY")], Passes),
    ];
    check(&setting.layer(), &setting, table).await;
}

#[tokio::test]
async fn a_key_that_is_not_behind_bearer_is_an_invalid_request_that_names_what_to_write() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "KEY")], InvalidRequest),
        (&[(A, " KEY ")], InvalidRequest),
        (&[(A, "BearerKEY")], InvalidRequest),
        (&[(A, "bearerKEY")], InvalidRequest),
        (&[(A, "Token KEY")], InvalidRequest),
        (&[(A, "ApiKey KEY")], InvalidRequest),
        (&[(A, "Key   KEY")], InvalidRequest),
        (&[(A, "Basic KEY")], InvalidRequest),
        (&[(A, "Bearerx KEY")], InvalidRequest),
        (&[(A, "X-Bearer KEY")], InvalidRequest),
    ];
    for layer in [setting.layer(), setting.layer().optional()] {
        check(&layer, &setting, table).await;
    }
    let answer = send(&setting.layer(), get(&[(A, setting.key.as_bytes())])).await;
    assert!(answer.body.contains("write `Authorization: Bearer KEY`"), "{}", answer.body);
    assert!(!answer.body.contains(&setting.key));
    // A layer that takes no key from there has nothing to say about it.
    let elsewhere = setting.layer().credentials([Credential::header(X.parse().unwrap())]);
    check(&elsewhere, &setting, &[(&[(A, "Token KEY")], NoCredential)]).await;
}

#[tokio::test]
async fn the_credentials_of_other_schemes_are_not_taken_for_keys_of_a_format_without_rules() {
    let setting = fixture().await;
    let layer = setting.layer().optional().scheme(old_and_new_keys().build().unwrap());
    for (value, expected) in [
        ("Basic dXNlcjpwYXNzd29yZA==", Anonymous),
        ("Negotiate YIIJvwYGKwYBBQUC", Anonymous),
        ("Digest username=\"ada\"", Anonymous),
        ("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.", Anonymous),
        ("BearereyJhbGciOiJub25lIn0", InvalidRequest),
    ] {
        assert_eq!(
            auth_outcome(&send(&layer, get(&[(A, value.as_bytes())])).await),
            expected,
            "{value}"
        );
    }
}

#[tokio::test]
async fn what_is_no_b64token_behind_bearer_is_an_invalid_request() {
    // RFC 6750 §2.1 and §3.1.
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "Bearer KEY,")], InvalidRequest),
        (&[(A, "Bearer KEY;")], InvalidRequest),
        (&[(A, "Bearer \"KEY\"")], InvalidRequest),
        (&[(A, "Bearer 'KEY'")], InvalidRequest),
        (&[(A, "Bearer <KEY>")], InvalidRequest),
        (&[(A, "Bearer [KEY]")], InvalidRequest),
        (&[(A, "Bearer {KEY}")], InvalidRequest),
        (&[(A, "Bearer $KEY")], InvalidRequest),
        (&[(A, "Bearer a=b")], InvalidRequest),
        (&[(A, "Bearer =")], InvalidRequest),
        (&[(A, "Bearer !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")], InvalidRequest),
        (&[(A, "Bearer KEY==")], InvalidToken),
        (&[(A, "Bearer -._~+/09azAZ=")], InvalidToken),
        // No grammar but that of a field value.
        (&[(X, "\"KEY\"")], InvalidToken),
    ];
    check(&setting.layer(), &setting, table).await;
    // Keys of another service may have any visible characters.
    let scheme = old_and_new_keys().build().unwrap();
    let key = "old-key!{\"of\":<1>}";
    let hash = KeyHash::bcrypt(key, 4).unwrap();
    let user = User::new(setting.user.clone(), "");
    let record = KeyRecord::new(0, &key[..8], user);
    setting.store.insert_key(&StoredKey::new(record, hash), &Attribution::default()).await.unwrap();
    let layer = setting.layer().scheme(scheme);
    for (key, expected) in [(key, Passes), ("another-key!{}", InvalidToken)] {
        let value = format!("Bearer {key}");
        assert_eq!(auth_outcome(&send(&layer, get(&[(A, value.as_bytes())])).await), expected);
    }
}

#[tokio::test]
async fn what_follows_the_grammar_but_is_no_key_is_an_invalid_token() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "Bearer x")], InvalidToken),
        (&[(A, "Bearer acme_live_0123456789_ABCDEFGHIJKLMNOPQRSTUV0m3Okk")], InvalidToken),
        (&[(A, "Bearer KEYx")], InvalidToken),
        (&[(X, "x")], InvalidToken),
    ];
    check(&setting.layer(), &setting, table).await;
    let sizes = [511, 512, 513, 100_000].map(|size| "k".repeat(size));
    for key in [with_wrong_secret(&setting.key), unknown_key()].iter().chain(&sizes) {
        for (name, value) in [(A, format!("Bearer {key}")), (X, key.clone())] {
            let answer = send(&setting.layer(), get(&[(name, value.as_bytes())])).await;
            assert_eq!(auth_outcome(&answer), InvalidToken, "{} bytes in {name}", key.len());
        }
    }
}

#[tokio::test]
async fn two_different_keys_are_rejected_and_the_same_key_twice_is_fine() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "Bearer KEY"), (X, "KEY")], Passes),
        (&[(X, "KEY"), (X, " KEY")], Passes),
        (&[(A, "Bearer KEY"), (X, "KEY"), (X, "KEY")], Passes),
        (&[(A, "Bearer KEY"), (X, "OTHER")], InvalidRequest),
        (&[(A, "Bearer OTHER"), (X, "KEY")], InvalidRequest),
        (&[(A, "Bearer KEY"), (X, "x")], InvalidRequest),
        (&[(A, "Bearer KEY"), (X, "")], InvalidRequest),
        (&[(A, "Bearer"), (X, "KEY")], InvalidRequest),
        (&[(X, "KEY"), (X, "OTHER")], InvalidRequest),
        (&[(X, "KEY"), (X, "KEY"), (X, "OTHER")], InvalidRequest),
        (&[(A, "Bearer KEY"), (X, "KEY"), (X, "OTHER")], InvalidRequest),
    ];
    check(&setting.layer(), &setting, table).await;
}

#[tokio::test]
async fn two_authorization_fields_are_rejected_even_if_they_are_the_same() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[(A, "Bearer KEY"), (A, "Bearer KEY")], InvalidRequest),
        (&[(A, "Bearer KEY"), (A, "Bearer OTHER")], InvalidRequest),
        (&[(A, "Bearer KEY"), (A, "Basic dTpw")], InvalidRequest),
        (&[(A, "Basic dTpw"), (A, "Bearer KEY")], InvalidRequest),
        (&[(A, "Basic dTpw"), (A, "Digest x=y"), (X, "KEY")], InvalidRequest),
    ];
    check(&setting.layer(), &setting, table).await;
    let twice = get(&[(A, b"Bearer x"), (A, b"Bearer x")]);
    let answer = send(&setting.layer(), twice).await;
    let denial = answer.response.extensions().get::<Denial>();
    assert!(matches!(denial, Some(Denial::MalformedCredential(MalformedCredential::Repeated))));
    assert!(answer.body.contains("there is more than one Authorization header"), "{}", answer.body);
}

#[tokio::test]
async fn a_request_that_is_denied_for_its_grammar_never_reaches_the_store() {
    let setting = fixture().await;
    let store = Counted::over(setting.store.clone());
    let layer = ApiKeyAuthLayer::new(store.clone());
    let key = setting.key.as_bytes();
    let bearer = [b"Bearer ", key].concat();
    let other = unknown_key();
    for fields in [
        &[(A, &bearer[..]), (X, other.as_bytes())][..],
        &[(A, &bearer), (A, &bearer)],
        &[(X, key), (X, b"x")],
        &[(X, b"\xff")],
    ] {
        assert_eq!(auth_outcome(&send(&layer, get(fields)).await), InvalidRequest);
        assert_eq!(store.take_asked(), 0);
    }
    assert_eq!(auth_outcome(&send(&layer, get(&[(A, &bearer), (X, key)])).await), Passes);
    assert_eq!(store.take_asked(), 1);
}

#[tokio::test]
async fn a_key_in_the_header_field_of_a_teams_choice_passes_and_the_default_places_no_longer_do() {
    let setting = fixture().await;
    let place = Credential::header(HeaderName::from_static("x-team-key"));
    let table: &[(Fields, AuthOutcome)] = &[
        (&[("x-team-key", "KEY")], Passes),
        (&[("X-Team-Key", " KEY ")], Passes),
        (&[("x-team-key", "Bearer KEY")], InvalidRequest),
        (&[("x-team-key", "KEY"), ("x-team-key", "OTHER")], InvalidRequest),
        (&[("x-team-key", "KEY"), (X, "OTHER")], Passes),
        (&[(A, "Bearer KEY")], NoCredential),
        (&[(X, "KEY")], NoCredential),
    ];
    check(&setting.layer().credentials([place]), &setting, table).await;
}

#[tokio::test]
async fn a_key_is_the_user_name_of_basic_and_the_password_is_not_looked_at() {
    let setting = fixture().await;
    let layer = setting.layer().credentials([Credential::bearer(), Credential::basic()]);
    for (scheme, user_pass, expected) in [
        ("Basic ", "KEY:", Passes),
        ("basic   ", "KEY:", Passes),
        (" BASIC ", "KEY:password", Passes),
        ("Basic ", "KEY:a:b:é\0 c", Passes),
        ("Basic ", "KEY", InvalidRequest),
        ("Basic ", ":", InvalidRequest),
        ("Basic ", ":KEY", InvalidRequest),
        ("Basic ", "", InvalidRequest),
        ("Basic ", " KEY:", InvalidRequest),
        ("Basic ", "KEY :", InvalidRequest),
        ("Basic ", "K\0EY:", InvalidRequest),
        ("Basic ", "KEYé:", InvalidRequest),
        ("Basic\t", "KEY:", InvalidRequest),
        ("Basic ", "x:", InvalidToken),
        ("Bearer ", "KEY:", InvalidToken),
    ] {
        let encoded = STANDARD.encode(user_pass.replace("KEY", &setting.key));
        let value = format!("{scheme}{encoded}");
        let answer = send(&layer, get(&[(A, value.as_bytes())])).await;
        assert_eq!(auth_outcome(&answer), expected, "{scheme:?} {user_pass:?}");
    }
    for (value, expected) in [
        ("Basic ???".to_owned(), InvalidRequest),
        ("Basic".to_owned(), InvalidRequest),
        (format!("Basic {}", setting.key), InvalidRequest),
        (format!("Basic {}", STANDARD.encode("k".repeat(513) + ":")), InvalidToken),
        (format!("Basic {}", "A".repeat(100_000)), InvalidToken),
        (format!("Bearer {}", setting.key), Passes),
    ] {
        let answer = send(&layer, get(&[(A, value.as_bytes())])).await;
        assert_eq!(auth_outcome(&answer), expected, "{:.60}", value);
    }
    let challenges = send(&layer, get(&[])).await;
    let challenges = challenges.response.headers().get_all("www-authenticate").iter();
    assert!(challenges.into_iter().any(|challenge| challenge.as_bytes().starts_with(b"Basic ")));
}

#[tokio::test]
async fn a_closure_finds_a_key_in_the_query_and_what_it_finds_is_judged_like_any_other() {
    let setting = fixture().await;
    let from_query = Credential::from_fn(|head| {
        let pairs = head.uri().query()?.split('&');
        pairs.filter_map(|pair| pair.strip_prefix("key=")).next().map(Into::into)
    });
    let layer = setting.layer().credentials([Credential::bearer(), from_query]);
    for (query, bearer, expected) in [
        ("?a=b&key=KEY", "", Passes),
        ("?key=KEY", "Bearer KEY", Passes),
        ("?key=x", "Bearer KEY", InvalidRequest),
        ("?key=", "", InvalidRequest),
        ("?key=x", "", InvalidToken),
        ("?a=b", "", NoCredential),
        ("", "", NoCredential),
    ] {
        let mut request = get(&[]);
        *request.uri_mut() = format!("/{query}").replace("KEY", &setting.key).parse().unwrap();
        if !bearer.is_empty() {
            let value = bearer.replace("KEY", &setting.key).parse().unwrap();
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        assert_eq!(auth_outcome(&send(&layer, request).await), expected, "{query} {bearer}");
    }
    let owned =
        setting.layer().credentials([Credential::from_fn(|_| Some("ключ".to_owned().into()))]);
    assert_eq!(auth_outcome(&send(&owned, get(&[])).await), InvalidRequest);
}

/// Bytes that a header value may hold.
fn header_bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        4 => 0x20..0x7f_u8,
        1 => Just(b' '),
        1 => Just(b'\t'),
        1 => 0x80..=0xff_u8,
    ];
    let start = prop_oneof![Just(""), Just("Bearer "), Just("Basic "), Just("bearer tak_live_")];
    (start, prop::collection::vec(byte, 0..600))
        .prop_map(|(start, rest)| [start.as_bytes(), &rest].concat())
}

proptest! {
    #[test]
    fn random_header_bytes_are_rejected_without_a_panic_or_a_look_up(
        fields in prop::collection::vec((prop::sample::select(vec![A, X]), header_bytes()), 0..4),
    ) {
        block_on(async {
            let store = Counted::default();
            let every = [
                Credential::bearer(),
                Credential::basic(),
                Credential::header(HeaderName::from_static(X)),
            ];
            let fields: Vec<_> = fields.iter().map(|(name, v)| (*name, &v[..])).collect();
            let default = ApiKeyAuthLayer::new(store.clone());
            for layer in [default.clone(), default.clone().credentials(every), default.optional()] {
                let outcome = auth_outcome(&send(&layer, get(&fields)).await);
                let authorizations = fields.iter().filter(|(name, _)| *name == A).count();
                if authorizations > 1 {
                    assert_eq!(outcome, InvalidRequest);
                }
                assert_ne!(outcome, Passes);
            }
            assert_eq!(store.take_asked(), 0);
        });
    }

    #[test]
    fn a_byte_outside_of_visible_ascii_in_a_key_is_an_invalid_request(
        before in "[!-~]{1,40}",
        byte in prop_oneof![Just(b' '), Just(b'\t'), 0x80..=0xff_u8],
        after in "[!-~]{1,40}",
    ) {
        block_on(async {
            let layer = ApiKeyAuthLayer::new(Counted::default());
            let key = [before.as_bytes(), &[byte], after.as_bytes()].concat();
            let bearer = [b"Bearer ", &key[..]].concat();
            for fields in [&[(A, &bearer[..])][..], &[(X, &key)]] {
                assert_eq!(auth_outcome(&send(&layer, get(fields)).await), InvalidRequest);
            }
        });
    }

    #[test]
    fn a_valid_key_passes_in_any_case_of_the_scheme_with_any_spaces_around_it(
        scheme in "[Bb][Ee][Aa][Rr][Ee][Rr]",
        spaces in " {1,40}",
        before in "[ \t]{0,10}",
        after in "[ \t]{0,10}",
        twice in any::<bool>(),
    ) {
        block_on(async {
            let setting = fixture().await;
            let bearer = format!("{before}{scheme}{spaces}{}{after}", setting.key);
            let plain = format!("{after}{}{before}", setting.key);
            let mut fields = vec![(A, bearer.as_bytes())];
            if twice {
                fields.push((X, plain.as_bytes()));
            }
            assert_eq!(auth_outcome(&send(&setting.layer(), get(&fields)).await), Passes);
        });
    }
}
