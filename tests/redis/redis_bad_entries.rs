//! Redis that holds, or returns, something else than what was written to it. Every time the store has the last
//! word, and what lies there is good again afterwards.

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};
use tower_api_key::{
    MemoryStore, NewKey, SqliteStore,
    authenticator::AuthenticatorBuilder,
    clock::{Clock, ManualClock},
    denial::InvalidKey,
    key::KeyHash,
    record::KeyRecord,
    redis::RedisState,
    store::{Attribution, CacheSecret, KeyRepository, KeyStore, StoredKey},
};

use crate::support::{
    checks::Checks,
    edit_key,
    fleet::*,
    key_checker::{Outcome, first_chars, scheme},
    log::capture,
    servers::{Port, Redis},
};

/// A node that hits, and the names of the two entries that it hits.
async fn warm(redis: &Redis) -> (Keys<SqliteStore>, Node<SqliteStore>, [String; 2]) {
    let keys = sqlite().await;
    let node = keys.node(redis);
    node.until_hit(&keys.key).await;
    let both = both_under(redis, &keys.record.prefix);
    (keys, node, both)
}

/// The store answers once, and then Redis again.
async fn heals<S: KeyStore + Clone>(node: &Node<S>, key: &str, what: &str) {
    assert_eq!(node.try_key(key).await, (Outcome::Passes, 1), "{what}");
    node.until_hit(key).await;
}

#[tokio::test]
async fn an_entry_that_was_cut_short_is_replaced() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    for name in &both {
        let whole = redis.command(&["STRLEN", name]).parse::<usize>().unwrap();
        let lengths = [0, 1, 3, 4, 5, 24, 25, 104, 105, 106, 136, 137, 138];
        let lengths = lengths.into_iter().chain([whole - 33, whole - 32, whole - 31, whole - 1]);
        for length in lengths.filter(|&length| length < whole) {
            alter(&redis, name, &format!("string.sub(v, 1, {length})"));
            heals(&node, &keys.key, &format!("{length} bytes of {name}")).await;
        }
        for start in [2, 6, 106, whole - 31] {
            alter(&redis, name, &format!("string.sub(v, {start})"));
            heals(&node, &keys.key, &format!("{name} from byte {start}")).await;
        }
        for longer in ["v .. 'x'", "v .. v", "' ' .. v"] {
            alter(&redis, name, longer);
            heals(&node, &keys.key, &format!("{name}: {longer}")).await;
        }
    }
}

#[tokio::test]
async fn an_entry_with_any_byte_changed_is_replaced() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    for name in &both {
        let whole = redis.command(&["STRLEN", name]).parse::<usize>().unwrap();
        // The whole header and the whole MAC, and some of what is between.
        let places = (1..=105).chain((106..=whole - 32).step_by(37)).chain(whole - 31..=whole);
        for place in places {
            let flip = format!(
                "string.sub(v, 1, {}) .. string.char(bit.bxor(string.byte(v, {place}), 1)) .. string.sub(v, {})",
                place - 1,
                place + 1
            );
            alter(&redis, name, &flip);
            heals(&node, &keys.key, &format!("byte {place} of {name}")).await;
        }
    }
}

#[tokio::test]
async fn an_entry_of_another_version_is_replaced() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    let before = r#"'{"api_key_id":1,"is_active":true,"user_role":"admin","key_hash":"$2b$10$x"}'"#;
    for name in &both {
        for other in ["'tak2' .. string.sub(v, 5)", "'tak0' .. string.sub(v, 5)", before, "'valid'"]
        {
            alter(&redis, name, other);
            heals(&node, &keys.key, &format!("{name}: {other}")).await;
        }
    }
}

