-- How caches learn of changes. Whoever changes a column that a decision reads gives the row a new
-- revision and leaves a row in api_key_changes, also with an UPDATE by hand. Usage totals and
-- last_used_at do neither. SQLite has one writer, so that revisions rise in the order of commits.

CREATE TABLE api_key_changes (
    revision   INTEGER PRIMARY KEY AUTOINCREMENT,
    changed_at REAL    NOT NULL DEFAULT (julianday('now')),
    -- The keys under this prefix, or of this user, or with neither all of them.
    key_prefix TEXT,
    user_id    INTEGER
);
CREATE INDEX api_key_changes_prefix ON api_key_changes (key_prefix, revision);

-- The first row, of a prefix that no key has, so that there is always one whose absence tells of a restore.
INSERT INTO api_key_changes (key_prefix) VALUES ('');

-- Authenticates entries of shared caches. The newest one is used, the one before still accepted.
CREATE TABLE api_key_cache_secrets (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    secret     BLOB    NOT NULL CHECK (length(secret) = 32),
    created_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f'))
);
INSERT INTO api_key_cache_secrets (secret) VALUES (randomblob(32));

ALTER TABLE users ADD COLUMN api_key_revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE api_keys ADD COLUMN api_key_revision INTEGER NOT NULL DEFAULT 0;

CREATE TRIGGER api_key_note_new AFTER INSERT ON api_keys BEGIN
    INSERT INTO api_key_changes (key_prefix) VALUES (NEW.key_prefix);
    UPDATE api_keys SET api_key_revision = (SELECT max(revision) FROM api_key_changes) WHERE id = NEW.id;
END;
CREATE TRIGGER api_key_note_gone AFTER DELETE ON api_keys BEGIN
    INSERT INTO api_key_changes (key_prefix) VALUES (OLD.key_prefix);
END;
CREATE TRIGGER api_key_note AFTER UPDATE ON api_keys WHEN
    OLD.id IS NOT NEW.id
    OR OLD.user_id IS NOT NEW.user_id
    OR OLD.name IS NOT NEW.name
    OR OLD.key_prefix IS NOT NEW.key_prefix
    OR OLD.key_hash IS NOT NEW.key_hash
    OR OLD.is_active IS NOT NEW.is_active
    OR OLD.permissions IS NOT NEW.permissions
    OR OLD.scopes IS NOT NEW.scopes
    OR OLD.rate_limit_per_minute IS NOT NEW.rate_limit_per_minute
    OR OLD.rate_limit_per_hour IS NOT NEW.rate_limit_per_hour
    OR OLD.rate_limit_per_day IS NOT NEW.rate_limit_per_day
    OR OLD.allowed_models IS NOT NEW.allowed_models
    OR OLD.allowed_endpoints IS NOT NEW.allowed_endpoints
    OR OLD.allowed_ips IS NOT NEW.allowed_ips
    OR OLD.is_unlimited IS NOT NEW.is_unlimited
    OR OLD.budget_limit_cents IS NOT NEW.budget_limit_cents
    OR OLD.budget_type IS NOT NEW.budget_type
    OR OLD.expires_at IS NOT NEW.expires_at
    OR OLD.metadata IS NOT NEW.metadata
BEGIN
    INSERT INTO api_key_changes (key_prefix)
        SELECT OLD.key_prefix WHERE OLD.key_prefix IS NOT NEW.key_prefix;
    INSERT INTO api_key_changes (key_prefix) VALUES (NEW.key_prefix);
    UPDATE api_keys SET api_key_revision = (SELECT max(revision) FROM api_key_changes) WHERE id = NEW.id;
END;
-- Ids are given again, and REPLACE deletes without a word.
CREATE TRIGGER api_key_note_user_new AFTER INSERT ON users BEGIN
    INSERT INTO api_key_changes (user_id) VALUES (NEW.id);
    UPDATE users SET api_key_revision = (SELECT max(revision) FROM api_key_changes) WHERE id = NEW.id;
    -- Keys that were stored before their user were unknown until now.
    INSERT INTO api_key_changes (key_prefix) SELECT key_prefix FROM api_keys WHERE user_id = NEW.id;
END;
CREATE TRIGGER api_key_note_replaced BEFORE INSERT ON api_keys BEGIN
    INSERT INTO api_key_changes (key_prefix)
        SELECT key_prefix FROM api_keys WHERE id = NEW.id AND key_prefix IS NOT NEW.key_prefix;
END;
CREATE TRIGGER api_key_note_user AFTER UPDATE ON users WHEN
    OLD.id IS NOT NEW.id
    OR OLD.email IS NOT NEW.email
    OR OLD.role IS NOT NEW.role
    OR OLD.is_active IS NOT NEW.is_active
BEGIN
    INSERT INTO api_key_changes (user_id) SELECT OLD.id WHERE OLD.id IS NOT NEW.id;
    INSERT INTO api_key_changes (user_id) VALUES (NEW.id);
    UPDATE users SET api_key_revision = (SELECT max(revision) FROM api_key_changes) WHERE id = NEW.id;
END;
CREATE TRIGGER api_key_note_user_gone AFTER DELETE ON users BEGIN
    INSERT INTO api_key_changes (user_id) VALUES (OLD.id);
END;
