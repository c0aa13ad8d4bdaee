//! One suite of behaviour that every store passes.

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Waker},
    time::{Duration, SystemTime},
};

use chrono::{TimeZone, Utc};
use futures_util::StreamExt;
use serde_json::json;
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey, StoreError,
    authenticator::AuthenticatorBuilder,
    clock::ManualClock,
    denial::InvalidKey,
    error::StoreErrorKind,
    key::{KeyFormat, KeyHash, KeySchemeBuilder},
    record::{
        Budget, BudgetPeriod, KeyId, KeyRecord, RateLimits, Revision, Revisions, UsageTotals, User,
    },
    store::{
        Answer, Attribution, Change, ChangeStream, DynKeyStore, KeyRepository, KeyStore, KeyUsage,
        LeaseRequest, ListKeys, Lookup, StoredKey, UsageBatch,
    },
};

use crate::support::{
    self, edit_key, eventually::eventually, every_store::on_every_store, from_the_past, some_user,
    stores::question,
};

on_every_store! {
    an_issued_key_comes_back_with_all_that_was_set
    a_key_is_denied_for_what_is_wrong_with_it
    what_is_not_there_can_be_neither_revoked_nor_updated_nor_found
    what_contradicts_the_store_is_a_conflict
    an_edit_changes_what_can_be_edited_and_nothing_else
    keys_are_listed_in_pages_and_by_owner
    metadata_of_every_type_comes_back_as_it_was_stored
    an_edit_of_a_record_from_before_a_revocation_does_not_undo_it
    an_edit_that_requires_a_revision_is_a_conflict_after_another_change
    keys_that_share_a_prefix_are_each_tried_up_to_eight
    a_bcrypt_key_is_upgraded_and_never_costs_bcrypt_again
    an_answer_says_when_it_was_read
    an_answer_has_the_revision_of_the_change_before_it
    a_look_up_that_is_dropped_leaves_the_store_usable
    an_arc_and_a_dyn_store_answer_like_the_store
    an_authenticator_that_caches_receives_each_change
    changes_since_a_moment_are_all_those_after_it_however_late_somebody_listens
}

/// An authenticator that asks its store each time.
fn asking(store: impl KeyStore) -> AuthenticatorBuilder {
    Authenticator::builder(store).cache_capacity(0)
}

/// Why the key is not valid, if it is not.
async fn fault(authenticator: &Authenticator, key: &str) -> Option<InvalidKey> {
    match authenticator.authenticate(key).await {
        Err(Denial::InvalidKey(reason)) => Some(reason),
        Ok(_) => None,
        Err(denial) => panic!("{denial:?}"),
    }
}

async fn an_issued_key_comes_back_with_all_that_was_set(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "admin").await.unwrap();
    let expiry =
        Utc.with_ymd_and_hms(2099, 12, 31, 23, 59, 59).unwrap() + Duration::from_micros(123_456);
    let limits = RateLimits::default().per_minute(0).per_day(86_400);
    let new = NewKey::new(user.id.clone(), "laptop \"δ\"")
        .scopes(["chat:write", "it's"])
        .permissions(["read"])
        .rate_limits(limits)
        .allowed_models(["small"])
        .allowed_endpoints(["POST /v1/*".parse().unwrap(), "/health".parse().unwrap()])
        .allowed_ips(["10.0.0.0/8".parse().unwrap(), "2001:db8::1".parse().unwrap()])
        .unlimited()
        .budget(Budget { limit_cents: 5000, period: BudgetPeriod::Weekly })
        .expires_at(expiry)
        .metadata(json!({ "team": ["a", 1, null, 1.5] }));
    let before = Utc::now() - Duration::from_secs(5);
    let issued = manager.issue(new).await.unwrap();

    let address = "10.1.2.3".parse().unwrap();
    let caller = Authenticator::new(store.clone())
        .authenticate_from(issued.expose_secret(), address)
        .await
        .unwrap();
    assert_eq!(caller.user(), &user);
    assert_eq!(
        (caller.user().email.as_str(), caller.user().role.as_str()),
        ("ada@example.com", "admin")
    );
    assert_eq!(caller.scopes(), ["chat:write", "it's"]);
    assert_eq!(caller.permissions(), ["read"]);
    assert_eq!(caller.rate_limits(), limits);
    assert_eq!(caller.allowed_models(), ["small"]);
    assert!(caller.can_access_endpoint(&http::Method::POST, "/v1/chat"));
    assert!(!caller.can_access_endpoint(&http::Method::GET, "/v1/chat"));
    assert_eq!(caller.allowed_ips().len(), 2);
    assert_eq!(caller.metadata(), &json!({ "team": ["a", 1, null, 1.5] }));
    let key = caller.key();
    assert_eq!((key.name.as_str(), key.is_active, key.is_unlimited), ("laptop \"δ\"", true, true));
    assert_eq!(key.budget, Some(Budget { limit_cents: 5000, period: BudgetPeriod::Weekly }));
    assert_eq!(key.expires_at, Some(expiry));
    assert_eq!((key.usage, key.last_used_at), (UsageTotals::default(), None));
    assert!(
        key.created_at > before
            && key.updated_at > before
            && key.created_at < Utc::now() + Duration::from_secs(5)
    );
    assert!(issued.expose_secret().contains(&key.prefix) && key.prefix.len() == 10);
    assert_eq!(key, issued.record());
    assert_eq!(
        store.find_key(&key.id).await.unwrap().map(StoredKey::into_record).as_ref(),
        Some(key)
    );
}

