//! The body of a denied request: how much of it is read before the answer.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, routing::post};
use bytes::Bytes;
use http::{Request, Version};
use http_body::{Body, Frame, SizeHint};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, timeout},
};
use tower::{ServiceBuilder, ServiceExt};
use tower_api_key::{
    ApiKeyAuthLayer, MemoryStore, RateLimitLayer, RequireLayer, rate_limit::LocalRateLimiter,
    record::RateLimits,
};

use crate::support::{self, Fixture, bearer, fixture, probe::probe};

const MIB: usize = 1 << 20;

/// A body of frames of 1 MiB, which counts those that are taken.
struct Upload {
    frames: VecDeque<Bytes>,
    /// After the frames it neither ends nor has more.
    stalls: bool,
    is_declared: bool,
    taken: Arc<AtomicUsize>,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.frames.pop_front() {
            Some(frame) => {
                self.taken.fetch_add(1, SeqCst);
                Poll::Ready(Some(Ok(Frame::data(frame))))
            }
            None if self.stalls => Poll::Pending,
            None => Poll::Ready(None),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.is_declared {
            true => SizeHint::with_exact(self.frames.iter().map(|it| it.len() as u64).sum()),
            false => SizeHint::default(),
        }
    }
}

struct Case {
    frames: usize,
    stalls: bool,
    is_declared: bool,
    version: Version,
    expect: Option<&'static str>,
}

const CASE: Case =
    Case { frames: 3, stalls: false, is_declared: false, version: Version::HTTP_11, expect: None };

impl Case {
    /// Sends it with a wrong key through `layer`: how many frames were taken.
    async fn taken_by(self, layer: &ApiKeyAuthLayer) -> usize {
        let service = ServiceBuilder::new().layer(layer.clone()).service(probe().0);
        let (request, taken) = self.request("nonsense");
        assert_eq!(service.oneshot(request).await.unwrap().status(), 401);
        taken.load(SeqCst)
    }

    fn request(self, key: &str) -> (Request<Upload>, Arc<AtomicUsize>) {
        let taken = Arc::<AtomicUsize>::default();
        let frames = (0..self.frames).map(|_| Bytes::from(vec![0; MIB])).collect();
        let Self { stalls, is_declared, .. } = self;
        let body = Upload { frames, stalls, is_declared, taken: Arc::clone(&taken) };
        let mut request = bearer(key).map(|_| body);
        *request.version_mut() = self.version;
        if let Some(expect) = self.expect {
            request.headers_mut().insert("expect", expect.parse().unwrap());
        }
        (request, taken)
    }
}

#[tokio::test]
async fn the_body_of_a_denied_request_is_read_to_its_end() {
    let layer = fixture().await.layer();
    assert_eq!(Case { ..CASE }.taken_by(&layer).await, 3);
    assert_eq!(Case { version: Version::HTTP_10, ..CASE }.taken_by(&layer).await, 3);
    assert_eq!(Case { version: Version::HTTP_2, ..CASE }.taken_by(&layer).await, 3);
    assert_eq!(Case { is_declared: true, ..CASE }.taken_by(&layer).await, 3);
    assert_eq!(Case { expect: Some("something"), ..CASE }.taken_by(&layer).await, 3);
}

#[tokio::test]
async fn no_more_is_read_than_the_limit_and_a_body_that_declares_more_is_not_read_at_all() {
    let fixture = fixture().await;
    // The ninth frame is past 8 MiB.
    assert_eq!(Case { frames: 100, ..CASE }.taken_by(&fixture.layer()).await, 9);
    let declared = Case { frames: 9, is_declared: true, ..CASE };
    assert_eq!(declared.taken_by(&fixture.layer()).await, 0);
    let less = fixture.layer().discard_body(2 * MIB as u64, Duration::from_secs(2));
    assert_eq!(Case { frames: 100, ..CASE }.taken_by(&less).await, 3);
    for off in [
        fixture.layer().discard_body(0, Duration::from_secs(2)),
        fixture.layer().discard_body(8 << 20, Duration::ZERO),
    ] {
        assert_eq!(Case { ..CASE }.taken_by(&off).await, 0);
    }
}

