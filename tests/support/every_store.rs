//! One suite for all stores.

/// Runs each behaviour on each store.
macro_rules! on_every_store {
    ($($behaviour:ident)*) => {
        mod memory {
            $(#[tokio::test] async fn $behaviour() { super::$behaviour(::tower_api_key::MemoryStore::new()).await; })*
        }
        mod sqlite_in_memory {
            $(#[tokio::test] async fn $behaviour() {
                let store = ::tower_api_key::SqliteStore::in_memory().unwrap();
                store.migrate().await.unwrap();
                super::$behaviour(store).await;
            })*
        }
        mod sqlite_file {
            $(#[tokio::test(flavor = "multi_thread")] async fn $behaviour() {
                let folder = tempfile::tempdir().unwrap();
                let store = ::tower_api_key::SqliteStore::open(folder.path().join("keys.db")).unwrap();
                store.migrate().await.unwrap();
                super::$behaviour(store).await;
            })*
        }
        mod postgres {
            $(#[tokio::test] async fn $behaviour() {
                let server = $crate::support::servers::Postgres::start();
                let store = ::tower_api_key::PostgresStore::builder(&server.url()).max_connections(2).build();
                let store = store.unwrap();
                store.migrate().await.unwrap();
                super::$behaviour(store).await;
            })*
        }
        mod replica_of_memory {
            $(#[tokio::test] async fn $behaviour() {
                let store = ::tower_api_key::Replica::new(::tower_api_key::MemoryStore::new()).unwrap();
                store.loaded().await;
                super::$behaviour(store).await;
            })*
        }
        mod replica_of_sqlite {
            $(#[tokio::test(flavor = "multi_thread")] async fn $behaviour() {
                let store = ::tower_api_key::SqliteStore::in_memory().unwrap();
                store.migrate().await.unwrap();
                let store = ::tower_api_key::Replica::new(store).unwrap();
                store.loaded().await;
                super::$behaviour(store).await;
            })*
        }
        mod replica_of_postgres {
            #[tokio::test(flavor = "multi_thread")] async fn all() {
                let server = $crate::support::servers::Postgres::start();
                let admin = server.client().await;
                $({
                    let database = stringify!($behaviour);
                    admin.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
                    let url = server.database_url(database);
                    let store = ::tower_api_key::PostgresStore::new(&url).unwrap();
                    store.migrate().await.unwrap();
                    let store = ::tower_api_key::Replica::new(store).unwrap();
                    store.loaded().await;
                    Box::pin(super::$behaviour(store)).await;
                })*
            }
        }
        mod postgres_on_many_threads {
            #[tokio::test(flavor = "multi_thread")] async fn all() {
                let server = $crate::support::servers::Postgres::start();
                let admin = server.client().await;
                $({
                    let database = stringify!($behaviour);
                    admin.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
                    let url = server.database_url(database);
                    let store = ::tower_api_key::PostgresStore::new(&url).unwrap();
                    store.migrate().await.unwrap();
                    // Boxed: together, the futures would overflow the stack.
                    Box::pin(super::$behaviour(store)).await;
                })*
            }
        }
    };
}

pub(crate) use on_every_store;
