//! The servers that tests start are private, can be frozen, and go away.

mod support;

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::Duration,
};

use support::servers::{Postgres, Redis, wait_for};

fn ping(redis: &Redis) -> std::io::Result<String> {
    let mut socket = UnixStream::connect(redis.socket())?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    socket.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    socket.read_exact(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn a_redis_server_answers_freezes_thaws_and_leaves_nothing_behind() {
    let redis = Redis::start();
    assert_eq!(ping(&redis).unwrap(), "+PONG\r\n");
    redis.freeze();
    let frozen = ping(&redis).unwrap_err().kind();
    assert!(matches!(frozen, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{frozen:?}");
    redis.thaw();
    wait_for("Redis to thaw", || ping(&redis).is_ok());

    let (process, socket) =
        (PathBuf::from(format!("/proc/{}", redis.process_id())), redis.socket());
    drop(redis);
    assert!(!process.exists() && !socket.exists());
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