async fn a_key_is_denied_for_what_is_wrong_with_it(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let authenticator = asking(store.clone()).build();
    let reason = async |key: &str| fault(&authenticator, key).await;
    let user = manager.create_user("ada@example.com", "admin").await.unwrap();
    let issue = async || manager.issue(NewKey::new(user.id.clone(), "k")).await.unwrap();

    let good = issue().await;
    assert_eq!(reason(good.expose_secret()).await, None);

    let other_store = MemoryStore::new();
    let other_user = some_user(other_store.clone()).await;
    let other = KeyManager::new(other_store).issue(NewKey::new(other_user, "k")).await.unwrap();
    assert_eq!(reason(other.expose_secret()).await, Some(InvalidKey::Unknown));

    let forged = KeyRecord::new(0, &*other.record().prefix, user.clone());
    store
        .insert_key(
            &StoredKey::new(forged, KeyHash::sha256("something else")),
            &Attribution::default(),
        )
        .await
        .unwrap();
    assert_eq!(reason(other.expose_secret()).await, Some(InvalidKey::WrongSecret));

    let revoked = issue().await;
    manager.revoke(&revoked.record().id).await.unwrap();
    manager.revoke(&revoked.record().id).await.unwrap();
    assert_eq!(reason(revoked.expose_secret()).await, Some(InvalidKey::Revoked));

    let past = Utc::now() - Duration::from_secs(1);
    let expired = NewKey::new(user.id.clone(), "k").expires_at(past);
    let expired = from_the_past(&manager).issue(expired).await.unwrap();
    assert_eq!(reason(expired.expose_secret()).await, Some(InvalidKey::Expired));

    let mut inactive = user.clone();
    inactive.is_active = false;
    assert!(store.update_user(&inactive, &Attribution::default()).await.unwrap().is_some());
    assert_eq!(reason(good.expose_secret()).await, Some(InvalidKey::OwnerInactive));
    assert!(store.update_user(&user, &Attribution::default()).await.unwrap().is_some());
    assert_eq!(reason(good.expose_secret()).await, None);
}

async fn what_is_not_there_can_be_neither_revoked_nor_updated_nor_found(store: impl KeyRepository) {
    for id in [KeyId::from(4711), KeyId::from("text")] {
        assert!(store.revoke_key(&id, &Attribution::default()).await.unwrap().is_none());
        assert!(store.find_key(&id).await.unwrap().is_none());
        let record = KeyRecord::new(id, "prefix", User::new(1, ""));
        assert!(edit_key(&store, &record, None).await.unwrap().is_none());
    }
    assert!(
        store
            .update_user(&User::new(4711, "a@b.c"), &Attribution::default())
            .await
            .unwrap()
            .is_none()
    );
    assert!(
        store
            .update_user(&User::new("text", "a@b.c"), &Attribution::default())
            .await
            .unwrap()
            .is_none()
    );
}

