//! Every method of `KeyManager`, and hand-written SQL, on every store and through Redis: one audit row for each change,
//! and no secret and no hash in a table (except the columns for hashes), in Redis, a log line, a metric or a result.

use std::{
    collections::BTreeSet,
    fmt::{Debug, Write},
    fs,
    path::Path,
};

use chrono::{TimeDelta, Utc};
use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, KeyManager, KeyScheme, MemoryStore, NewKey, PostgresStore,
    RedisCache, SqliteStore,
    key::{KeyFormat, KeyHash},
    management::{ExplainedRequest, ImportedKey, IssuedKey, KeyPatch, Rotation, UserPatch},
    record::{KeyId, UserId},
    store::{KeyFilter, KeyRepository, ListAudit, ListKeys, ListUsers},
};

use crate::support::{
    alone::is_alone,
    bearer,
    eventually::eventually,
    leaks::{
        Marked, Metrics, StoredValue, capture_all, published, values_of_file, values_of_redis,
        values_of_server,
    },
    send,
    servers::{Postgres, Redis},
    unknown_key, with_wrong_secret,
};

const PEPPER: &str = "marked-pepper-of-many-bytes-0123456789";
const LEGACY: [&str; 2] = ["legacy01-MarkedSecretOfBcrypt", "legacy02-MarkedSecretOfSha256"];

