//! One suite of management that every store passes.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey,
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    management::{Imported, ImportedKey, IssuedKey, KeyPatch, ManageError, Rotation, UserPatch},
    record::{Budget, BudgetPeriod, KeyId, RateLimits, Secret, UserId},
    store::{
        AuditAction, KeyFilter, KeyRepository, KeyUsage, ListAudit, ListKeys, ListUsers, UsageBatch,
    },
};

use crate::support::{eventually::eventually, every_store::on_every_store, some_user};

on_every_store! {
    users_are_found_listed_changed_and_deleted
    a_user_who_owns_keys_is_not_deleted
    every_field_of_an_issued_key_is_stored
    a_patch_keeps_what_it_does_not_set_and_clears_what_it_sets_to_none
    an_update_that_requires_a_revision_conflicts_and_names_the_current_one
    of_two_updates_with_the_same_revision_one_wins
    concurrent_updates_of_different_fields_are_both_kept
    a_rotated_key_is_accepted_with_both_secrets_until_the_grace_period_ends
    a_second_rotation_in_the_grace_period_is_a_conflict
    a_legacy_key_becomes_structured_and_keeps_its_previous_secret
    an_ended_grace_period_denies_the_previous_secret
    a_revoked_key_keeps_the_first_reason_and_can_be_reactivated
    many_keys_are_revoked_at_once
    a_deleted_key_is_unknown_and_keeps_usage_and_audit
    keys_are_listed_by_each_filter
    an_import_skips_what_is_stored_and_what_is_invalid
    each_change_has_one_audit_row_without_a_hash
    the_audit_is_listed_and_pruned
    the_last_use_of_each_secret_is_stored
    a_caller_sees_only_the_keys_of_its_owner
    invalid_fields_are_rejected_with_their_names
    a_key_that_leaves_a_lookup_id_does_not_affect_the_other_key_under_it
}

fn now() -> DateTime<Utc> {
    // PostgreSQL stores microseconds, SQLite milliseconds.
    DateTime::from_timestamp(Utc::now().timestamp(), 0).unwrap()
}

/// Returns why the store denies a key, without a cache.
async fn denial(store: &(impl KeyRepository + Clone), key: &str) -> Option<InvalidKey> {
    denial_with(store, KeyScheme::default(), key).await
}

async fn denial_with(
    store: &(impl KeyRepository + Clone),
    scheme: KeyScheme,
    key: &str,
) -> Option<InvalidKey> {
    let asking = Authenticator::builder(store.clone()).scheme(scheme).cache_capacity(0).build();
    match asking.authenticate(key).await {
        Ok(_) => None,
        Err(Denial::InvalidKey(reason)) => Some(reason),
        Err(other) => panic!("{other}"),
    }
}

async fn issue<S: KeyRepository + Clone>(store: &S) -> (KeyManager<S>, IssuedKey) {
    let manager = KeyManager::new(store.clone()).actor("tester");
    let user = some_user(store.clone()).await;
    let issued = manager.issue(NewKey::new(user, "laptop")).await.unwrap();
    (manager, issued)
}

async fn users_are_found_listed_changed_and_deleted<S: KeyRepository + Clone>(store: S) {
    let manager = KeyManager::new(store);
    let ada = manager.create_user("ada@example.com", "admin").await.unwrap();
    let bob = manager.create_user("bob@example.com", "user").await.unwrap();
    assert_eq!(manager.find_user(&ada.id).await.unwrap(), ada);
    assert_eq!(manager.find_user_by_email("bob@example.com").await.unwrap(), bob);
    for missing in [UserId::from(4711), UserId::from("text")] {
        assert!(matches!(manager.find_user(&missing).await, Err(ManageError::NotFound("user"))));
        assert!(matches!(manager.delete_user(&missing).await, Err(ManageError::NotFound("user"))));
    }
    let missing = manager.find_user_by_email("nobody@example.com").await;
    assert!(matches!(missing, Err(ManageError::NotFound("user"))));

    let first = manager.list_users(&ListUsers::default().limit(1)).await.unwrap();
    assert_eq!(first.users, std::slice::from_ref(&ada));
    let second = ListUsers::default().limit(1).after(first.next.unwrap());
    let second = manager.list_users(&second).await.unwrap();
    assert_eq!((second.users, second.next), (vec![bob.clone()], None));

    let taken = manager.create_user("ada@example.com", "user").await;
    assert!(matches!(taken, Err(ManageError::Conflict { .. })));
    let patch = UserPatch::default().email("ada@example.com");
    let taken = manager.update_user(&bob.id, &patch).await;
    assert!(matches!(taken, Err(ManageError::Conflict { .. })));

    let patch = UserPatch::default().role("auditor");
    let changed = manager.update_user(&bob.id, &patch).await.unwrap();
    assert_eq!((changed.role.as_str(), changed.email.as_str()), ("auditor", "bob@example.com"));
    assert!(!manager.deactivate_user(&bob.id).await.unwrap().is_active);
    assert!(manager.reactivate_user(&bob.id).await.unwrap().is_active);
    assert_eq!(manager.find_user(&bob.id).await.unwrap(), changed);

    manager.delete_user(&bob.id).await.unwrap();
    assert!(matches!(manager.find_user(&bob.id).await, Err(ManageError::NotFound("user"))));
}

async fn a_user_who_owns_keys_is_not_deleted<S: KeyRepository + Clone>(store: S) {
    let (manager, issued) = issue(&store).await;
    let owner = &issued.record().user.id;
    let error = manager.delete_user(owner).await.unwrap_err();
    assert_eq!(error.to_string(), "the user owns keys");
    assert_eq!(denial(&store, issued.expose_secret()).await, None);
    manager.delete(&issued.record().id).await.unwrap();
    manager.delete_user(owner).await.unwrap();
}

