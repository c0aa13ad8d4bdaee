-- Users and their API keys. Lists and metadata are JSON in text; time stamps are in UTC, without a time zone, as
-- SQLite's functions and most ORMs write them. Existing tables are adopted: migrate() records them in api_key_adopted
-- and adds the columns that they lack.

CREATE TABLE IF NOT EXISTS api_key_adopted (
    name TEXT PRIMARY KEY
);

CREATE TABLE IF NOT EXISTS users (
    -- Never reused, because keys refer to it.
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    email      TEXT    NOT NULL UNIQUE,
    role       TEXT    NOT NULL DEFAULT 'user',
    is_active  BOOLEAN NOT NULL DEFAULT TRUE,
    created_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f')),
    updated_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f'))
);

CREATE TABLE IF NOT EXISTS api_keys (
    -- Never reused, because usage and budgets refer to it, and are kept after the key is deleted.
    id                    INTEGER PRIMARY KEY AUTOINCREMENT,
    -- A user who owns keys can't be deleted.
    user_id               INTEGER NOT NULL REFERENCES users (id),
    name                  TEXT    NOT NULL DEFAULT '',
    description           TEXT,
    key_prefix            TEXT    NOT NULL,
    key_hash              TEXT    NOT NULL,
    -- A fast hash of the same key, which is valid only while fast_hash_of = key_hash.
    fast_hash             TEXT,
    fast_hash_of          TEXT,
    -- The previous secret, which is accepted until previous_expires_at.
    previous_key_prefix   TEXT,
    previous_key_hash     TEXT,
    previous_fast_hash    TEXT,
    previous_fast_hash_of TEXT,
    previous_expires_at   TEXT,
    previous_last_used_at TEXT,
    is_active             BOOLEAN NOT NULL DEFAULT TRUE,
    revoked_at            TEXT,
    revoked_by            TEXT,
    revoke_reason         TEXT,
    created_by            TEXT,
    -- It does not reference api_keys: it is kept after that key is deleted.
    created_by_key        INTEGER,
    permissions           TEXT    NOT NULL DEFAULT '[]',
    scopes                TEXT    NOT NULL DEFAULT '[]',
    rate_limit_per_minute INTEGER,
    rate_limit_per_hour   INTEGER,
    rate_limit_per_day    INTEGER,
    allowed_models        TEXT    NOT NULL DEFAULT '[]',
    allowed_endpoints     TEXT    NOT NULL DEFAULT '[]',
    allowed_ips           TEXT    NOT NULL DEFAULT '[]',
    is_unlimited          BOOLEAN NOT NULL DEFAULT FALSE,
    budget_limit_cents    INTEGER,
    budget_type           TEXT,
    expires_at            TEXT,
    not_before            TEXT,
    total_requests        INTEGER NOT NULL DEFAULT 0,
    total_tokens          INTEGER NOT NULL DEFAULT 0,
    -- In cents, with a precision of a millionth.
    total_cost            REAL    NOT NULL DEFAULT 0,
    last_used_at          TEXT,
    metadata              TEXT,
    created_at            TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f')),
    updated_at            TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f'))
);

-- Look-ups use the prefix. It is not unique: existing keys may share one.
CREATE INDEX IF NOT EXISTS api_keys_lookup ON api_keys (key_prefix);
CREATE INDEX IF NOT EXISTS api_keys_owner ON api_keys (user_id);
