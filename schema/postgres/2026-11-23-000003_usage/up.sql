-- What was used, by day (UTC). Not tied to api_keys: what a key has cost outlives it.
CREATE TABLE IF NOT EXISTS api_key_usage (
    api_key_id       BIGINT NOT NULL,
    day              DATE   NOT NULL,
    requests         BIGINT NOT NULL DEFAULT 0,
    tokens           BIGINT NOT NULL DEFAULT 0,
    -- A millionth of a cent.
    cost_micro_cents BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (api_key_id, day)
);

-- The last batch of each writer that was counted: one that is sent again counts once.
CREATE TABLE IF NOT EXISTS api_key_usage_writers (
    writer   TEXT        PRIMARY KEY,
    sequence BIGINT      NOT NULL,
    seen_at  TIMESTAMPTZ NOT NULL
);