async fn every_field_of_an_issued_key_is_stored<S: KeyRepository + Clone>(store: S) {
    let manager = KeyManager::new(store.clone()).actor("tester");
    let user = some_user(store.clone()).await;
    let not_before = now() - TimeDelta::days(1);
    let new = NewKey::new(user.clone(), "laptop")
        .description("of Ada,\nfor tests")
        .scopes(["chat:write"])
        .permissions(["files"])
        .rate_limits(RateLimits::default().per_minute(1).per_hour(2).per_day(3))
        .allowed_models(["small"])
        .allowed_endpoints(["POST /v1/chat".parse().unwrap()])
        .allowed_ips(["10.0.0.0/8".parse().unwrap()])
        .unlimited()
        .budget(Budget { limit_cents: 2_000, period: BudgetPeriod::Monthly })
        .not_before(not_before)
        .expires_at(now() + TimeDelta::days(90))
        .metadata(json!({ "team": "a" }));
    let issued = manager.issue(new).await.unwrap();
    let found = manager.find(&issued.record().id).await.unwrap();
    assert_eq!(&found, issued.record());
    assert_eq!(found.description, "of Ada,\nfor tests");
    assert_eq!(found.created_by.as_deref(), Some("tester"));
    assert_eq!(found.not_before, Some(not_before));

    let copy = manager.issue(NewKey::from_template(&found, user, "copy")).await.unwrap();
    let copy = copy.record();
    assert_ne!((&copy.id, &copy.prefix), (&found.id, &found.prefix));
    assert_eq!((copy.name.as_str(), &copy.budget), ("copy", &found.budget));
    assert_eq!((&copy.scopes, &copy.allowed_ips), (&found.scopes, &found.allowed_ips));
    assert_eq!((copy.expires_at, copy.not_before), (found.expires_at, found.not_before));
}

async fn a_patch_keeps_what_it_does_not_set_and_clears_what_it_sets_to_none<
    S: KeyRepository + Clone,
>(
    store: S,
) {
    let (manager, issued) = issue(&store).await;
    let id = &issued.record().id;
    let set = KeyPatch::default()
        .per_minute(Some(5))
        .per_day(Some(100))
        .expires_at(Some(now() + TimeDelta::days(1)))
        .budget(Some(Budget { limit_cents: 1, period: BudgetPeriod::Total }))
        .scopes(["a", "b"])
        .metadata(json!({ "a": 1 }));
    let record = manager.update(id, &set, None).await.unwrap();
    assert_eq!(record, manager.find(id).await.unwrap());
    assert_eq!(record.rate_limits, RateLimits::default().per_minute(5).per_day(100));
    assert_eq!(record.name, "laptop");
    assert!(record.revision > issued.record().revision);

    let clear = KeyPatch::default()
        .name("phone")
        .per_minute(None)
        .expires_at(None)
        .budget(None)
        .metadata(Value::Null);
    let record = manager.update(id, &clear, None).await.unwrap();
    assert_eq!(record, manager.find(id).await.unwrap());
    assert_eq!(record.rate_limits, RateLimits::default().per_day(100));
    assert_eq!((record.expires_at, record.budget), (None, None));
    assert_eq!((record.name.as_str(), &record.metadata), ("phone", &Value::Null));
    assert_eq!(record.scopes, ["a", "b"]);

    // A patch that changes nothing writes nothing.
    let same = manager.update(id, &KeyPatch::default().name("phone"), None).await.unwrap();
    assert_eq!(same, record);
    for missing in [KeyId::from(4711), KeyId::from("text")] {
        let error = manager.update(&missing, &clear, None).await.unwrap_err();
        assert!(matches!(error, ManageError::NotFound("key")), "{error}");
    }
}

async fn an_update_that_requires_a_revision_conflicts_and_names_the_current_one<
    S: KeyRepository + Clone,
>(
    store: S,
) {
    let (manager, issued) = issue(&store).await;
    let (id, first) = (&issued.record().id, issued.record().revision);
    let name = |name: &str| KeyPatch::default().name(name);
    let second = manager.update(id, &name("second"), Some(first)).await.unwrap().revision;
    let error = manager.update(id, &name("third"), Some(first)).await.unwrap_err();
    let ManageError::Conflict { current, .. } = error else { panic!("{error}") };
    assert_eq!(current, Some(second));
    assert_eq!(manager.find(id).await.unwrap().name, "second");
    // Usage is no change.
    let mut batch = UsageBatch::new("w", 1, Utc::now().into());
    let mut usage = KeyUsage::new(id.clone());
    usage.requests = 1;
    usage.last_used_at = Some(Utc::now().into());
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();
    assert_eq!(manager.find(id).await.unwrap().revision, second);
    manager.update(id, &name("third"), Some(second)).await.unwrap();
}

async fn of_two_updates_with_the_same_revision_one_wins<S: KeyRepository + Clone>(store: S) {
    const ROUNDS: u32 = 1_000;
    let (manager, issued) = issue(&store).await;
    let id = &issued.record().id;
    let mut revision = issued.record().revision;
    for round in 0..ROUNDS {
        // On tasks of their own, which run on other threads if the runtime has some.
        let [a, b] = ["a", "b"].map(|it| {
            let patch = KeyPatch::default().name(format!("{it}{round}"));
            let (manager, id) = (manager.clone(), id.clone());
            tokio::spawn(async move { manager.update(&id, &patch, Some(revision)).await })
        });
        let (a, b) = (a.await.unwrap(), b.await.unwrap());
        let (won, lost) = if a.is_ok() { (a, b) } else { (b, a) };
        let won = won.unwrap();
        let Err(ManageError::Conflict { current, .. }) = lost else { panic!("{lost:?}") };
        assert!(won.revision > revision);
        assert_eq!(current, Some(won.revision), "round {round}");
        assert_eq!(manager.find(id).await.unwrap(), won);
        revision = won.revision;
    }
    let (mut updates, mut page) = (0, ListAudit::default().key(id.clone()).limit(500));
    loop {
        let found = manager.audit(&page).await.unwrap();
        updates += found.entries.iter().filter(|it| it.action == AuditAction::Update).count();
        page.before = found.next;
        if found.next.is_none() {
            break;
        }
    }
    assert_eq!(updates, ROUNDS as usize, "one entry for each that won");
}