#[tokio::test]
async fn random_bytes_are_replaced_whatever_they_look_like() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    let nines = "9".repeat(100);
    for name in &both {
        for length in [0, 1, 31, 32, 33, 137, 300, 262_144 - 105, 262_145] {
            for header in ["", "tak1", "tak1s", "tak1t", "tak1v"] {
                let random = format!(
                    "'{header}' .. string.sub(string.rep((function() local t = {{}}; for i = 1, 300 do
                        t[i] = string.char(math.random(0, 255)) end; return table.concat(t) end)(),
                        {length} / 300 + 1), 1, {length})"
                );
                alter(&redis, name, &random);
                heals(&node, &keys.key, &format!("{name}: {header} and {length} bytes")).await;
            }
        }
        // The highest revision that there is, under the secret that there is.
        for header in ["'tak1s'", "'tak1t'", "'tak1v'", "string.sub(v, 1, 5)"] {
            let newest = format!(
                "{header} .. string.sub(v, 6, 25) .. '{}' .. string.sub(v, 106)",
                &nines[..80]
            );
            alter(&redis, name, &newest);
            heals(&node, &keys.key, &format!("{name}: {newest}")).await;
        }
    }
}

#[tokio::test]
async fn an_entry_of_a_secret_that_nobody_has_lets_nobody_in_and_does_not_stay() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    for name in &both {
        for id in [
            "00000000000000000000",
            "00000000000000000007",
            "99999999999999999999",
            "not digits, not digi",
        ] {
            alter(&redis, name, &format!("string.sub(v, 1, 5) .. '{id}' .. string.sub(v, 26)"));
            heals(&node, &keys.key, &format!("{name}: {id}")).await;
        }
    }
}

#[tokio::test]
async fn an_entry_of_an_unknown_secret_and_the_highest_revision_does_not_keep_redis_out_for_good() {
    let redis = Redis::start();
    let (keys, node, [data, _]) = warm(&redis).await;
    let high = "9".repeat(80);
    let newest =
        format!("string.sub(v, 1, 5) .. '00000000000000000000' .. '{high}' .. string.sub(v, 106)");
    alter(&redis, &data, &newest);
    redis.command(&["PERSIST", &data]);
    node.until_hit(&keys.key).await;
}

#[tokio::test]
async fn an_entry_that_was_moved_from_another_key_is_replaced() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    let (other, revoked) = (keys.issue().await, keys.issue().await);
    for key in [&other, &revoked] {
        node.until_hit(key.expose_secret()).await;
    }
    let others = both_under(&redis, &other.record().prefix);
    let of_revoked = both_under(&redis, &revoked.record().prefix);
    let copy = |from: &str, to: &str| {
        assert_eq!(redis.command(&["COPY", from, to, "REPLACE"]), "1");
    };
    // One's data in place of the other's, one's proof, both, and each in the other's place.
    let moves = [
        vec![(&others[0], &both[0])],
        vec![(&others[1], &both[1])],
        vec![(&others[0], &both[0]), (&others[1], &both[1])],
        vec![(&both[1], &both[0])],
        vec![(&both[0], &both[1])],
    ];
    for moved in &moves {
        moved.iter().for_each(|(from, to)| copy(from, to));
        heals(&node, &keys.key, &format!("{moved:?}")).await;
        assert_eq!(
            node.authenticator.authenticate(&keys.key).await.unwrap().key().id,
            keys.record.id
        );
    }
    keys.manager.revoke(&revoked.record().id).await.unwrap();
    node.until_denied(revoked.expose_secret(), InvalidKey::Revoked).await;
    for _ in 0..5 {
        copy(&both[0], &of_revoked[0]);
        copy(&both[1], &of_revoked[1]);
        let outcome = node.try_key(revoked.expose_secret()).await.0;
        assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
    }
}

#[tokio::test]
async fn a_replayed_entry_with_a_higher_revision_written_into_it_brings_nothing_back() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    both.iter().for_each(|name| keep(&redis, name));
    keys.revoke().await;
    node.until_denied(&keys.key, InvalidKey::Revoked).await;
    let fresh = keys.node(&redis);
    for revision in ["00000000000000000099", "18446744073709551615", "99999999999999999999"] {
        for kind in ["n", "t", "v"] {
            both.iter().for_each(|name| replay(&redis, name));
            let raised = format!(
                "'tak1{kind}' .. string.sub(v, 6, 25) .. '{revision}' .. string.sub(v, 46)"
            );
            alter(&redis, &both[0], &raised);
            for node in [&node, &fresh] {
                let outcome = node.try_key(&keys.key).await.0;
                assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked), "{raised}");
            }
        }
    }
}

