//! The servers that tests start are private, can be frozen, killed and restored, and go away; and the network
//! in front of them does what the test orders.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use crate::support::{
    proxy::Proxy,
    servers::{Postgres, Redis, RedisCluster, RedisSentinel, wait_for},
};

/// A client that sends `PING` to Redis.
struct Pinging(TcpStream);

impl Pinging {
    fn connect(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self(stream))
    }

    fn ping(&mut self) -> std::io::Result<String> {
        self.0.write_all(b"PING\r\n")?;
        self.read()
    }

    fn read(&mut self) -> std::io::Result<String> {
        let mut answer = [0; 7];
        self.0.read_exact(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn ping(port: u16) -> std::io::Result<String> {
    Pinging::connect(port)?.ping()
}

fn timed_out(result: &std::io::Result<String>) -> bool {
    matches!(result, Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()))
}

#[test]
fn a_redis_server_answers_freezes_thaws_and_leaves_nothing_behind() {
    let redis = Redis::start();
    assert_eq!(ping(redis.port()).unwrap(), "+PONG\r\n");
    assert!(redis.answers());
    redis.freeze();
    assert!(timed_out(&ping(redis.port())));
    assert!(!redis.answers());
    redis.thaw();
    wait_for("Redis to thaw", || ping(redis.port()).is_ok());

    let (process, folder) =
        (PathBuf::from(format!("/proc/{}", redis.process_id())), redis.folder().to_owned());
    assert!(process.exists() && folder.exists());
    drop(redis);
    assert!(!process.exists() && !folder.exists());
}

#[test]
fn a_redis_server_loses_what_its_snapshot_does_not_hold_when_it_ends() {
    let mut redis = Redis::start();
    let port = redis.port();
    assert_eq!(redis.command(&["SET", "old", "1"]), "OK");
    redis.save_snapshot();
    assert_eq!(redis.command(&["SET", "new", "1"]), "OK");

    redis.stop();
    assert_eq!(ping(port).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    redis.start_again();
    assert_eq!(redis.command(&["DBSIZE"]), "0");

    redis.command(&["SET", "new", "1"]);
    redis.kill();
    redis.start_again();
    assert_eq!((redis.port(), redis.command(&["DBSIZE"])), (port, "0".to_owned()));

    redis.command(&["SET", "new", "1"]);
    redis.start_again_from_snapshot();
    assert_eq!(redis.command(&["MGET", "old", "new"]), "1\n(nil)");
    redis.kill();
    redis.start_again();
    assert_eq!(redis.command(&["DBSIZE"]), "0");
}

#[test]
fn a_redis_server_takes_settings_and_counts_commands() {
    let redis = Redis::with_settings(&["requirepass=sesame", "maxmemory=2mb"]);
    assert_eq!(redis.url(), format!("redis://:sesame@127.0.0.1:{}/", redis.port()));
    assert_eq!(ping(redis.port()).unwrap(), "-NOAUTH");
    assert_eq!(redis.command(&["CONFIG", "GET", "maxmemory"]), "maxmemory\n2097152");
    assert_eq!(redis.command(&["GET"]), "-ERR wrong number of arguments for 'get' command");

    redis.command(&["CONFIG", "RESETSTAT"]);
    for _ in 0..3 {
        assert_eq!(redis.command(&["GET", "nothing"]), "(nil)");
    }
    let counts = redis.command_counts();
    assert_eq!((counts.get("get"), counts.get("set")), (Some(&3), None));
}

#[test]
fn a_redis_server_speaks_tls() {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "the authority");
    let root = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &issuer).unwrap().pem();

    let redis = Redis::with_tls(&certificate, &key.serialize_pem(), &root);
    assert_eq!(redis.url(), format!("rediss://127.0.0.1:{}/", redis.port()));
    assert_eq!(redis.command(&["PING"]), "PONG");
    assert!(ping(redis.port()).is_err());
    let mut client = Command::new("redis-cli");
    client.args(["-p", &redis.port().to_string(), "--tls", "--cacert"]);
    client.arg(redis.folder().join("tls-ca-cert-file")).arg("PING");
    assert_eq!(client.output().unwrap().stdout, b"PONG\n");
}