async fn concurrent_updates_of_different_fields_are_both_kept<S: KeyRepository + Clone>(store: S) {
    let (manager, issued) = issue(&store).await;
    let id = &issued.record().id;
    for round in 0..10 {
        let name = KeyPatch::default().name(format!("n{round}"));
        let limit = KeyPatch::default().per_minute(Some(round));
        let (name, limit) = futures_util::future::join(
            manager.update(id, &name, None),
            manager.update(id, &limit, None),
        )
        .await;
        name.unwrap();
        limit.unwrap();
        let record = manager.find(id).await.unwrap();
        assert_eq!(
            (record.name, record.rate_limits.per_minute),
            (format!("n{round}"), Some(round))
        );
    }
}

async fn a_rotated_key_is_accepted_with_both_secrets_until_the_grace_period_ends<
    S: KeyRepository + Clone,
>(
    store: S,
) {
    let (manager, old) = issue(&store).await;
    let id = &old.record().id;
    let how = Rotation::default().grace(Duration::from_secs(3600));
    let new = manager.rotate(id, how).await.unwrap();
    assert_eq!((&new.record().id, &new.record().prefix), (id, &old.record().prefix));
    assert_ne!(new.expose_secret(), old.expose_secret());
    let grace = new.grace().unwrap();
    assert_eq!(grace.prefix, old.record().prefix);
    assert!((grace.ends_at - Utc::now() - TimeDelta::hours(1)).abs() < TimeDelta::minutes(1));
    assert_eq!(manager.find(id).await.unwrap().grace.as_ref(), Some(grace));

    let asking = Authenticator::new(store.clone());
    let current = asking.authenticate(new.expose_secret()).await.unwrap();
    let previous = asking.authenticate(old.expose_secret()).await.unwrap();
    assert_eq!((current.secret(), previous.secret()), (Secret::Current, Secret::Previous));
    assert_eq!((current.valid_until(), previous.valid_until()), (None, Some(grace.ends_at)));

    // 0 ends the previous secret at once.
    let at_once = Rotation::default().grace(Duration::ZERO).end_previous();
    let third = manager.rotate(id, at_once).await.unwrap();
    assert_eq!(third.grace(), None);
    assert_eq!(denial(&store, third.expose_secret()).await, None);
    for before in [&old, &new] {
        let reason = denial(&store, before.expose_secret()).await;
        assert_eq!(reason, Some(InvalidKey::WrongSecret));
    }
}

async fn a_second_rotation_in_the_grace_period_is_a_conflict<S: KeyRepository + Clone>(store: S) {
    let (manager, old) = issue(&store).await;
    let id = &old.record().id;
    let new = manager.rotate(id, Rotation::default()).await.unwrap();
    let error = manager.rotate(id, Rotation::default()).await.unwrap_err();
    assert!(matches!(error, ManageError::Conflict { .. }), "{error}");
    for key in [&old, &new] {
        assert_eq!(denial(&store, key.expose_secret()).await, None);
    }
    let third = manager.rotate(id, Rotation::default().end_previous()).await.unwrap();
    assert_eq!(denial(&store, old.expose_secret()).await, Some(InvalidKey::WrongSecret));
    for key in [&new, &third] {
        assert_eq!(denial(&store, key.expose_secret()).await, None);
    }
    manager.revoke(id).await.unwrap();
    let error = manager.rotate(id, Rotation::default().end_previous()).await.unwrap_err();
    assert!(matches!(error, ManageError::Conflict { .. }), "{error}");
}

fn with_legacy_keys() -> KeyScheme {
    let legacy = KeyFormat::first_chars(8).unwrap();
    let structured = KeyFormat::structured("tak", "live").unwrap();
    let scheme = KeyScheme::builder().format(structured).format(legacy);
    scheme.pepper("a pepper of sixteen bytes").build().unwrap()
}

async fn a_legacy_key_becomes_structured_and_keeps_its_previous_secret<S: KeyRepository + Clone>(
    store: S,
) {
    let scheme = with_legacy_keys();
    let user = some_user(store.clone()).await;
    let manager = KeyManager::new(store.clone()).scheme(scheme.clone());
    let legacy = "abcdefgh-the-secret-of-another-service";
    let hash = KeyHash::bcrypt(legacy, 4).unwrap();
    let imported = ImportedKey::new(NewKey::new(user, "old"), "abcdefgh", hash);
    let outcome = manager.import([imported.clone()]).await.unwrap();
    assert!(matches!(outcome[..], [Imported::Stored]), "{outcome:?}");
    let id = manager.list(&ListKeys::default()).await.unwrap().keys[0].id.clone();
    assert_eq!(denial_with(&store, scheme.clone(), legacy).await, None);

    let how = Rotation::default().grace(Duration::from_secs(3600));
    let new = manager.rotate(&id, how).await.unwrap();
    // The import is repeated.
    let outcome = manager.import([imported]).await.unwrap();
    assert!(matches!(outcome[..], [Imported::Duplicate]), "{outcome:?}");
    assert!(new.expose_secret().starts_with("tak_live_"));
    assert_eq!(new.record().id, id);
    assert_eq!(new.grace().unwrap().prefix, "abcdefgh");
    for key in [legacy, new.expose_secret()] {
        assert_eq!(denial_with(&store, scheme.clone(), key).await, None, "{key}");
    }
    manager.end_grace(&id).await.unwrap();
    assert_eq!(denial_with(&store, scheme.clone(), legacy).await, Some(InvalidKey::Unknown));
    assert_eq!(denial_with(&store, scheme, new.expose_secret()).await, None);
}

