//! A service that knows whether this very instance was polled ready, and what it takes to poll by
//! hand.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::Service;
use tower_api_key::AuthContext;

use super::eventually::others_make;

/// Each clone is an instance of its own, with a number, that nobody has polled ready yet. Calling
/// one that is not ready panics.
pub struct Probe {
    instance: usize,
    is_ready: bool,
    shared: Arc<Shared>,
    _alive: Arc<()>,
}

#[derive(Default)]
struct Shared {
    instances: AtomicUsize,
    polled_ready: Mutex<Vec<usize>>,
    called: Mutex<Vec<usize>>,
    is_pending: AtomicBool,
    waiting: Mutex<Option<Waker>>,
    readiness_fault: Mutex<Option<ProbeError>>,
    response_fault: Mutex<Option<ProbeError>>,
    holds_calls: AtomicBool,
    alive: Arc<()>,
}

/// What the tests see and steer of all instances.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

/// Neither `Clone` nor `std::error::Error`: nothing but the very value gets through.
#[derive(Debug, PartialEq)]
pub struct ProbeError(pub u32);

pub fn probe() -> (Probe, Control) {
    let shared = Arc::<Shared>::default();
    let control = Control(Arc::clone(&shared));
    (Probe::of(shared), control)
}

impl Probe {
    fn of(shared: Arc<Shared>) -> Self {
        let instance = shared.instances.fetch_add(1, SeqCst);
        let _alive = Arc::clone(&shared.alive);
        Self { instance, is_ready: false, shared, _alive }
    }
}

impl Clone for Probe {
    fn clone(&self) -> Self {
        Self::of(Arc::clone(&self.shared))
    }
}

impl Control {
    /// The instances that said they were ready, in that order.
    pub fn polled_ready(&self) -> Vec<usize> {
        self.0.polled_ready.lock().unwrap().clone()
    }

    /// The instances that were called, in that order.
    pub fn called(&self) -> Vec<usize> {
        self.0.called.lock().unwrap().clone()
    }

    /// Makes all instances not ready.
    pub fn block(&self) {
        self.0.is_pending.store(true, SeqCst);
    }

    /// Makes all instances ready and wakes who waits for it.
    pub fn unblock(&self) {
        self.0.is_pending.store(false, SeqCst);
        if let Some(waker) = self.0.waiting.lock().unwrap().take() {
            waker.wake();
        }
    }

    /// Whether a request waits for an instance to be ready.
    pub fn is_waited_for(&self) -> bool {
        self.0.waiting.lock().unwrap().is_some()
    }

    pub fn fail_readiness(&self, error: ProbeError) {
        *self.0.readiness_fault.lock().unwrap() = Some(error);
    }

    pub fn fail_response(&self, error: ProbeError) {
        *self.0.response_fault.lock().unwrap() = Some(error);
    }

    /// From now on calls are not answered.
    pub fn hold_calls(&self) {
        self.0.holds_calls.store(true, SeqCst);
    }

    /// How many instances and calls there are.
    pub fn alive(&self) -> usize {
        Arc::strong_count(&self.0.alive) - 1
    }
}

impl<B> Service<Request<B>> for Probe {
    type Response = Response<Full<Bytes>>;
    type Error = ProbeError;
    type Future = ProbeFuture<B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProbeError>> {
        if let Some(error) = self.shared.readiness_fault.lock().unwrap().take() {
            return Poll::Ready(Err(error));
        }
        if self.shared.is_pending.load(SeqCst) {
            *self.shared.waiting.lock().unwrap() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        self.is_ready = true;
        self.shared.polled_ready.lock().unwrap().push(self.instance);
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ProbeFuture<B> {
        assert!(mem::take(&mut self.is_ready), "instance {} was not ready", self.instance);
        self.shared.called.lock().unwrap().push(self.instance);
        let is_held = self.shared.holds_calls.load(SeqCst);
        let outcome = match self.shared.response_fault.lock().unwrap().take() {
            Some(error) => Err(error),
            None => Ok(Response::new(Full::new(caller_of(&request).into()))),
        };
        let _alive = Arc::clone(&self.shared.alive);
        ProbeFuture { outcome: (!is_held).then_some(outcome), _request: request, _alive }
    }
}

/// Who calls, as the inner service sees it; `-` for nobody.
fn caller_of<B>(request: &Request<B>) -> String {
    let caller = request.extensions().get::<AuthContext>();
    caller.map_or("-".to_owned(), |caller| caller.user().email.clone())
}

/// Holds the request until it is dropped.
pub struct ProbeFuture<B> {
    outcome: Option<Result<Response<Full<Bytes>>, ProbeError>>,
    _request: Request<B>,
    _alive: Arc<()>,
}

impl<B> Unpin for ProbeFuture<B> {}

impl<B> Future for ProbeFuture<B> {
    type Output = Result<Response<Full<Bytes>>, ProbeError>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.outcome.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Probe({})", self.instance)
    }
}

/// Counts how often it is woken.
#[derive(Default)]
pub struct Wakes(AtomicUsize);

impl Wakes {
    pub fn count(&self) -> usize {
        self.0.load(SeqCst)
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// Polls once, with a waker that does nothing.
pub fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// Polls until the end, with a waker that does nothing, and lets other tasks run in between.
pub async fn poll_to_end<F: Future + Unpin>(future: &mut F) -> F::Output {
    let mut output = None;
    others_make("the future ends", || match poll(future) {
        Poll::Ready(outcome) => {
            output = Some(outcome);
            true
        }
        Poll::Pending => false,
    })
    .await;
    output.unwrap()
}

/// Polls readiness once, with a waker that does nothing.
pub fn poll_ready<S: Service<R>, R>(service: &mut S) -> Poll<Result<(), S::Error>> {
    service.poll_ready(&mut Context::from_waker(Waker::noop()))
}

/// Runs a future on this thread, without any runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        std::thread::park();
    }
}
