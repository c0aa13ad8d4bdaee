-- The functions and triggers of this version refer to the audit. The comment holds their version: without it, migrate()
-- of an earlier version makes its own.
DROP FUNCTION IF EXISTS
    api_key_next_revision, api_key_revise_key, api_key_revise_user, api_key_note_key, api_key_note_row, api_key_note_added,
    api_key_note_user, api_key_note_all, api_key_notify,
    api_key_skip_foreign, api_key_cluster, api_key_horizon, api_key_prune, api_key_renumber, api_key_write_audit, api_key_audited,
    api_key_audit_user CASCADE;
COMMENT ON TABLE api_key_changes IS NULL;
DROP TABLE api_key_audit;
DROP SEQUENCE api_key_audit_ids;
DROP INDEX IF EXISTS
    api_keys_previous_lookup, api_keys_created_by_key, api_keys_expiring, api_keys_revoked, api_keys_prefix;

DO $$
DECLARE
    made RECORD;
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = to_regclass('api_keys') AND i.indpred IS NULL AND a.attname = 'key_prefix'
    ) THEN
        CREATE INDEX api_keys_lookup ON api_keys (key_prefix);
    END IF;
    FOR made IN
        SELECT attname AS name FROM pg_attribute
        WHERE attrelid = to_regclass('api_keys') AND NOT attisdropped
            AND col_description(attrelid, attnum) = 'made by tower-api-key'
            AND attname IN (
                'description', 'not_before', 'previous_key_prefix', 'previous_key_hash', 'previous_fast_hash',
                'previous_fast_hash_of', 'previous_expires_at', 'previous_last_used_at', 'created_by', 'created_by_key',
                'revoked_at', 'revoked_by', 'revoke_reason')
    LOOP
        EXECUTE format('ALTER TABLE api_keys DROP COLUMN %I', made.name);
    END LOOP;
    FOR made IN
        SELECT conname AS name FROM pg_constraint
        WHERE conrelid = to_regclass('api_keys') AND confrelid = to_regclass('users') AND contype = 'f'
            AND obj_description(conrelid, 'pg_class') = 'made by tower-api-key'
    LOOP
        EXECUTE format('ALTER TABLE api_keys DROP CONSTRAINT %I', made.name);
        EXECUTE format(
            'ALTER TABLE api_keys ADD CONSTRAINT %I FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE',
            made.name);
    END LOOP;
END
$$;