async fn what_contradicts_the_store_is_a_conflict(store: impl KeyRepository + Clone) {
    let kind = |error: StoreError| (error.kind(), error.is_transient());
    let conflict = (StoreErrorKind::Conflict, false);
    let user =
        store.insert_user("ada@example.com", "admin", &Attribution::default()).await.unwrap();
    assert_eq!(
        kind(
            store
                .insert_user("ada@example.com", "user", &Attribution::default())
                .await
                .unwrap_err()
        ),
        conflict
    );

    let key = |user: &User| {
        StoredKey::new(KeyRecord::new(0, "prefix", user.clone()), KeyHash::sha256("secret"))
    };
    assert_eq!(
        kind(
            store
                .insert_key(&key(&User::new(4711, "")), &Attribution::default())
                .await
                .unwrap_err()
        ),
        conflict
    );
    assert_eq!(
        kind(
            store
                .insert_key(&key(&User::new("text", "")), &Attribution::default())
                .await
                .unwrap_err()
        ),
        conflict
    );
    store.insert_key(&key(&user), &Attribution::default()).await.unwrap();
    assert_eq!(
        kind(store.insert_key(&key(&user), &Attribution::default()).await.unwrap_err()),
        conflict
    );
}

async fn an_edit_changes_what_can_be_edited_and_nothing_else(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let expiry = Utc::now() + Duration::from_secs(60);
    let new = NewKey::new(user, "before").scopes(["a"]).expires_at(expiry).metadata(json!(1));
    let issued = manager.issue(new).await.unwrap();
    let mut edited = issued.record().clone();
    edited.name = "after".into();
    edited.scopes = vec!["b".into()];
    edited.allowed_models = vec!["m".into()];
    edited.rate_limits.per_hour = Some(7);
    edited.expires_at = None;
    edited.metadata = serde_json::Value::Null;
    let wanted = edited.clone();
    edited.prefix = "somebody".into();
    edited.user.email = "eve@example.com".into();
    edited.usage.requests = 99;
    edited.is_active = false;
    assert!(edit_key(&store, &edited, None).await.unwrap().is_some());

    let mut found = store.find_key(&edited.id).await.unwrap().unwrap().into_record();
    assert!(found.updated_at >= wanted.updated_at && found.revision > wanted.revision);
    (found.updated_at, found.revision) = (wanted.updated_at, wanted.revision);
    assert_eq!(found, wanted);
    let authenticator = Authenticator::new(store);
    assert!(authenticator.authenticate(issued.expose_secret()).await.unwrap().has_scope("b"));
}

async fn keys_are_listed_in_pages_and_by_owner(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let (ada, bob) = (
        manager.create_user("ada@example.com", "user").await.unwrap().id,
        manager.create_user("bob@example.com", "user").await.unwrap().id,
    );
    for n in 0..5 {
        let owner = if n % 2 == 0 { &ada } else { &bob };
        manager.issue(NewKey::new(owner.clone(), format!("key {n}"))).await.unwrap();
    }
    let names = async |page: &ListKeys| {
        let keys = store.list_keys(page).await.unwrap().keys;
        let names: Vec<_> = keys.iter().map(|key| key.name.clone()).collect();
        (names, keys.last().map(|key| key.id.clone()))
    };
    assert_eq!(names(&ListKeys::default()).await.0.len(), 5);
    let mut page = ListKeys::default().limit(2);
    let (first, last) = names(&page).await;
    assert_eq!(first, ["key 0", "key 1"]);
    page.after = last;
    assert_eq!(names(&page).await.0, ["key 2", "key 3"]);
    page.filter.owner = Some(ada);
    assert_eq!(names(&page).await.0, ["key 2", "key 4"]);
    page.filter.owner = Some("text".into());
    assert_eq!(names(&page).await.0, [""; 0]);
}

