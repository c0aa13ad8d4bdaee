//! What a hit costs, beside the least that it could cost.
//!
//! `cargo bench --bench hot_path`: nanoseconds a call of a tower service that is ready at once, building the
//! request included: bare; behind tower-http's static bearer check; behind a hit inlined by hand (SHA-256,
//! quick_cache look-up, extension insert), which is the floor; behind a layer with moka as most people would
//! write one; behind this layer. With 1 thousand, 100 thousand and 1 million cached keys, on one thread, and
//! on all cores with 1 thousand. All contenders take turns in each round; the figures are medians of the
//! rounds, the ratios medians of the rounds' ratios. The last line is JSON.

mod call;
mod figures;

use std::{
    convert::Infallible,
    future::{Future, Ready},
    pin::{Pin, pin},
    sync::{Arc, Barrier},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use call::{Body, Call, Inner, request};
use figures::{median, median_ratio, take_turns};
use http::{HeaderValue, Response, header};
use sha2::{Digest, Sha256};
use tower::{Layer, Service};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, KeyScheme, StoreError,
    key::KeyFormat,
    record::{KeyRecord, User},
    store::{Answer, KeyStore, Lookup},
};
use tower_http::validate_request::ValidateRequestHeaderLayer;

const ROUNDS: usize = 15;
const CALLS: usize = 200_000;
const PREFIX: usize = 10;

fn main() {
    let floor_and_hit = |keys: &Keys| {
        let inlined = Inlined::warm(keys);
        let layer = warm_layer(keys);
        let (mut floor, mut hit) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            take_turns(
                round,
                [&mut || floor.push(time(&inlined, keys)), &mut || {
                    hit.push(time(&layer.layer(Inner), keys));
                }],
            );
        }
        (median(&floor), median(&hit), median_ratio(&hit, &floor))
    };

    let keys = Keys::new(1_000);
    #[allow(deprecated, reason = "it is the simplest check that there is")]
    let bearer = ValidateRequestHeaderLayer::bearer(keys.token(0)).layer(Inner);
    let one_key = Keys { order: vec![0; keys.order.len()], ..Keys::new(1_000) };
    let inlined = Inlined::warm(&keys);
    let moka = Moka::warm(&keys);
    let layer = warm_layer(&keys);
    let hits = layer.layer(Inner);
    let mut times: [Vec<f64>; 5] = Default::default();
    let (mut one_thread, mut all_cores, mut floor_one, mut floor_all) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for round in 0..ROUNDS {
        let [bare, check, floor, most, hit] = &mut times;
        take_turns(
            round,
            [
                &mut || bare.push(time(&Inner, &keys)),
                &mut || check.push(time(&bearer, &one_key)),
                &mut || floor.push(time(&inlined, &keys)),
                &mut || most.push(time(&moka, &keys)),
                &mut || hit.push(time(&hits, &keys)),
            ],
        );
        take_turns(
            round,
            [
                &mut || one_thread.push(throughput(&hits, &keys, 1)),
                &mut || all_cores.push(throughput(&hits, &keys, cores)),
                &mut || floor_one.push(throughput(&inlined, &keys, 1)),
                &mut || floor_all.push(throughput(&inlined, &keys, cores)),
            ],
        );
    }
    let [bare, check, floor, most, hit] = &times;
    println!("1 thousand keys, one thread               ns a call");
    for (name, times) in [
        ("bare service", bare),
        ("tower-http, static bearer check", check),
        ("hit inlined by hand", floor),
        ("layer with moka", most),
        ("this layer", hit),
    ] {
        println!("  {name:<36} {:>10.1}", median(times));
    }
    let scaling = median_ratio(&all_cores, &one_thread) / cores as f64;
    let floor_scaling = median_ratio(&floor_all, &floor_one) / cores as f64;
    println!("{cores} cores over {cores} times one thread");
    println!("  hit inlined by hand                  {floor_scaling:>10.3}");
    println!("  this layer                           {scaling:>10.3}");

    let allocations = |service: &dyn Fn()| allocation_counter::measure(service).count_total;
    let count = 1_000;
    let of_floor = allocations(&|| calls(&mut inlined.clone(), &keys, count));
    let of_hit = allocations(&|| calls(&mut hits.clone(), &keys, count));
    let allocations_over_floor = (of_hit as f64 - of_floor as f64) / count as f64;
    println!("allocations a call: {} by hand, {} in this layer", of_floor / 1_000, of_hit / 1_000);
    let (floor_ns, hit_ns, hit_over_floor) = (median(floor), median(hit), median_ratio(hit, floor));
    drop((inlined, moka, layer, hits));

    let (floor, hit, ratio) = floor_and_hit(&Keys::new(100_000));
    println!("100 thousand keys: {floor:.1} by hand, {hit:.1} in this layer, ratio {ratio:.3}");

    let many = Keys::new(1_000_000);
    let mut layer = None;
    let memory = allocation_counter::measure(|| layer = Some(warm_layer(&many)));
    drop(layer);
    let bytes_per_key = memory.bytes_current as f64 / many.tokens.len() as f64;
    let (floor, hit, hit_over_floor_1m) = floor_and_hit(&many);
    println!(
        "1 million keys: {floor:.1} by hand, {hit:.1} in this layer, ratio {hit_over_floor_1m:.3}, \
         {bytes_per_key:.0} bytes a key"
    );
    println!(
        "{{\"hit_ns\":{hit_ns:.1},\"floor_ns\":{floor_ns:.1},\"hit_over_floor\":{hit_over_floor:.3},\
         \"hit_over_floor_1m\":{hit_over_floor_1m:.3},\"allocations_over_floor\":{allocations_over_floor:.3},\
         \"scaling\":{scaling:.3},\"bytes_per_key\":{bytes_per_key:.0}}}"
    );
}

