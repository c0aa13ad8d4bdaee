DROP TRIGGER api_key_note_new;
DROP TRIGGER api_key_note_gone;
DROP TRIGGER api_key_note;
DROP TRIGGER api_key_note_user;
DROP TRIGGER api_key_note_user_gone;
ALTER TABLE users DROP COLUMN api_key_revision;
ALTER TABLE api_keys DROP COLUMN api_key_revision;
DROP TABLE api_key_changes;
DROP TABLE api_key_cache_secrets;