#[test]
fn a_cluster_serves_a_slot_again_after_its_master_was_killed() {
    let mut cluster = RedisCluster::start();
    assert_eq!(cluster.urls().len(), 6);
    assert_eq!(cluster.slot_of("key"), 12539);
    assert_eq!(cluster.command("key", &["SET", "key", "1"]), "OK");
    let elsewhere =
        cluster.nodes().iter().find(|node| node.port() != cluster.master_of("key").port());
    assert!(elsewhere.unwrap().command(&["GET", "key"]).starts_with("-MOVED 12539"));
    wait_for("the replica to have it", || cluster.command_counts().get("set") == Some(&2));

    let killed = cluster.kill_master_of("key");
    cluster.wait_until_ok();
    assert_ne!(cluster.master_of("key").port(), killed);
    assert_eq!(cluster.command("key", &["GET", "key"]), "1");
    assert_eq!(cluster.command("key", &["SET", "key", "2"]), "OK");

    cluster.start_killed_again();
    cluster.wait_until_ok();
    let old = cluster.nodes().iter().find(|node| node.port() == killed).unwrap();
    assert!(old.command(&["ROLE"]).starts_with("slave"));
    assert_ne!(cluster.master_of("key").port(), killed);
    let folders: Vec<_> = cluster.nodes().iter().map(|node| node.folder().to_owned()).collect();
    drop(cluster);
    assert_gone(&folders);
}

#[test]
fn a_cluster_replaces_a_frozen_master_which_follows_once_thawed() {
    let cluster = RedisCluster::start();
    let frozen = cluster.master_of("key");
    frozen.freeze();
    cluster.wait_until_ok();
    assert_eq!(cluster.command("key", &["SET", "key", "1"]), "OK");
    frozen.thaw();
    cluster.wait_until_ok();
    assert!(frozen.command(&["ROLE"]).starts_with("slave"));
    assert_eq!(cluster.command("key", &["GET", "key"]), "1");
}

#[test]
fn sentinels_replace_a_killed_master() {
    let mut redis = RedisSentinel::start();
    assert_eq!((redis.sentinel_urls().len(), redis.master_name()), (3, "the-master"));
    assert_eq!(redis.command(&["SET", "key", "1"]), "OK");
    wait_for("the replicas to have it", || {
        redis.nodes().iter().all(|node| node.command(&["GET", "key"]) == "1")
    });
    let killed = redis.kill_master();
    redis.wait_for_new_master();
    assert_ne!(redis.master().port(), killed);
    assert_eq!(redis.command(&["GET", "key"]), "1");
    assert_eq!(redis.command(&["SET", "key", "2"]), "OK");

    redis.bring_back_lost_master();
    redis.wait_for_new_master();
    assert_eq!(redis.lost_master().command(&["GET", "key"]), "2");
    let servers = redis.nodes().iter().chain(redis.sentinels());
    let folders: Vec<_> = servers.map(|server| server.folder().to_owned()).collect();
    assert_eq!(folders.len(), 6);
    drop(redis);
    assert_gone(&folders);
}

#[test]
fn sentinels_replace_a_frozen_master_which_loses_what_was_written_to_it_alone() {
    let mut redis = RedisSentinel::start();
    let frozen = redis.freeze_master();
    redis.wait_for_new_master();
    assert_ne!(redis.master().port(), frozen);
    assert_eq!(redis.command(&["SET", "key", "new"]), "OK");
    redis.bring_back_lost_master();
    let reply = redis.lost_master().command(&["SET", "key", "old"]);
    assert!(reply == "OK" || reply.starts_with("-READONLY"), "{reply}");
    redis.wait_for_new_master();
    assert_eq!(redis.lost_master().command(&["GET", "key"]), "new");
}

#[test]
fn a_postgresql_server_goes_away_even_after_a_panic() {
    let mut folder = PathBuf::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let postgres = Postgres::start();
        folder = postgres.folder().to_owned();
        assert!(folder.join("data/postmaster.pid").exists());
        panic!("a test fails");
    }));
    assert!(panicked.is_err());
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_postgresql_server_keeps_what_was_committed_when_it_is_killed_and_nothing_newer_than_its_copy()
 {
    let mut postgres = Postgres::start();
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE notes (note text); INSERT INTO notes VALUES ('old')")
        .await
        .unwrap();
    postgres.save_copy();

    let client = postgres.client().await;
    client.batch_execute("INSERT INTO notes VALUES ('new')").await.unwrap();
    postgres.kill();
    assert!(client.batch_execute("SELECT 1").await.is_err());
    postgres.start_again();
    assert_eq!(notes(&postgres).await, ["new", "old"]);

    postgres.start_again_from_copy();
    assert_eq!(notes(&postgres).await, ["old"]);
    postgres.kill();
    postgres.start_again_from_copy();
    assert_eq!(notes(&postgres).await, ["old"]);
}