async fn an_ended_grace_period_denies_the_previous_secret<S: KeyRepository + Clone>(store: S) {
    let (manager, old) = issue(&store).await;
    let id = &old.record().id;
    let node = Authenticator::new(store.clone());
    let new = manager.rotate(id, Rotation::default()).await.unwrap();
    node.authenticate(old.expose_secret()).await.unwrap();
    let ended = manager.end_grace(id).await.unwrap();
    assert_eq!(ended.grace, None);
    assert_eq!(manager.end_grace(id).await.unwrap(), ended, "it is idempotent");
    eventually("the node denies the previous secret", async || {
        node.authenticate(old.expose_secret()).await.is_err()
    })
    .await;
    node.authenticate(new.expose_secret()).await.unwrap();
}

async fn a_revoked_key_keeps_the_first_reason_and_can_be_reactivated<S: KeyRepository + Clone>(
    store: S,
) {
    let (manager, issued) = issue(&store).await;
    let id = &issued.record().id;
    manager.reason("lost").revoke(id).await.unwrap();
    manager.reason("again").revoke(id).await.unwrap();
    let revoked = manager.find(id).await.unwrap();
    assert!(!revoked.is_active);
    assert_eq!(revoked.revoke_reason.as_deref(), Some("lost"));
    assert_eq!(revoked.revoked_by.as_deref(), Some("tester"));
    assert!((revoked.revoked_at.unwrap() - Utc::now()).abs() < TimeDelta::minutes(1));
    assert_eq!(denial(&store, issued.expose_secret()).await, Some(InvalidKey::Revoked));

    let active = manager.reactivate(id).await.unwrap();
    assert!(active.is_active);
    assert_eq!((active.revoked_at, active.revoked_by, active.revoke_reason), (None, None, None));
    assert_eq!(denial(&store, issued.expose_secret()).await, None);
    for missing in [KeyId::from(4711), KeyId::from("text")] {
        let error = manager.revoke(&missing).await.unwrap_err();
        assert!(matches!(error, ManageError::NotFound("key")), "{error}");
        let error = manager.reactivate(&missing).await.unwrap_err();
        assert!(matches!(error, ManageError::NotFound("key")), "{error}");
    }
}

async fn many_keys_are_revoked_at_once<S: KeyRepository + Clone>(store: S) {
    let (manager, kept) = issue(&store).await;
    let maker = &kept.record().id;
    let other = manager.create_user("other@example.com", "user").await.unwrap().id;
    let by_key = manager.clone();
    let context = Authenticator::new(store.clone()).authenticate(kept.expose_secret()).await;
    let acting = by_key.acting_for(&context.unwrap());
    let made: Vec<_> = [
        manager.issue(NewKey::new(other.clone(), "1")).await.unwrap(),
        acting.issue(NewKey::new(kept.record().user.id.clone(), "2")).await.unwrap(),
        manager.issue(NewKey::new(other.clone(), "3")).await.unwrap(),
    ]
    .into();
    let ids: Vec<_> = made.iter().map(|key| key.record().id.clone()).collect();
    let error = manager.revoke_all(&KeyFilter::default()).await.unwrap_err();
    assert!(matches!(error, ManageError::Invalid { field: "filter", .. }), "{error}");

    let revoked = manager.revoke_all(&KeyFilter::default().owner(other)).await.unwrap();
    assert_eq!(revoked, [ids[0].clone(), ids[2].clone()]);
    let filter = KeyFilter::default().created_by_key(maker.clone());
    assert_eq!(manager.revoke_all(&filter).await.unwrap(), [ids[1].clone()]);
    assert_eq!(manager.revoke_all(&filter).await.unwrap(), [], "revoked keys are not selected");
    let filter = KeyFilter::default().prefix(&kept.record().prefix[..4]).contains("LAP");
    assert_eq!(manager.revoke_all(&filter).await.unwrap(), std::slice::from_ref(maker));
    for key in made.iter().chain([&kept]) {
        assert_eq!(denial(&store, key.expose_secret()).await, Some(InvalidKey::Revoked));
    }
    let old = manager.issue(NewKey::new(kept.record().user.id.clone(), "4")).await.unwrap();
    let filter = KeyFilter::default().created_before(now() - TimeDelta::days(1));
    assert_eq!(manager.revoke_all(&filter).await.unwrap(), []);
    let filter = KeyFilter::default().created_before(now() + TimeDelta::days(1));
    assert_eq!(manager.revoke_all(&filter).await.unwrap(), [old.record().id.clone()]);
}

