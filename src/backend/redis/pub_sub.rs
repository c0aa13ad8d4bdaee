//! Changes, from the store below or, where that has no feed, from the other nodes by pub/sub.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use deadpool_redis::redis::{Msg, aio::PubSub, cmd};
use futures_core::Stream;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::time::{sleep, timeout};

use super::{RedisCache, entry::MAC, names::channel};
use crate::{
    key::hmac_sha256,
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
        let deleting = Deleting { below, cache: cache.clone() };
        return if is_complete {
            ChangeStream::new(deleting)
        } else {
            ChangeStream::best_effort(deleting)
        };
    }
    let listening = Listening { cache: cache.clone(), messages: None };
    ChangeStream::steps(listening, |mut listening| async move {
        let change = listening.next().await;
        Some((vec![change], listening))
    })
    .into_hints()
}

/// Passes changes on, and deletes in Redis what they are about.
struct Deleting<S> {
    below: ChangeStream,
    cache: RedisCache<S>,
}

impl<S> Unpin for Deleting<S> {}

impl<S: KeyStore> Stream for Deleting<S> {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        let change = ready!(Pin::new(&mut self.below).poll_next(cx));
        if let Some(change) = &change {
            self.cache.delete(change);
        }
        Poll::Ready(change)
    }
}

impl<S: KeyStore> RedisCache<S> {
    /// Deletes in Redis what a change is about, in the background. Of an owner's keys, the prefixes are not
    /// known here: for those there are minimum revisions.
    pub(super) fn delete(&self, change: &Change) {
        if let (Change::Prefix(prefix, revision), Some(secret)) =
            (change, self.0.secrets.current(self))
        {
            self.0.deletes.push(prefix, *revision, secret);
        }
    }

    /// Tells the other nodes of a change that was made here, if the store does not.
    pub(super) fn publish(&self, change: &Change) {
        let Some(secret) = self.0.secrets.current(self) else { return };
        let Some(message) = Message::of(change).and_then(|message| message.encode(&secret)) else {
            return;
        };
        let link = std::sync::Arc::clone(&self.0.link);
        tokio::spawn(async move {
            let mut publish = cmd("PUBLISH");
            publish.arg(channel(&secret)).arg(message);
            // Nodes that hear nothing ask the store again after `max_staleness`.
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
        let (text, tag) = message.split_at_checked(message.len().checked_sub(MAC)?)?;
        let secrets = [Some(secret), secret.previous()];
        let is_ours = |secret: &CacheSecret| bool::from(mac(text, secret).ct_eq(tag));
        if !secrets.into_iter().flatten().any(is_ours) {
            return None;
        }
        serde_json::from_slice(text).ok()
    }
}

/// Not that of an entry: the name comes first there, with its length.
fn mac(message: &[u8], secret: &CacheSecret) -> [u8; MAC] {
    hmac_sha256(secret.expose_secret(), &[b"change:", message].concat())
}

struct Listening<S> {
    cache: RedisCache<S>,
    messages: Option<PubSub>,
}

impl<S: KeyStore> Listening<S> {
    async fn next(&mut self) -> Change {
        loop {
            let Some(messages) = &mut self.messages else {
                let Some(secret) = self.cache.0.secrets.current(&self.cache) else {
                    // Without the secret, no message is taken.
                    sleep(SECRET_PAUSE).await;
                    continue;
                };
                let channel = channel(&secret);
                let subscribe = self.cache.0.link.connector().subscribe(&channel);
                match timeout(CONNECT_LIMIT, subscribe).await {
                    Ok(Ok(messages)) => {
                        self.messages = Some(messages);
                        // What was said meanwhile is not known.
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
                    if let Some(change) = self.believe(&message) {
                        return change;
                    }
                }
                None => self.messages = None,
            }
        }
    }

    fn believe(&self, message: &Msg) -> Option<Change> {
        let secret = self.cache.0.secrets.current(&self.cache)?;
        let message = Message::decode(message.get_payload_bytes(), &secret);
        if message.is_none() {
            telemetry::redis_entry_not_believed(&channel(&secret));
        }
        message.map(Message::change)
    }
}
