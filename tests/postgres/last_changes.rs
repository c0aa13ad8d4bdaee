//! A look-up reads the table of changes only where a row's own revision is below one that the node knows.

use std::time::Duration;

use tower_api_key::{
    Authenticator, Denial, KeyScheme, PostgresStore,
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    record::{KeyId, KeyRecord, User},
    store::{Attribution, KeyRepository, StoredKey},
};

use crate::support::{database::run, eventually::eventually, servers::Postgres};

/// A node without a local cache, in sync with a server that logs its statements, and keys that share a lookup id.
struct SharedId {
    server: Postgres,
    store: PostgresStore,
    user: User,
    node: Authenticator,
}

impl SharedId {
    async fn start() -> Self {
        let server = Postgres::with_settings(&["log_statement=all"]);
        let store = PostgresStore::new(&server.url()).unwrap();
        store.migrate().await.unwrap();
        let by = Attribution::default();
        let user = store.insert_user("ada@example.com", "user", &by).await.unwrap();
        let scheme = KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap());
        let node = Authenticator::builder(PostgresStore::new(&server.url()).unwrap())
            .scheme(scheme.build().unwrap())
            .cache_capacity(0)
            .build();
        let this = Self { server, store, user, node };
        this.add("sk-proj-first").await;
        this.node.authenticate("sk-proj-first").await.unwrap();
        eventually("sync", async || this.node.health().last_sync.is_some()).await;
        this
    }

    async fn add(&self, key: &str) -> KeyId {
        let record = KeyRecord::new(0, "sk-proj-", self.user.clone());
        let key = StoredKey::new(record, KeyHash::bcrypt(key, 4).unwrap());
        self.store.insert_key(&key, &Attribution::default()).await.unwrap().id
    }

    /// How many statements read the keys under a lookup id: without the last changes, and with them.
    fn statements(&self) -> (usize, usize) {
        let log = self.server.log();
        let executed = |text| log.split("execute ").skip(1).filter(move |it| it.contains(text));
        (executed("SELECT NULL::text[] AS row").count(), executed("asked.number AS asked").count())
    }

    async fn denied(&self, key: &str) -> Option<InvalidKey> {
        match self.node.authenticate(key).await {
            Err(Denial::InvalidKey(reason)) => Some(reason),
            Ok(_) => None,
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_neighbour_was_deleted_is_accepted_and_the_deleted_one_is_not() {
    let fixture = SharedId::start().await;
    let second = fixture.add("sk-proj-second").await;
    eventually("the second key", async || fixture.denied("sk-proj-second").await.is_none()).await;
    fixture.store.delete_key(&second, &Attribution::default()).await.unwrap();
    // From then on, the node knows a revision that no row has.
    eventually("the deletion", async || {
        fixture.denied("sk-proj-second").await == Some(InvalidKey::WrongSecret)
    })
    .await;
    let in_full = fixture.statements().1;
    eventually("a read in full", async || {
        assert_eq!(fixture.denied("sk-proj-first").await, None);
        fixture.statements().1 > in_full
    })
    .await;
    assert_eq!(fixture.denied("sk-proj-second").await, Some(InvalidKey::WrongSecret));

    // A change of the first key raises its own revision above that.
    run(&fixture.server.client().await, "UPDATE api_keys SET name = 'renamed'").await;
    eventually("the change, and no read in full", async || {
        let before = fixture.statements();
        assert_eq!(fixture.denied("sk-proj-first").await, None);
        let after = fixture.statements();
        (after.0 - before.0, after.1 - before.1) == (1, 0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_key_is_unknown_and_not_an_outage() {
    let fixture = SharedId::start().await;
    run(&fixture.server.client().await, "DELETE FROM api_keys").await;
    eventually("the deletion", async || {
        fixture.denied("sk-proj-first").await == Some(InvalidKey::Unknown)
    })
    .await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while fixture.statements().1 == 0 {
            assert_eq!(fixture.denied("sk-proj-first").await, Some(InvalidKey::Unknown));
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_whose_row_has_a_lower_revision_than_its_last_change_keeps_the_keys() {
    let fixture = SharedId::start().await;
    run(
        &fixture.server.client().await,
        "BEGIN;
        ALTER TABLE api_keys DROP CONSTRAINT api_keys_user_id_fkey;
        DELETE FROM users;
        INSERT INTO users (id, email, role) OVERRIDING SYSTEM VALUE VALUES (1, 'ada@example.com', 'admin');
        COMMIT",
    )
    .await;
    eventually("a read in full", async || {
        assert_eq!(fixture.denied("sk-proj-first").await, None);
        fixture.statements().1 > 0
    })
    .await;
    assert_eq!(fixture.node.authenticate("sk-proj-first").await.unwrap().user().role, "admin");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_rows_with_one_key_the_first_is_used_wherever_it_is_in_the_table() {
    let fixture = SharedId::start().await;
    let first = fixture.add("sk-proj-twins").await;
    fixture.add("sk-proj-twins").await;
    let client = fixture.server.client().await;
    // An updated row moves behind the others.
    let revoke = format!("UPDATE api_keys SET is_active = FALSE WHERE id = {first}");
    run(&client, &revoke).await;
    eventually("the change", async || {
        fixture.denied("sk-proj-twins").await == Some(InvalidKey::Revoked)
    })
    .await;
    for _ in 0..5 {
        run(&client, "UPDATE api_keys SET total_requests = total_requests + 1").await;
        assert_eq!(fixture.denied("sk-proj-twins").await, Some(InvalidKey::Revoked));
    }
}
