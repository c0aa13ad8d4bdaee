//! Tables that another service's ORM made are adopted, and that service goes on working.

use serde_json::json;
use tower_api_key::{
    AuthContext, Authenticator, Denial, KeyManager, KeyScheme, NewKey, PostgresStore,
    backend::MigrateError,
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    record::{Budget, BudgetPeriod},
    store::{Attribution, KeyRepository, KeySelection, KeyStore},
};

use crate::support::{edit_key, eventually::eventually, servers::Postgres, stores::question};

/// As SQLAlchemy makes them for the service that this crate takes over from: defaults in the ORM and
/// not in the database, JSON, time stamps without a zone, an enum.
const ORM_TABLES: &str = "
    CREATE TYPE userrole AS ENUM ('ADMIN', 'user');
    CREATE TABLE users (
        id SERIAL NOT NULL PRIMARY KEY,
        email VARCHAR(255) NOT NULL,
        hashed_password VARCHAR(255),
        role userrole NOT NULL,
        is_active BOOLEAN,
        created_at TIMESTAMP WITHOUT TIME ZONE NOT NULL
    );
    CREATE UNIQUE INDEX ix_users_email ON users (email);
    CREATE TABLE api_keys (
        id SERIAL NOT NULL PRIMARY KEY,
        user_id INTEGER NOT NULL REFERENCES users (id),
        name VARCHAR(100) NOT NULL,
        key_prefix VARCHAR(20) NOT NULL,
        key_hash VARCHAR(255) NOT NULL UNIQUE,
        is_active BOOLEAN,
        permissions JSON,
        scopes JSON,
        rate_limit_per_minute INTEGER,
        rate_limit_per_hour INTEGER,
        rate_limit_per_day INTEGER,
        allowed_models JSON,
        allowed_endpoints JSON,
        allowed_ips JSON,
        is_unlimited BOOLEAN NOT NULL,
        budget_limit_cents INTEGER,
        budget_type VARCHAR(20),
        expires_at TIMESTAMP WITHOUT TIME ZONE,
        total_requests INTEGER NOT NULL,
        total_tokens INTEGER NOT NULL,
        total_cost FLOAT NOT NULL,
        last_used_at TIMESTAMP WITHOUT TIME ZONE,
        created_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
        updated_at TIMESTAMP WITHOUT TIME ZONE,
        department TEXT
    );
    CREATE INDEX ix_api_keys_key_prefix ON api_keys (key_prefix);";

/// The statements that the ORM sends for a new user, and for a new key with all that it knows.
const ORM_USER: &str = "INSERT INTO users (email, hashed_password, role, is_active, created_at)
    VALUES ('ada@example.com', 'x', 'ADMIN', true, '2026-01-02T03:04:05') RETURNING users.id";

fn orm_key(hash: &str, expires_at: &str) -> String {
    format!(
        "INSERT INTO api_keys (user_id, name, key_prefix, key_hash, is_active, permissions, scopes,
            rate_limit_per_minute, rate_limit_per_hour, rate_limit_per_day, allowed_models,
            allowed_endpoints, allowed_ips, is_unlimited, budget_limit_cents, budget_type, expires_at,
            total_requests, total_tokens, total_cost, last_used_at, created_at, updated_at, department)
        VALUES (1, 'from before', 'sk-12345', '{hash}', true, '{{}}'::JSON, '[\"chat\"]'::JSON,
            60, NULL, 86400, 'null'::JSON, NULL, '[\"127.0.0.1\"]'::JSON, false, 1000, 'monthly',
            {expires_at}, 7, 8, 1.25, NULL, '2026-01-02T03:04:05', NULL, 'research')
        RETURNING api_keys.id"
    )
}

const OLD_KEY: &str = "sk-12345-and-a-secret-part-of-forty-bytes";