#[tokio::test]
async fn a_replayed_entry_does_not_bring_back_what_a_key_could_do() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    both.iter().for_each(|name| keep(&redis, name));
    let mut record = keys.record.clone();
    record.scopes = vec!["read".to_owned()];
    edit_key(&keys.store, &record, None).await.unwrap();
    let scopes = async |node: &Node<SqliteStore>| {
        node.authenticator.authenticate(&keys.key).await.unwrap().scopes().to_vec()
    };
    eventually("the change is known", async || scopes(&node).await == ["read"]).await;
    let fresh = keys.node(&redis);
    for _ in 0..10 {
        both.iter().for_each(|name| replay(&redis, name));
        for node in [&node, &fresh] {
            assert_eq!(scopes(node).await, ["read"]);
        }
    }
    node.until_hit(&keys.key).await;
    assert_eq!(scopes(&node).await, ["read"]);
}

#[tokio::test]
async fn an_immortal_entry_ends_when_it_should_have() {
    let redis = Redis::start();
    let (keys, clock) = (Keys::over(MemoryStore::new()).await, clock());
    let node = by_hand(&keys, &redis, &clock);
    node.until_hit(&keys.key).await;
    let both = both_under(&redis, &keys.record.prefix);
    let persist = || both.iter().for_each(|name| drop(redis.command(&["PERSIST", name])));
    persist();
    both.iter().for_each(|name| keep(&redis, name));

    clock.advance(Duration::from_secs(299));
    in_sync(&keys, &node).await;
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
    clock.advance(Duration::from_secs(1));
    in_sync(&keys, &node).await;
    heals(&node, &keys.key, "data after 300 s").await;

    // The proof lives longer, and no longer than that.
    clock.advance(Duration::from_secs(3299));
    in_sync(&keys, &node).await;
    node.asks_the_store(&keys.key).await;
    node.until_hit(&keys.key).await;
    replay(&redis, &both[1]);
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
    clock.advance(Duration::from_secs(1));
    in_sync(&keys, &node).await;
    heals(&node, &keys.key, "proof after 3600 s").await;
    for _ in 0..3 {
        both.iter().for_each(|name| replay(&redis, name));
        heals(&node, &keys.key, "both of an hour ago").await;
    }
}

#[tokio::test]
async fn a_huge_value_is_replaced() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    for name in &both {
        alter(&redis, name, "v .. string.rep('x', 10485760)");
        heals(&node, &keys.key, name).await;
        assert!(redis.command(&["STRLEN", name]).parse::<usize>().unwrap() < 4096);
    }
    assert_eq!(node.cache.state(), RedisState::Up);
}

#[tokio::test]
async fn a_record_that_is_too_large_for_redis_is_read_from_the_store() {
    let redis = Redis::start();
    let (keys, node, _) = warm(&redis).await;
    let large = keys.manager.issue(NewKey::new(keys.user.clone(), "large")).await.unwrap();
    // More than a `KeyManager` accepts, as another service may have it.
    let mut record = large.record().clone();
    record.metadata = serde_json::json!({ "notes": "x".repeat(300_000) });
    edit_key(&keys.store, &record, None).await.unwrap().unwrap();
    for _ in 0..5 {
        node.asks_the_store(large.expose_secret()).await;
    }
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
}

#[tokio::test]
async fn a_value_of_another_type_is_replaced() {
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    for name in &both {
        let others: [&[&str]; 6] = [
            &["RPUSH", name, "a", "b"],
            &["HSET", name, "a", "b"],
            &["SADD", name, "a"],
            &["ZADD", name, "1", "a"],
            &["XADD", name, "*", "a", "b"],
            &["SET", name, "17"],
        ];
        for other in others {
            redis.command(&["DEL", name]);
            assert!(!redis.command(other).starts_with('-'));
            heals(&node, &keys.key, &format!("{other:?}")).await;
        }
    }
    assert_eq!(node.cache.state(), RedisState::Up);
}

