//! What another service pays for the triggers on its tables.
//!
//! `cargo bench --bench adoption` starts a PostgreSQL of its own with two databases that have the same tables of
//! another service; one of them is adopted. 48 connections insert users (sign-ups), update a column that this crate
//! does not read (the time of the last log-in), and issue keys, in turns on the one database and the other. Each
//! ratio is the median over the rounds of the throughput after adoption over the one before. Notifications are
//! counted: users without keys cause none. The last line is JSON.

mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use figures::median_ratio;
use servers::Postgres;
use tokio::task::JoinSet;
use tokio_postgres::{AsyncMessage, Client, NoTls};
use tower_api_key::PostgresStore;

const CLIENTS: usize = 48;
/// As many as `TABLES` makes.
const USERS: i32 = 10_000;
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_secs(2);

const TABLES: &str = "
    CREATE TABLE users (
        id SERIAL PRIMARY KEY, email VARCHAR(255) NOT NULL UNIQUE, hashed_password VARCHAR(255),
        role VARCHAR(20) NOT NULL DEFAULT 'user', is_active BOOLEAN DEFAULT TRUE,
        created_at TIMESTAMP NOT NULL DEFAULT now(), last_login_at TIMESTAMP
    );
    CREATE TABLE api_keys (
        id SERIAL PRIMARY KEY, user_id INTEGER NOT NULL REFERENCES users (id),
        name VARCHAR(100) NOT NULL DEFAULT '', key_prefix VARCHAR(20) NOT NULL,
        key_hash VARCHAR(255) NOT NULL UNIQUE, is_active BOOLEAN DEFAULT TRUE
    );
    CREATE INDEX ON api_keys (key_prefix);
    INSERT INTO users (email) SELECT 'user ' || n FROM generate_series(1, 10000) AS n";

const WORK: [(&str, &str, &str); 3] = [
    (
        "insert_ratio",
        "sign-ups",
        "INSERT INTO users (email) SELECT gen_random_uuid()::text WHERE $1::integer > 0",
    ),
    ("update_ratio", "log-ins", "UPDATE users SET last_login_at = now() WHERE id = $1"),
    (
        "issue_ratio",
        "keys issued",
        "INSERT INTO api_keys (user_id, key_prefix, key_hash)
        SELECT $1, left(r, 10), r FROM (SELECT gen_random_uuid()::text) AS s (r)",
    ),
];

#[tokio::main]
async fn main() {
    let postgres = Postgres::with_settings(&["max_connections=200", "shared_buffers=128MB"]);
    let admin = postgres.client().await;
    let mut databases = Vec::new();
    for name in ["before", "after"] {
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let url = postgres.database_url(name);
        connect(&url).await.batch_execute(TABLES).await.unwrap();
        if name == "after" {
            PostgresStore::new(&url).unwrap().migrate().await.unwrap();
        }
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(Arc::new(connect(&url).await));
        }
        databases.push(clients);
    }
    let notified = listen(&postgres.database_url("after")).await;

    println!("{CLIENTS} connections, transactions a second   before adoption    after     ratio");
    let mut json = Vec::new();
    for (key, name, sql) in WORK {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let notified_before = notified.load(Ordering::Relaxed);
        for round in 0..ROUNDS {
            for at in [round % 2, 1 - round % 2] {
                let rate = throughput(&databases[at], sql).await;
                assert!(rate > 0.0, "nothing was done: {name}");
                if at == 0 { before.push(rate) } else { after.push(rate) }
            }
        }
        let ratio = median_ratio(&after, &before);
        let (b, a) = (figures::median(&before), figures::median(&after));
        println!("  {name:<40} {b:>12.0} {a:>12.0} {ratio:>9.2}");
        json.push(format!("\"{key}\":{ratio:.3}"));
        let notifications = notified.load(Ordering::Relaxed) - notified_before;
        let expects_some = name == "keys issued";
        assert_eq!(notifications > 0, expects_some, "{notifications} notifications of {name}");
    }
    println!("{{{}}}", json.join(","));
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Counts notifications of changes.
async fn listen(url: &str) -> Arc<AtomicU64> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if matches!(message, AsyncMessage::Notification(_)) {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    client.batch_execute("LISTEN api_key_changes").await.unwrap();
    // It listens for as long as the client lives.
    std::mem::forget(client);
    count
}

async fn throughput(clients: &[Arc<Client>], sql: &'static str) -> f64 {
    let is_over = Arc::new(AtomicBool::new(false));
    let mut work = JoinSet::new();
    let begin = Instant::now();
    for (at, client) in clients.iter().enumerate() {
        let (client, is_over) = (Arc::clone(client), Arc::clone(&is_over));
        work.spawn(async move {
            let statement = client.prepare(sql).await.unwrap();
            let (mut count, mut user) = (0_u32, at as i32);
            while !is_over.load(Ordering::Relaxed) {
                // Scattered over the users, another one each time.
                user = (user + 7919) % USERS;
                assert_eq!(client.execute(&statement, &[&(user + 1)]).await.unwrap(), 1);
                count += 1;
            }
            f64::from(count)
        });
    }
    tokio::time::sleep(ROUND).await;
    is_over.store(true, Ordering::Relaxed);
    let count: f64 = work.join_all().await.into_iter().sum();
    count / begin.elapsed().as_secs_f64()
}
