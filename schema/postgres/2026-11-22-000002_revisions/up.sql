-- Revisions and changes, from which caches learn of changed keys and owners. The functions and triggers that write them
-- are in schema/triggers/postgres.sql.

CREATE SEQUENCE IF NOT EXISTS api_key_revisions;

-- Written only by triggers. The id is random, so that a row differs from one with the same numbers in a database that
-- lost its last commits, and rows of two databases never collide under logical replication.
CREATE TABLE IF NOT EXISTS api_key_changes (
    id         UUID        PRIMARY KEY DEFAULT gen_random_uuid(),
    revision   BIGINT      NOT NULL DEFAULT nextval('api_key_revisions'),
    -- Readers continue from a snapshot: a transaction in progress may commit at any later time.
    xid        XID8        NOT NULL DEFAULT pg_current_xact_id(),
    changed_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    -- The change is of the keys with this lookup id (and of the row that changed), of those of this user, or with
    -- neither of all keys.
    key_prefix TEXT,
    api_key_id BIGINT,
    user_id    BIGINT
);

-- Snapshots of this cluster at known times. A row that is not visible in a snapshot became visible after it, however
-- long ago it was written. A node that starts must read these rows, and they must not be pruned yet.
CREATE TABLE IF NOT EXISTS api_key_horizons (
    id       UUID        PRIMARY KEY DEFAULT gen_random_uuid(),
    cluster  TEXT        NOT NULL,
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    -- Every transaction below next_xid is visible, except for those in in_progress.
    next_xid    XID8     NOT NULL,
    in_progress XID8[]   NOT NULL
);

-- Secrets that authenticate entries of shared caches. The latest one is used, and the one before it is still accepted.
-- Ids are random, so that those of two databases don't collide under logical replication.
CREATE TABLE IF NOT EXISTS api_key_cache_secrets (
    id         BIGINT      PRIMARY KEY DEFAULT (('x' || left(md5(gen_random_uuid()::text), 15))::bit(60)::bigint),
    secret     BYTEA       NOT NULL CHECK (length(secret) = 32),
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);
-- 244 random bits. There is no other strong source without an extension.
INSERT INTO api_key_cache_secrets (secret)
    SELECT sha256((gen_random_uuid()::text || gen_random_uuid()::text)::bytea)
    WHERE NOT EXISTS (SELECT FROM api_key_cache_secrets);

-- An index is created only if it is missing: CREATE INDEX IF NOT EXISTS would wait for a lock first.
DO $$
DECLARE
    wanted RECORD;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('api_key_changes_xid',    'api_key_changes', 'xid, revision'),
            ('api_key_changes_prefix', 'api_key_changes', 'key_prefix, revision'),
            ('api_key_changes_user',   'api_key_changes', 'user_id, revision')
        ) AS indexes (name, in_table, columns)
        -- An index of the same name in a later schema belongs to another table.
        WHERE NOT EXISTS (
            SELECT FROM pg_index WHERE indrelid = to_regclass(in_table) AND indexrelid = to_regclass(name))
    LOOP
        EXECUTE format('CREATE INDEX %I ON %I (%s)', wanted.name, wanted.in_table, wanted.columns);
    END LOOP;

    -- An index for the keys of a user, if an adopted table has none.
    IF NOT EXISTS (
        SELECT FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = to_regclass('api_keys') AND i.indpred IS NULL AND a.attname = 'user_id'
    ) THEN
        CREATE INDEX api_keys_by_user ON api_keys (user_id);
    END IF;

    FOR wanted IN
        SELECT * FROM (VALUES ('users'), ('api_keys')) AS tables (name)
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = to_regclass(name) AND attname = 'api_key_revision' AND NOT attisdropped
        )
    LOOP
        EXECUTE format('ALTER TABLE %I ADD COLUMN api_key_revision BIGINT NOT NULL DEFAULT 0', wanted.name);
        EXECUTE format('COMMENT ON COLUMN %I.api_key_revision IS ''made by tower-api-key''', wanted.name);
    END LOOP;

    -- A dropped sequence removed the default as well. The new one continues after the highest revision.
    IF NOT (SELECT is_called FROM api_key_revisions) THEN
        ALTER TABLE api_key_changes ALTER COLUMN revision SET DEFAULT nextval('api_key_revisions');
        PERFORM setval('api_key_revisions', greatest(
            (SELECT max(revision) FROM api_key_changes), (SELECT max(api_key_revision) FROM api_keys),
            (SELECT max(api_key_revision) FROM users), 0) + 1, FALSE);
    END IF;
END
$$;