fn scheme() -> KeyScheme {
    KeyScheme::builder()
        .format(KeyFormat::structured("acme", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
        .pepper("a pepper of this test")
        .upgrade_hashes()
        .build()
        .unwrap()
}

/// A server in whose database the ORM's tables lie, with one user and one key.
async fn orm_server() -> (Postgres, tokio_postgres::Client, PostgresStore) {
    let server = Postgres::start();
    let orm = server.client().await;
    // A zone far from UTC, so that a time stamp that is read in the session's zone is found out.
    orm.batch_execute("ALTER DATABASE postgres SET timezone = 'Pacific/Auckland'").await.unwrap();
    orm.batch_execute(ORM_TABLES).await.unwrap();
    orm.batch_execute(ORM_USER).await.unwrap();
    let hash = KeyHash::bcrypt(OLD_KEY, 4).unwrap().expose_hash();
    orm.batch_execute(&orm_key(&hash, "'2099-01-01T00:00:00'")).await.unwrap();
    let store = PostgresStore::new(&server.url()).unwrap();
    (server, orm, store)
}

async fn text(client: &tokio_postgres::Client, query: &str) -> String {
    client.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
}

fn authenticator(store: &PostgresStore) -> Authenticator {
    Authenticator::builder(store.clone()).scheme(scheme()).build()
}

async fn authenticate(store: &PostgresStore) -> Result<AuthContext, Denial> {
    authenticator(store).authenticate_from(OLD_KEY, "127.0.0.1".parse().unwrap()).await
}

#[tokio::test]
async fn a_key_from_before_works_and_its_row_is_as_it_was() {
    let (_server, orm, store) = orm_server().await;
    let snapshot =
        "SELECT string_agg(to_jsonb(k)::text, '') FROM (SELECT id, user_id, name, key_prefix,
        key_hash, is_active, permissions, scopes, rate_limit_per_minute, allowed_ips, is_unlimited,
        budget_limit_cents, budget_type, expires_at, total_requests, total_tokens, total_cost,
        last_used_at, created_at, updated_at, department FROM api_keys ORDER BY id) k";
    let columns =
        "SELECT string_agg(a.attname || format_type(a.atttypid, a.atttypmod) || a.attnotnull, ' '
        ORDER BY a.attrelid, a.attnum) FROM pg_attribute a
        WHERE a.attnum > 0 AND a.attrelid IN ('users'::regclass, 'api_keys'::regclass)
        AND col_description(a.attrelid, a.attnum) IS DISTINCT FROM 'made by tower-api-key'";
    let before = (text(&orm, snapshot).await, text(&orm, columns).await);
    store.migrate().await.unwrap();
    store.migrate().await.unwrap();

    let caller = authenticate(&store).await.unwrap();
    assert_eq!(
        (caller.user().email.as_str(), caller.user().role.as_str()),
        ("ada@example.com", "ADMIN")
    );
    let key = caller.key();
    assert_eq!((caller.scopes(), caller.permissions().len()), (["chat".to_owned()].as_slice(), 0));
    assert_eq!(caller.rate_limits().per_minute, Some(60));
    assert!(caller.allowed_models().is_empty() && caller.allowed_endpoints().is_empty());
    assert_eq!(key.budget, Some(Budget { limit_cents: 1000, period: BudgetPeriod::Monthly }));
    assert_eq!(key.expires_at.unwrap().to_rfc3339(), "2099-01-01T00:00:00+00:00");
    assert_eq!(key.created_at.to_rfc3339(), "2026-01-02T03:04:05+00:00");
    assert_eq!(
        (key.usage.requests, key.usage.tokens, key.usage.cost_micro_cents),
        (7, 8, 1_250_000)
    );
    assert_eq!((text(&orm, snapshot).await, text(&orm, columns).await), before);
}

#[tokio::test]
async fn a_time_stamp_without_a_zone_is_utc() {
    let (_server, orm, store) = orm_server().await;
    store.migrate().await.unwrap();
    for (expiry, is_valid) in [("-1 minute", false), ("1 minute", true)] {
        let update = format!(
            "UPDATE api_keys SET expires_at = timezone('UTC', now()) + interval '{expiry}'"
        );
        orm.batch_execute(&update).await.unwrap();
        assert_eq!(authenticate(&store).await.is_ok(), is_valid, "{expiry}");
    }
}

#[tokio::test]
async fn the_statements_of_the_orm_go_on_working_beside_the_crate() {
    let (_server, orm, store) = orm_server().await;
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone()).scheme(scheme());
    let user = manager.create_user("bob@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id.clone(), "new").scopes(["chat"])).await.unwrap();

    // The ORM reads what the crate wrote, by its own types …
    let row = orm
        .query_one(
            "SELECT scopes->>0, total_cost, is_active, created_at > timezone('UTC', now()) - interval '1 minute'
                AND created_at <= timezone('UTC', now())
            FROM api_keys WHERE key_prefix = $1",
            &[&issued.record().prefix],
        )
        .await
        .unwrap();
    let read: (String, f64, bool, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(read, ("chat".to_owned(), 0.0, true, true));

    // … writes as before …
    let hash = KeyHash::bcrypt("sk-12345-another", 4).unwrap().expose_hash();
    orm.batch_execute(&orm_key(&hash, "NULL")).await.unwrap();
    let address = "127.0.0.1".parse().unwrap();
    let other = authenticator(&store).authenticate_from("sk-12345-another", address).await.unwrap();
    assert_eq!(other.key().name, "from before");
    orm.batch_execute(
        "UPDATE api_keys SET total_requests = total_requests + 1, last_used_at = now()",
    )
    .await
    .unwrap();

    // … and what it changes, the crate sees at the next look-up.
    orm.batch_execute("UPDATE users SET is_active = false WHERE email = 'bob@example.com'")
        .await
        .unwrap();
    let denial = authenticator(&store).authenticate(issued.expose_secret()).await.unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::OwnerInactive)), "{denial}");
    assert!(store.update_user(&user, &Attribution::default()).await.unwrap().is_some());
    assert!(authenticator(&store).authenticate(issued.expose_secret()).await.is_ok());
    orm.batch_execute("DELETE FROM api_keys WHERE name = 'new'").await.unwrap();
    let denial = authenticator(&store).authenticate(issued.expose_secret()).await.unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::Unknown)), "{denial}");
}