#[tokio::test]
async fn redis_that_is_full_costs_nothing_but_the_hits() {
    let redis = Redis::with_settings(&["maxmemory=100kb", "maxmemory-policy=noeviction"]);
    let keys = sqlite().await;
    let node = keys.node(&redis);
    for _ in 0..50 {
        node.asks_the_store(&keys.key).await;
    }
    eventually("it is asked all the same", async || {
        node.asks_the_store(&keys.key).await;
        redis.count("mget") > 20 && redis.count("evalsha") + redis.count("eval") > 20
    })
    .await;
    assert_eq!(node.cache.state(), RedisState::Up);
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    node.until_hit(&keys.key).await;

    redis.command(&["CONFIG", "SET", "maxmemory", "100kb"]);
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
    keys.revoke().await;
    node.until_denied(&keys.key, InvalidKey::Revoked).await;
}

#[tokio::test]
async fn redis_that_became_a_replica_answers_no_worse_than_the_store() {
    let (log, _guard) = capture();
    let redis = Redis::start();
    let (keys, node, both) = warm(&redis).await;
    let others = [keys.issue().await, keys.issue().await, keys.issue().await];
    let dead = Port::claim();
    log.take();
    redis.command(&["REPLICAOF", "127.0.0.1", &dead.number().to_string()]);
    for stale in ["yes", "no"] {
        // With "no", it answers -MASTERDOWN to every command.
        redis.command(&["CONFIG", "SET", "replica-serve-stale-data", stale]);
        for _ in 0..100 {
            assert_eq!(node.try_key(&keys.key).await.0, Outcome::Passes);
            for key in &others {
                assert_eq!(node.try_key(key.expose_secret()).await, (Outcome::Passes, 1));
            }
            tokio::task::yield_now().await;
        }
    }
    both.iter().for_each(|name| keep_nothing(&redis, name));
    keys.revoke().await;
    node.until_denied(&keys.key, InvalidKey::Revoked).await;
    let lines = log.take();
    let warnings = lines.lines().filter(|line| line.contains("WARN")).count();
    assert!(warnings <= 10, "{warnings} warnings:\n{lines}");

    redis.command(&["REPLICAOF", "NO", "ONE"]);
    for key in &others {
        node.until_hit(key.expose_secret()).await;
    }
    let outcome = node.try_key(&keys.key).await.0;
    assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
}

/// A replica takes no writes, so that what lies there stays.
fn keep_nothing(redis: &Redis, name: &str) {
    assert!(redis.command(&["DEL", name]).starts_with('-'));
}

/// Replies of a server that is reachable, but not in order. Whether the link or the data shows it is not
/// what counts: the store answers.
const ERRORS: [&str; 12] = [
    "-LOADING Redis is loading the dataset in memory\r\n",
    "-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
    "-NOAUTH Authentication required.\r\n",
    "-NOPERM this user has no permissions to run the 'mget' command\r\n",
    "-BUSY Redis is busy running a script.\r\n",
    "-MISCONF Redis is configured to save RDB snapshots\r\n",
    "-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    "-CROSSSLOT Keys in request don't hash to the same slot\r\n",
    "-ERR unknown command\r\n",
    "-\r\n",
    "-NOSCRIPT No matching script.\r\n",
];

/// Well-formed, and no answer to what was queried.
const WRONG_TYPES: [&str; 12] = [
    ":5\r\n",
    "+OK\r\n",
    "$-1\r\n",
    "$0\r\n\r\n",
    "*0\r\n",
    "*-1\r\n",
    "*1\r\n$-1\r\n",
    "*9\r\n:1\r\n:2\r\n:3\r\n:4\r\n:5\r\n:6\r\n:7\r\n:8\r\n:9\r\n",
    "*2\r\n*0\r\n*1\r\n*0\r\n",
    "*2\r\n+OK\r\n-ERR no\r\n",
    "*2\r\n$4\r\ntak1\r\n$0\r\n\r\n",
    "*2\r\n$-1\r\n:9223372036854775807\r\n",
];