fn scheme() -> KeyScheme {
    KeyScheme::builder()
        .format(KeyFormat::structured("tak", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
        .pepper(PEPPER)
        .upgrade_hashes()
        .build()
        .unwrap()
}

/// What was done on a store, and what came of it.
struct Exercise<R: KeyRepository> {
    store: R,
    manager: KeyManager<R>,
    marked: Marked,
    keys: Vec<KeyId>,
    /// The results of all calls, as they are printed.
    printed: String,
    methods: BTreeSet<&'static str>,
    /// Id of the last entry of the audit.
    last: i64,
}

impl<R: KeyRepository + Clone> Exercise<R> {
    fn over(store: R) -> Self {
        let manager = KeyManager::new(store.clone()).scheme(scheme()).actor("tester");
        let mut marked = Marked::default();
        marked.secret(PEPPER);
        let (keys, printed, methods) = (Vec::new(), String::new(), BTreeSet::new());
        Self { store, manager, marked, keys, printed, methods, last: 0 }
    }

    /// Takes the result of a method, which has to have made this many changes.
    async fn step<T: Debug>(
        &mut self,
        method: &'static str,
        changes: usize,
        result: Result<T, impl std::error::Error>,
    ) -> Option<T> {
        self.methods.insert(method);
        write!(self.printed, "{result:?}\n{result:#?}\n").unwrap();
        if let Err(error) = &result {
            writeln!(self.printed, "{error} {:?}", error.source()).unwrap();
        }
        self.made(method, changes).await;
        for id in &self.keys {
            let Ok(Some(key)) = self.store.find_key(id).await else { continue };
            self.marked.hash(key.hash());
            key.previous_hash().iter().for_each(|hash| self.marked.hash(hash));
            writeln!(self.printed, "{key:?}").unwrap();
        }
        result.ok()
    }

    /// Asserts the number of audit rows since the last step.
    async fn made(&mut self, what: &str, changes: usize) {
        let page = self.store.list_audit(&ListAudit::default().limit(1_000)).await.unwrap();
        let new: Vec<_> = page.entries.iter().filter(|entry| entry.id > self.last).collect();
        assert_eq!(new.len(), changes, "audit rows of {what}: {new:#?}");
        self.last = new.first().map_or(self.last, |entry| entry.id);
        self.printed += &serde_json::to_string(&new).unwrap();
        writeln!(self.printed, "{new:?}").unwrap();
    }

    /// Takes the result of a method that returns a new secret.
    async fn secret(
        &mut self,
        method: &'static str,
        issued: Result<IssuedKey, impl std::error::Error>,
    ) -> (KeyId, String) {
        let issued = issued.unwrap();
        self.marked.key(issued.expose_secret());
        let (id, key) = (issued.record().id.clone(), issued.expose_secret().to_owned());
        self.keys.push(id.clone());
        self.step(method, 1, Ok::<_, std::fmt::Error>(issued)).await;
        (id, key)
    }

    /// Sends a request with each key through the layer, with and without a cache, and flushes its usage.
    async fn requests(&mut self, keys: &[&str]) {
        for capacity in [0, 100] {
            let node = Authenticator::builder(self.store.clone()).scheme(scheme());
            let node = node.cache_capacity(capacity).build();
            let layer = ApiKeyAuthLayer::from(node.clone()).verbose();
            for key in keys.iter().chain(keys) {
                let answer = send(&layer, bearer(key)).await;
                writeln!(self.printed, "{answer:?} {:?}", node.authenticate(key).await).unwrap();
            }
            node.shutdown().await;
        }
        self.made("requests", 0).await;
    }

    /// Calls every method, with good and with bad values. Returns the user of the keys that are left.
    async fn run(&mut self) -> UserId {
        let manager = self.manager.clone();
        let ada = manager.create_user("ada@example.com", "admin").await;
        let ada = self.step("create_user", 1, ada).await.unwrap().id;
        let bob = manager.create_user("bob@example.com", "user").await;
        let bob = self.step("create_user", 1, bob).await.unwrap().id;
        self.step("create_user", 0, manager.create_user("bob@example.com", "user").await).await;
        self.step("find_user", 0, manager.find_user(&ada).await).await;
        let found = manager.find_user_by_email("ada@example.com").await;
        self.step("find_user_by_email", 0, found).await;
        self.step("list_users", 0, manager.list_users(&ListUsers::default()).await).await;

        let new = NewKey::new(ada.clone(), "of ada").description("a key").scopes(["read", "write"]);
        let (id, first) = self.secret("issue", manager.issue(new.clone()).await).await;
        let (other, of_bob) =
            self.secret("issue", manager.issue(NewKey::new(bob.clone(), "of bob")).await).await;
        self.step("issue", 0, manager.issue(NewKey::new(4711, "of nobody")).await).await;
        self.requests(&[&first, &of_bob, &with_wrong_secret(&first), &unknown_key(), "Marked"])
            .await;
        self.step("find", 0, manager.find(&id).await).await;
        self.step("list", 0, manager.list(&ListKeys::default()).await).await;
        let patch = KeyPatch::default().name("new").scopes(["read"]);
        let updated = self.step("update", 1, manager.update(&id, &patch, None).await).await;
        // The same values again, and a revision that is not the current one.
        let revision = updated.unwrap().revision;
        self.step("update", 0, manager.update(&id, &patch, None).await).await;
        let name = |name: &str| KeyPatch::default().name(name);
        self.step("update", 1, manager.update(&id, &name("b"), Some(revision)).await).await;
        self.step("update", 0, manager.update(&id, &name("c"), Some(revision)).await).await;

        let day = Rotation::default();
        let (_, second) = self.secret("rotate", manager.rotate(&id, day).await).await;
        self.requests(&[&first, &second]).await;
        self.step("rotate", 0, manager.rotate(&id, day).await).await;
        let ending = manager.rotate(&id, day.end_previous()).await;
        let (_, third) = self.secret("rotate", ending).await;
        self.requests(&[&first, &second, &third]).await;
        self.step("end_grace", 1, manager.end_grace(&id).await).await;
        self.step("end_grace", 0, manager.end_grace(&id).await).await;
        let at_once = manager.rotate(&id, day.grace(std::time::Duration::ZERO)).await;
        let (_, fourth) = self.secret("rotate", at_once).await;
        self.requests(&[&third, &fourth]).await;

        self.step("revoke", 1, manager.reason("lost").revoke(&id).await).await;
        self.step("revoke", 0, manager.revoke(&id).await).await;
        self.step("rotate", 0, manager.rotate(&id, day).await).await;
        self.requests(&[&fourth]).await;
        self.step("reactivate", 1, manager.reactivate(&id).await).await;
        self.step("reactivate", 0, manager.reactivate(&id).await).await;

        self.import(&ada).await;
        self.acting_for(&fourth, &ada).await;

        let role = UserPatch::default().role("auditor");
        self.step("update_user", 1, manager.update_user(&bob, &role).await).await;
        self.step("update_user", 0, manager.update_user(&bob, &role).await).await;
        self.step("deactivate_user", 1, manager.deactivate_user(&bob).await).await;
        self.step("deactivate_user", 0, manager.deactivate_user(&bob).await).await;
        self.step("reactivate_user", 1, manager.reactivate_user(&bob).await).await;
        self.step("delete_user", 0, manager.delete_user(&bob).await).await;

        let of_bob = KeyFilter::default().owner(bob.clone());
        let (_, another) =
            self.secret("issue", manager.issue(NewKey::new(bob.clone(), "x")).await).await;
        self.requests(&[&another]).await;
        self.step("revoke_all", 2, manager.revoke_all(&of_bob).await).await;
        self.step("revoke_all", 0, manager.revoke_all(&of_bob).await).await;
        self.step("revoke_all", 0, manager.revoke_all(&KeyFilter::default()).await).await;
        let today = Utc::now().date_naive();
        self.step("usage", 0, manager.usage(&id, today, today).await).await;
        self.step("audit", 0, manager.audit(&ListAudit::default()).await).await;
        let request = ExplainedRequest::default();
        self.step("explain", 0, manager.explain(&id, &request).await).await;
        self.step("delete", 1, manager.delete(&other).await).await;
        self.step("delete", 0, manager.delete(&other).await).await;
        let last = self.keys.last().unwrap().clone();
        self.step("delete", 1, manager.delete(&last).await).await;
        self.step("delete_user", 1, manager.delete_user(&bob).await).await;
        let before = Utc::now() - TimeDelta::days(1);
        self.step("prune_audit", 0, manager.prune_audit(before).await).await;
        // For a search while both secrets of a key are stored.
        let (_, last) = self.secret("rotate", manager.rotate(&id, day).await).await;
        self.requests(&[&fourth, &last]).await;
        ada
    }

    /// Hashes of another service: bcrypt, and SHA-256.
    async fn import(&mut self, user: &UserId) {
        let manager = self.manager.clone();
        let hashes = [KeyHash::bcrypt(LEGACY[0], 4).unwrap(), KeyHash::sha256(LEGACY[1])];
        let imported = |key: &str, hash: &KeyHash, user: UserId| {
            ImportedKey::new(
                NewKey::new(user, "imported"),
                key.get(..8).unwrap_or(""),
                hash.clone(),
            )
        };
        let both: Vec<_> =
            LEGACY.iter().zip(&hashes).map(|(key, it)| imported(key, it, user.clone())).collect();
        LEGACY.iter().for_each(|key| self.marked.key(key));
        hashes.iter().for_each(|hash| self.marked.hash(hash));
        self.step("import", 2, manager.import(both.clone()).await).await;
        self.step("import", 0, manager.import(both).await).await;
        let bad =
            [imported("of nobody", &hashes[0], 4711.into()), imported("", &hashes[0], 4711.into())];
        self.step("import", 0, manager.import(bad).await).await;
        // The check of a bcrypt hash stores a fast one.
        self.requests(&[LEGACY[0], LEGACY[1], "legacy01-MarkedButWrong"]).await;
        let listed =
            manager.list(&ListKeys::default().filter(KeyFilter::default().prefix("legacy"))).await;
        let listed = self.step("list", 0, listed).await.unwrap();
        let id = listed.keys[0].id.clone();
        let (_, structured) =
            self.secret("rotate", manager.rotate(&id, Rotation::default()).await).await;
        self.requests(&[&structured, LEGACY[0]]).await;
    }

    /// The same for a caller.
    async fn acting_for(&mut self, key: &str, user: &UserId) {
        let node = Authenticator::builder(self.store.clone()).scheme(scheme()).build();
        let caller = node.authenticate(key).await.unwrap();
        let manager = self.manager.clone().acting_for(&caller);
        let new = NewKey::new(user.clone(), "of a caller").scopes(["read"]);
        let (id, _) = self.secret("issue", manager.issue(new).await).await;
        let wider = NewKey::new(user.clone(), "wider").scopes(["write"]);
        self.step("issue", 0, manager.issue(wider).await).await;
        let name = KeyPatch::default().name("by a caller");
        self.step("update", 1, manager.update(&id, &name, None).await).await;
        self.secret("rotate", manager.rotate(&id, Rotation::default()).await).await;
        self.step("revoke", 1, manager.revoke(&id).await).await;
        self.step("reactivate", 1, manager.reactivate(&id).await).await;
        self.step("delete", 1, manager.delete(&id).await).await;
        node.shutdown().await;
    }

    /// Runs hand-written SQL.
    async fn by_hand(&mut self, user: &UserId, mut run: impl AsyncFnMut(&str)) {
        let [a, b] = ["a-MarkedSecretByHand", "b-MarkedSecretByHand"].map(|key| {
            self.marked.key(key);
            KeyHash::sha256(key).expose_hash()
        });
        let insert = "INSERT INTO api_keys (user_id, name, key_prefix, key_hash) VALUES";
        for (sql, changes) in [
            ("INSERT INTO users (email, role) VALUES ('hand@example.com', 'user')".to_owned(), 0),
            (format!("{insert} ({user}, 'h', 'hand1', '{a}')"), 1),
            (format!("{insert} ({user}, 'h', 'hand2', '{a}'), ({user}, 'h', 'hand3', '{a}')"), 2),
            ("UPDATE api_keys SET name = 'of hand' WHERE key_prefix = 'hand1'".to_owned(), 1),
            ("UPDATE api_keys SET name = 'of hand' WHERE key_prefix = 'hand1'".to_owned(), 0),
            ("UPDATE api_keys SET description = 'x' WHERE key_prefix LIKE 'hand%'".to_owned(), 3),
            (format!("UPDATE api_keys SET key_hash = '{b}' WHERE key_prefix = 'hand1'"), 1),
            (format!("UPDATE api_keys SET previous_key_hash = key_hash, previous_key_prefix = key_prefix,
                previous_expires_at = '2100-01-01 00:00:00', key_hash = '{a}' WHERE key_prefix = 'hand1'"), 1),
            ("UPDATE api_keys SET total_requests = 7, last_used_at = NULL".to_owned(), 0),
            (format!("UPDATE users SET role = 'boss' WHERE id = {user}"), 1),
            ("DELETE FROM api_keys WHERE key_prefix = 'hand2'".to_owned(), 1),
            ("UPDATE api_keys SET is_active = FALSE WHERE key_prefix LIKE 'hand%'".to_owned(), 2),
            ("DELETE FROM api_keys WHERE key_prefix = 'hand3'".to_owned(), 1),
        ] {
            run(&sql).await;
            self.made(&sql, changes).await;
        }
    }

    /// Asserts what the tables contain, and that nothing that was printed shows a secret or a hash.
    fn check(&self, values: &[StoredValue]) {
        // The search finds the hashes where they have to be: two keys have two secrets, and one has a fast hash.
        assert!(values.is_empty() || self.marked.assert_stored_as_hashes(values) >= 6);
        self.marked.assert_hidden("a result", &self.printed);
    }
}

#[tokio::test]
async fn a_leak_into_a_table_is_found_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.db");
    let store = SqliteStore::open(&path).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store);
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let issued = manager.issue(NewKey::new(user, "k")).await.unwrap();
    let key = issued.expose_secret();
    let mut marked = Marked::default();
    marked.key(key);
    assert_eq!(marked.assert_stored_as_hashes(&values_of_file(&path)), 1);
    let hash = KeyHash::sha256(key).expose_hash();
    let digest = hash.strip_prefix("sha256$").unwrap();
    let mut hand = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    for (table, leak) in [
        ("api_keys", format!("UPDATE api_keys SET description = 'the key {key}'")),
        ("api_keys", format!("UPDATE api_keys SET fast_hash = '{key}'")),
        ("api_keys", format!("UPDATE api_keys SET metadata = json_object('h', '{hash}')")),
        (
            "api_key_audit",
            format!("UPDATE api_key_audit SET reason = 'was {}'", digest.to_uppercase()),
        ),
        (
            "api_key_audit",
            format!("UPDATE api_key_audit SET \"after\" = '{}'", &key[key.len() - 12..]),
        ),
        (
            "api_key_changes",
            format!("INSERT INTO api_key_changes (key_prefix) VALUES (X'{digest}')"),
        ),
        (
            "service",
            format!(
                "CREATE TABLE service (x BLOB); INSERT INTO service VALUES (CAST('{key}' AS BLOB))"
            ),
        ),
    ] {
        hand.batch_execute(&leak).unwrap();
        let values: Vec<_> =
            values_of_file(&path).into_iter().filter(|value| value.table == table).collect();
        let is_found = std::panic::catch_unwind(|| marked.assert_stored_as_hashes(&values));
        assert!(is_found.is_err(), "{leak}");
        hand.batch_execute(
            "UPDATE api_keys SET description = NULL, metadata = NULL, fast_hash = NULL;
            UPDATE api_key_audit SET reason = NULL, \"before\" = NULL, \"after\" = NULL;
            DELETE FROM api_key_changes WHERE typeof(key_prefix) = 'blob'",
        )
        .unwrap();
    }
    for shown in
        [format!("{digest:?}"), format!("{:?}", key.as_bytes()), format!("{:?}", &key[20..])]
    {
        assert!(marked.has_secret(&shown) || marked.has_hash(&shown), "{shown}");
    }
}

/// The names of the methods that the source declares.
fn declared() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/management");
    let files = fs::read_dir(folder).unwrap().flatten().map(|file| file.path());
    let sources = files.filter(|path| path.extension().is_some_and(|it| it == "rs"));
    let methods = sources.flat_map(|path| {
        let source = fs::read_to_string(path).unwrap();
        let names = source
            .split("pub async fn ")
            .skip(1)
            .map(|rest| rest.split(['(', '<']).next().unwrap().to_owned());
        names.collect::<Vec<_>>()
    });
    methods.collect()
}

#[test]
fn no_secret_and_no_hash_leaves_its_column_and_each_change_has_one_audit_row() {
    if !is_alone(
        "secrecy::no_secret_and_no_hash_leaves_its_column_and_each_change_has_one_audit_row",
    ) {
        return;
    }
    // Together, the futures would overflow the stack of the test's thread.
    let run = || tokio::runtime::Runtime::new().unwrap().block_on(nothing_leaves_its_column());
    let thread = std::thread::Builder::new().stack_size(64 << 20).spawn(run).unwrap();
    thread.join().unwrap();
}

async fn nothing_leaves_its_column() {
    let (log, metrics) = (capture_all(), Metrics::install());
    tracing::trace!("at every level");
    let mut all = Vec::new();

    let mut memory = Exercise::over(MemoryStore::new());
    memory.run().await;
    writeln!(memory.printed, "{:?} {:#?}", memory.store, memory.manager).unwrap();
    memory.check(&[]);
    let methods: BTreeSet<_> = memory.methods.iter().map(|&name| name.to_owned()).collect();
    assert_eq!(methods, declared(), "every method of KeyManager is called");
    all.push(memory.marked);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.db");
    let store = SqliteStore::open(&path).unwrap();
    store.migrate().await.unwrap();
    let mut file = Exercise::over(store);
    let user = file.run().await;
    let mut hand = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    file.by_hand(&user, async |sql: &str| hand.batch_execute(sql).unwrap()).await;
    file.check(&values_of_file(&path));
    all.push(file.marked);

    let server = Postgres::start();
    let admin = server.client().await;
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let mut postgres = Exercise::over(store);
    let user = postgres.run().await;
    postgres.by_hand(&user, async |sql: &str| admin.batch_execute(sql).await.unwrap()).await;
    postgres.check(&values_of_server(&admin).await);
    postgres.marked.assert_hidden("the log of PostgreSQL", server.log());
    all.push(postgres.marked);

    let redis = Redis::start();
    let messages = published(&redis.url()).await;
    admin.batch_execute("CREATE DATABASE cached").await.unwrap();
    let url = server.database_url("cached");
    let store = PostgresStore::new(&url).unwrap();
    store.migrate().await.unwrap();
    let cache = RedisCache::new(store, redis.url()).unwrap();
    assert!(cache.prepare(std::time::Duration::from_secs(10)).await);
    let mut cached = Exercise::over(cache);
    cached.run().await;
    let admin = crate::support::database::connect(&url).await;
    cached.check(&values_of_server(&admin).await);
    let stored = async || values_of_redis(&redis.url()).await;
    eventually("entries in Redis", async || stored().await.len() > 1_000).await;
    cached.marked.assert_hidden("Redis", stored().await);
    let messages = messages.lock().unwrap().clone();
    assert!(!messages.is_empty());
    cached.marked.assert_hidden("a message in Redis", messages);
    all.push(cached.marked);

    let (log, metrics) = (log.text(), metrics.text());
    assert!(log.contains("at every level") && log.contains("WARN"), "all levels are captured");
    assert!(metrics.contains("api_key_denials_total"), "{metrics}");
    for marked in &all {
        marked.assert_hidden("the log", &log);
        marked.assert_hidden("a metric", &metrics);
    }
}