#[tokio::test]
async fn a_hash_that_is_changed_by_hand_voids_the_upgrade() {
    let (_server, orm, store) = orm_server().await;
    store.migrate().await.unwrap();
    assert!(authenticate(&store).await.is_ok());
    let fast = "SELECT fast_hash FROM api_keys WHERE fast_hash_of = key_hash";
    assert!(text(&orm, fast).await.starts_with("hmac-sha256$"));

    let rotated = KeyHash::bcrypt("sk-12345-the-next-one", 4).unwrap().expose_hash();
    orm.execute("UPDATE api_keys SET key_hash = $1", &[&rotated]).await.unwrap();
    let denial = authenticate(&store).await.unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::WrongSecret)), "{denial}");
    let address = "127.0.0.1".parse().unwrap();
    assert!(
        authenticator(&store).authenticate_from("sk-12345-the-next-one", address).await.is_ok()
    );
}

#[tokio::test]
async fn arrays_zones_and_big_integers_are_adopted_too() {
    let server = Postgres::start();
    let orm = server.client().await;
    orm.batch_execute(
        "CREATE TABLE users (id BIGSERIAL PRIMARY KEY, email TEXT NOT NULL);
        CREATE TABLE api_keys (
            id BIGSERIAL PRIMARY KEY, user_id BIGINT NOT NULL, key_prefix TEXT NOT NULL,
            key_hash TEXT NOT NULL, scopes TEXT[] NOT NULL DEFAULT '{}', allowed_ips JSONB,
            permissions TEXT, total_cost NUMERIC(10, 4), expires_at TIMESTAMPTZ
        );
        INSERT INTO users (email) VALUES ('ada@example.com');",
    )
    .await
    .unwrap();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let new = NewKey::new(1, "k").scopes(["a,b", "c"]).permissions(["p"]);
    let issued = manager.issue(new).await.unwrap();
    let caller = Authenticator::new(store).authenticate(issued.expose_secret()).await.unwrap();
    assert_eq!(
        (caller.scopes(), caller.permissions()),
        (["a,b".into(), "c".into()].as_slice(), ["p".to_owned()].as_slice())
    );
    assert_eq!(text(&orm, "SELECT array_to_string(scopes, '|') FROM api_keys").await, "a,b|c");
}

#[tokio::test]
async fn a_table_of_users_alone_gets_its_keys() {
    let server = Postgres::start();
    let orm = server.client().await;
    orm.batch_execute("CREATE TABLE users (id SERIAL PRIMARY KEY, email TEXT); INSERT INTO users (email) VALUES ('a@b.c')").await.unwrap();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(1, "k")).await.unwrap();
    assert!(Authenticator::new(store).authenticate(issued.expose_secret()).await.is_ok());
}

#[tokio::test]
async fn what_cannot_be_adopted_is_reported_column_by_column_and_nothing_is_changed() {
    let server = Postgres::start();
    let orm = server.client().await;
    orm.batch_execute(
        "CREATE TABLE users (id UUID PRIMARY KEY, email TEXT);
        CREATE TABLE api_keys (id BIGINT, user_id UUID, key_prefix CHAR(8), expires_at DATE,
            is_active INTEGER, scopes POINT);",
    )
    .await
    .unwrap();
    let store = PostgresStore::new(&server.url()).unwrap();
    let error = store.migrate().await.unwrap_err();
    let MigrateError::NotAdoptable(faults) = &error else { panic!("{error:?}") };
    let named: Vec<_> =
        faults.iter().map(|fault| format!("{}.{}", fault.table, fault.column)).collect();
    for column in [
        "users.id",
        "api_keys.id",
        "api_keys.user_id",
        "api_keys.key_prefix",
        "api_keys.key_hash",
        "api_keys.expires_at",
        "api_keys.is_active",
        "api_keys.scopes",
    ] {
        assert!(named.iter().any(|name| name == column), "{column} in {named:?}");
    }
    assert_eq!(faults.len(), 8, "{error}");
    assert!(
        error.to_string().contains("users.id is uuid, but must be smallint, integer or bigint"),
        "{error}"
    );
    let relations = "SELECT count(*)::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'";
    assert_eq!(text(&orm, relations).await, "2");
    let columns = "SELECT count(*)::text FROM pg_attribute WHERE attrelid = 'api_keys'::regclass AND attnum > 0";
    assert_eq!(text(&orm, columns).await, "6");
}

