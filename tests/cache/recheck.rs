//! `AuthContext::recheck`: a handler that outlives its request checks the key again, without the key.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tower_api_key::{
    AuthContext, Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey, PostgresStore,
    StoreError,
    authenticator::AuthenticatorBuilder,
    clock::ManualClock,
    denial::InvalidKey,
    error::StoreErrorKind,
    key::KeyHash,
    record::{AllowedNetwork, KeyRecord, Revision, User},
    store::{Answer, Change, KeyRepository, KeyStore, Lookup, StoredKey},
};

use crate::support::{
    fixture,
    fleet::{self, sqlite},
    old_and_new_keys,
    scripted::{Issued, Node, Scripted, status},
    servers::{Postgres, Redis},
    stores::Vouching,
};

type Checked = Result<AuthContext, Denial>;

/// A node with a feed that is in sync, and the context of a key.
async fn let_in(node: &Node, owner: i64) -> (Issued, AuthContext) {
    let issued = node.store.issue(owner).await;
    let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
    node.store.is_listened_to(1).await;
    node.sync().await;
    node.store.take_asked();
    (issued, caller)
}

fn invalid(checked: Checked) -> InvalidKey {
    match checked {
        Err(Denial::InvalidKey(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn store_error(checked: Checked) -> (u16, StoreErrorKind) {
    let denial = checked.unwrap_err();
    match &denial {
        Denial::Unavailable(error) | Denial::Unsupported(error) => {
            (denial.status().as_u16(), error.kind())
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_recheck_is_a_hit_while_nothing_has_changed_and_shows_what_has() {
    let node = Node::over(Scripted::new());
    let (issued, caller) = let_in(&node, 1).await;
    assert_eq!(caller.recheck().await.unwrap().key().id, caller.key().id);
    assert_eq!(node.store.take_asked(), 0);

    node.store.edit(&issued, 2, 1, |record| record.name = "renamed".into());
    node.store.emit(Change::Prefix(issued.prefix.clone(), Revision(2))).await;
    assert_eq!(caller.recheck().await.unwrap().key().name, "renamed");
    assert_eq!(node.store.take_asked(), 1);
    // The old context finds what the new one has found, and so does a request with the key.
    assert_eq!(caller.recheck().await.unwrap().key().name, "renamed");
    assert_eq!(node.ask(&issued.key).await, (200, 0));
}

#[tokio::test]
async fn a_revoked_key_a_deactivated_owner_and_a_deleted_key_end_at_the_next_recheck() {
    let node = Node::over(Scripted::new());
    let (revoked, caller) = let_in(&node, 1).await;
    node.store.edit(&revoked, 2, 1, |record| record.is_active = false);
    node.store.emit(Change::Prefix(revoked.prefix.clone(), Revision(2))).await;
    assert_eq!(invalid(caller.recheck().await), InvalidKey::Revoked);

    let orphan = node.store.issue(2).await;
    let caller = node.authenticator.authenticate(&orphan.key).await.unwrap();
    node.store.edit(&orphan, 1, 2, |record| record.user.is_active = false);
    node.store.emit(Change::Owner(orphan.owner.clone(), Revision(2))).await;
    assert_eq!(invalid(caller.recheck().await), InvalidKey::OwnerInactive);

    let deleted = node.store.issue(3).await;
    let caller = node.authenticator.authenticate(&deleted.key).await.unwrap();
    node.store.delete(&deleted, 2);
    node.store.emit(Change::Prefix(deleted.prefix.clone(), Revision(2))).await;
    assert_eq!(invalid(caller.recheck().await), InvalidKey::Unknown);
}

#[tokio::test]
async fn a_key_that_was_found_revoked_by_a_request_is_denied_without_a_look_up() {
    let node = Node::over(Scripted::new());
    let (issued, caller) = let_in(&node, 1).await;
    node.store.edit(&issued, 2, 1, |record| record.is_active = false);
    node.store.emit(Change::Prefix(issued.prefix.clone(), Revision(2))).await;
    assert_eq!(node.ask(&issued.key).await, (401, 1));
    assert_eq!(invalid(caller.recheck().await), InvalidKey::Revoked);
    assert_eq!(node.store.take_asked(), 0);
}

#[tokio::test]
async fn a_key_expires_by_the_clock_without_a_look_up_that_lets_it_in() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let expiry = node.now() + Duration::from_secs(5);
    node.store.edit(&issued, 1, 1, |record| record.expires_at = Some(expiry.into()));
    let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
    node.seconds(4);
    assert!(caller.recheck().await.is_ok());
    node.seconds(1);
    assert_eq!(invalid(caller.recheck().await), InvalidKey::Expired);
}

#[tokio::test]
async fn an_outage_is_endured_as_long_as_for_a_request() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
    node.store.fail();
    node.seconds(90);
    assert!(caller.recheck().await.is_ok(), "within max_staleness + stale_if_error");
    node.moment();
    assert_eq!(store_error(caller.recheck().await), (503, StoreErrorKind::Unavailable));
    assert_eq!(node.ask(&issued.key).await.0, 503);
    node.store.recover();
    assert!(caller.recheck().await.is_ok());
}

#[tokio::test]
async fn an_outage_after_a_recheck_that_was_denied_brings_no_key_back() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
    node.store.edit(&issued, 2, 1, |record| record.is_active = false);
    node.seconds(31);
    assert_eq!(invalid(caller.recheck().await), InvalidKey::Revoked);
    node.store.fail();
    assert_eq!(store_error(caller.recheck().await), (503, StoreErrorKind::Unavailable));
    assert_eq!(node.ask(&issued.key).await.0, 503);
}

#[tokio::test]
async fn a_hundred_rechecks_of_one_key_are_one_look_up() {
    let node = Node::with(Scripted::new(), |builder| builder.cache_capacity(0));
    let (_, caller) = let_in(&node, 1).await;
    node.store.hold();
    let checks: Vec<_> = (0..100)
        .map(|_| {
            let caller = caller.clone();
            tokio::spawn(async move { caller.recheck().await })
        })
        .collect();
    node.store.has_under_way(1).await;
    node.store.let_go(1);
    for check in checks {
        assert!(check.await.unwrap().is_ok());
    }
    assert_eq!(node.store.take_asked(), 1);
}

#[tokio::test]
async fn a_recheck_does_not_join_the_look_up_of_a_request_with_the_key() {
    let node = Node::with(Scripted::new(), |builder| builder.cache_capacity(0));
    let (issued, caller) = let_in(&node, 1).await;
    node.store.rehash(&issued, 1, KeyHash::bcrypt(&issued.key, 4).unwrap());
    node.store.hold();
    let recheck = tokio::spawn(async move { caller.recheck().await });
    node.store.has_under_way(1).await;
    let (authenticator, key) = (node.authenticator.clone(), issued.key.clone());
    let request = tokio::spawn(async move { status(&authenticator, &key).await });
    node.store.has_under_way(2).await;
    node.store.let_go(2);
    assert_eq!(invalid(recheck.await.unwrap()), InvalidKey::WrongSecret);
    assert_eq!(request.await.unwrap(), 200);
}

#[tokio::test]
async fn a_changed_hash_ends_the_recheck_and_not_the_key() {
    let node = Node::over(Scripted::new());
    let (issued, caller) = let_in(&node, 1).await;
    node.store.rehash(&issued, 2, KeyHash::bcrypt(&issued.key, 4).unwrap());
    node.store.emit(Change::Prefix(issued.prefix.clone(), Revision(2))).await;
    for _ in 0..2 {
        assert_eq!(invalid(caller.recheck().await), InvalidKey::WrongSecret);
    }
    assert_eq!(node.store.take_asked(), 2, "what does not match is not cached");
    assert_eq!(node.ask(&issued.key).await, (200, 1));
    // The key has matched the new hash by now, so that the old context is good again, also after another change.
    assert!(caller.recheck().await.is_ok());
    node.store.edit(&issued, 3, 1, |record| record.name = "renamed".into());
    node.store.emit(Change::Prefix(issued.prefix.clone(), Revision(3))).await;
    assert_eq!(caller.recheck().await.unwrap().key().name, "renamed");
}

#[tokio::test]
async fn a_row_with_the_hash_of_an_empty_text_is_no_match() {
    let node = Node::with(Scripted::new(), |builder| builder.cache_capacity(0));
    for hash in [KeyHash::sha256(""), KeyHash::bcrypt("", 4).unwrap()] {
        let issued = node.store.issue(1).await;
        let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
        assert!(caller.recheck().await.is_ok());
        node.store.rehash(&issued, 1, hash);
        assert_eq!(invalid(caller.recheck().await), InvalidKey::WrongSecret);
    }
}

#[tokio::test]
async fn a_recheck_of_a_bcrypt_key_runs_no_bcrypt_and_upgrades_nothing() {
    /// One row, and how often its answer came with an upgrade.
    #[derive(Clone)]
    struct OneRow(Arc<Mutex<StoredKey>>, Arc<AtomicUsize>);

    impl KeyStore for OneRow {
        async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
            let row = self.0.lock().unwrap().clone();
            let answer = lookup.verify([row]).await?;
            self.1.fetch_add(usize::from(answer.upgrade().is_some()), SeqCst);
            Ok(answer)
        }
    }

    let key = "oldkey-1-of-mine";
    let record = KeyRecord::new(1, "oldkey-1", User::new(7, "a@b.c"));
    let row = |hash| StoredKey::new(record.clone(), hash);
    let store = OneRow(
        Arc::new(Mutex::new(row(KeyHash::bcrypt(key, 4).unwrap()))),
        Arc::new(AtomicUsize::new(0)),
    );
    let scheme = old_and_new_keys().pepper("sixteen bytes of pepper").upgrade_hashes();
    let node = Authenticator::builder(store.clone()).scheme(scheme.build().unwrap());
    let node = node.cache_capacity(0).build();
    let caller = node.authenticate(key).await.unwrap();
    assert_eq!(store.1.load(SeqCst), 1);
    assert!(caller.recheck().await.is_ok());

    // Past five failed checks a slow hash is not checked at all: 503.
    *store.0.lock().unwrap() = row(KeyHash::bcrypt("another key", 4).unwrap());
    for _ in 0..20 {
        assert_eq!(invalid(caller.recheck().await), InvalidKey::WrongSecret);
    }
    assert_eq!(store.1.load(SeqCst), 1);
}

async fn is_rechecked_and_revoked<R>(store: R, scheme: KeyScheme)
where
    R: KeyRepository + Clone,
{
    let manager = KeyManager::new(store.clone()).scheme(scheme.clone());
    let user = manager.create_user("bob@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    let node = Authenticator::builder(store).scheme(scheme).cache_capacity(0).build();
    let caller = node.authenticate(issued.expose_secret()).await.unwrap();
    let again = caller.recheck().await.unwrap();
    assert_eq!(again.key().id, issued.record().id);
    // A context of a recheck can be rechecked, too.
    assert!(again.recheck().await.is_ok());
    manager.revoke(&issued.record().id).await.unwrap();
    assert_eq!(invalid(again.recheck().await), InvalidKey::Revoked);
}

#[tokio::test]
async fn keys_of_every_kind_of_fast_hash_are_rechecked_in_memory_and_in_sqlite() {
    let peppered = || KeyScheme::builder().pepper("sixteen bytes of pepper").build().unwrap();
    for scheme in [KeyScheme::default(), peppered()] {
        is_rechecked_and_revoked(MemoryStore::new(), scheme.clone()).await;
        is_rechecked_and_revoked(sqlite().await.store, scheme).await;
    }
}

#[tokio::test]
async fn a_key_in_postgres_is_rechecked() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    is_rechecked_and_revoked(store, KeyScheme::default()).await;
}

#[tokio::test]
async fn a_context_from_a_shared_cache_is_rechecked_in_the_store() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let [first, node] = [keys.node(&redis), keys.node(&redis)];
    for node in [&first, &node] {
        node.until_hit(&keys.key).await;
    }
    node.store.take_asked();
    // Nodes of this fleet cache nothing themselves.
    let caller = node.authenticator.authenticate(&keys.key).await.unwrap();
    assert_eq!(node.store.take_asked(), 0, "the context is from Redis");
    let again = caller.recheck().await.unwrap();
    assert_eq!(node.store.take_asked(), 1);
    keys.revoke().await;
    fleet::eventually("the revocation", async || {
        again.recheck().await.is_err_and(|it| matches!(it, Denial::InvalidKey(InvalidKey::Revoked)))
    })
    .await;
}

#[tokio::test]
async fn a_recheck_is_bounded_like_every_look_up() {
    let settings = |builder: AuthenticatorBuilder| builder.cache_capacity(0).max_lookups(1);
    let node = Node::with(Scripted::new(), settings);
    let (_, caller) = let_in(&node, 1).await;
    let other = node.store.issue(2).await;
    node.store.hold();
    let (authenticator, key) = (node.authenticator.clone(), other.key.clone());
    let request = tokio::spawn(async move { status(&authenticator, &key).await });
    node.store.has_under_way(1).await;
    assert_eq!(store_error(caller.recheck().await), (503, StoreErrorKind::Overloaded));
    node.store.let_go(1);
    assert_eq!(request.await.unwrap(), 200);
}

#[tokio::test]
async fn a_store_that_verifies_keys_elsewhere_is_rechecked_while_the_answer_is_fresh() {
    let record = KeyRecord::new(1, "elsewhere", User::new(7, "a@b.c"));
    let clock = Arc::new(ManualClock::at(std::time::SystemTime::now()));
    let node = Authenticator::builder(Vouching(record)).clock(clock.clone()).build();
    let key = fixture().await.key;
    let caller = node.authenticate(&key).await.unwrap();
    assert!(caller.recheck().await.is_ok());
    clock.advance(Duration::from_secs(31));
    assert_eq!(store_error(caller.recheck().await), (500, StoreErrorKind::Unsupported));
    // A request that presents the key makes it fresh again.
    node.authenticate(&key).await.unwrap();
    assert!(caller.recheck().await.is_ok());
}

#[tokio::test]
async fn a_store_that_vouches_for_a_key_that_was_not_presented_is_rejected() {
    /// Verifies the first look-up, and vouches in every later one.
    struct Turncoat(MemoryStore, AtomicBool);

    impl KeyStore for Turncoat {
        async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
            if self.1.swap(true, SeqCst) {
                assert_eq!(lookup.expose_secret(), "");
                return Ok(lookup.assume_verified(KeyRecord::new(1, "any", User::new(7, "a@b.c"))));
            }
            self.0.resolve(lookup).await
        }
    }

    let fixture = fixture().await;
    let store = Turncoat(fixture.store.clone(), AtomicBool::new(false));
    let node = Authenticator::builder(store).cache_capacity(0).build();
    let caller = node.authenticate(&fixture.key).await.unwrap();
    assert_eq!(store_error(caller.recheck().await), (500, StoreErrorKind::Unsupported));
}

#[tokio::test]
async fn a_context_without_an_authenticator_is_itself_or_unavailable() {
    let record = KeyRecord::new(1, "test", User::new(7, "a@b.c"));
    let unverified = AuthContext::unverified(record);
    assert_eq!(unverified.recheck().await.unwrap().key().id, unverified.key().id);

    let fixture = fixture().await;
    let node = Authenticator::new(fixture.store.clone());
    let caller = node.authenticate(&fixture.key).await.unwrap();
    assert!(caller.recheck().await.is_ok());
    drop(node);
    assert_eq!(store_error(caller.recheck().await), (503, StoreErrorKind::Unavailable));
}

#[tokio::test]
async fn a_recheck_counts_no_request_and_checks_no_address() {
    let fixture = fixture().await;
    let network: AllowedNetwork = "192.0.2.0/24".parse().unwrap();
    let issued = fixture.issue(|new| new.allowed_ips([network])).await;
    let node = Authenticator::new(fixture.store.clone());
    let address = "192.0.2.1".parse().unwrap();
    let caller = node.authenticate_from(issued.expose_secret(), address).await.unwrap();
    let again = caller.recheck().await.unwrap();
    assert!(again.can_access_from(address) && !again.can_access_from("::1".parse().unwrap()));

    for _ in 0..5 {
        again.recheck().await.unwrap();
    }
    node.shutdown().await;
    let key = fixture.store.find_key(&caller.key().id).await.unwrap().unwrap().into_record();
    assert_eq!(key.usage.requests, 1);
}

#[tokio::test]
async fn debug_shows_neither_the_key_nor_its_digest() {
    let fixture = fixture().await;
    let node = Authenticator::new(fixture.store.clone());
    let caller = node.authenticate(&fixture.key).await.unwrap().recheck().await.unwrap();
    let digest = KeyHash::sha256(&fixture.key).expose_hash().replace("sha256$", "");
    let bytes: Vec<_> = (0..digest.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digest[at..at + 2], 16).unwrap().to_string())
        .collect();
    for shown in [format!("{caller:?}"), format!("{caller:#?}")] {
        let shown = shown.replace(['\n', ' '], "");
        for secret in [&fixture.key[20..], &digest, &bytes.join(",")] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}
