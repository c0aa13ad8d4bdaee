-- What was used, by day (UTC). Not tied to api_keys: what a key has cost outlives it.
CREATE TABLE IF NOT EXISTS api_key_usage (
    api_key_id       INTEGER NOT NULL,
    day              TEXT    NOT NULL,
    requests         INTEGER NOT NULL DEFAULT 0,
    tokens           INTEGER NOT NULL DEFAULT 0,
    -- A millionth of a cent.
    cost_micro_cents INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (api_key_id, day)
) WITHOUT ROWID;

-- The last batch of each writer that was counted: one that is sent again counts once.
CREATE TABLE IF NOT EXISTS api_key_usage_writers (
    writer   TEXT    PRIMARY KEY,
    sequence INTEGER NOT NULL,
    seen_at  TEXT    NOT NULL
);
