-- The triggers refer to these tables. migrate() of an older version restores its own.
DROP TRIGGER IF EXISTS api_key_note_new;
DROP TRIGGER IF EXISTS api_key_note_gone;
DROP TRIGGER IF EXISTS api_key_note;
DROP TRIGGER IF EXISTS api_key_note_replaced;
DROP TRIGGER IF EXISTS api_key_note_overwritten;
DROP TRIGGER IF EXISTS api_key_audit_overwritten;
DROP TRIGGER IF EXISTS api_key_note_user_new;
DROP TRIGGER IF EXISTS api_key_note_user;
DROP TRIGGER IF EXISTS api_key_note_user_gone;
DROP TRIGGER IF EXISTS api_key_note_user_replaced;
DROP TRIGGER IF EXISTS api_key_note_user_overwritten;
DROP TRIGGER IF EXISTS api_key_audit_user_overwritten;
DROP TRIGGER IF EXISTS api_key_audit_user_going;
DROP TABLE api_key_audit;
DROP TABLE api_key_attribution;
DROP TABLE api_key_replaced;
DROP TABLE api_key_owners;
DROP TABLE api_key_schema;
DROP INDEX api_keys_previous_lookup;
DROP INDEX api_keys_creator;
DROP INDEX api_keys_expiry;
DROP INDEX api_keys_revoked;
-- Hashes of previous secrets are removed. The other columns of the migration are kept, because an adopted table may have
-- had them before, and SQLite has no conditional statements.
ALTER TABLE api_keys DROP COLUMN previous_key_prefix;
ALTER TABLE api_keys DROP COLUMN previous_key_hash;
ALTER TABLE api_keys DROP COLUMN previous_fast_hash;
ALTER TABLE api_keys DROP COLUMN previous_fast_hash_of;
ALTER TABLE api_keys DROP COLUMN previous_expires_at;
ALTER TABLE api_keys DROP COLUMN previous_last_used_at;