async fn a_deleted_key_is_unknown_and_keeps_usage_and_audit<S: KeyRepository + Clone>(store: S) {
    let (manager, issued) = issue(&store).await;
    let id = &issued.record().id;
    let mut batch = UsageBatch::new("w", 1, Utc::now().into());
    let mut usage = KeyUsage::new(id.clone());
    (usage.requests, usage.tokens, usage.cost_micro_cents) = (3, 5, 7);
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();

    manager.reason("cleanup").delete(id).await.unwrap();
    assert_eq!(denial(&store, issued.expose_secret()).await, Some(InvalidKey::Unknown));
    assert!(matches!(manager.find(id).await, Err(ManageError::NotFound("key"))));
    assert!(matches!(manager.delete(id).await, Err(ManageError::NotFound("key"))));

    let today = Utc::now().date_naive();
    let days = manager.usage(id, today - TimeDelta::days(1), today).await.unwrap();
    let [day] = days[..] else { panic!("{days:?}") };
    assert_eq!((day.requests, day.tokens, day.cost_micro_cents), (3, 5, 7));
    let before = today - TimeDelta::days(9);
    assert_eq!(manager.usage(id, before, today - TimeDelta::days(2)).await.unwrap(), []);

    let audit = manager.audit(&ListAudit::default().key(id.clone())).await.unwrap().entries;
    let actions: Vec<_> = audit.iter().map(|entry| entry.action).collect();
    assert_eq!(actions, [AuditAction::Delete, AuditAction::Issue]);
    assert_eq!((audit[0].reason.as_deref(), &audit[0].after), (Some("cleanup"), &None));
}

async fn keys_are_listed_by_each_filter<S: KeyRepository + Clone>(store: S) {
    let (manager, first) = issue(&store).await;
    let user = first.record().user.id.clone();
    let other = manager.create_user("other@example.com", "user").await.unwrap().id;
    let new = |owner: &UserId, name: &str| NewKey::new(owner.clone(), name);
    let issue = async |new| manager.issue(new).await.unwrap().record().id.clone();
    let scoped = issue(new(&user, "Build Server").scopes(["chat:write", "a\"b\\c"])).await;
    let ending = issue(new(&user, "x").expires_at(now() + TimeDelta::days(5))).await;
    let described = issue(new(&other, "100%_").description("for the build")).await;
    let revoked = issue(new(&other, "y")).await;
    manager.revoke(&revoked).await.unwrap();
    let mut batch = UsageBatch::new("w", 1, Utc::now().into());
    let mut usage = KeyUsage::new(scoped.clone());
    usage.last_used_at = Some(Utc::now().into());
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();

    let first = first.record().id.clone();
    let all = [&first, &scoped, &ending, &described, &revoked];
    let filter = KeyFilter::default;
    for (filter, expected) in [
        (filter(), &all[..]),
        (filter().owner(other.clone()), &[&described, &revoked]),
        (filter().owner("text"), &[]),
        (filter().active(), &all[..4]),
        (filter().revoked(), &[&revoked]),
        (filter().expires_before(now() + TimeDelta::days(6)), &[&ending]),
        (filter().expires_before(now() + TimeDelta::days(4)), &[]),
        (
            filter().unused_since(now() - TimeDelta::days(1)),
            &[&first, &ending, &described, &revoked],
        ),
        (filter().contains("bUILD"), &[&scoped, &described]),
        (filter().contains("%_"), &[&described]),
        (filter().scope("chat:write"), &[&scoped]),
        (filter().scope("chat:"), &[]),
        (filter().scope("a\"b\\c"), &[&scoped]),
        (filter().created_before(now() + TimeDelta::days(1)), &all[..]),
        (filter().created_before(now() - TimeDelta::days(1)), &[]),
        (filter().created_by_key(4711), &[]),
        (filter().active().owner(other.clone()).contains("build"), &[&described]),
    ] {
        for limit in [1, 100] {
            let (mut found, mut page) = (Vec::new(), ListKeys::default().limit(limit));
            page = page.filter(filter.clone());
            loop {
                let listed = manager.list(&page).await.unwrap();
                assert!(listed.unreadable.is_empty());
                found.extend(listed.keys.into_iter().map(|key| key.id));
                let Some(next) = listed.next else { break };
                page = page.after(next);
            }
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{filter:?}, {limit}");
        }
    }
}

async fn an_import_skips_what_is_stored_and_what_is_invalid<S: KeyRepository + Clone>(store: S) {
    let scheme = with_legacy_keys();
    let manager = KeyManager::new(store.clone()).scheme(scheme.clone()).actor("importer");
    let user = some_user(store.clone()).await;
    let key = |at: usize, user: &UserId| {
        let hash = KeyHash::bcrypt(&format!("prefix{at:02}secret"), 4).unwrap();
        ImportedKey::new(NewKey::new(user.clone(), "k"), format!("prefix{at:02}"), hash)
    };
    let keys = [
        key(1, &user),
        key(2, &user),
        ImportedKey::new(NewKey::new(user.clone(), "x".repeat(10_000)), "p", KeyHash::sha256("a")),
        key(3, &4711.into()),
        key(4, &user).revoked(),
    ];
    let outcome = manager.import(keys.clone()).await.unwrap();
    use Imported::{Duplicate, Rejected, Stored};
    let [Stored, Stored, Rejected(invalid), Rejected(no_user), Stored] = &outcome[..] else {
        panic!("{outcome:?}")
    };
    assert!(matches!(invalid, ManageError::Invalid { field: "name", .. }), "{invalid}");
    assert!(matches!(no_user, ManageError::NotFound("user")), "{no_user}");
    // The same import again, with a new key that is in it twice.
    let new = key(5, &user);
    let again = keys.into_iter().chain([new.clone(), new]);
    let outcome = manager.import(again).await.unwrap();
    assert!(
        matches!(
            outcome[..],
            [Duplicate, Duplicate, Rejected(_), Rejected(_), Duplicate, Stored, Duplicate]
        ),
        "{outcome:?}"
    );
    for (key, reason) in [
        ("prefix01secret", None),
        ("prefix02secret", None),
        ("prefix02wrong!", Some(InvalidKey::WrongSecret)),
        ("prefix03secret", Some(InvalidKey::Unknown)),
        ("prefix04secret", Some(InvalidKey::Revoked)),
    ] {
        assert_eq!(denial_with(&store, scheme.clone(), key).await, reason, "{key}");
    }
    assert_eq!(manager.import([]).await.unwrap().len(), 0);
}

