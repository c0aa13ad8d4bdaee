//! What a caller sees when PostgreSQL fails, hangs, or requires TLS.

use std::{
    future::Future,
    pin::pin,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use tower_api_key::{
    AuthContext, Authenticator, Denial, KeyManager, NewKey, PostgresStore, StoreError,
    backend::MigrateError,
    denial::InvalidKey,
    error::StoreErrorKind,
    management::ManageError,
    store::{KeyRepository, KeyStore},
};

use crate::support::{self, eventually::eventually, servers::Postgres, stores::question};

struct Fixture {
    server: Postgres,
    store: PostgresStore,
    key: String,
}

/// A migrated database with one key, behind a pool of one connection.
async fn fixture() -> Fixture {
    let server = Postgres::start();
    let store = PostgresStore::builder(&server.url())
        .max_connections(1)
        .timeout(Duration::from_millis(1500))
        .statement_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    Fixture { server, store, key: issued.expose_secret().to_owned() }
}

impl Fixture {
    async fn ask(&self) -> Result<AuthContext, Denial> {
        Authenticator::new(self.store.clone()).authenticate(&self.key).await
    }

    async fn unavailable(&self) -> StoreError {
        match self.ask().await {
            Err(Denial::Unavailable(error)) => error,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_a_503_and_not_a_401_until_it_is_back() {
    let mut fixture = fixture().await;
    assert!(fixture.ask().await.is_ok());
    fixture.server.stop();
    let error = fixture.unavailable().await;
    assert_eq!((error.kind(), error.is_transient()), (StoreErrorKind::Unavailable, true));
    assert!(std::error::Error::source(&error).is_some());
    fixture.server.start_again();
    assert!(fixture.ask().await.is_ok());
}

#[tokio::test]
async fn a_key_that_is_cached_goes_on_working_while_the_server_is_down_and_is_revoked_after() {
    let mut fixture = fixture().await;
    let authenticator = Authenticator::new(fixture.store.clone());
    let prefix = authenticator.authenticate(&fixture.key).await.unwrap().key().prefix.clone();
    fixture.server.stop();
    assert!(authenticator.authenticate(&fixture.key).await.is_ok());
    let unknown = authenticator.authenticate(&support::unknown_key()).await.unwrap_err();
    assert!(matches!(unknown, Denial::Unavailable(_)), "{unknown:?}");
    assert!(authenticator.health().is_store_failing);
    fixture.server.start_again();
    // The feed was cut off when this was done, perhaps.
    let revoke = format!("UPDATE api_keys SET is_active = false WHERE key_prefix = '{prefix}'");
    fixture.server.client().await.batch_execute(&revoke).await.unwrap();
    eventually("the feed has caught up", async || {
        match authenticator.authenticate(&fixture.key).await {
            Ok(_) => false,
            Err(Denial::InvalidKey(InvalidKey::Revoked)) => true,
            Err(denial) => panic!("{denial:?}"),
        }
    })
    .await;
}

#[tokio::test]
async fn connections_that_died_in_the_pool_are_not_felt() {
    let mut fixture = fixture().await;
    assert!(fixture.ask().await.is_ok());
    fixture.server.stop();
    fixture.server.start_again();
    assert!(fixture.ask().await.is_ok(), "the first request after a restart");

    let operator = fixture.server.client().await;
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'tower-api-key'";
    operator.batch_execute(others).await.unwrap();
    let first = fixture.ask().await;
    assert!(first.is_ok(), "the first request after the connections were ended: {first:?}");

    let pool_of_eight = PostgresStore::builder(&fixture.server.url()).max_connections(8).build();
    // Four at once, each over a connection of its own: one authenticator would ask once for all of them,
    // and then never again.
    let (pool_of_eight, lookup) = (pool_of_eight.unwrap(), question(&fixture.key).await);
    let ask = async || {
        let ask = || pool_of_eight.resolve(&lookup);
        let (a, b, c, d) = tokio::join!(ask(), ask(), ask(), ask());
        for answer in [a, b, c, d] {
            assert!(answer.unwrap().record().is_some());
        }
    };
    ask().await;
    fixture.server.stop();
    fixture.server.start_again();
    ask().await;
}

#[tokio::test]
async fn a_frozen_server_costs_no_more_than_the_deadline() {
    let fixture = fixture().await;
    assert!(fixture.ask().await.is_ok());
    fixture.server.freeze();
    let asked = Instant::now();
    assert_eq!(fixture.unavailable().await.kind(), StoreErrorKind::Timeout);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    fixture.server.thaw();
    assert!(fixture.ask().await.is_ok());
}

#[tokio::test]
async fn a_statement_that_hangs_is_ended_by_the_server_and_the_connection_goes_on() {
    let fixture = fixture().await;
    let mut other = fixture.server.client().await;
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE api_keys").await.unwrap();
    let error = fixture.unavailable().await;
    assert!(error.is_transient(), "{error:?}");
    lock.rollback().await.unwrap();
    assert!(fixture.ask().await.is_ok());
}

#[tokio::test]
async fn a_query_that_is_dropped_halfway_leaves_the_pool_whole() {
    let fixture = fixture().await;
    let mut other = fixture.server.client().await;
    // In a transaction, the view of what others do stands still.
    let observer = fixture.server.client().await;
    // The store's own future: an authenticator's look-up goes on when its caller is gone.
    let lookup = question(&fixture.key).await;
    for _ in 0..3 {
        let lock = other.transaction().await.unwrap();
        lock.batch_execute("LOCK TABLE api_keys").await.unwrap();
        {
            let mut ask = pin!(fixture.store.resolve(&lookup));
            let waiting = "SELECT count(*) FROM pg_stat_activity
                WHERE application_name = 'tower-api-key' AND wait_event_type = 'Lock'";
            loop {
                let poll = ask.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                assert!(poll.is_pending());
                // The server says that the query has reached it and waits.
                if observer.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 1 {
                    break;
                }
            }
        }
        lock.rollback().await.unwrap();
        let answer = fixture.store.resolve(&lookup).await;
        let answer = answer.expect("there is one connection in the pool, and it is free");
        assert!(answer.record().is_some());
    }
}

#[tokio::test]
async fn a_migration_that_is_dropped_halfway_or_meets_a_frozen_server_can_be_done_again() {
    let mut server = Postgres::start();
    let store =
        PostgresStore::builder(&server.url()).timeout(Duration::from_secs(1)).build().unwrap();
    let (mut other, observer) = (server.client().await, server.client().await);
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("SELECT pg_advisory_xact_lock(x'746f7765722d6170'::bigint)").await.unwrap();
    {
        let mut migration = pin!(store.migrate());
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'";
        loop {
            assert!(migration.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            if observer.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 1 {
                break;
            }
        }
    }
    lock.rollback().await.unwrap();
    store.migrate().await.unwrap();

    server.freeze();
    let Err(MigrateError::Store(error)) = store.migrate().await else { panic!() };
    assert_eq!(error.kind(), StoreErrorKind::Timeout);
    server.thaw();
    store.migrate().await.unwrap();
    server.stop();
    assert!(store.migrate().await.is_err());
}

#[tokio::test]
async fn a_connection_to_what_has_become_a_standby_is_given_up() {
    let fixture = fixture().await;
    let operator = fixture.server.client().await;
    let manager = KeyManager::new(fixture.store.clone());
    let read_only = "ALTER DATABASE postgres SET default_transaction_read_only = ";
    operator.batch_execute(&format!("{read_only} on")).await.unwrap();
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'tower-api-key'";
    operator.batch_execute(end).await.unwrap();
    assert!(fixture.ask().await.is_ok());
    let Err(ManageError::Store(error)) = manager.create_user("bob@example.com", "user").await
    else {
        panic!()
    };
    assert!(error.is_transient(), "{error:?}");
    // The connection to what was a standby does not go back to the pool.
    operator
        .batch_execute(&format!("SET default_transaction_read_only = off; {read_only} off"))
        .await
        .unwrap();
    manager.create_user("bob@example.com", "user").await.unwrap();
}

#[tokio::test]
async fn a_missing_table_is_a_503_that_says_so_in_the_error() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    let authenticator = Authenticator::new(store.clone());
    let key = fixture().await.key;
    let Err(Denial::Unavailable(error)) = authenticator.authenticate(&key).await else { panic!() };
    assert_eq!((error.kind(), error.is_transient()), (StoreErrorKind::Rejected, false));
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("api_keys"), "{source}");
}

#[tokio::test]
async fn a_url_that_cannot_be_used_is_a_typed_error_without_the_password() {
    for url in [
        "",
        "postgres",
        "mysql://app:hunter2@localhost/app",
        "postgres://app:hunter2@localhost:not-a-port/app",
        "postgres://app:hunter2@localhost/app?sslmode=sometimes",
        "postgres://app:hunter2@localhost/app?no_such_parameter=1",
        "postgres://app:hunter2@localhost/app?sslmode=verify-full&sslrootcert=/no/such/file",
    ] {
        let error = PostgresStore::new(url).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        assert!(error.to_string().starts_with("the PostgreSQL URL can't be used: "), "{error}");
    }
    let store = PostgresStore::new("postgres://app:hunter2@localhost/app?sslmode=disable").unwrap();
    assert!(!format!("{store:?}").contains("hunter2"));
}

/// A server with a certificate for `localhost` alone, and the authority that signed it.
fn tls_server() -> (Postgres, tempfile::NamedTempFile) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(root.path(), authority.self_signed(&authority_key).unwrap().pem()).unwrap();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &issuer).unwrap().pem();
    let files = [("ssl_cert_file", &*certificate), ("ssl_key_file", &*key.serialize_pem())];
    (Postgres::with_files(&files, &["ssl=on"]), root)
}

#[tokio::test]
async fn sslmode_means_what_it_means_in_libpq() {
    let (server, root) = tls_server();
    let connects = async |host: &str, parameters: &str| {
        let url = server.tcp_url(parameters).replace("127.0.0.1", host);
        match PostgresStore::new(&url).unwrap().find_key(&1.into()).await {
            Err(error) if error.kind() == StoreErrorKind::Rejected => true, // no tables: it connected
            Err(error) if error.kind() == StoreErrorKind::Unavailable => false,
            other => panic!("{other:?}"),
        }
    };
    let with_root = |mode: &str| format!("sslmode={mode}&sslrootcert={}", root.path().display());
    for mode in ["sslmode=disable", "sslmode=allow", "sslmode=prefer", "sslmode=require", ""] {
        assert!(connects("127.0.0.1", mode).await, "{mode}");
    }
    for (host, parameters, expected) in [
        ("localhost", with_root("verify-full"), true),
        ("127.0.0.1", with_root("verify-full"), false),
        ("127.0.0.1", with_root("verify-ca"), true),
        ("127.0.0.1", with_root("require"), true),
        ("localhost", "sslmode=verify-full".to_owned(), false),
        ("localhost", "sslmode=verify-ca&sslrootcert=system".to_owned(), false),
    ] {
        assert_eq!(connects(host, &parameters).await, expected, "{host} {parameters}");
    }
    let encrypted = async |parameters: &str| {
        let store = PostgresStore::new(&server.tcp_url(parameters)).unwrap();
        let _ = store.find_key(&1.into()).await;
        let query = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
            WHERE ssl AND application_name = 'tower-api-key'";
        server.client().await.query_one(query, &[]).await.unwrap().get::<_, i64>(0)
    };
    assert_eq!((encrypted("sslmode=disable").await, encrypted("").await > 0), (0, true));

    let plain = Postgres::start();
    let required = PostgresStore::new(&plain.tcp_url("sslmode=require")).unwrap();
    assert_eq!(required.find_key(&1.into()).await.unwrap_err().kind(), StoreErrorKind::Unavailable);
    let preferred = PostgresStore::new(&plain.tcp_url("sslmode=prefer")).unwrap();
    assert_eq!(preferred.find_key(&1.into()).await.unwrap_err().kind(), StoreErrorKind::Rejected);
}