async fn metadata_of_every_type_comes_back_as_it_was_stored(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let authenticator = asking(store.clone()).build();
    let values = [
        json!("12"),
        json!("hello"),
        json!(""),
        json!("null"),
        json!("{\"a\": \"b\"}"),
        json!(12),
        json!(-1.5),
        json!(true),
        json!(false),
        json!(null),
        json!([]),
        json!(["12", 12, null]),
        json!({}),
        json!({ "a": { "b": "\"quoted\"" } }),
    ];
    for value in &values {
        let new = NewKey::new(user.clone(), value.to_string()).metadata(value.clone());
        let issued = manager.issue(new).await.unwrap();
        let id = &issued.record().id;
        assert_eq!(&issued.record().metadata, value);
        let caller = authenticator.authenticate(issued.expose_secret()).await.unwrap();
        assert_eq!(caller.metadata(), value);
        // And by an edit.
        let mut record = store.find_key(id).await.unwrap().unwrap().into_record();
        assert_eq!(&record.metadata, value);
        record.metadata = json!({ "another": 1 });
        edit_key(&store, &record, None).await.unwrap().unwrap();
        record.metadata = value.clone();
        edit_key(&store, &record, None).await.unwrap().unwrap();
        assert_eq!(&store.find_key(id).await.unwrap().unwrap().into_record().metadata, value);
    }
    let page = store.list_keys(&ListKeys::default()).await.unwrap();
    let listed: Vec<_> = page.keys.iter().map(|key| key.metadata.clone()).collect();
    assert_eq!((listed.as_slice(), page.unreadable.len(), page.next), (&values[..], 0, None));
}

async fn an_edit_of_a_record_from_before_a_revocation_does_not_undo_it(
    store: impl KeyRepository + Clone,
) {
    let user = some_user(store.clone()).await;
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(user, "k")).await.unwrap();
    let old = store.find_key(&issued.record().id).await.unwrap().unwrap();
    let mut record = old.record().clone();
    store.revoke_key(&record.id, &Attribution::default()).await.unwrap().unwrap();
    record.name = "another".into();
    assert!(record.is_active);
    let new = old.clone().with_record(record);
    let error = store.replace_key(&old, &new, &Attribution::default()).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Conflict);
    let now = store.find_key(&issued.record().id).await.unwrap().unwrap().into_record();
    assert_eq!((now.name.as_str(), now.is_active), ("k", false));
    let authenticator = asking(store).build();
    assert_eq!(fault(&authenticator, issued.expose_secret()).await, Some(InvalidKey::Revoked));
}

async fn an_edit_that_requires_a_revision_is_a_conflict_after_another_change(
    store: impl KeyRepository + Clone,
) {
    let user = some_user(store.clone()).await;
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(user, "k")).await.unwrap();
    let mut found = store.find_key(&issued.record().id).await.unwrap().unwrap().into_record();
    assert_eq!(found.revision, issued.record().revision);
    found.name = "first".into();
    let Some(Change::Prefix(_, revision)) =
        edit_key(&store, &found, Some(found.revision)).await.unwrap()
    else {
        panic!("the row has the revision")
    };
    assert_eq!(store.find_key(&found.id).await.unwrap().unwrap().into_record().revision, revision);

    found.name = "second".into();
    let error = edit_key(&store, &found, Some(found.revision)).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Conflict);
    // A revocation counts as a change, and usage does not.
    let mut batch = UsageBatch::new("w", 1, SystemTime::now());
    batch.entries.push(KeyUsage::new(found.id.clone()));
    store.record_usage(&batch).await.unwrap();
    assert_eq!(store.find_key(&found.id).await.unwrap().unwrap().into_record().revision, revision);
    store.revoke_key(&found.id, &Attribution::default()).await.unwrap().unwrap();
    let error = edit_key(&store, &found, Some(revision)).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Conflict);
    assert_eq!(store.find_key(&found.id).await.unwrap().unwrap().into_record().name, "first");
    let nobody = KeyRecord::new(4711, "", User::new(1, ""));
    assert!(edit_key(&store, &nobody, Some(Revision(1))).await.unwrap().is_none());
}

fn first_chars() -> KeySchemeBuilder {
    KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).pepper("sixteen bytes or more")
}