#[tokio::test]
async fn whatever_redis_says_the_store_answers_and_the_breaker_stays_closed() {
    let keys = sqlite().await;
    for reply in ERRORS.into_iter().chain(WRONG_TYPES) {
        let fake = Fake::start(reply).await;
        let node = Node::new(Counting::over(keys.store.clone()), fake.url());
        eventually("it is asked ten times", async || {
            node.asks_the_store(&keys.key).await;
            fake.asked() >= 10
        })
        .await;
        assert_eq!(node.cache.state(), RedisState::Up, "{reply:?}");
        fake.answer_nothing_known();
        for _ in 0..3 {
            node.asks_the_store(&keys.key).await;
        }
    }
}

#[tokio::test]
async fn a_server_that_speaks_no_redis_or_points_elsewhere_opens_the_breaker() {
    let (log, _guard) = capture();
    let keys = sqlite().await;
    let nobody = Port::claim();
    let moved = format!("-MOVED 1234 127.0.0.1:{}\r\n", nobody.number());
    let reply = [
        moved.as_str(),
        "-CLUSTERDOWN The cluster is down\r\n",
        "-MASTERDOWN Link with MASTER is down\r\n",
        "HTTP/1.1 400 Bad Request\r\n\r\n",
        "\0\u{1}\u{2}\r\n",
        "*999999999\r\n",
        "$999999999999\r\nx",
        "$536870912\r\nx",
        "*2\r\n$3\r\nabcdef\r\n",
        "",
    ];
    for reply in reply {
        log.take();
        let fake = Fake::start(reply).await;
        let store = Counting::over(keys.store.clone());
        let soon = Duration::from_millis(50);
        let node = Node::with(
            store,
            fake.url(),
            |cache| cache.timeout(soon),
            |authenticator| authenticator,
        );
        eventually("the breaker opens", async || {
            node.asks_the_store(&keys.key).await;
            log.text().contains("Redis fails")
        })
        .await;
        fake.answer_nothing_known();
        eventually("it is asked again", async || {
            node.asks_the_store(&keys.key).await;
            node.cache.state() == RedisState::Up && fake.asked() >= 8
        })
        .await;
    }
}

#[tokio::test]
async fn prefixes_with_braces_and_glob_characters_are_names_like_any_other() {
    let redis = Redis::start();
    let keys = sqlite().await;
    let prefixes = [
        "victim01",
        "victim0?",
        "victim0*",
        "********",
        "????????",
        "[a-z][0-",
        "victim[0",
        "{victim}",
        "}victim{",
        "{}{}{}{}",
        "{{{{}}}}",
        "\\victim0",
        "victim\\?",
        "api_key:",
        "data:{v}",
        "vic'\"t$;",
        "%0d%0aSE",
        "victim0^",
        "victim0-",
        "[^v]icti",
    ];
    let _checks = Checks::alone().await;
    let scheme = scheme(first_chars(8)).pepper("0123456789abcdef");
    let scheme = scheme.build().unwrap();
    let store = Counting::over(keys.store.clone());
    let authenticator = |authenticator: AuthenticatorBuilder| authenticator.scheme(scheme.clone());
    let node = Node::with(store, redis.servers(), |cache| cache, authenticator);
    let key_of = |prefix: &str| format!("{prefix}-of-mine");
    let mut ids = Vec::new();
    for prefix in prefixes {
        let hash = KeyHash::bcrypt(&key_of(prefix), 4).unwrap();
        let record = KeyRecord::new(0, prefix, keys.record.user.clone());
        let key = StoredKey::new(record, hash);
        ids.push(keys.store.insert_key(&key, &Attribution::default()).await.unwrap().id);
    }
    for prefix in prefixes {
        assert_eq!(node.try_key(&key_of(prefix)).await.0, Outcome::Passes, "{prefix}");
        node.until_hit(&key_of(prefix)).await;
    }
    assert_eq!(redis.command(&["DBSIZE"]), (2 * prefixes.len()).to_string());
    for (at, id) in ids.iter().enumerate() {
        keys.manager.revoke(id).await.unwrap();
        node.until_denied(&key_of(prefixes[at]), InvalidKey::Revoked).await;
        for (other, prefix) in prefixes.iter().enumerate() {
            let outcome = node.try_key(&key_of(prefix)).await;
            if other > at {
                assert_eq!(outcome, (Outcome::Passes, 0), "{prefix}");
            } else {
                assert_eq!(outcome.0, Outcome::Invalid(InvalidKey::Revoked), "{prefix}");
            }
        }
    }
}

