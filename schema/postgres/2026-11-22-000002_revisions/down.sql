-- The triggers are dropped with their functions.
DROP FUNCTION IF EXISTS
    api_key_next_revision, api_key_revise_key, api_key_revise_user, api_key_note_key, api_key_note_user, api_key_note_all, api_key_notify,
    api_key_skip_foreign, api_key_cluster, api_key_horizon, api_key_prune CASCADE;
DROP INDEX IF EXISTS api_keys_by_user;
ALTER TABLE users DROP COLUMN api_key_revision;
ALTER TABLE api_keys DROP COLUMN api_key_revision;
DROP TABLE api_key_changes;
DROP TABLE api_key_horizons;
DROP TABLE api_key_cache_secrets;
DROP SEQUENCE api_key_revisions;
