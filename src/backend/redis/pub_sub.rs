//! Change events, from the store below or, if it has no feed, from the other nodes by pub/sub.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use deadpool_redis::redis::{Msg, aio::PubSub, cmd};
use futures_core::Stream;
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use super::{RedisCache, entry::MAC, names::channel};
use crate::{
    key::equal,
    record::{Revision, UserId},
    store::{CacheSecret, Change, ChangeStream, KeyStore},
    telemetry,
};

const PAUSE: Duration = Duration::from_secs(1);
const SECRET_PAUSE: Duration = Duration::from_millis(20);
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn changes<S: KeyStore>(cache: &RedisCache<S>, since: SystemTime) -> ChangeStream {
    let below = cache.0.store.changes(since);
    if below.has_feed() {
        let is_complete = below.is_complete();
        let with_tombstones = WithTombstones { below, cache: cache.clone() };
        return if is_complete {
            ChangeStream::new(with_tombstones)
        } else {
            ChangeStream::best_effort(with_tombstones)
        };
    }
    let subscription = Subscription { cache: cache.clone(), messages: None };
    ChangeStream::steps(subscription, |mut subscription| async move {
        let change = subscription.next().await;
        Some((vec![change], subscription))
    })
    .into_hints()
}

/// Passes changes on, and queues tombstones for them.
struct WithTombstones<S> {
    below: ChangeStream,
    cache: RedisCache<S>,
}

impl<S> Unpin for WithTombstones<S> {}

impl<S: KeyStore> Stream for WithTombstones<S> {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        let change = ready!(Pin::new(&mut self.below).poll_next(cx));
        if let Some(change) = &change {
            self.cache.queue_tombstone(change);
        }
        Poll::Ready(change)
    }
}

impl<S: KeyStore> RedisCache<S> {
    /// Queues a tombstone for a change. The lookup ids of an owner's keys are not known here; minimum revisions cover
    /// them.
    pub(super) fn queue_tombstone(&self, change: &Change) {
        if let (Change::Prefix(prefix, revision), Some(secret)) =
            (change, self.0.secrets.current(self))
        {
            self.0.tombstones.push(prefix, *revision, secret);
        }
    }

    /// Publishes a change that was made here to the other nodes, if the store has no feed.
    pub(super) fn publish(&self, change: &Change) {
        let Some(secret) = self.0.secrets.current(self) else { return };
        let Some(message) = Message::of(change).and_then(|message| message.encode(&secret)) else {
            return;
        };
        let link = std::sync::Arc::clone(&self.0.link);
        tokio::spawn(async move {
            let mut publish = cmd("PUBLISH");
            publish.arg(channel(&secret)).arg(message);
            // Nodes that miss the message query the store again after `max_staleness`.
            let _ = link.run(&publish).await;
        });
    }
}

#[derive(Serialize, Deserialize)]
enum Message {
    Prefix(String, u64),
    Owner(UserId, u64),
}

impl Message {
    fn of(change: &Change) -> Option<Self> {
        match change {
            Change::Prefix(prefix, revision) => Some(Self::Prefix(prefix.clone(), revision.0)),
            Change::Owner(owner, revision) => Some(Self::Owner(owner.clone(), revision.0)),
            _ => None,
        }
    }

    fn change(self) -> Change {
        match self {
            Self::Prefix(prefix, revision) => Change::Prefix(prefix, Revision(revision)),
            Self::Owner(owner, revision) => Change::Owner(owner, Revision(revision)),
        }
    }

    fn encode(&self, secret: &CacheSecret) -> Option<Vec<u8>> {
        let mut message = serde_json::to_vec(self).ok()?;
        let mac = mac(&message, secret);
        message.extend_from_slice(&mac);
        Some(message)
    }

    fn decode(message: &[u8], secret: &CacheSecret) -> Option<Self> {
        let (text, tag) = message.split_last_chunk()?;
        let secrets = [Some(secret), secret.previous()];
        let is_ours = |secret: &CacheSecret| equal(&mac(text, secret), tag);
        if !secrets.into_iter().flatten().any(is_ours) {
            return None;
        }
        serde_json::from_slice(text).ok()
    }
}

/// Returns the MAC of a message. It differs from that of an entry, which starts with the name and its length.
fn mac(message: &[u8], secret: &CacheSecret) -> [u8; MAC] {
    secret.mac_of(&[b"change:", message])
}

struct Subscription<S> {
    cache: RedisCache<S>,
    messages: Option<PubSub>,
}

impl<S: KeyStore> Subscription<S> {
    async fn next(&mut self) -> Change {
        loop {
            let Some(messages) = &mut self.messages else {
                let Some(secret) = self.cache.0.secrets.current(&self.cache) else {
                    // Without the secret, no message can be verified.
                    sleep(SECRET_PAUSE).await;
                    continue;
                };
                let channel = channel(&secret);
                let subscribe = self.cache.0.link.connector().subscribe(&channel);
                match timeout(CONNECT_LIMIT, subscribe).await {
                    Ok(Ok(messages)) => {
                        self.messages = Some(messages);
                        // Messages may have been missed meanwhile.
                        return Change::Reset;
                    }
                    _ => sleep(PAUSE).await,
                }
                continue;
            };
            let message = {
                let mut messages = messages.on_message();
                std::future::poll_fn(|cx| Pin::new(&mut messages).poll_next(cx)).await
            };
            match message {
                Some(message) => {
                    if let Some(change) = self.verify(&message) {
                        return change;
                    }
                }
                None => self.messages = None,
            }
        }
    }

    fn verify(&self, message: &Msg) -> Option<Change> {
        let secret = self.cache.0.secrets.current(&self.cache)?;
        let message = Message::decode(message.get_payload_bytes(), &secret);
        if message.is_none() {
            telemetry::redis_entry_invalid(&channel(&secret));
        }
        message.map(Message::change)
    }
}
