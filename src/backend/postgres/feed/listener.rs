//! The connection on which notifications arrive: [`Listener`].

use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout, timeout_at},
};
use tokio_postgres::{AsyncMessage, Client, SimpleQueryMessage};

use super::DEADLINE;
use crate::{
    backend::postgres::{Inner, sqlstate::statement_error},
    error::StoreError,
    telemetry,
};

/// Time in which notifications are combined into one read.
const BURST: Duration = Duration::from_millis(2);

/// A dedicated connection on which notifications arrive.
pub(super) struct Listener {
    client: Client,
    notified: mpsc::Receiver<Notified>,
    /// A channel that only this connection uses. A notification that returns on it shows that notifications arrive,
    /// which they don't through PgBouncer.
    own_channel: String,
    awaits_beat: bool,
    was_deaf: bool,
}

enum Notified {
    Changes,
    OwnBeat,
}

impl Listener {
    pub(super) async fn connect(store: &Inner) -> Result<Self, StoreError> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| StoreError::unavailable(error.to_string()))?;
        let own_channel = format!("api_key_beat_{:016x}", u64::from_ne_bytes(random));
        let (client, mut connection) = store.target.connect_raw(DEADLINE).await?;
        // A full queue already contains all the hints that one read needs.
        let (hint, notified) = mpsc::channel(64);
        let own = own_channel.clone();
        // The task ends when the client is dropped.
        tokio::spawn(async move {
            while let Some(Ok(message)) =
                std::future::poll_fn(|cx| connection.poll_message(cx)).await
            {
                let AsyncMessage::Notification(notification) = message else { continue };
                let is_own = notification.channel() == own;
                // The payload is ignored, because any role may have written it.
                let _ = hint.try_send(if is_own { Notified::OwnBeat } else { Notified::Changes });
            }
        });
        let listener = Self { client, notified, own_channel, awaits_beat: false, was_deaf: false };
        listener.run(&format!("LISTEN api_key_changes; LISTEN {}", listener.own_channel)).await?;
        Ok(listener)
    }

    /// Waits for a notification, at most until `until`.
    pub(super) async fn wait(&mut self, until: Instant) -> Result<(), StoreError> {
        loop {
            match timeout_at(until.into(), self.notified.recv()).await {
                Err(_) => return Ok(()),
                Ok(None) => return Err(StoreError::unavailable("the connection is closed")),
                Ok(Some(Notified::OwnBeat)) => self.note_beat(),
                Ok(Some(Notified::Changes)) => break,
            }
        }
        sleep(BURST).await;
        while let Ok(notified) = self.notified.try_recv() {
            if matches!(notified, Notified::OwnBeat) {
                self.note_beat();
            }
        }
        Ok(())
    }

    fn note_beat(&mut self) {
        self.awaits_beat = false;
        if std::mem::take(&mut self.was_deaf) {
            telemetry::feed_notified(true);
        }
    }

    /// Sends a notification to this connection itself, and logs if the last one has not arrived.
    pub(super) async fn beat(&mut self) -> Result<(), StoreError> {
        if self.awaits_beat && !std::mem::replace(&mut self.was_deaf, true) {
            telemetry::feed_notified(false);
        }
        self.awaits_beat = true;
        self.run(&format!("NOTIFY {}", self.own_channel)).await.map(drop)
    }

    /// Runs a statement that returns one JSON value.
    pub(super) async fn run_json<T: DeserializeOwned>(&self, sql: &str) -> Result<T, StoreError> {
        let text = self.run(sql).await?;
        let text = text.ok_or_else(|| StoreError::rejected("the feed's query returns no row"))?;
        serde_json::from_str(&text).map_err(StoreError::rejected)
    }

    /// Runs statements and returns the first value. They are sent as text in one message: nothing is prepared, so that
    /// it works through any pooler. The text contains no external values other than numbers and ids that the database
    /// made.
    async fn run(&self, sql: &str) -> Result<Option<String>, StoreError> {
        let ran = timeout(DEADLINE, self.client.simple_query(sql)).await;
        let messages = ran.map_err(|_| StoreError::timeout(DEADLINE))?;
        let messages = messages.map_err(statement_error)?;
        Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        }))
    }
}