#[tokio::test]
async fn what_a_client_may_put_into_a_key_never_gets_into_a_name() {
    let redis = Redis::start();
    let (keys, node, _) = warm(&redis).await;
    for key in
        ["vic tim01-of-mine", "víctim01-of-mine", "victim01\r\nFLUSHALL", "\u{1f511}\u{1f511}"]
    {
        assert_eq!(node.try_key(key).await.1, 0, "{key}");
        assert!(
            !matches!(node.try_key(key).await.0, Outcome::Passes | Outcome::Status(_)),
            "{key}"
        );
    }
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
}

/// A copy is as old as the clock that is worse for it reads.
#[tokio::test]
async fn a_suspended_node_without_a_feed_asks_the_store_when_it_wakes_up() {
    let (redis, keys, clock) = (Redis::start(), Keys::over(MemoryStore::new()).await, clock());
    let node = feedless_by_hand(&keys, &redis, &clock).await;
    node.until_hit(&keys.key).await;
    clock.set_wall(clock.now() + Duration::from_secs(29));
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
    // No node is notified, and the entry is still there.
    keys.revoke().await;
    clock.set_wall(clock.now() + Duration::from_secs(2));
    let outcome = node.try_key(&keys.key).await;
    assert_eq!(outcome, (Outcome::Invalid(InvalidKey::Revoked), 1));
}

#[tokio::test]
async fn a_clock_that_is_set_back_keeps_no_copy_fresh() {
    let (redis, keys, clock) = (Redis::start(), Keys::over(MemoryStore::new()).await, clock());
    let node = feedless_by_hand(&keys, &redis, &clock).await;
    node.until_hit(&keys.key).await;
    keys.revoke().await;
    let hour = Duration::from_secs(3600);
    clock.advance(Duration::from_secs(31));
    clock.set_wall(clock.now() - hour);
    let outcome = node.try_key(&keys.key).await;
    assert_eq!(outcome, (Outcome::Invalid(InvalidKey::Revoked), 1));
}

#[tokio::test]
async fn a_clock_that_jumps_costs_hits_and_never_the_right_answer() {
    let (redis, keys, clock) = (Redis::start(), Keys::over(MemoryStore::new()).await, clock());
    let node = by_hand(&keys, &redis, &clock);
    let other = keys.issue().await;
    node.until_hit(other.expose_secret()).await;
    let hours = |hours: u64| Duration::from_secs(3600 * hours);
    let jumps: [fn(SystemTime, Duration) -> SystemTime; 2] =
        [|now, by| now + by, |now, by| now - by];
    for jump in jumps {
        for by in [hours(2), hours(24 * 365)] {
            let key = keys.issue().await;
            node.until_hit(key.expose_secret()).await;
            let both = both_under(&redis, &key.record().prefix);
            both.iter().for_each(|name| keep(&redis, name));
            clock.set_wall(jump(clock.now(), by));
            // Before and after the node has received the new time.
            assert_eq!(node.try_key(key.expose_secret()).await.0, Outcome::Passes);
            in_sync(&keys, &node).await;
            node.until_hit(key.expose_secret()).await;
            keys.manager.revoke(&key.record().id).await.unwrap();
            node.until_denied(key.expose_secret(), InvalidKey::Revoked).await;
            both.iter().for_each(|name| replay(&redis, name));
            let outcome = node.try_key(key.expose_secret()).await.0;
            assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
            node.until_hit(other.expose_secret()).await;
        }
    }
}

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(SystemTime::now()))
}

fn secret() -> CacheSecret {
    CacheSecret::new(1, [7; 32])
}

