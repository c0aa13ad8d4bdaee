-- Revisions and changes, from which caches learn of changed keys and owners. The triggers that write them are in
-- src/backend/sqlite/triggers.rs, because they depend on the unique indexes of the tables. SQLite has one writer, so
-- that revisions rise in the order of commits.

CREATE TABLE IF NOT EXISTS api_key_changes (
    revision   INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Distinguishes a row from one with the same revision in an older copy of the file.
    nonce      INTEGER NOT NULL DEFAULT (random()),
    changed_at REAL    NOT NULL DEFAULT (julianday('now')),
    -- The change is of the keys with this lookup id (and of the row that changed), of those of this user, or with
    -- neither of all keys.
    key_prefix TEXT,
    api_key_id INTEGER,
    user_id    INTEGER,
    -- Keys may have been stored before their user.
    is_new_user BOOLEAN NOT NULL DEFAULT FALSE
);
CREATE INDEX IF NOT EXISTS api_key_changes_prefix ON api_key_changes (key_prefix, revision)
    WHERE key_prefix IS NOT NULL;
CREATE INDEX IF NOT EXISTS api_key_changes_user ON api_key_changes (user_id, revision)
    WHERE user_id IS NOT NULL;

-- The first row, with a lookup id that no key has, so that there is always a last row.
INSERT INTO api_key_changes (key_prefix) SELECT '' WHERE NOT EXISTS (SELECT 1 FROM api_key_changes);

-- The last revision at known times. A higher revision was committed after that time, however long ago it was written. A
-- node that starts must read these rows, and they must not be pruned yet.
CREATE TABLE IF NOT EXISTS api_key_horizons (
    taken_at REAL    NOT NULL DEFAULT (julianday('now')),
    revision INTEGER NOT NULL
);

-- Deleted users, and when they were deleted: their ids may be assigned again. A key that was assigned to the id before
-- that (api_keys.api_key_owned_since) belongs to the deleted user, and is not valid.
CREATE TABLE IF NOT EXISTS api_key_deleted_users (
    user_id  INTEGER PRIMARY KEY,
    revision INTEGER NOT NULL
);

-- Secrets that authenticate entries of shared caches. The latest one is used, and the one before it is still accepted.
CREATE TABLE IF NOT EXISTS api_key_cache_secrets (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    secret     BLOB    NOT NULL CHECK (length(secret) = 32),
    created_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f'))
);
INSERT INTO api_key_cache_secrets (secret) SELECT randomblob(32)
    WHERE NOT EXISTS (SELECT 1 FROM api_key_cache_secrets);