async fn notes(postgres: &Postgres) -> Vec<String> {
    let rows = postgres.client().await.query("SELECT note FROM notes ORDER BY note", &[]).await;
    rows.unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn a_killed_postgresql_server_leaves_no_process_and_no_shared_memory_behind() {
    let mut postgres = Postgres::start();
    let lock = std::fs::read_to_string(postgres.folder().join("data/postmaster.pid")).unwrap();
    let segment = lock.lines().nth(6).unwrap().split_whitespace().nth(1).unwrap().to_owned();
    assert!(shared_memory().contains(&segment));
    let folder = postgres.folder().to_str().unwrap().to_owned();
    assert!(!processes_of(&folder).is_empty());
    postgres.kill();
    assert_eq!(processes_of(&folder), Vec::<String>::new());
    assert!(!shared_memory().contains(&segment));
}

fn shared_memory() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    table.lines().filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned())).collect()
}

/// A server's command line names its folder.
fn assert_gone(folders: &[PathBuf]) {
    for folder in folders {
        assert_eq!(processes_of(folder.to_str().unwrap()), Vec::<String>::new());
        assert!(!folder.exists());
    }
}

/// The command lines that name this folder.
fn processes_of(folder: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    lines
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .filter(|line| line.contains(folder))
        .collect()
}

#[test]
fn a_proxy_passes_delays_and_counts() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.port());
    assert_eq!(proxy.url(&redis.url()), format!("redis://127.0.0.1:{}/", proxy.port()));
    let mut client = Pinging::connect(proxy.port()).unwrap();
    assert_eq!(client.ping().unwrap(), "+PONG\r\n");
    assert_eq!((proxy.connections(), proxy.open_connections()), (1, 1));
    assert_eq!((proxy.bytes_to_server(), proxy.bytes_to_client()), (6, 7));

    proxy.delay(Duration::from_millis(50));
    let asked = Instant::now();
    assert_eq!(client.ping().unwrap(), "+PONG\r\n");
    assert!(asked.elapsed() >= Duration::from_millis(100));
    drop(client);
    wait_for("the proxy to notice", || proxy.open_connections() == 0);
}

#[test]
fn a_black_hole_holds_everything_back_until_it_heals() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.port());
    let mut old = Pinging::connect(proxy.port()).unwrap();
    old.ping().unwrap();
    redis.command(&["CONFIG", "RESETSTAT"]);
    proxy.black_hole();
    let mut new = Pinging::connect(proxy.port()).unwrap();
    assert!(timed_out(&old.ping()) && timed_out(&new.ping()));
    assert_eq!(redis.command_counts().get("ping"), None);

    proxy.pass();
    assert_eq!(
        (old.read().unwrap(), new.read().unwrap()),
        ("+PONG\r\n".into(), "+PONG\r\n".into())
    );
}

#[test]
fn a_proxy_refuses_and_resets_connections() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.port());
    let mut client = Pinging::connect(proxy.port()).unwrap();
    client.ping().unwrap();
    proxy.reset();
    assert_eq!(client.read().unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut client = Pinging::connect(proxy.port()).unwrap();
    assert_eq!(client.ping().unwrap(), "+PONG\r\n");

    proxy.refuse();
    assert_eq!(proxy.open_connections(), 0);
    assert_eq!(client.read().unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(ping(proxy.port()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    proxy.pass();
    assert_eq!(ping(proxy.port()).unwrap(), "+PONG\r\n");
}

#[test]
fn a_proxy_corrupts_answers_and_swallows_them_after_the_server_has_acted() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.port());
    proxy.corrupt();
    let mut client = Pinging::connect(proxy.port()).unwrap();
    let mut answer = [0; 7];
    client.0.write_all(b"PING\r\n").unwrap();
    client.0.read_exact(&mut answer).unwrap();
    assert_eq!(answer.map(|byte| !byte), *b"+PONG\r\n");
    proxy.pass();

    proxy.swallow_answer_to("INCR");
    assert_eq!(client.ping().unwrap(), "+PONG\r\n");
    client.0.write_all(b"INCR counter\r\n").unwrap();
    assert_eq!(client.read().unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!((proxy.swallowed(), redis.command(&["GET", "counter"])), (1, "1".to_owned()));

    proxy.swallow_next_answer();
    assert!(ping(proxy.port()).is_err());
    assert_eq!(ping(proxy.port()).unwrap(), "+PONG\r\n");
}

#[tokio::test(start_paused = true)]
async fn a_postgresql_client_goes_through_a_proxy_whose_clock_runs_on_when_the_test_stops_its_own()
{
    let postgres = Postgres::start();
    let proxy = Proxy::start(postgres.port());
    proxy.delay(Duration::from_millis(20));
    let url = proxy.url(&postgres.tcp_url(""));
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(client.query_one("SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);
    proxy.reset();
    assert!(client.query_one("SELECT 1", &[]).await.is_err());
}

#[test]
fn a_proxy_goes_away_with_its_connections() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.port());
    let port = proxy.port();
    let mut client = Pinging::connect(port).unwrap();
    client.ping().unwrap();
    drop(proxy);
    assert!(!timed_out(&client.read()));
    assert_eq!(ping(port).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}
