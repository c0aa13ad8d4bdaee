//! One budget and a fleet: what is let through never passes the limit, whatever breaks in between.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::task::JoinSet;
use tower_api_key::{
    AuthContext, Authenticator, Denial, KeyManager, NewKey, PostgresStore,
    record::{Budget, BudgetPeriod},
    store::KeyRepository,
};

use crate::support::{eventually::eventually, servers::Postgres};

/// 100 cents, in holds of a twentieth of a cent.
const LIMIT_CENTS: u64 = 100;
const ESTIMATE: u64 = 50_000;
const MOST: u64 = LIMIT_CENTS * 1_000_000 / ESTIMATE;
/// What the child holds when it is killed.
const HELD: u64 = 10;
/// Longer than PostgreSQL takes to start again.
const LEASE: Duration = Duration::from_secs(18);
const CHILD: &str = "TOWER_API_KEY_TEST_SPENDER";

fn node(url: &str) -> Authenticator {
    Authenticator::builder(PostgresStore::new(url).unwrap())
        .usage_interval(Duration::from_millis(50))
        .lease_lifetime(LEASE)
        .max_staleness(Duration::from_secs(600))
        .build()
}

/// So many reserve again and again until nothing is left for a while. `granted` receives each hold.
fn spend(
    caller: &AuthContext,
    callers: usize,
    granted: impl Fn() + Clone + Send + 'static,
) -> JoinSet<()> {
    let mut spenders = JoinSet::new();
    for _ in 0..callers {
        let (caller, granted) = (caller.clone(), granted.clone());
        spenders.spawn(async move {
            let mut denied = 0;
            while denied < 4 {
                match caller.reserve(ESTIMATE).await {
                    Ok(reservation) => {
                        granted();
                        tokio::time::sleep(Duration::from_millis(150)).await;
                        reservation.settle(ESTIMATE);
                        denied = 0;
                    }
                    Err(Denial::BudgetExceeded(_)) => {
                        denied += 1;
                        tokio::time::sleep(Duration::from_millis(260)).await;
                    }
                    Err(Denial::Unavailable(_)) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Err(denial) => panic!("{denial:?}"),
                }
            }
        });
    }
    spenders
}

/// No test of its own: a node in a process of its own, for the one below to kill.
#[test]
#[ignore = "a part of another test"]
fn a_spender_that_will_be_killed() {
    let Ok(settings) = std::env::var(CHILD) else { return };
    let (url, key) = settings.split_once(' ').unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let node = node(url);
        let caller = node.authenticate(key).await.unwrap();
        let _held = caller.reserve(HELD * ESTIMATE).await.unwrap();
        (0..HELD).for_each(|_| println!("granted one"));
        spend(&caller, 200, || println!("granted one")).join_all().await;
        std::future::pending::<()>().await;
    });
}

struct Spender(Child);

impl Drop for Spender {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holds_never_pass_the_limit_and_a_dead_nodes_lease_comes_back() {
    let mut server = Postgres::start();
    let url = server.tcp_url("");
    let store = PostgresStore::new(&url).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let budget = Budget { limit_cents: LIMIT_CENTS, period: BudgetPeriod::Total };
    let key = manager.issue(NewKey::new(user.id, "k").budget(budget)).await.unwrap();

    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "budget_fleet::a_spender_that_will_be_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD, format!("{url} {}", key.expose_secret()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let mut child = Spender(child);
    let granted = Arc::new(AtomicU64::new(0));
    let of_child = Arc::new(AtomicU64::new(0));
    let reader = {
        let of_child = Arc::clone(&of_child);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                of_child.fetch_add(u64::from(line == "granted one"), SeqCst);
            }
        })
    };
    let nodes = [node(&url), node(&url)];
    let mut spenders = Vec::new();
    for node in &nodes {
        let caller = node.authenticate(key.expose_secret()).await.unwrap();
        let granted = Arc::clone(&granted);
        spenders.push(spend(&caller, 200, move || {
            granted.fetch_add(1, SeqCst);
        }));
    }
    eventually("the child spends", async || of_child.load(SeqCst) > 50).await;
    server.stop();
    server.start_again();
    // In the middle of its holds.
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    reader.join().unwrap();
    for spenders in spenders {
        spenders.join_all().await;
    }
    let (of_child, of_nodes) = (of_child.load(SeqCst), granted.load(SeqCst));
    assert!(of_child + of_nodes <= MOST, "{of_child} and {of_nodes} holds were granted");
    assert!(of_nodes > 200, "{of_child} and {of_nodes}: hardly anything was granted");

    let id = &key.record().id;
    let spent = async || {
        let record = store.find_key(id).await.unwrap().unwrap().into_record();
        u64::try_from(record.usage.cost_micro_cents).unwrap()
    };
    eventually("what was settled is charged", async || spent().await >= of_nodes * ESTIMATE).await;
    let before = spent().await;
    assert!(before <= (of_child + of_nodes - HELD) * ESTIMATE);
    assert!(before <= LIMIT_CENTS * 1_000_000 - HELD * ESTIMATE, "nothing was lost with the child");
    // What the dead node had leased and did not settle can be spent once its lease has expired.
    let caller = nodes[0].authenticate(key.expose_secret()).await.unwrap();
    eventually("the lease comes back", async || {
        if let Ok(reservation) = caller.reserve(ESTIMATE).await {
            reservation.settle(ESTIMATE);
        }
        spent().await >= LIMIT_CENTS * 1_000_000
    })
    .await;
    assert_eq!(spent().await, LIMIT_CENTS * 1_000_000);
    for node in &nodes {
        node.shutdown().await;
    }
    let leases = server.client().await;
    let leases = leases.query(
        "SELECT * FROM api_key_leases WHERE amount_micro_cents > 0 AND expires_at > now()",
        &[],
    );
    assert!(leases.await.unwrap().is_empty());
}
