-- Rotation, attribution and audit. The functions and triggers that write the audit are in schema/triggers/postgres.sql.

DO $$
DECLARE
    wanted RECORD;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('description',           'TEXT'),
            ('not_before',            'TIMESTAMPTZ'),
            -- The secret before the last rotation, which is accepted until previous_expires_at.
            ('previous_key_prefix',   'TEXT'),
            ('previous_key_hash',     'TEXT'),
            -- Valid only while previous_fast_hash_of = previous_key_hash.
            ('previous_fast_hash',    'TEXT'),
            ('previous_fast_hash_of', 'TEXT'),
            ('previous_expires_at',   'TIMESTAMPTZ'),
            ('previous_last_used_at', 'TIMESTAMPTZ'),
            ('created_by',            'TEXT'),
            ('created_by_key',        'BIGINT'),
            ('revoked_at',            'TIMESTAMPTZ'),
            ('revoked_by',            'TEXT'),
            ('revoke_reason',         'TEXT')
        ) AS columns (name, definition)
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = to_regclass('api_keys') AND attname = name AND NOT attisdropped)
    LOOP
        EXECUTE format('ALTER TABLE api_keys ADD COLUMN %I %s', wanted.name, wanted.definition);
        EXECUTE format('COMMENT ON COLUMN api_keys.%I IS ''made by tower-api-key''', wanted.name);
    END LOOP;
END
$$;

CREATE SEQUENCE IF NOT EXISTS api_key_audit_ids;

-- Changes of keys and users, written only by triggers. It does not reference the tables, because entries are kept after
-- the key or the user is deleted.
CREATE TABLE IF NOT EXISTS api_key_audit (
    id            BIGINT      NOT NULL DEFAULT nextval('api_key_audit_ids'),
    at            TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    action        TEXT        NOT NULL,
    actor         TEXT,
    actor_key     BIGINT,
    database_role TEXT,
    api_key_id    BIGINT,
    user_id       BIGINT,
    before        JSONB,
    after         JSONB,
    reason        TEXT,
    request_id    TEXT,
    -- With the time, so that an entry of another database with the same id is another entry: logical replication and
    -- dumps bring such entries. A trigger gives them ids of this database.
    PRIMARY KEY (id, at)
);

-- An index is created only if it is missing: CREATE INDEX IF NOT EXISTS would wait for a lock first.
DO $$
DECLARE
    wanted RECORD;
    owner  RECORD;
BEGIN
    -- A dropped sequence removed the default as well.
    IF NOT EXISTS (
        SELECT FROM pg_attrdef d JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
        WHERE d.adrelid = 'api_key_audit'::regclass AND p.refobjid = 'api_key_audit_ids'::regclass
    ) THEN
        ALTER TABLE api_key_audit ALTER COLUMN id SET DEFAULT nextval('api_key_audit_ids');
    END IF;
    -- Rows of a dump may be ahead of the sequence.
    IF (SELECT max(id) FROM api_key_audit) > (SELECT last_value FROM api_key_audit_ids) THEN
        PERFORM setval('api_key_audit_ids', (SELECT max(id) FROM api_key_audit));
    END IF;

    FOR wanted IN
        SELECT * FROM (VALUES
            ('api_key_audit_key',        'api_key_audit', 'api_key_id, id', NULL),
            ('api_key_audit_user',       'api_key_audit', 'user_id, id',    NULL),
            ('api_key_audit_actor',      'api_key_audit', 'actor, id',      NULL),
            ('api_key_audit_time',       'api_key_audit', 'at',             NULL),
            -- Most keys have no value in these columns. An index on last_used_at would end HOT updates of usage.
            ('api_keys_previous_lookup', 'api_keys',      'previous_key_prefix', 'previous_key_prefix IS NOT NULL'),
            ('api_keys_created_by_key',  'api_keys',      'created_by_key',      'created_by_key IS NOT NULL'),
            ('api_keys_expiring',        'api_keys',      'expires_at',          'expires_at IS NOT NULL'),
            ('api_keys_revoked',         'api_keys',      'id',                  'NOT coalesce(is_active, FALSE)')
        ) AS indexes (name, in_table, columns, condition)
        -- An index of the same name in a later schema belongs to another table.
        WHERE NOT EXISTS (
            SELECT FROM pg_index WHERE indrelid = to_regclass(in_table) AND indexrelid = to_regclass(name))
    LOOP
        EXECUTE format('CREATE INDEX %I ON %I (%s)%s', wanted.name, wanted.in_table, wanted.columns,
            ' WHERE ' || wanted.condition);
    END LOOP;

    -- In a table that this crate made, the index of look-ups also serves ranges of lookup ids, whatever the collation of
    -- the database is. It replaces the index of the first migration. The indexes of an adopted table are left as they are.
    IF EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = to_regclass('api_keys') AND attname = 'key_prefix' AND atttypid = 'text'::regtype
            AND attcollation = 'pg_catalog.default'::regcollation
            AND obj_description(attrelid, 'pg_class') = 'made by tower-api-key'
    ) AND NOT EXISTS (
        SELECT FROM pg_index WHERE indrelid = to_regclass('api_keys') AND indexrelid = to_regclass('api_keys_prefix')
    ) THEN
        CREATE INDEX api_keys_prefix ON api_keys (key_prefix text_pattern_ops);
        IF EXISTS (
            SELECT FROM pg_index WHERE indrelid = to_regclass('api_keys') AND indexrelid = to_regclass('api_keys_lookup')
        ) THEN
            DROP INDEX api_keys_lookup;
        END IF;
    END IF;

    -- In a table that this crate made, the deletion of a user no longer deletes keys. An adopted table is left as it is.
    FOR owner IN
        SELECT conname FROM pg_constraint
        WHERE conrelid = to_regclass('api_keys') AND confrelid = to_regclass('users') AND contype = 'f'
            AND confdeltype = 'c' AND obj_description(conrelid, 'pg_class') = 'made by tower-api-key'
    LOOP
        EXECUTE format('ALTER TABLE api_keys DROP CONSTRAINT %I', owner.conname);
        EXECUTE format('ALTER TABLE api_keys ADD CONSTRAINT %I FOREIGN KEY (user_id) REFERENCES users (id)', owner.conname);
    END LOOP;
END
$$;