async fn keys_that_share_a_prefix_are_each_tried_up_to_eight(store: impl KeyRepository + Clone) {
    let scheme = first_chars().build().unwrap();
    let authenticator = asking(store.clone()).scheme(scheme).build();
    let user = store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap();
    let add = async |n: usize| {
        let mut record = KeyRecord::new(0, "sk-proj-", user.clone());
        record.name = format!("key {n}");
        let hash = KeyHash::bcrypt(&format!("sk-proj-{n}"), 4).unwrap();
        store.insert_key(&StoredKey::new(record, hash), &Attribution::default()).await.unwrap();
    };
    for n in 0..8 {
        add(n).await;
    }
    let ask = async |n: usize| authenticator.authenticate(&format!("sk-proj-{n}")).await;
    for n in 0..8 {
        assert_eq!(ask(n).await.unwrap().key().name, format!("key {n}"));
    }
    assert!(matches!(ask(8).await, Err(Denial::InvalidKey(InvalidKey::WrongSecret))));
    add(8).await;
    assert_eq!(ask(7).await.unwrap().key().name, "key 7");
    // It may be the ninth key, so that it can't be called wrong.
    assert!(matches!(ask(8).await, Err(Denial::BadRow(_))));
    assert!(matches!(ask(9).await, Err(Denial::BadRow(_))));
}

async fn a_bcrypt_key_is_upgraded_and_never_costs_bcrypt_again(store: impl KeyRepository + Clone) {
    let user = store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap();
    let hash = KeyHash::bcrypt("old-key-of-mine", 4).unwrap();
    store
        .insert_key(
            &StoredKey::new(KeyRecord::new(0, "old-key-", user), hash),
            &Attribution::default(),
        )
        .await
        .unwrap();
    let clock = Arc::new(ManualClock::at(SystemTime::now()));
    // A scheme of its own each time, so that the limit of failed checks is fresh.
    let authenticator = |upgrade| {
        let scheme = first_chars();
        let scheme = if upgrade { scheme.upgrade_hashes() } else { scheme };
        let scheme = scheme.build().unwrap();
        asking(store.clone()).scheme(scheme).clock(clock.clone()).build()
    };
    /// How many wrong keys are called wrong before slow checks are limited.
    async fn wrong(authenticator: Authenticator) -> usize {
        for n in 0..20 {
            match authenticator.authenticate("old-key-of-yours").await {
                Err(Denial::InvalidKey(InvalidKey::WrongSecret)) => {}
                Err(Denial::Unavailable(_)) => return n,
                other => panic!("{other:?}"),
            }
        }
        20
    }
    assert!(authenticator(false).authenticate("old-key-of-mine").await.is_ok());
    assert_eq!(wrong(authenticator(false)).await, 5);
    assert!(authenticator(true).authenticate("old-key-of-mine").await.is_ok());
    assert_eq!(wrong(authenticator(false)).await, 20, "the fast hash decides alone");
    assert!(authenticator(false).authenticate("old-key-of-mine").await.is_ok());
}

/// A store over another that keeps the as-of of each answer.
struct Watched<S>(S, Arc<Mutex<Vec<SystemTime>>>);

impl<S: KeyStore> KeyStore for Watched<S> {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let answer = self.0.resolve(lookup).await?;
        self.1.lock().unwrap().push(answer.as_of());
        Ok(answer)
    }
}

async fn an_answer_says_when_it_was_read(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let issued = manager.issue(NewKey::new(user, "k")).await.unwrap();
    let seen = Arc::<Mutex<Vec<_>>>::default();
    let is_replica = store.replica_status().is_some();
    let authenticator = asking(Watched(store, Arc::clone(&seen))).build();
    // The clock of a node may go in ticks of 10 ms.
    let before = SystemTime::now() - Duration::from_millis(11);
    assert!(authenticator.authenticate(issued.expose_secret()).await.is_ok());
    manager.revoke(&issued.record().id).await.unwrap();
    assert!(authenticator.authenticate(issued.expose_secret()).await.is_err());
    let denial = authenticator.authenticate(&support::unknown_key()).await.unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::Unknown)), "{denial}");
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 3);
    // A replica answers as of the last sync, which may be a poll interval ago.
    let tolerance = if is_replica { Duration::from_secs(3) } else { Duration::ZERO };
    for as_of in seen.iter() {
        assert!(*as_of + tolerance >= before && *as_of <= SystemTime::now());
    }
    assert!(is_replica || seen[0] <= seen[1] && seen[1] <= seen[2]);
}

