-- Usage by day (UTC). It does not reference api_keys: the cost of a key is kept after the key is deleted.
CREATE TABLE IF NOT EXISTS api_key_usage (
    api_key_id       INTEGER NOT NULL,
    day              TEXT    NOT NULL,
    requests         INTEGER NOT NULL DEFAULT 0,
    tokens           INTEGER NOT NULL DEFAULT 0,
    -- In millionths of a cent.
    cost_micro_cents INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (api_key_id, day)
) WITHOUT ROWID;

-- The last counted batch of each writer, which makes retries idempotent.
CREATE TABLE IF NOT EXISTS api_key_usage_writers (
    writer   TEXT    PRIMARY KEY,
    sequence INTEGER NOT NULL,
    seen_at  TEXT    NOT NULL
);