#[tokio::test]
async fn a_client_that_waits_for_a_continue_and_a_grpc_call_are_answered_at_once() {
    let layer = fixture().await.layer();
    for expect in ["100-continue", "100-Continue"] {
        assert_eq!(Case { expect: Some(expect), ..CASE }.taken_by(&layer).await, 0);
    }
    let service = ServiceBuilder::new().layer(layer).service(probe().0);
    let (request, taken) = CASE.request("nonsense");
    let response = service.oneshot(support::grpc(request, "application/grpc")).await.unwrap();
    assert_eq!((response.status().as_u16(), taken.load(SeqCst)), (200, 0));
}

#[test]
fn without_a_timer_a_denied_request_is_answered_and_its_body_not_read() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let layer = ApiKeyAuthLayer::new(MemoryStore::new());
    assert_eq!(runtime.block_on(Case { ..CASE }.taken_by(&layer)), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stalls_is_answered_after_the_time_limit() {
    let fixture = fixture().await;
    let began = Instant::now();
    assert_eq!(Case { stalls: true, ..CASE }.taken_by(&fixture.layer()).await, 3);
    assert_eq!(began.elapsed().as_secs(), 2);
    let layer = fixture.layer().discard_body(8 << 20, Duration::from_secs(7));
    let began = Instant::now();
    assert_eq!(Case { stalls: true, ..CASE }.taken_by(&layer).await, 3);
    assert_eq!(began.elapsed().as_secs(), 7);
}

#[tokio::test]
async fn a_guard_reads_the_body_within_the_limits_of_the_layer_around_it() {
    let fixture = fixture().await;
    let mut none = RateLimits::default();
    none.per_minute = Some(0);
    let issued = fixture.issue(|key| key.rate_limits(none)).await;
    let off = fixture.layer().discard_body(0, Duration::ZERO);
    for (layer, expected) in [(fixture.layer(), 3), (off, 0)] {
        let required = ServiceBuilder::new()
            .layer(layer.clone())
            .layer(RequireLayer::scope("a"))
            .service(probe().0);
        let (request, taken) = CASE.request(issued.expose_secret());
        assert_eq!(required.oneshot(request).await.unwrap().status(), 403);
        assert_eq!(taken.load(SeqCst), expected);

        let limited = ServiceBuilder::new()
            .layer(layer)
            .layer(RateLimitLayer::new(LocalRateLimiter::new()))
            .service(probe().0);
        let (request, taken) = CASE.request(issued.expose_secret());
        assert_eq!(limited.oneshot(request).await.unwrap().status(), 429);
        assert_eq!(taken.load(SeqCst), expected);
    }
}

/// A server with the layer, and a route behind a guard as well.
async fn serve(fixture: &Fixture) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new()
        .route("/", post(|body: Bytes| async move { body.len().to_string() }))
        .route("/guarded", post(|| async {}).layer(RequireLayer::scope("a")))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .layer(fixture.layer());
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// Sends the whole body before it reads, as most clients do: the first line of the response, and whether the
/// connection can be used again.
async fn upload(
    address: std::net::SocketAddr,
    path: &str,
    key: &str,
    size: usize,
) -> (String, bool) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    for round in 0..2 {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-length: {size}\r\n\r\n"
        );
        let sent = async {
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&vec![b'x'; size]).await
        };
        if let Err(error) = sent.await {
            return (format!("round {round}: {error}"), false);
        }
        let mut response = vec![0; 4096];
        let read = timeout(Duration::from_secs(20), stream.read(&mut response)).await.unwrap();
        let read = match read {
            Ok(0) => return (format!("round {round}: closed"), false),
            Ok(read) => read,
            Err(error) => return (format!("round {round}: {error}"), false),
        };
        let text = String::from_utf8_lossy(&response[..read]).into_owned();
        if round == 1 {
            return (text.lines().next().unwrap_or_default().to_owned(), true);
        }
    }
    unreachable!("two rounds")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_sends_its_whole_body_first_reads_the_denial_thirty_times_of_thirty() {
    let fixture = fixture().await;
    let address = serve(&fixture).await;
    for (path, key, expected) in [
        ("/", "nonsense".to_owned(), "HTTP/1.1 401 Unauthorized"),
        ("/guarded", fixture.key.clone(), "HTTP/1.1 403 Forbidden"),
    ] {
        for size in [500_000, 5_000_000] {
            let mut uploads = JoinSet::new();
            for _ in 0..30 {
                let key = key.clone();
                uploads.spawn(async move { upload(address, path, &key, size).await });
            }
            for (answer, is_reusable) in uploads.join_all().await {
                assert_eq!((&*answer, is_reusable), (expected, true), "{path} {size}");
            }
        }
    }
}
