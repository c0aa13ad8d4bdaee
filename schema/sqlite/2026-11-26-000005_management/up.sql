-- Previous secrets, and the audit. migrate() adds the columns of api_keys, because SQLite has no ADD COLUMN IF NOT
-- EXISTS. The triggers that write the audit are in src/backend/sqlite/triggers.rs.

CREATE INDEX IF NOT EXISTS api_keys_previous_lookup ON api_keys (previous_key_prefix)
    WHERE previous_key_prefix IS NOT NULL;
CREATE INDEX IF NOT EXISTS api_keys_creator ON api_keys (created_by_key) WHERE created_by_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS api_keys_expiry ON api_keys (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS api_keys_revoked ON api_keys (id) WHERE NOT coalesce(is_active, FALSE);

-- One row for each change of a key, and of a user who owns keys or is managed by this crate. It references no table: it
-- is kept after the key and the user are deleted.
CREATE TABLE IF NOT EXISTS api_key_audit (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    -- In UTC, with six digits of a second, so that texts are in the order of times.
    at            TEXT    NOT NULL,
    action        TEXT    NOT NULL,
    -- NULL for a statement that this crate did not make.
    actor         TEXT,
    actor_key     INTEGER,
    -- SQLite has no roles.
    database_role TEXT,
    api_key_id    INTEGER,
    user_id       INTEGER,
    -- JSON without hashes and usage.
    "before"      TEXT,
    "after"       TEXT,
    reason        TEXT,
    request_id    TEXT
);
-- Each index ends in the row id, which is the id.
CREATE INDEX IF NOT EXISTS api_key_audit_key ON api_key_audit (api_key_id) WHERE api_key_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS api_key_audit_user ON api_key_audit (user_id);
CREATE INDEX IF NOT EXISTS api_key_audit_actor ON api_key_audit (actor) WHERE actor IS NOT NULL;
CREATE INDEX IF NOT EXISTS api_key_audit_at ON api_key_audit (at);

-- Who makes the change of the current transaction. The row exists only within the transaction.
CREATE TABLE IF NOT EXISTS api_key_attribution (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    at         TEXT    NOT NULL,
    actor      TEXT,
    actor_key  INTEGER,
    reason     TEXT,
    request_id TEXT
);

-- The rows that the current statement is about to delete: a row that REPLACE deletes fires no trigger. They are in the
-- audit once the statement has deleted them. Rows that it did not delete are removed by the next statement.
CREATE TABLE IF NOT EXISTS api_key_replaced (
    is_user  BOOLEAN NOT NULL,
    id       INTEGER NOT NULL,
    -- The action if the row is replaced by one with the same id.
    action   TEXT,
    user_id  INTEGER,
    "before" TEXT    NOT NULL,
    PRIMARY KEY (is_user, id)
) WITHOUT ROWID;

-- The users who own keys, so that changes of other users cost nothing. The triggers of users can't name api_keys.
CREATE TABLE IF NOT EXISTS api_key_owners (
    user_id PRIMARY KEY
) WITHOUT ROWID;
INSERT INTO api_key_owners (user_id) SELECT DISTINCT k.user_id FROM api_keys AS k
    WHERE k.user_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM api_key_owners AS o WHERE o.user_id = k.user_id);

-- The version of the schema, which migrate() writes. Earlier versions have no such table.
CREATE TABLE IF NOT EXISTS api_key_schema (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    version INTEGER NOT NULL
);
