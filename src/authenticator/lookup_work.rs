//! The future of a look-up, and what polls it: [`LookupWork`].

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::runtime::Handle;

/// The future of a look-up. It delivers its outcome itself.
pub(super) type WorkFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The future of a look-up, polled by the request that has begun it, or by a task of its own.
///
/// A request that polls it needs no other task, which costs about 3 µs. But a request may be dropped, or not be polled for
/// a while. The future therefore moves to a task as soon as others depend on it: when another request waits for the
/// outcome, while the look-up holds something that other look-ups wait for, and when its request is dropped.
pub(super) struct LookupWork {
    state: Mutex<WorkState>,
    runtime: Handle,
}

struct WorkState {
    /// `None` while it is being polled, and after it has moved to a task or ended.
    future: Option<WorkFuture>,
    /// Wakes the request, which has to wait for the outcome instead once the future moves.
    request: Option<Waker>,
    /// Whether another request waits for the outcome.
    is_shared: bool,
    /// Whether the look-up holds something that other look-ups wait for. A store that does not report it is assumed to.
    is_holding: bool,
}

impl LookupWork {
    pub(super) fn new(runtime: Handle) -> Self {
        let state = WorkState { future: None, request: None, is_shared: false, is_holding: true };
        Self { state: Mutex::new(state), runtime }
    }

    /// Sets the future, once. The request polls it next.
    pub(super) fn begin(&self, future: WorkFuture) {
        // Another request may have joined before.
        let mut state = self.state();
        state.future = Some(future);
        if state.is_shared {
            self.spawn(state);
        }
    }

    /// Polls the future. Returns `Ready` after it has ended or moved to a task. A panic drops it, as it does on a task.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Timers and tasks of the look-up belong to the same runtime, whichever runtime polls the request.
        let _entered = self.runtime.enter();
        // The lock is not held meanwhile, because a store may authenticate a request itself.
        let Some(mut future) = self.take() else { return Poll::Ready(()) };
        let Ok(Poll::Pending) = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) else {
            return Poll::Ready(());
        };
        let mut state = self.state();
        state.future = Some(future);
        if state.is_shared || state.is_holding {
            self.spawn(state);
            return Poll::Ready(());
        }
        state.request = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Moves the future to a task, because another request waits for the outcome.
    pub(super) fn share(&self) {
        let mut state = self.state();
        state.is_shared = true;
        self.spawn(state);
    }

    /// Sets whether the look-up holds something that other look-ups wait for.
    #[cfg(any(feature = "_sql", feature = "redis", test))]
    pub(super) fn set_holding(&self, is_holding: bool) {
        let mut state = self.state();
        state.is_holding = is_holding;
        if is_holding {
            self.spawn(state);
        }
    }

    /// Moves the future to a task, because the request is dropped.
    pub(super) fn leave(&self) {
        self.spawn(self.state());
    }

    /// Spawns the future. While it is being polled, `poll` does that afterwards.
    fn spawn(&self, mut state: MutexGuard<'_, WorkState>) {
        let (future, request) = (state.future.take(), state.request.take());
        drop(state);
        if let Some(future) = future {
            // The task polls it at once, so that no wake of the request's waker is missed.
            self.runtime.spawn(future);
            request.iter().for_each(Waker::wake_by_ref);
        }
    }

    fn take(&self) -> Option<WorkFuture> {
        let mut state = self.state();
        state.request = None;
        state.future.take()
    }

    fn state(&self) -> MutexGuard<'_, WorkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, poll_fn},
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
        time::Duration,
    };

    use tokio::{sync::oneshot, time::timeout};

    use super::*;

    /// Work that ends when the sender sends, and then sends.
    fn work() -> (LookupWork, oneshot::Sender<()>, oneshot::Receiver<()>) {
        let work = LookupWork::new(Handle::current());
        let (go, wait) = oneshot::channel();
        let (done, ended) = oneshot::channel();
        work.begin(Box::pin(async move {
            let _ = wait.await;
            let _ = done.send(());
        }));
        (work, go, ended)
    }

    fn poll(work: &LookupWork) -> Poll<()> {
        work.poll(&mut Context::from_waker(Waker::noop()))
    }

    async fn ends(ended: oneshot::Receiver<()>) -> bool {
        timeout(Duration::from_secs(5), ended).await.is_ok_and(|outcome| outcome.is_ok())
    }

    #[tokio::test]
    async fn work_that_holds_nothing_stays_with_its_request() {
        let (work, go, mut ended) = work();
        work.set_holding(false);
        assert_eq!(poll(&work), Poll::Pending);
        go.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(ended.try_recv().is_err(), "nothing else polls it");
        assert_eq!(poll(&work), Poll::Ready(()));
        assert!(ended.try_recv().is_ok());
    }

    #[tokio::test]
    async fn work_moves_to_a_task_when_others_depend_on_it() {
        let steps: [fn(&LookupWork); 4] = [
            |work| assert_eq!(poll(work), Poll::Ready(()), "it holds something by default"),
            |work| {
                work.set_holding(false);
                assert_eq!(poll(work), Poll::Pending);
                work.set_holding(true);
            },
            |work| {
                work.set_holding(false);
                assert_eq!(poll(work), Poll::Pending);
                work.share();
                // It never comes back.
                work.set_holding(false);
            },
            |work| work.leave(),
        ];
        for step in steps {
            let (work, go, ended) = work();
            step(&work);
            assert_eq!(poll(&work), Poll::Ready(()));
            go.send(()).unwrap();
            assert!(ends(ended).await);
        }
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn the_request_is_woken_when_the_work_moves() {
        let steps: [fn(&LookupWork); 2] = [LookupWork::share, |work| work.set_holding(true)];
        for step in steps {
            let (work, _go, _ended) = work();
            work.set_holding(false);
            let wakes = Arc::new(Wakes::default());
            let waker = Waker::from(Arc::clone(&wakes));
            assert_eq!(work.poll(&mut Context::from_waker(&waker)), Poll::Pending);
            assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
            step(&work);
            assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        }
    }

    #[tokio::test]
    async fn work_that_others_depend_on_before_or_while_it_is_polled_moves_to_a_task() {
        let before = LookupWork::new(Handle::current());
        before.share();
        let (done, ended) = oneshot::channel();
        before.begin(Box::pin(async { assert_eq!(done.send(()), Ok(())) }));
        assert!(ends(ended).await);

        let during = Arc::new(LookupWork::new(Handle::current()));
        let polls = Arc::new(AtomicUsize::new(0));
        let (own, count) = (Arc::clone(&during), Arc::clone(&polls));
        during.set_holding(false);
        during.begin(Box::pin(poll_fn(move |_| {
            own.share();
            match count.fetch_add(1, Ordering::Relaxed) {
                0 => Poll::Pending,
                _ => Poll::Ready(()),
            }
        })));
        assert_eq!(poll(&during), Poll::Ready(()));
        while polls.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_panic_drops_the_future() {
        let work = LookupWork::new(Handle::current());
        let (kept, dropped) = oneshot::channel::<()>();
        work.begin(Box::pin(async move {
            let _kept = kept;
            assert!(Handle::try_current().is_err(), "panic on purpose");
            pending::<()>().await;
        }));
        assert_eq!(poll(&work), Poll::Ready(()));
        assert!(dropped.await.is_err());
    }
}