#[tokio::test]
async fn a_view_and_keys_without_users_cannot_be_adopted() {
    let server = Postgres::start();
    let orm = server.client().await;
    orm.batch_execute("CREATE VIEW api_keys AS SELECT 1 AS id").await.unwrap();
    let error = PostgresStore::new(&server.url()).unwrap().migrate().await.unwrap_err().to_string();
    assert!(
        error.contains("users is missing") && error.contains("api_keys is not a table"),
        "{error}"
    );
}

#[tokio::test]
async fn ten_nodes_that_start_at_once_migrate_once() {
    let server = Postgres::start();
    let nodes: Vec<_> = (0..10)
        .map(|_| {
            let store = PostgresStore::new(&server.url()).unwrap();
            tokio::spawn(async move { store.migrate().await })
        })
        .collect();
    for node in nodes {
        node.await.unwrap().unwrap();
    }
    let orm = server.client().await;
    let count = "SELECT count(*)::text FROM __diesel_schema_migrations";
    assert_eq!(text(&orm, count).await, "5");
    assert_eq!(text(&orm, "SELECT count(*)::text FROM api_key_cache_secrets").await, "1");
}

/// From the newest migration to the oldest.
const DOWN: [&str; 5] = [
    include_str!("../../schema/postgres/2026-11-26-000005_management/down.sql"),
    include_str!("../../schema/postgres/2026-11-23-000004_budgets/down.sql"),
    include_str!("../../schema/postgres/2026-11-23-000003_usage/down.sql"),
    include_str!("../../schema/postgres/2026-11-22-000002_revisions/down.sql"),
    include_str!("../../schema/postgres/2026-11-22-000001_users_and_keys/down.sql"),
];