async fn each_change_has_one_audit_row_without_a_hash<S: KeyRepository + Clone>(store: S) {
    use AuditAction::{
        CreateUser, Delete, DeleteUser, EndGrace, Issue, Reactivate, Revoke, Rotate, Update,
        UpdateUser,
    };
    let manager = KeyManager::new(store.clone()).actor("tester").request_id("r-1");
    let mut expected = Vec::new();
    let mut done = |action: AuditAction| expected.insert(0, action);
    let user = manager.create_user("audited@example.com", "user").await.unwrap().id;
    done(CreateUser);
    let issued = manager.issue(NewKey::new(user.clone(), "audited")).await.unwrap();
    done(Issue);
    let id = &issued.record().id;
    manager.update(id, &KeyPatch::default().name("new"), None).await.unwrap();
    done(Update);
    let rotated = manager.rotate(id, Rotation::default()).await.unwrap();
    done(Rotate);
    manager.end_grace(id).await.unwrap();
    done(EndGrace);
    manager.reason("lost").revoke(id).await.unwrap();
    done(Revoke);
    manager.revoke(id).await.unwrap();
    manager.reactivate(id).await.unwrap();
    done(Reactivate);
    manager.update_user(&user, &UserPatch::default().role("auditor")).await.unwrap();
    done(UpdateUser);
    manager.deactivate_user(&user).await.unwrap();
    done(UpdateUser);
    manager.revoke_all(&KeyFilter::default().owner(user.clone())).await.unwrap();
    done(Revoke);
    // Usage, and the use of a key, are no changes.
    let node = Authenticator::new(store.clone());
    drop(node.authenticate(rotated.expose_secret()).await);
    node.shutdown().await;
    manager.delete(id).await.unwrap();
    done(Delete);
    manager.delete_user(&user).await.unwrap();
    done(DeleteUser);

    let entries = manager.audit(&ListAudit::default()).await.unwrap().entries;
    let actions: Vec<_> = entries.iter().map(|entry| entry.action).collect();
    assert_eq!(actions, expected);
    let text = serde_json::to_string(&entries).unwrap();
    let hash = |key: &IssuedKey| KeyHash::sha256(key.expose_secret()).expose_hash();
    for secret in [hash(&issued), hash(&rotated)] {
        let digest = secret.rsplit('$').next().unwrap();
        assert!(!text.contains(digest));
    }
    for key in [&issued, &rotated] {
        assert!(!text.contains(key.expose_secret()));
    }
    for entry in &entries {
        assert_eq!(entry.actor.as_deref(), Some("tester"), "{entry:?}");
        assert_eq!(entry.request_id.as_deref(), Some("r-1"), "{entry:?}");
        assert_eq!(entry.user, Some(user.clone()), "{entry:?}");
        assert!((entry.at - Utc::now()).abs() < TimeDelta::minutes(1), "{entry:?}");
    }
    let revoke = entries.iter().rfind(|entry| entry.action == Revoke).unwrap();
    assert_eq!((revoke.reason.as_deref(), revoke.key.as_ref()), (Some("lost"), Some(id)));
    let value = |side: &Option<Value>, field: &str| side.as_ref().unwrap()[field].clone();
    assert_eq!(value(&revoke.before, "is_active"), json!(true));
    assert_eq!(value(&revoke.after, "is_active"), json!(false));
    assert_eq!(value(&revoke.after, "revoke_reason"), json!("lost"));
    let update = entries.iter().find(|entry| entry.action == Update).unwrap();
    assert_eq!(value(&update.before, "name"), json!("audited"));
    assert_eq!(value(&update.after, "name"), json!("new"));
    let rotate = entries.iter().find(|entry| entry.action == Rotate).unwrap();
    assert_eq!(value(&rotate.after, "previous_key_prefix"), json!(issued.record().prefix));
    let fields = |side: &Option<Value>| {
        let object = side.as_ref().unwrap().as_object().unwrap();
        object.keys().cloned().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        fields(&rotate.after),
        "allowed_endpoints allowed_ips allowed_models budget_limit_cents budget_type created_by created_by_key \
         description expires_at id is_active is_unlimited key_prefix metadata name not_before permissions \
         previous_expires_at previous_key_prefix rate_limit_per_day rate_limit_per_hour rate_limit_per_minute \
         revoke_reason revoked_at revoked_by scopes user_id"
    );
    let user_update = entries.iter().rfind(|entry| entry.action == UpdateUser).unwrap();
    assert_eq!(fields(&user_update.after), "email id is_active role");
    assert_eq!(user_update.key, None);
}