async fn an_answer_has_the_revision_of_the_change_before_it(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let mut user = manager.create_user("ada@example.com", "admin").await.unwrap();
    let other = manager.issue(NewKey::new(user.id.clone(), "other")).await.unwrap();
    let issued = manager.issue(NewKey::new(user.id.clone(), "k")).await.unwrap();
    let lookup = question(issued.expose_secret()).await;
    let revisions = async || store.resolve(&lookup).await.unwrap().revisions();
    let of_key = |change: Option<Change>| match change {
        Some(Change::Prefix(prefix, revision)) if prefix == issued.record().prefix => revision,
        other => panic!("{other:?}"),
    };
    let first = revisions().await;

    let mut record = issued.record().clone();
    record.name = "another".into();
    let edited = of_key(edit_key(&store, &record, None).await.unwrap());
    assert!(edited > first.key);
    assert_eq!(revisions().await, Revisions { key: edited, ..first });

    user.role = "user".into();
    let owner = match store.update_user(&user, &Attribution::default()).await.unwrap() {
        Some(Change::Owner(id, revision)) if id == user.id => revision,
        other => panic!("{other:?}"),
    };
    assert!(owner > first.owner);
    assert_eq!(revisions().await, Revisions { key: edited, owner });

    // Another key's change is none of this one's.
    store.revoke_key(&other.record().id, &Attribution::default()).await.unwrap().unwrap();
    assert_eq!(revisions().await, Revisions { key: edited, owner });
    let revoked =
        of_key(store.revoke_key(&issued.record().id, &Attribution::default()).await.unwrap());
    assert!(revoked > edited);
    assert_eq!(revisions().await, Revisions { key: revoked, owner });

    // The answer to a wrong key is about the same row; that to an unknown one is from before the first
    // change under its prefix.
    let wrong = question(&support::with_wrong_secret(issued.expose_secret())).await;
    assert_eq!(store.resolve(&wrong).await.unwrap().revisions().key, revoked);
    let unknown = support::unknown_key();
    let lookup = question(&unknown).await;
    let before = store.resolve(&lookup).await.unwrap();
    assert!(before.record().is_none());
    let record = KeyRecord::new(0, lookup.id(), user);
    store
        .insert_key(&StoredKey::new(record, KeyHash::sha256(&unknown)), &Attribution::default())
        .await
        .unwrap();
    let after = store.resolve(&lookup).await.unwrap();
    assert!(after.record().is_some());
    assert!(after.revisions().key > before.revisions().key);
}