/// A node whose clock is moved by hand, and the store's with it.
fn by_hand(keys: &Keys<MemoryStore>, redis: &Redis, clock: &Arc<ManualClock>) -> Node<MemoryStore> {
    let store = Counting::over(keys.store.clone()).by_clock(clock);
    let cache =
        |it: tower_api_key::backend::RedisCacheBuilder<_>| it.secret(secret()).clock(clock.clone());
    Node::with(store, redis.servers(), cache, |authenticator| authenticator.clock(clock.clone()))
}

/// The same with a store that emits no change event, and a subscription that is in place.
async fn feedless_by_hand(
    keys: &Keys<MemoryStore>,
    redis: &Redis,
    clock: &Arc<ManualClock>,
) -> Node<MemoryStore> {
    let store = Counting::over(keys.store.clone()).without_feed();
    let cache =
        |it: tower_api_key::backend::RedisCacheBuilder<_>| it.secret(secret()).clock(clock.clone());
    let node = Node::with(store, redis.servers(), cache, |authenticator| {
        authenticator.clock(clock.clone())
    });
    eventually("it listens", async || {
        assert_eq!(node.try_key(&keys.key).await.0, Outcome::Passes);
        redis.command(&["PUBSUB", "NUMSUB", "api_key:changes"]).ends_with("\n1")
    })
    .await;
    // What is from before that is not trusted, with a margin of a second.
    eventually("it trusts Redis", async || {
        clock.advance(Duration::from_millis(1500));
        node.try_key(&keys.key).await == (Outcome::Passes, 0)
    })
    .await;
    redis.command(&["DEL", &keys.data(redis)]);
    node
}

/// Waits until the node knows what time it is now.
async fn in_sync(keys: &Keys<MemoryStore>, node: &Node<MemoryStore>) {
    keys.issue().await;
    eventually("it is in sync", async || {
        node.authenticator.health().last_sync.is_some_and(|ago| ago < Duration::from_millis(1))
    })
    .await;
}

/// A server that answers every read with the same bytes, and everything else as Redis does.
struct Fake {
    port: u16,
    state: Arc<Mutex<(Vec<u8>, usize)>>,
    task: JoinHandle<()>,
}

impl Fake {
    async fn start(reply: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new((reply.as_bytes().to_vec(), 0)));
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let mut unread = Vec::new();
                    while stream.read_buf(&mut unread).await.is_ok_and(|read| read > 0) {
                        while let Some(name) = take_command(&mut unread) {
                            let answer = answer(&name, &shared);
                            if answer.is_empty() || stream.write_all(&answer).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
        Self { port, state, task }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// How often something was read.
    fn asked(&self) -> usize {
        self.state.lock().unwrap().1
    }

    fn answer_nothing_known(&self) {
        self.state.lock().unwrap().0 = b"*2\r\n$-1\r\n$-1\r\n".to_vec();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn answer(name: &str, state: &Mutex<(Vec<u8>, usize)>) -> Vec<u8> {
    match name {
        "PING" => b"+PONG\r\n".to_vec(),
        "MGET" => {
            let mut state = state.lock().unwrap();
            state.1 += 1;
            state.0.clone()
        }
        "EVALSHA" | "EVAL" => b":1\r\n".to_vec(),
        _ => b"+OK\r\n".to_vec(),
    }
}

/// Takes one whole command off the buffer and returns its name.
fn take_command(unread: &mut Vec<u8>) -> Option<String> {
    let mut at = 0;
    let count = number_after(unread, b'*', &mut at)?;
    let mut name = None;
    for _ in 0..count {
        let length = number_after(unread, b'$', &mut at)?;
        let word = unread.get(at..at + length)?;
        name.get_or_insert_with(|| String::from_utf8_lossy(word).to_uppercase());
        at += length + 2;
    }
    if at > unread.len() {
        return None;
    }
    unread.drain(..at);
    name
}

fn number_after(bytes: &[u8], mark: u8, at: &mut usize) -> Option<usize> {
    let rest = bytes.get(*at..)?;
    let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
    assert_eq!(rest[0], mark);
    *at += end + 2;
    std::str::from_utf8(&rest[1..end]).unwrap().parse().ok()
}