async fn the_audit_is_listed_and_pruned<S: KeyRepository + Clone>(store: S) {
    let ada = KeyManager::new(store.clone()).actor("ada");
    let bob = ada.clone().actor("bob");
    let user = ada.create_user("audit@example.com", "user").await.unwrap().id;
    let other = bob.create_user("audit2@example.com", "user").await.unwrap().id;
    let mut keys = Vec::new();
    for owner in [&user, &other, &user] {
        keys.push(ada.issue(NewKey::new(owner.clone(), "k")).await.unwrap().record().id.clone());
    }
    for id in &keys {
        bob.revoke(id).await.unwrap();
    }
    let count = async |page: ListAudit| ada.audit(&page).await.unwrap().entries.len();
    let list = ListAudit::default;
    assert_eq!(count(list()).await, 8);
    assert_eq!(count(list().actor("ada")).await, 4);
    assert_eq!(count(list().key(keys[0].clone())).await, 2);
    assert_eq!(count(list().key("text")).await, 0);
    assert_eq!(count(list().user(user.clone())).await, 5);
    assert_eq!(count(list().user(user.clone()).actor("bob")).await, 2);
    assert_eq!(count(list().since(now() - TimeDelta::hours(1))).await, 8);
    assert_eq!(count(list().since(now() + TimeDelta::hours(1))).await, 0);
    assert_eq!(count(list().until(now() - TimeDelta::hours(1))).await, 0);

    let (mut ids, mut page) = (Vec::new(), list().limit(3));
    loop {
        let listed = ada.audit(&page).await.unwrap();
        assert!(listed.entries.len() <= 3);
        ids.extend(listed.entries.iter().map(|entry| entry.id));
        let Some(next) = listed.next else { break };
        page = page.before(next);
    }
    assert_eq!(ids.len(), 8);
    assert!(ids.is_sorted_by(|a, b| a > b), "{ids:?}");

    assert_eq!(ada.prune_audit(now() - TimeDelta::hours(1)).await.unwrap(), 0);
    assert_eq!(ada.prune_audit(now() + TimeDelta::hours(1)).await.unwrap(), 8);
    assert_eq!(count(list()).await, 0);
}

async fn the_last_use_of_each_secret_is_stored<S: KeyRepository + Clone>(store: S) {
    let (manager, old) = issue(&store).await;
    let id = &old.record().id;
    let used = async |key: &IssuedKey| {
        let node = Authenticator::new(store.clone());
        node.authenticate(key.expose_secret()).await.unwrap();
        node.shutdown().await;
    };
    used(&old).await;
    let first_use = manager.find(id).await.unwrap().last_used_at;
    assert!(first_use.is_some());
    let new = manager.rotate(id, Rotation::default()).await.unwrap();
    let record = manager.find(id).await.unwrap();
    assert_eq!(record.last_used_at, None, "the new secret was not used");
    assert_eq!(record.grace.unwrap().last_used_at, first_use);
    used(&old).await;
    assert_eq!(manager.find(id).await.unwrap().last_used_at, None);
    used(&new).await;
    let record = manager.find(id).await.unwrap();
    assert!(record.last_used_at.is_some());
    assert_eq!(record.usage.requests, 3);
}

async fn a_caller_sees_only_the_keys_of_its_owner<S: KeyRepository + Clone>(store: S) {
    let root = KeyManager::new(store.clone());
    let ada = root.create_user("ada@callers.com", "user").await.unwrap().id;
    let bob = root.create_user("bob@callers.com", "user").await.unwrap().id;
    let boss = root.create_user("boss@callers.com", "admin").await.unwrap().id;
    let issue = async |owner: &UserId, scopes: &[&str]| {
        let new = NewKey::new(owner.clone(), "k").scopes(scopes.iter().copied());
        root.issue(new).await.unwrap()
    };
    let of_ada = issue(&ada, &["a", "b"]).await;
    let wide = issue(&ada, &["a", "b", "c"]).await;
    let of_bob = issue(&bob, &["a"]).await;
    let of_boss = issue(&boss, &["a", "b"]).await;
    let node = Authenticator::new(store.clone());
    let acting = async |key: &IssuedKey| {
        root.clone().acting_for(&node.authenticate(key.expose_secret()).await.unwrap())
    };
    let (as_ada, as_boss) = (acting(&of_ada).await, acting(&of_boss).await);
    let id = |key: &IssuedKey| key.record().id.clone();

    let listed = as_ada.list(&ListKeys::default()).await.unwrap().keys;
    assert_eq!(
        listed.iter().map(|key| key.id.clone()).collect::<Vec<_>>(),
        [id(&of_ada), id(&wide)]
    );
    let listed = as_ada.list(&ListKeys::default().owner(bob.clone())).await.unwrap().keys;
    assert!(listed.is_empty());
    let bobs = id(&of_bob);
    let patch = KeyPatch::default().name("mine");
    let not_found =
        |error: ManageError| assert!(matches!(error, ManageError::NotFound(_)), "{error}");
    not_found(as_ada.find(&bobs).await.unwrap_err());
    not_found(as_ada.update(&bobs, &patch, None).await.unwrap_err());
    not_found(as_ada.rotate(&bobs, Rotation::default()).await.unwrap_err());
    not_found(as_ada.end_grace(&bobs).await.unwrap_err());
    not_found(as_ada.revoke(&bobs).await.unwrap_err());
    not_found(as_ada.reactivate(&bobs).await.unwrap_err());
    not_found(as_ada.delete(&bobs).await.unwrap_err());
    not_found(as_ada.usage(&bobs, now().date_naive(), now().date_naive()).await.unwrap_err());
    not_found(as_ada.find_user(&bob).await.unwrap_err());
    let filter = KeyFilter::default().owner(bob.clone());
    assert_eq!(as_ada.revoke_all(&filter).await.unwrap(), []);
    let entries = as_ada.audit(&ListAudit::default()).await.unwrap().entries;
    assert!(entries.iter().all(|entry| entry.user.as_ref() == Some(&ada)));
    let denied = as_ada.create_user("eve@callers.com", "admin").await.unwrap_err();
    assert!(matches!(denied, ManageError::NotPermitted(_)), "{denied}");

    // The ceiling.
    let exceeds =
        |error: ManageError| assert!(matches!(error, ManageError::ExceedsCeiling(_)), "{error}");
    let new = |owner: &UserId, scope: &str| NewKey::new(owner.clone(), "k").scopes([scope]);
    as_ada.issue(new(&ada, "a")).await.unwrap();
    exceeds(as_ada.issue(new(&ada, "c")).await.unwrap_err());
    exceeds(as_ada.issue(new(&bob, "a")).await.unwrap_err());
    exceeds(
        as_ada.update(&id(&of_ada), &KeyPatch::default().scopes(["c"]), None).await.unwrap_err(),
    );
    exceeds(as_ada.rotate(&id(&wide), Rotation::default()).await.unwrap_err());
    let hash = KeyHash::sha256("some key");
    let outcome = as_ada.import([ImportedKey::new(new(&ada, "c"), "p", hash)]).await.unwrap();
    assert!(matches!(&outcome[..], [Imported::Rejected(ManageError::ExceedsCeiling(_))]));
    as_ada.revoke(&id(&wide)).await.unwrap();
    exceeds(as_ada.reactivate(&id(&wide)).await.unwrap_err());
    assert_eq!(denial(&store, wide.expose_secret()).await, Some(InvalidKey::Revoked));
    let own = as_ada.rotate(&id(&of_ada), Rotation::default()).await.unwrap();
    assert_eq!(denial(&store, own.expose_secret()).await, None);

    // An administrator manages all keys, within the ceiling of the own key.
    let made = as_boss.issue(new(&bob, "a")).await.unwrap();
    assert_eq!(made.record().created_by.as_deref(), Some("boss@callers.com"));
    assert_eq!(made.record().created_by_key, Some(id(&of_boss)));
    exceeds(as_boss.issue(new(&bob, "c")).await.unwrap_err());
    as_boss.revoke(&bobs).await.unwrap();
    as_boss.create_user("eve@callers.com", "user").await.unwrap();
    let entries = as_boss.audit(&ListAudit::default().key(bobs)).await.unwrap().entries;
    assert_eq!(entries[0].actor.as_deref(), Some("boss@callers.com"));
    assert_eq!(entries[0].actor_key, Some(id(&of_boss)));
}