/// Keys, the header fields that carry them, and the order in which they come.
struct Keys {
    tokens: Vec<String>,
    fields: Vec<HeaderValue>,
    order: Vec<u32>,
}

impl Keys {
    fn new(count: usize) -> Self {
        // 46 bytes, as this crate's own keys have.
        let token =
            |n: usize| format!("{n:0PREFIX$}_{:035}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let tokens: Vec<_> = (0..count).map(token).collect();
        let field = |token: &String| HeaderValue::try_from(format!("Bearer {token}")).unwrap();
        let fields = tokens.iter().map(field).collect();
        let mut order: Vec<u32> = (0..count as u32).collect();
        let mut random = 0x2545_F491_4F6C_DD1D_u64;
        for at in (1..count).rev() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            order.swap(at, (random % (at as u64 + 1)) as usize);
        }
        Self { tokens, fields, order }
    }

    fn token(&self, at: usize) -> &str {
        &self.tokens[at]
    }

    fn request(&self, at: usize) -> Call {
        request(self.fields[at].clone())
    }
}

/// A hit as short as it gets.
#[derive(Clone)]
struct Inlined {
    keys: Arc<quick_cache::sync::Cache<[u8; 32], AuthContext>>,
    inner: Inner,
}

impl Inlined {
    fn warm(keys: &Keys) -> Self {
        let cache = quick_cache::sync::Cache::new(keys.tokens.len() * 2);
        for token in &keys.tokens {
            cache.insert(Sha256::digest(token).into(), AuthContext::unverified(record(token)));
        }
        Self { keys: Arc::new(cache), inner: Inner }
    }
}

impl Service<Call> for Inlined {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Call) -> Self::Future {
        let field = request.headers()[header::AUTHORIZATION].as_bytes();
        let key: [u8; 32] = Sha256::digest(&field[b"Bearer ".len()..]).into();
        let caller = self.keys.get(&key).expect("all keys are there");
        request.extensions_mut().insert(caller);
        self.inner.call(request)
    }
}

/// What is mostly written: the key as a string, an async cache, a boxed future.
#[derive(Clone)]
struct Moka {
    keys: moka::future::Cache<String, Arc<KeyRecord>>,
    inner: Inner,
}

