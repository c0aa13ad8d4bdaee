-- The triggers go with their functions.
DROP FUNCTION api_key_next_revision, api_key_note_key, api_key_note_user, api_key_note_all CASCADE;
DROP INDEX IF EXISTS api_keys_by_user;
ALTER TABLE users DROP COLUMN api_key_revision;
ALTER TABLE api_keys DROP COLUMN api_key_revision;
DROP TABLE api_key_changes;
DROP TABLE api_key_cache_secrets;
DROP SEQUENCE api_key_revisions;