async fn invalid_fields_are_rejected_with_their_names<S: KeyRepository + Clone>(store: S) {
    let (manager, issued) = issue(&store).await;
    let id = &issued.record().id;
    let new = || NewKey::new(issued.record().user.id.clone(), "k");
    let long = || "x".repeat(10_000_000);
    for (new, field) in [
        (NewKey::new(1, long()), "name"),
        (NewKey::new(1, "a\0b"), "name"),
        (new().description(long()), "description"),
        (new().scopes([""]), "scopes"),
        (new().scopes((0..2_000).map(|n| n.to_string())), "scopes"),
        (new().permissions([long()]), "permissions"),
        (new().expires_at(now() - TimeDelta::seconds(5)), "expires_at"),
        (
            new().not_before(now() + TimeDelta::days(2)).expires_at(now() + TimeDelta::days(1)),
            "expires_at",
        ),
        (new().rate_limits(RateLimits::default().per_day(u64::MAX)), "rate_limit_per_day"),
        (new().metadata(json!({ "a": long() })), "metadata"),
        (new().metadata(json!({ "a": "\0" })), "metadata"),
    ] {
        let error = manager.issue(new).await.unwrap_err();
        let ManageError::Invalid { field: found, .. } = &error else { panic!("{field}: {error}") };
        assert_eq!(*found, field, "{error}");
        assert!(error.to_string().len() < 200);
    }
    let patch = KeyPatch::default().name(long());
    let error = manager.update(id, &patch, None).await.unwrap_err();
    assert!(matches!(error, ManageError::Invalid { field: "name", .. }), "{error}");
    for (email, role, field) in [
        ("", "user", "email"),
        ("no address", "user", "email"),
        ("a@b@c", "user", "email"),
        ("a b@c.d", "user", "email"),
        ("a@b.c", "", "role"),
    ] {
        let error = manager.create_user(email, role).await.unwrap_err();
        let ManageError::Invalid { field: found, .. } = error else { panic!("{email}: {error}") };
        assert_eq!(found, field, "{email}");
    }
    let no_user = manager.issue(NewKey::new(4711, "k")).await.unwrap_err();
    assert!(matches!(no_user, ManageError::Conflict { .. }), "{no_user}");
    let keys = manager.list(&ListKeys::default()).await.unwrap().keys;
    assert_eq!(keys.len(), 1, "nothing is stored");
}

/// Two keys in a legacy format may share a lookup id.
async fn a_key_that_leaves_a_lookup_id_does_not_affect_the_other_key_under_it<
    S: KeyRepository + Clone,
>(
    store: S,
) {
    let scheme = with_legacy_keys();
    let user = some_user(store.clone()).await;
    let manager = KeyManager::new(store.clone()).scheme(scheme.clone());
    let secrets = ["shared00-first-secret", "shared00-second-secret", "shared00-third-secret"];
    let keys = secrets.map(|key| {
        let hash = KeyHash::bcrypt(key, 4).unwrap();
        ImportedKey::new(NewKey::new(user.clone(), "k"), "shared00", hash)
    });
    manager.import(keys).await.unwrap();
    let listed = manager.list(&ListKeys::default()).await.unwrap().keys;
    let node = Authenticator::builder(store.clone()).scheme(scheme).build();
    for key in secrets {
        node.authenticate(key).await.unwrap();
    }
    manager.rotate(&listed[0].id, Rotation::default()).await.unwrap();
    manager.end_grace(&listed[0].id).await.unwrap();
    manager.delete(&listed[1].id).await.unwrap();
    for (key, is_accepted) in secrets.into_iter().zip([false, false, true]) {
        eventually("the node has received the changes", async || {
            match node.authenticate(key).await {
                Ok(_) => is_accepted,
                Err(Denial::InvalidKey(_)) => !is_accepted,
                Err(_) => false,
            }
        })
        .await;
    }
}