impl Moka {
    fn warm(keys: &Keys) -> Self {
        let lifetime = Duration::from_secs(300);
        let cache = moka::future::Cache::builder()
            .max_capacity(keys.tokens.len() as u64 * 2)
            .time_to_live(lifetime)
            .build();
        runtime().block_on(async {
            for token in &keys.tokens {
                cache.insert(token.clone(), Arc::new(record(token))).await;
            }
        });
        Self { keys: cache, inner: Inner }
    }
}

impl Service<Call> for Moka {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Call) -> Self::Future {
        let (keys, mut inner) = (self.keys.clone(), self.inner.clone());
        Box::pin(async move {
            let field =
                request.headers().get(header::AUTHORIZATION).and_then(|it| it.to_str().ok());
            let token =
                field.and_then(|it| it.strip_prefix("Bearer ")).unwrap_or_default().to_owned();
            let caller = keys.get(&token).await.expect("all keys are there");
            request.extensions_mut().insert(caller);
            inner.call(request).await
        })
    }
}

/// A store that knows every key.
struct Everybody;

impl KeyStore for Everybody {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        Ok(lookup.assume_verified(record(lookup.expose_secret())))
    }
}

fn record(token: &str) -> KeyRecord {
    let number: i64 = token[..PREFIX].parse().unwrap();
    let mut record = KeyRecord::new(
        number,
        &token[..PREFIX],
        User::new(number, format!("user{number}@example.com")),
    );
    record.name = format!("service {number}");
    record.scopes = ["chat:write", "models:read", "files:read"].map(str::to_owned).to_vec();
    record.allowed_models = ["small", "large"].map(str::to_owned).to_vec();
    record
}

/// This layer, with all the keys in its cache, which stay fresh for the length of the run.
fn warm_layer(keys: &Keys) -> ApiKeyAuthLayer {
    let scheme =
        KeyScheme::builder().format(KeyFormat::first_chars(PREFIX).unwrap()).build().unwrap();
    let authenticator = Authenticator::builder(Everybody)
        .scheme(scheme)
        .cache_capacity(keys.tokens.len() * 2)
        .max_staleness(Duration::from_secs(24 * 3600))
        .build();
    runtime().block_on(async {
        for token in &keys.tokens {
            authenticator.authenticate(token).await.unwrap();
        }
    });
    assert_eq!(authenticator.health().cached_keys, keys.tokens.len());
    ApiKeyAuthLayer::from(authenticator)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Nanoseconds a call.
fn time<S: Service<Call> + Clone>(service: &S, keys: &Keys) -> f64 {
    let mut service = service.clone();
    calls(&mut service, keys, 1_000);
    let start = Instant::now();
    calls(&mut service, keys, CALLS);
    start.elapsed().as_nanos() as f64 / CALLS as f64
}

/// Calls a nanosecond of `threads` threads together.
fn throughput<S: Service<Call> + Clone + Send>(service: &S, keys: &Keys, threads: usize) -> f64 {
    let barrier = Barrier::new(threads + 1);
    let mut start = None;
    std::thread::scope(|scope| {
        let barrier = &barrier;
        for _ in 0..threads {
            let mut service = service.clone();
            scope.spawn(move || {
                calls(&mut service, keys, 1_000);
                barrier.wait();
                calls(&mut service, keys, CALLS);
            });
        }
        barrier.wait();
        start = Some(Instant::now());
    });
    (threads * CALLS) as f64 / start.unwrap().elapsed().as_nanos() as f64
}

fn calls<S: Service<Call>>(service: &mut S, keys: &Keys, count: usize) {
    let mut cx = Context::from_waker(Waker::noop());
    for at in keys.order.iter().cycle().take(count) {
        let future = pin!(service.call(keys.request(*at as usize)));
        let Poll::Ready(response) = future.poll(&mut cx) else { panic!("a hit waits for nothing") };
        assert!(response.is_ok());
    }
}
