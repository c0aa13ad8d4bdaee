-- Revisions and changes, from which caches learn that a key or its owner was changed. The triggers that write them
-- are in src/store/sqlite/triggers.rs: they depend on the unique indexes of the tables. SQLite has one writer, so
-- that revisions rise in the order of commits.

CREATE TABLE IF NOT EXISTS api_key_changes (
    revision   INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Tells a row from one with the same revision in an older copy of the file.
    nonce      INTEGER NOT NULL DEFAULT (random()),
    changed_at REAL    NOT NULL DEFAULT (julianday('now')),
    -- The keys with this lookup id (and the row that changed), or those of this user, or with neither all keys.
    key_prefix TEXT,
    api_key_id INTEGER,
    user_id    INTEGER,
    -- Keys may have been stored before their user.
    is_new_user BOOLEAN NOT NULL DEFAULT FALSE
);
CREATE INDEX IF NOT EXISTS api_key_changes_prefix ON api_key_changes (key_prefix, revision);
CREATE INDEX IF NOT EXISTS api_key_changes_user ON api_key_changes (user_id, revision);

-- The first row, of a lookup id that no key has, so that there is always a last row.
INSERT INTO api_key_changes (key_prefix) SELECT '' WHERE NOT EXISTS (SELECT 1 FROM api_key_changes);

-- The last revision at known times. What is above one was committed after it, however long ago it was written: that
-- is what a node that starts has to read, and what must not be pruned yet.
CREATE TABLE IF NOT EXISTS api_key_horizons (
    taken_at REAL    NOT NULL DEFAULT (julianday('now')),
    revision INTEGER NOT NULL
);

-- Users who were deleted, and when: their ids may be given again. A key is theirs, and dead, if it was assigned to the
-- id before that (api_keys.api_key_owned_since).
CREATE TABLE IF NOT EXISTS api_key_deleted_users (
    user_id  INTEGER PRIMARY KEY,
    revision INTEGER NOT NULL
);

-- Authenticates entries of shared caches. The latest one is used, the one before it is still accepted.
CREATE TABLE IF NOT EXISTS api_key_cache_secrets (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    secret     BLOB    NOT NULL CHECK (length(secret) = 32),
    created_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f'))
);
INSERT INTO api_key_cache_secrets (secret) SELECT randomblob(32)
    WHERE NOT EXISTS (SELECT 1 FROM api_key_cache_secrets);
