//! `migrate()` restores what is missing of the crate's objects, whatever version the database records, and changes
//! nothing where nothing is missing.

use std::time::Duration;

use tokio_postgres::Client;
use tower_api_key::{
    Authenticator, Denial, backend::MigrateError, denial::InvalidKey, store::Change,
};

use crate::support::{
    self,
    database::{
        caches, connect, database, incomplete, is_denied, number, run, store_at, url_of_role,
        url_with_path,
    },
    feed::{eventually, in_sync},
    servers::Postgres,
};

const POLL: Duration = Duration::from_millis(100);

/// What `migrate()` makes, with all that matters of it.
async fn schema(client: &Client) -> Vec<String> {
    let everything = "
        SELECT 'relation ' || c.relkind::text || ' ' || c.relname FROM pg_class c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE '%diesel%' AND c.relkind <> 'i'
        UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT pg_get_triggerdef(oid) || tgenabled::text FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT regexp_replace(pg_get_indexdef(indexrelid), 'INDEX [^ ]+', 'INDEX') FROM pg_index
            WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
        UNION ALL SELECT 'column ' || attrelid::regclass || '.' || attname || ' ' || format_type(atttypid, atttypmod)
                || ' ' || attnotnull || ' ' || coalesce(pg_get_expr(adbin, adrelid), '')
            FROM pg_attribute JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND attnum > 0
                AND NOT attisdropped AND c.relname NOT LIKE '%diesel%'
        ORDER BY 1";
    let rows = client.query(everything, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn names(client: &Client, sql: &str) -> Vec<String> {
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn each_trigger_function_index_table_and_column_that_is_missing_is_made_anew() {
    let db = database().await;
    let before = schema(&db.admin).await;
    let mut damage = names(
        &db.admin,
        "SELECT format('DROP TRIGGER %I ON %s', tgname, tgrelid::regclass) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT format('ALTER TABLE %s DISABLE TRIGGER %I', tgrelid::regclass, tgname) FROM pg_trigger
            WHERE NOT tgisinternal
        UNION ALL SELECT format('DROP FUNCTION %s CASCADE', oid::regprocedure) FROM pg_proc
            WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT format('DROP INDEX %s', indexrelid::regclass) FROM pg_index
            WHERE indexrelid::regclass::text LIKE 'api_key%' AND NOT indisprimary
        UNION ALL SELECT format('DROP TABLE %s CASCADE', oid::regclass) FROM pg_class
            WHERE relkind = 'r' AND relname LIKE 'api\\_key\\_%'
        UNION ALL SELECT format('DROP SEQUENCE %s CASCADE', oid::regclass) FROM pg_class
            WHERE relkind = 'S' AND relname = 'api_key_revisions'",
    )
    .await;
    damage.extend([
        "CREATE OR REPLACE FUNCTION api_key_note_key() RETURNS TRIGGER LANGUAGE plpgsql AS
            $$ BEGIN RETURN NULL; END $$"
            .to_owned(),
        "ALTER FUNCTION api_key_note_key() SECURITY INVOKER".to_owned(),
        "ALTER TABLE api_keys DROP COLUMN fast_hash, DROP COLUMN fast_hash_of".to_owned(),
        "ALTER TABLE api_keys DROP COLUMN api_key_revision CASCADE".to_owned(),
        "ALTER TABLE users DROP COLUMN api_key_revision CASCADE".to_owned(),
        "ALTER FUNCTION api_key_note_user() RESET search_path".to_owned(),
    ]);
    assert!(damage.len() > 40, "{damage:#?}");
    let mut faults = Vec::new();
    for damage in damage {
        println!("{damage}");
        db.run("BEGIN").await;
        db.run(&damage).await;
        db.run("COMMIT").await;
        if let Err(error) = db.store.migrate().await {
            faults.push(format!("{damage}: {error:?}"));
        }
        let after = schema(&db.admin).await;
        let lost: Vec<_> = before.iter().filter(|thing| !after.contains(thing)).collect();
        if !lost.is_empty() {
            faults.push(format!("{damage}: {lost:#?}"));
        }
        // And the sequence goes on.
        let outcome = db
            .admin
            .batch_execute(
                "INSERT INTO users (email) VALUES (random()); UPDATE users SET role = role || 'x'",
            )
            .await;
        if let Err(error) = outcome {
            faults.push(format!("{damage}: {error:?}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[tokio::test]
async fn what_is_restored_counts_no_revision_twice() {
    let db = database().await;
    let key = db.key().await;
    for _ in 0..5 {
        db.run("UPDATE api_keys SET name = name || 'x'").await;
    }
    let before = db.number("SELECT max(api_key_revision) FROM api_keys").await;
    for damage in ["DROP SEQUENCE api_key_revisions CASCADE", "DROP TABLE api_key_changes CASCADE"]
    {
        db.run(damage).await;
        db.store.migrate().await.unwrap();
        db.run(&format!("UPDATE api_keys SET name = name || 'x' WHERE id = {}", key.id)).await;
        let after = db.number("SELECT max(api_key_revision) FROM api_keys").await;
        assert!(after > before, "{damage}: {after} after {before}");
    }
}

#[tokio::test]
async fn tables_that_were_dropped_and_made_by_the_orm_are_adopted_again() {
    let db = database().await;
    let key = db.key().await;
    let store = store_at(&db.server.url(), POLL);
    let node = Authenticator::builder(store).max_staleness(Duration::from_secs(2)).build();
    let node = caches(node, &key).await;
    db.run("DROP TABLE users, api_keys CASCADE").await;
    eventually("a fault", async || incomplete(&node).is_some()).await;
    db.run(
        "CREATE TABLE users (id SERIAL PRIMARY KEY, email VARCHAR(255) NOT NULL);
        CREATE TABLE api_keys (id SERIAL PRIMARY KEY, user_id INTEGER NOT NULL REFERENCES users (id),
            name VARCHAR(100), key_prefix VARCHAR(20) NOT NULL, key_hash VARCHAR(255) NOT NULL UNIQUE)",
    )
    .await;
    db.store.migrate().await.unwrap();
    eventually("no fault", async || node.health().feed.fault.is_none()).await;
    in_sync(&node).await;
    assert!(matches!(
        node.authenticate(&key.secret).await,
        Err(Denial::InvalidKey(InvalidKey::Unknown))
    ));
    let key = db.key().await;
    assert!(node.authenticate(&key.secret).await.is_ok());
    in_sync(&node).await;
    db.run(&key.revoke()).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
}

#[tokio::test]
async fn a_role_that_owns_nothing_migrates_where_nothing_is_missing_and_changes_nothing() {
    let db = database().await;
    let before = schema(&db.admin).await;
    let rows = db.number("SELECT count(*) FROM api_key_changes").await;
    db.run("CREATE ROLE guest LOGIN").await;
    let guest = store_at(&url_of_role(&db.server.url(), "guest"), POLL);
    guest.migrate().await.unwrap();
    // Functions of the other service are none of the crate's.
    db.run("CREATE FUNCTION api_key_of_the_orm() RETURNS INT LANGUAGE sql AS 'SELECT 1'").await;
    guest.migrate().await.unwrap();
    db.run("DROP FUNCTION api_key_of_the_orm()").await;
    for _ in 0..3 {
        db.store.migrate().await.unwrap();
    }
    assert_eq!(schema(&db.admin).await, before);
    assert_eq!(db.number("SELECT count(*) FROM api_key_changes").await, rows);
    db.run("DROP TRIGGER api_key_note ON users").await;
    assert!(guest.migrate().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_nodes_that_start_at_once_repair_once_while_the_other_service_writes() {
    let db = database().await;
    let key = db.key().await;
    let writer = connect(&db.server.url()).await;
    let writes = tokio::spawn(async move {
        for n in 0..200 {
            run(
                &writer,
                &format!("UPDATE api_keys SET name = 'n{n}'; UPDATE users SET role = 'r{n}'"),
            )
            .await;
        }
    });
    let recorder = db.listen(POLL);
    recorder.all().await;
    // In the order of the other service, which would meet a deadlock otherwise.
    db.run(
        "BEGIN; LOCK TABLE api_keys, users; DROP TRIGGER api_key_note ON users;
        DROP FUNCTION api_key_note_key CASCADE; COMMIT",
    )
    .await;
    let nodes: Vec<_> = (0..10)
        .map(|_| {
            let store = store_at(&db.server.url(), POLL);
            tokio::spawn(async move { store.migrate().await })
        })
        .collect();
    for node in nodes {
        node.await.unwrap().unwrap();
    }
    writes.await.unwrap();
    let resets =
        "SELECT count(*) FROM api_key_changes WHERE key_prefix IS NULL AND user_id IS NULL";
    assert_eq!(db.number(resets).await, 1);
    assert!(recorder.all().await.contains(&Change::Reset));
    let node = caches(Authenticator::new(store_at(&db.server.url(), POLL)), &key).await;
    db.run(&key.revoke()).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
}

#[tokio::test]
async fn tables_in_parts_are_rejected_before_anything_is_changed() {
    let parts = [
        (
            "CREATE TABLE users (id BIGINT PRIMARY KEY, email TEXT);
            CREATE TABLE api_keys (id BIGINT PRIMARY KEY, user_id BIGINT, key_prefix TEXT, key_hash TEXT)
                PARTITION BY HASH (id);
            CREATE TABLE part PARTITION OF api_keys FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
            "api_keys",
        ),
        (
            "CREATE TABLE users (id BIGINT PRIMARY KEY, email TEXT); CREATE TABLE part () INHERITS (users);
            CREATE TABLE api_keys (id BIGINT PRIMARY KEY, user_id BIGINT, key_prefix TEXT, key_hash TEXT)",
            "users",
        ),
    ];
    for (tables, table) in parts {
        let server = Postgres::start();
        let admin = server.client().await;
        run(&admin, tables).await;
        let before = schema(&admin).await;
        let error = store_at(&server.url(), POLL).migrate().await.unwrap_err();
        let MigrateError::NotAdoptable(faults) = &error else { panic!("{error:?}") };
        assert_eq!((faults.len(), faults[0].table.as_str()), (1, table), "{error}");
        assert!(error.to_string().contains("partitioned or has child tables"), "{error}");
        assert_eq!(schema(&admin).await, before);
    }
}

#[tokio::test]
async fn a_reader_that_takes_long_does_not_keep_newer_functions_out() {
    let db = database().await;
    let mut reader = db.server.client().await;
    let reader = reader.transaction().await.unwrap();
    reader.batch_execute("SELECT * FROM api_keys; SELECT * FROM users").await.unwrap();
    db.run("COMMENT ON TABLE api_key_changes IS 'tower-api-key 0 x'").await;
    db.store.migrate().await.unwrap();
    let time_stamps =
        "SELECT (obj_description('api_key_changes'::regclass) LIKE 'tower-api-key 0%')::int";
    assert_eq!(db.number(time_stamps).await, 0);
}

/// Tables in `public`, as the superuser made them, and a role whose first schema is its own.
#[tokio::test]
async fn a_role_whose_first_schema_is_its_own_adopts_tables_in_another_one() {
    let server = Postgres::start();
    let admin = server.client().await;
    run(
        &admin,
        "CREATE ROLE keys LOGIN; CREATE ROLE orm LOGIN; CREATE SCHEMA keys AUTHORIZATION keys;
        GRANT CREATE ON SCHEMA public TO keys; SET ROLE keys;
        CREATE TABLE public.users (id SERIAL PRIMARY KEY, email TEXT);
        CREATE TABLE public.api_keys (id SERIAL PRIMARY KEY, user_id INTEGER REFERENCES public.users (id),
            key_prefix TEXT, key_hash TEXT);
        GRANT ALL ON ALL TABLES IN SCHEMA public TO orm; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO orm;
        RESET ROLE",
    )
    .await;
    let store = store_at(&url_of_role(&server.url(), "keys"), POLL);
    store.migrate().await.unwrap();
    let orm = connect(&url_of_role(&server.url(), "orm")).await;
    run(&orm, "INSERT INTO users (email) VALUES ('a'); UPDATE users SET email = 'b'").await;
    run(&orm, "INSERT INTO api_keys (user_id, key_prefix, key_hash) VALUES (1, 'p', 'x')").await;
    let key = support::database::key_in(&store).await;
    let node = caches(Authenticator::new(store.clone()), &key).await;
    run(&orm, &key.revoke()).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
    assert_eq!(
        number(&admin, "SELECT count(*) FROM pg_class WHERE relnamespace = 'keys'::regnamespace")
            .await,
        0
    );
}

#[tokio::test]
async fn users_and_keys_of_two_schemas_are_adopted_and_a_role_of_one_goes_on() {
    let server = Postgres::start();
    let admin = server.client().await;
    run(
        &admin,
        "CREATE SCHEMA accounts; CREATE SCHEMA keys; CREATE ROLE orm LOGIN;
        CREATE TABLE accounts.users (id SERIAL PRIMARY KEY, email TEXT);
        CREATE TABLE keys.api_keys (id SERIAL PRIMARY KEY, user_id INTEGER REFERENCES accounts.users (id),
            key_prefix TEXT, key_hash TEXT);
        GRANT USAGE ON SCHEMA accounts TO orm; GRANT ALL ON ALL TABLES IN SCHEMA accounts TO orm;
        GRANT ALL ON ALL SEQUENCES IN SCHEMA accounts TO orm",
    )
    .await;
    let url = url_with_path(&server.url(), "accounts,keys");
    let store = store_at(&url, POLL);
    store.migrate().await.unwrap();
    let key = support::database::key_in(&store).await;
    let node = caches(Authenticator::new(store), &key).await;
    // It has no right on the schema of the keys.
    let orm = connect(&url_of_role(&server.url(), "orm")).await;
    run(&orm, "INSERT INTO accounts.users (email) VALUES ('a')").await;
    run(&orm, &format!("UPDATE accounts.users SET is_active = FALSE WHERE id = {}", key.owner))
        .await;
    is_denied(&node, &key, InvalidKey::OwnerInactive).await;
    run(&orm, "DELETE FROM accounts.users WHERE email = 'a'").await;
}