async fn a_look_up_that_is_dropped_leaves_the_store_usable(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let issued = manager.issue(NewKey::new(user, "k")).await.unwrap();
    // The store's own future: an authenticator's look-up goes on when its caller is gone.
    let lookup = question(issued.expose_secret()).await;
    // More often than there are connections in any pool, at the first await and at later ones.
    for polls in 1..=40 {
        let mut answer = pin!(store.resolve(&lookup));
        for _ in 0..polls % 4 + 1 {
            if answer.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    assert!(store.resolve(&lookup).await.unwrap().record().is_some());
    assert!(Authenticator::new(store).authenticate(issued.expose_secret()).await.is_ok());
}

async fn an_arc_and_a_dyn_store_answer_like_the_store(
    store: impl KeyRepository + Clone + std::fmt::Debug,
) {
    let store = Arc::new(store);
    let manager = KeyManager::new(Arc::clone(&store));
    let mut user = manager.create_user("ada@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id.clone(), "k")).await.unwrap();
    let by_name = DynKeyStore::new(Arc::clone(&store));
    assert!(Authenticator::new(by_name.clone()).authenticate(issued.expose_secret()).await.is_ok());
    let lookup = question(issued.expose_secret()).await;
    let outcome = by_name.resolve(&lookup).await.unwrap();
    assert_eq!(outcome.record(), Some(issued.record()));
    assert_eq!(outcome.revisions(), store.resolve(&lookup).await.unwrap().revisions());

    let now = SystemTime::now();
    for mut changes in [by_name.changes(now), Arc::clone(&store).changes(now)] {
        assert!(changes.has_feed() && changes.is_complete());
        while !matches!(next(&mut changes).await, Change::Synced(_)) {}
        user.role.push('x');
        let change = store.update_user(&user, &Attribution::default()).await.unwrap().unwrap();
        loop {
            match next(&mut changes).await {
                Change::Synced(_) | Change::Status(_) => {}
                // The first sync of a replica may be from before its last changes.
                received if store.replica_status().is_some() && received != change => {}
                received => break assert_eq!(received, change),
            }
        }
    }

    // What is in memory has nobody to share it with.
    let secret = store.cache_secret().await.unwrap();
    assert_eq!(secret.is_some(), !format!("{store:?}").contains("MemoryStore"));
    assert_eq!(format!("{:?}", by_name.cache_secret().await.unwrap()), format!("{secret:?}"));
    let batch = UsageBatch::new("writer", 1, SystemTime::now());
    by_name.record_usage(&batch).await.unwrap();
    let ask = LeaseRequest::new(issued.record().id.clone(), "node", 1, 1);
    assert_eq!(by_name.lease(&ask).await.unwrap().amount_micro_cents, 1);
}

async fn next(changes: &mut ChangeStream) -> Change {
    let change = tokio::time::timeout(Duration::from_secs(10), changes.next()).await;
    change.expect("the feed says something").expect("the feed goes on")
}

async fn changes_since_a_moment_are_all_those_after_it_however_late_somebody_listens(
    store: impl KeyRepository + Clone,
) {
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let issued = manager.issue(NewKey::new(user, "k")).await.unwrap();
    let mut changes = store.changes(SystemTime::now());
    let revoked =
        store.revoke_key(&issued.record().id, &Attribution::default()).await.unwrap().unwrap();
    let mut received = Vec::new();
    // A replica passes on its last sync first, which may be from before.
    let since =
        if store.replica_status().is_some() { SystemTime::now() } else { SystemTime::UNIX_EPOCH };
    while !matches!(received.last(), Some(Change::Synced(as_of)) if *as_of > since) {
        received.push(next(&mut changes).await);
    }
    // Something to that effect, before it reports that it is in sync.
    assert!(received.contains(&revoked) || received.contains(&Change::Reset), "{received:?}");
}

async fn an_authenticator_that_caches_receives_each_change(store: impl KeyRepository + Clone) {
    let manager = KeyManager::new(store.clone());
    let authenticator = Authenticator::new(store.clone());
    let user = manager.create_user("ada@example.com", "admin").await.unwrap();
    let becomes = async |key: &str, expected: Option<InvalidKey>| {
        let what = format!("{expected:?}");
        eventually(&what, async || fault(&authenticator, key).await == expected).await;
    };
    let issued = manager.issue(NewKey::new(user.id.clone(), "k")).await.unwrap();
    let key = issued.expose_secret();
    assert_eq!(fault(&authenticator, key).await, None);

    let mut inactive = user.clone();
    inactive.is_active = false;
    store.update_user(&inactive, &Attribution::default()).await.unwrap().unwrap();
    becomes(key, Some(InvalidKey::OwnerInactive)).await;
    store.update_user(&user, &Attribution::default()).await.unwrap().unwrap();
    becomes(key, None).await;

    let mut record = issued.record().clone();
    record.scopes = vec!["chat".into()];
    edit_key(&store, &record, None).await.unwrap().unwrap();
    eventually("the new scope", async || {
        authenticator.authenticate(key).await.unwrap().has_scope("chat")
    })
    .await;

    // It is looked up in vain before it is there.
    let early = support::unknown_key();
    assert_eq!(fault(&authenticator, &early).await, Some(InvalidKey::Unknown));
    let lookup = question(&early).await;
    let record = KeyRecord::new(0, lookup.id(), user.clone());
    store
        .insert_key(&StoredKey::new(record, KeyHash::sha256(&early)), &Attribution::default())
        .await
        .unwrap();
    becomes(&early, None).await;

    manager.revoke(&issued.record().id).await.unwrap();
    becomes(key, Some(InvalidKey::Revoked)).await;
    assert_eq!(fault(&authenticator, &early).await, None, "the other key of the same user");
}