/// All that there is in the schema: tables, indexes, sequences, functions, triggers, columns and comments.
async fn schema(client: &tokio_postgres::Client) -> Vec<String> {
    let everything = "
        SELECT c.relkind::text || ' ' || c.relname FROM pg_class c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE '%diesel%'
        UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass FROM pg_trigger
            WHERE NOT tgisinternal
        UNION ALL SELECT 'column ' || attrelid::regclass || '.' || attname || ' '
                || format_type(atttypid, atttypmod) || ' ' || coalesce(col_description(attrelid, attnum), '')
            FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND attnum > 0
                AND NOT attisdropped AND c.relname NOT LIKE '%diesel%'
        ORDER BY 1";
    let rows = client.query(everything, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn going_down_takes_away_what_was_made_and_leaves_what_was_adopted() {
    let (_server, orm, store) = orm_server().await;
    let before = schema(&orm).await;
    store.migrate().await.unwrap();
    let made: Vec<_> =
        schema(&orm).await.into_iter().filter(|thing| !before.contains(thing)).collect();
    for thing in [
        "r api_key_changes",
        "r api_key_cache_secrets",
        "S api_key_revisions",
        "function api_key_note_key",
        "trigger zzz_api_key_revision on users",
        "trigger zzz_api_key_revision on api_keys",
        "trigger api_key_note_all on users",
        "column users.api_key_revision bigint made by tower-api-key",
        "column api_keys.api_key_revision bigint made by tower-api-key",
    ] {
        assert!(made.iter().any(|made| made == thing), "{thing} in {made:#?}");
    }
    for down in DOWN {
        orm.batch_execute(down).await.unwrap();
    }
    assert_eq!(schema(&orm).await, before);
    assert_eq!(text(&orm, "SELECT count(*)::text FROM api_keys").await, "1");
    // No trigger is left that would fail without its table.
    orm.batch_execute("UPDATE users SET is_active = false; DELETE FROM api_keys").await.unwrap();

    let fresh = Postgres::start();
    let orm = fresh.client().await;
    PostgresStore::new(&fresh.url()).unwrap().migrate().await.unwrap();
    assert_ne!(schema(&orm).await, [""; 0]);
    for down in DOWN {
        orm.batch_execute(down).await.unwrap();
    }
    assert_eq!(schema(&orm).await, [""; 0]);
}

#[tokio::test]
async fn a_look_up_uses_the_index_where_the_planner_has_no_statistics() {
    let server = Postgres::with_settings(&["autovacuum=off"]);
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let issued = {
        let manager = KeyManager::new(store.clone());
        let user = manager.create_user("ada@example.com", "user").await.unwrap();
        manager.issue(NewKey::new(user.id, "k")).await.unwrap()
    };
    let orm = server.client().await;
    orm.batch_execute(
        "INSERT INTO api_keys (user_id, key_prefix, key_hash)
        SELECT 1, 'prefix' || n, 'hash' || n FROM generate_series(1, 50000) n",
    )
    .await
    .unwrap();
    // Of each table, and last the rows that a walk of a primary key would read.
    let scans = "SELECT string_agg(concat_ws(' ', idx_scan, seq_scan,
            (SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = t.relname || '_pkey')
        ), ' ' ORDER BY t.relname DESC)
        FROM pg_stat_user_tables t WHERE t.relname IN ('api_keys', 'api_key_changes')";
    let counted = async || {
        let numbers = text(&orm, scans).await;
        let numbers: Vec<_> = numbers.split(' ').map(|n| n.parse::<u64>().unwrap()).collect();
        <[u64; 6]>::try_from(numbers).unwrap()
    };
    // Statistics of a session are sent when it ends; a new store has new connections.
    drop(store);
    let sessions =
        "SELECT count(*)::text FROM pg_stat_activity WHERE application_name = 'tower-api-key'";
    others_end(&orm, sessions).await;
    let before = counted().await;
    let store = PostgresStore::new(&server.url()).unwrap();
    // Without an authenticator, whose feed reads the table of changes too.
    let lookup = question(issued.expose_secret()).await;
    let under = KeySelection::Under(vec![lookup.id().to_owned()]);
    for _ in 0..10 {
        assert!(store.resolve(&lookup).await.unwrap().record().is_some());
        // This reads the table of changes too, as a look-up below a minimum revision does.
        store.read_keys(&under).await.unwrap();
    }
    drop(store);
    others_end(&orm, sessions).await;
    let mut after = before;
    eventually("ten scans of an index of each table", async || {
        after = counted().await;
        after[0] >= before[0] + 10 && after[3] >= before[3] + 10
    })
    .await;
    assert_eq!(
        [after[1], after[2], after[4], after[5]],
        [before[1], before[2], before[4], before[5]],
        "no sequential scan, no walk of a primary key: {before:?} {after:?}"
    );
}

/// Waits until the sessions are gone, whose number the query returns.
async fn others_end(client: &tokio_postgres::Client, sessions: &str) {
    eventually("the sessions end", async || text(client, sessions).await == "0").await;
}

#[tokio::test]
async fn metadata_survives_in_columns_of_every_type() {
    for column in ["json", "jsonb", "text", "varchar(40)", "note"] {
        let server = Postgres::start();
        let orm = server.client().await;
        let tables = format!(
            "CREATE DOMAIN note AS jsonb; CREATE TABLE users (id SERIAL PRIMARY KEY, email TEXT);
            CREATE TABLE api_keys (id SERIAL PRIMARY KEY, user_id INTEGER, key_prefix VARCHAR(40),
                key_hash VARCHAR(200), metadata {column})"
        );
        orm.batch_execute(&tables).await.unwrap();
        let store = PostgresStore::new(&server.url()).unwrap();
        store.migrate().await.unwrap();
        let user =
            store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap().id;
        let manager = KeyManager::new(store.clone());
        for value in
            [json!("12"), json!("a \"b\""), json!(""), json!(12), json!(true), json!({"a": [1]})]
        {
            let new = NewKey::new(user.clone(), "k").metadata(value.clone());
            let mut record = manager.issue(new).await.unwrap().record().clone();
            assert_eq!(record.metadata, value, "{column}");
            record.name = "edited".into();
            edit_key(&store, &record, None).await.unwrap().unwrap();
            assert_eq!(
                store.find_key(&record.id).await.unwrap().unwrap().into_record().metadata,
                value,
                "{column}"
            );
        }
        let new = NewKey::new(user.clone(), "k");
        let id = manager.issue(new).await.unwrap().record().id.clone();
        let is_null = format!("SELECT metadata IS NULL FROM api_keys WHERE id = {id}");
        assert!(orm.query_one(&is_null, &[]).await.unwrap().get::<_, bool>(0), "{column}");
    }
}
