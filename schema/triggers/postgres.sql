-- The functions and triggers that assign revisions to changed rows, record the changes, and write the audit. migrate()
-- runs this file if one of them is missing, disabled or outdated, with the search_path on the schema of the tables.
--
-- Changes by hand-written statements, by roles with only the right to write the tables, and by replication are recorded
-- alike. Updates of usage, last_used_at and other services' columns are not changes. No trigger names a column of
-- another service in its definition, which would prevent that service from altering or dropping it.
--
-- Functions that write run with the rights of their owner and a fixed search_path.

DO $make$
DECLARE
    home    TEXT := current_schema();
    options TEXT := format('LANGUAGE plpgsql SECURITY DEFINER SET search_path = %s, pg_temp', (
        SELECT string_agg(quote_ident(name), ', ' ORDER BY rank) FROM (
            SELECT name, min(rank) AS rank FROM (
                SELECT home AS name, 1 AS rank
                UNION ALL SELECT relnamespace::regnamespace::name, 2 FROM pg_class WHERE oid = to_regclass('api_keys')
                UNION ALL SELECT relnamespace::regnamespace::name, 3 FROM pg_class WHERE oid = to_regclass('users')
            ) AS schemas GROUP BY name
        ) AS schemas));
    users_options TEXT := CASE WHEN to_regclass('users')::oid IN (
            SELECT oid FROM pg_class WHERE relnamespace = home::regnamespace
        ) THEN 'LANGUAGE plpgsql' ELSE options END;
BEGIN
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_next_revision() RETURNS BIGINT $sql$ || options || $sql$ AS $body$
        BEGIN
            RETURN nextval('api_key_revisions');
        END
        $body$
    $sql$;
    -- The revision of a row is set under its lock, so that it rises in the order of the commits. Only these functions
    -- set it: a value in a statement, or from logical replication of another database, is ignored. Every update of
    -- usage waits for these two functions. They therefore run with the rights of the caller and without a search_path
    -- of their own, and read the fields themselves. Open sessions keep plans with the old types of columns; the
    -- fallback is for these.
    EXECUTE replace($sql$
        CREATE OR REPLACE FUNCTION api_key_revise_key() RETURNS TRIGGER LANGUAGE plpgsql AS $body$
        DECLARE
            is_changed BOOLEAN;
            o JSONB;
            n JSONB;
        BEGIN
            IF TG_OP = 'INSERT' THEN
                NEW.api_key_revision := {home}.api_key_next_revision();
                RETURN NEW;
            END IF;
            is_changed := OLD.id IS DISTINCT FROM NEW.id
                OR OLD.user_id IS DISTINCT FROM NEW.user_id
                OR OLD.name IS DISTINCT FROM NEW.name
                OR OLD.key_prefix IS DISTINCT FROM NEW.key_prefix
                OR OLD.key_hash IS DISTINCT FROM NEW.key_hash
                OR OLD.is_active IS DISTINCT FROM NEW.is_active
                OR OLD.previous_key_prefix IS DISTINCT FROM NEW.previous_key_prefix
                OR OLD.previous_key_hash IS DISTINCT FROM NEW.previous_key_hash
                OR OLD.previous_expires_at IS DISTINCT FROM NEW.previous_expires_at
                OR OLD.revoked_at IS DISTINCT FROM NEW.revoked_at
                OR OLD.revoked_by IS DISTINCT FROM NEW.revoked_by
                OR OLD.revoke_reason IS DISTINCT FROM NEW.revoke_reason
                OR OLD.created_by IS DISTINCT FROM NEW.created_by
                OR OLD.created_by_key IS DISTINCT FROM NEW.created_by_key
                OR OLD.description IS DISTINCT FROM NEW.description
                OR OLD.not_before IS DISTINCT FROM NEW.not_before
                OR OLD.permissions::text IS DISTINCT FROM NEW.permissions::text
                OR OLD.scopes::text IS DISTINCT FROM NEW.scopes::text
                OR OLD.rate_limit_per_minute IS DISTINCT FROM NEW.rate_limit_per_minute
                OR OLD.rate_limit_per_hour IS DISTINCT FROM NEW.rate_limit_per_hour
                OR OLD.rate_limit_per_day IS DISTINCT FROM NEW.rate_limit_per_day
                OR OLD.allowed_models::text IS DISTINCT FROM NEW.allowed_models::text
                OR OLD.allowed_endpoints::text IS DISTINCT FROM NEW.allowed_endpoints::text
                OR OLD.allowed_ips::text IS DISTINCT FROM NEW.allowed_ips::text
                OR OLD.is_unlimited IS DISTINCT FROM NEW.is_unlimited
                OR OLD.budget_limit_cents IS DISTINCT FROM NEW.budget_limit_cents
                OR OLD.budget_type IS DISTINCT FROM NEW.budget_type
                OR OLD.expires_at IS DISTINCT FROM NEW.expires_at
                OR OLD.metadata::text IS DISTINCT FROM NEW.metadata::text;
            IF is_changed THEN
                -- Data of a dump or of replication may be ahead of the sequence.
                NEW.api_key_revision := greatest({home}.api_key_next_revision(), OLD.api_key_revision + 1);
            ELSIF NEW.api_key_revision IS DISTINCT FROM OLD.api_key_revision THEN
                NEW.api_key_revision := OLD.api_key_revision;
            END IF;
            RETURN NEW;
        -- A column was dropped, or its type altered or one without an equality.
        EXCEPTION WHEN undefined_column OR datatype_mismatch OR undefined_function THEN
            BEGIN
                o := to_jsonb(OLD);
                n := to_jsonb(NEW);
                is_changed := o -> 'id' IS DISTINCT FROM n -> 'id'
                OR o -> 'user_id' IS DISTINCT FROM n -> 'user_id'
                OR o -> 'name' IS DISTINCT FROM n -> 'name'
                OR o -> 'key_prefix' IS DISTINCT FROM n -> 'key_prefix'
                OR o -> 'key_hash' IS DISTINCT FROM n -> 'key_hash'
                OR o -> 'is_active' IS DISTINCT FROM n -> 'is_active'
                OR o -> 'previous_key_prefix' IS DISTINCT FROM n -> 'previous_key_prefix'
                OR o -> 'previous_key_hash' IS DISTINCT FROM n -> 'previous_key_hash'
                OR o -> 'previous_expires_at' IS DISTINCT FROM n -> 'previous_expires_at'
                OR o -> 'revoked_at' IS DISTINCT FROM n -> 'revoked_at'
                OR o -> 'revoked_by' IS DISTINCT FROM n -> 'revoked_by'
                OR o -> 'revoke_reason' IS DISTINCT FROM n -> 'revoke_reason'
                OR o -> 'created_by' IS DISTINCT FROM n -> 'created_by'
                OR o -> 'created_by_key' IS DISTINCT FROM n -> 'created_by_key'
                OR o -> 'description' IS DISTINCT FROM n -> 'description'
                OR o -> 'not_before' IS DISTINCT FROM n -> 'not_before'
                OR o -> 'permissions' IS DISTINCT FROM n -> 'permissions'
                OR o -> 'scopes' IS DISTINCT FROM n -> 'scopes'
                OR o -> 'rate_limit_per_minute' IS DISTINCT FROM n -> 'rate_limit_per_minute'
                OR o -> 'rate_limit_per_hour' IS DISTINCT FROM n -> 'rate_limit_per_hour'
                OR o -> 'rate_limit_per_day' IS DISTINCT FROM n -> 'rate_limit_per_day'
                OR o -> 'allowed_models' IS DISTINCT FROM n -> 'allowed_models'
                OR o -> 'allowed_endpoints' IS DISTINCT FROM n -> 'allowed_endpoints'
                OR o -> 'allowed_ips' IS DISTINCT FROM n -> 'allowed_ips'
                OR o -> 'is_unlimited' IS DISTINCT FROM n -> 'is_unlimited'
                OR o -> 'budget_limit_cents' IS DISTINCT FROM n -> 'budget_limit_cents'
                OR o -> 'budget_type' IS DISTINCT FROM n -> 'budget_type'
                OR o -> 'expires_at' IS DISTINCT FROM n -> 'expires_at'
                OR o -> 'metadata' IS DISTINCT FROM n -> 'metadata';
                NEW.api_key_revision := (o ->> 'api_key_revision')::bigint;
                IF is_changed THEN
                    NEW.api_key_revision := greatest({home}.api_key_next_revision(), NEW.api_key_revision + 1);
                END IF;
                RETURN NEW;
            EXCEPTION
                -- json may hold what jsonb can't (a NUL character, a huge number): every update of it is a change.
                WHEN data_exception THEN
                    NEW.api_key_revision := greatest({home}.api_key_next_revision(), OLD.api_key_revision + 1);
                    RETURN NEW;
                -- Without the column of the revision the feed reports that it is incomplete.
                WHEN undefined_column THEN
                    RETURN NEW;
            END;
        END
        $body$
    $sql$, '{home}', quote_ident(home));
    -- Inserted users keep the revision 0, so that sign-ups of another service cost nothing. The revision of a user who
    -- was deleted and inserted again is that of the last change of this user, which look-ups read too. If the users are
    -- in their own schema, a role that writes them need not have a right on the other schema.
    EXECUTE replace($sql$
        CREATE OR REPLACE FUNCTION api_key_revise_user() RETURNS TRIGGER $sql$ || users_options || $sql$ AS $body$
        DECLARE
            is_changed BOOLEAN;
            o JSONB;
            n JSONB;
        BEGIN
            is_changed := OLD.id IS DISTINCT FROM NEW.id
                OR OLD.email IS DISTINCT FROM NEW.email
                OR OLD.role IS DISTINCT FROM NEW.role
                OR OLD.is_active IS DISTINCT FROM NEW.is_active;
            IF is_changed THEN
                -- Data of a dump or of replication may be ahead of the sequence.
                NEW.api_key_revision := greatest({home}.api_key_next_revision(), OLD.api_key_revision + 1);
            ELSIF NEW.api_key_revision IS DISTINCT FROM OLD.api_key_revision THEN
                NEW.api_key_revision := OLD.api_key_revision;
            END IF;
            RETURN NEW;
        -- A column was dropped, or its type altered or one without an equality.
        EXCEPTION WHEN undefined_column OR datatype_mismatch OR undefined_function THEN
            BEGIN
                o := to_jsonb(OLD);
                n := to_jsonb(NEW);
                is_changed := o -> 'id' IS DISTINCT FROM n -> 'id'
                OR o -> 'email' IS DISTINCT FROM n -> 'email'
                OR o -> 'role' IS DISTINCT FROM n -> 'role'
                OR o -> 'is_active' IS DISTINCT FROM n -> 'is_active';
                NEW.api_key_revision := (o ->> 'api_key_revision')::bigint;
                IF is_changed THEN
                    NEW.api_key_revision := greatest({home}.api_key_next_revision(), NEW.api_key_revision + 1);
                END IF;
                RETURN NEW;
            EXCEPTION
                -- json may hold what jsonb can't (a NUL character, a huge number): every update of it is a change.
                WHEN data_exception THEN
                    NEW.api_key_revision := greatest({home}.api_key_next_revision(), OLD.api_key_revision + 1);
                    RETURN NEW;
                -- Without the column of the revision the feed reports that it is incomplete.
                WHEN undefined_column THEN
                    RETURN NEW;
            END;
        END
        $body$
    $sql$, '{home}', quote_ident(home));
    -- Returns the columns of a key that the audit contains: no hashes, no usage, and no columns of another service.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_audited(k JSONB) RETURNS JSONB LANGUAGE plpgsql STABLE STRICT AS $body$
        BEGIN
            RETURN jsonb_build_object(
                'id', k -> 'id',
                'user_id', k -> 'user_id',
                'key_prefix', k -> 'key_prefix',
                'previous_key_prefix', k -> 'previous_key_prefix',
                'previous_expires_at', k -> 'previous_expires_at',
                'name', k -> 'name',
                'description', k -> 'description',
                'is_active', k -> 'is_active',
                'permissions', k -> 'permissions',
                'scopes', k -> 'scopes',
                'rate_limit_per_minute', k -> 'rate_limit_per_minute',
                'rate_limit_per_hour', k -> 'rate_limit_per_hour',
                'rate_limit_per_day', k -> 'rate_limit_per_day',
                'allowed_models', k -> 'allowed_models',
                'allowed_endpoints', k -> 'allowed_endpoints',
                'allowed_ips', k -> 'allowed_ips',
                'is_unlimited', k -> 'is_unlimited',
                'budget_limit_cents', k -> 'budget_limit_cents',
                'budget_type', k -> 'budget_type',
                'expires_at', k -> 'expires_at',
                'not_before', k -> 'not_before',
                'metadata', k -> 'metadata',
                'created_by', k -> 'created_by',
                'created_by_key', k -> 'created_by_key',
                'revoked_at', k -> 'revoked_at',
                'revoked_by', k -> 'revoked_by',
                'revoke_reason', k -> 'revoke_reason');
        END
        $body$
    $sql$;
    -- Writes an entry of the audit. The setting is made by the statements of this crate, for their transaction. A
    -- hand-written statement has none. The role is that of SET ROLE, or of the session: the functions of the triggers run
    -- with the rights of their owner, and so does this one, which only they may call.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_write_audit(
            of_action TEXT, of_key BIGINT, of_user BIGINT, old_row JSONB, new_row JSONB
        ) RETURNS VOID LANGUAGE plpgsql AS $body$
        DECLARE
            setting TEXT := nullif(current_setting('api_key.attribution', TRUE), '');
            made_by JSONB;
            made_by_key BIGINT;
        BEGIN
            IF setting IS NOT NULL THEN
                BEGIN
                    made_by := setting::jsonb;
                    made_by_key := made_by ->> 'key';
                EXCEPTION WHEN data_exception THEN
                    made_by_key := NULL;
                END;
            END IF;
            INSERT INTO api_key_audit
                (action, actor, actor_key, database_role, api_key_id, user_id, before, after, reason, request_id)
            VALUES (
                of_action, made_by ->> 'actor', made_by_key, coalesce(nullif(current_setting('role'), 'none'), session_user),
                of_key, of_user, old_row, new_row, made_by ->> 'reason', made_by ->> 'request_id');
        END
        $body$
    $sql$;
    -- Records a change under each lookup id that the row had or has: a key without one can't be looked up. The fields are
    -- named, which takes a third of the time of a conversion of the whole row. Open sessions keep plans with the old types
    -- of columns; the fallback is for these, and for columns that were dropped. The handlers enclose no write: each would
    -- take a transaction id for each row.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_row(op TEXT, old_row RECORD, new_row RECORD)
            RETURNS VOID LANGUAGE plpgsql AS $body$
        DECLARE
            o JSONB; n JSONB; is_known BOOLEAN := FALSE; done TEXT; of_key BIGINT; of_user BIGINT; old_key BIGINT;
            new_revision BIGINT; old_revision BIGINT; current_id TEXT; previous_id TEXT; old_id TEXT; old_previous_id TEXT;
            is_rotated BOOLEAN; was_active BOOLEAN; is_active BOOLEAN; had_grace BOOLEAN; has_grace BOOLEAN;
        BEGIN
            BEGIN
                IF op <> 'INSERT' THEN
                    of_key := old_row.id;
                    of_user := old_row.user_id;
                    old_key := old_row.id;
                    old_revision := old_row.api_key_revision;
                    old_id := old_row.key_prefix;
                    old_previous_id := old_row.previous_key_prefix;
                    was_active := old_row.is_active;
                    had_grace := old_row.previous_key_hash IS NOT NULL AND old_row.previous_key_prefix IS NOT NULL
                        AND old_row.previous_expires_at IS NOT NULL;
                END IF;
                IF op <> 'DELETE' THEN
                    of_key := new_row.id;
                    of_user := new_row.user_id;
                    new_revision := new_row.api_key_revision;
                    current_id := new_row.key_prefix;
                    previous_id := new_row.previous_key_prefix;
                    is_active := new_row.is_active;
                    has_grace := new_row.previous_key_hash IS NOT NULL AND new_row.previous_key_prefix IS NOT NULL
                        AND new_row.previous_expires_at IS NOT NULL;
                END IF;
                IF op = 'UPDATE' THEN
                    is_rotated := old_row.key_hash IS DISTINCT FROM new_row.key_hash;
                END IF;
                is_known := TRUE;
                IF op <> 'INSERT' THEN
                    o := jsonb_build_object(
                        'id', old_row.id,
                        'user_id', old_row.user_id,
                        'key_prefix', old_row.key_prefix,
                        'previous_key_prefix', old_row.previous_key_prefix,
                        'previous_expires_at', old_row.previous_expires_at,
                        'name', old_row.name,
                        'description', old_row.description,
                        'is_active', old_row.is_active,
                        'permissions', old_row.permissions,
                        'scopes', old_row.scopes,
                        'rate_limit_per_minute', old_row.rate_limit_per_minute,
                        'rate_limit_per_hour', old_row.rate_limit_per_hour,
                        'rate_limit_per_day', old_row.rate_limit_per_day,
                        'allowed_models', old_row.allowed_models,
                        'allowed_endpoints', old_row.allowed_endpoints,
                        'allowed_ips', old_row.allowed_ips,
                        'is_unlimited', old_row.is_unlimited,
                        'budget_limit_cents', old_row.budget_limit_cents,
                        'budget_type', old_row.budget_type,
                        'expires_at', old_row.expires_at,
                        'not_before', old_row.not_before,
                        'metadata', old_row.metadata,
                        'created_by', old_row.created_by,
                        'created_by_key', old_row.created_by_key,
                        'revoked_at', old_row.revoked_at,
                        'revoked_by', old_row.revoked_by,
                        'revoke_reason', old_row.revoke_reason);
                END IF;
                IF op <> 'DELETE' THEN
                    n := jsonb_build_object(
                        'id', new_row.id,
                        'user_id', new_row.user_id,
                        'key_prefix', new_row.key_prefix,
                        'previous_key_prefix', new_row.previous_key_prefix,
                        'previous_expires_at', new_row.previous_expires_at,
                        'name', new_row.name,
                        'description', new_row.description,
                        'is_active', new_row.is_active,
                        'permissions', new_row.permissions,
                        'scopes', new_row.scopes,
                        'rate_limit_per_minute', new_row.rate_limit_per_minute,
                        'rate_limit_per_hour', new_row.rate_limit_per_hour,
                        'rate_limit_per_day', new_row.rate_limit_per_day,
                        'allowed_models', new_row.allowed_models,
                        'allowed_endpoints', new_row.allowed_endpoints,
                        'allowed_ips', new_row.allowed_ips,
                        'is_unlimited', new_row.is_unlimited,
                        'budget_limit_cents', new_row.budget_limit_cents,
                        'budget_type', new_row.budget_type,
                        'expires_at', new_row.expires_at,
                        'not_before', new_row.not_before,
                        'metadata', new_row.metadata,
                        'created_by', new_row.created_by,
                        'created_by_key', new_row.created_by_key,
                        'revoked_at', new_row.revoked_at,
                        'revoked_by', new_row.revoked_by,
                        'revoke_reason', new_row.revoke_reason);
                END IF;
            EXCEPTION WHEN undefined_column OR datatype_mismatch OR undefined_function OR data_exception THEN
                BEGIN
                    o := NULL;
                    n := NULL;
                    IF op <> 'INSERT' THEN o := to_jsonb(old_row); END IF;
                    IF op <> 'DELETE' THEN n := to_jsonb(new_row); END IF;
                    is_known := coalesce(n, o) ? 'key_prefix' AND coalesce(n, o) ? 'api_key_revision';
                    of_key := coalesce(n, o) ->> 'id';
                    of_user := coalesce(n, o) ->> 'user_id';
                    old_key := o ->> 'id';
                    new_revision := n ->> 'api_key_revision';
                    old_revision := o ->> 'api_key_revision';
                    current_id := n ->> 'key_prefix';
                    previous_id := n ->> 'previous_key_prefix';
                    old_id := o ->> 'key_prefix';
                    old_previous_id := o ->> 'previous_key_prefix';
                    is_rotated := o -> 'key_hash' IS DISTINCT FROM n -> 'key_hash';
                    was_active := o -> 'is_active' = 'true';
                    is_active := n -> 'is_active' = 'true';
                    had_grace := o ->> 'previous_key_hash' IS NOT NULL AND o ->> 'previous_key_prefix' IS NOT NULL
                        AND o ->> 'previous_expires_at' IS NOT NULL;
                    has_grace := n ->> 'previous_key_hash' IS NOT NULL AND n ->> 'previous_key_prefix' IS NOT NULL
                        AND n ->> 'previous_expires_at' IS NOT NULL;
                    o := api_key_audited(o);
                    n := api_key_audited(n);
                EXCEPTION WHEN data_exception THEN
                    -- json that jsonb can't hold: the entry of the audit has no values.
                    o := NULL;
                    n := NULL;
                END;
            END;
            IF is_known THEN
                IF current_id IS NOT NULL THEN
                    INSERT INTO api_key_changes (revision, key_prefix, api_key_id) VALUES (new_revision, current_id, of_key);
                END IF;
                IF previous_id IS DISTINCT FROM current_id AND previous_id IS NOT NULL THEN
                    INSERT INTO api_key_changes (revision, key_prefix, api_key_id) VALUES (new_revision, previous_id, of_key);
                END IF;
                IF old_previous_id = current_id OR old_previous_id = previous_id OR old_previous_id = old_id THEN
                    old_previous_id := NULL;
                END IF;
                IF old_id IS NOT NULL AND old_id IS DISTINCT FROM current_id AND old_id IS DISTINCT FROM previous_id THEN
                    INSERT INTO api_key_changes (revision, key_prefix, api_key_id)
                        VALUES (greatest(nextval('api_key_revisions'), old_revision + 1), old_id, old_key);
                END IF;
                IF old_previous_id IS NOT NULL THEN
                    INSERT INTO api_key_changes (revision, key_prefix, api_key_id)
                        VALUES (greatest(nextval('api_key_revisions'), old_revision + 1), old_previous_id, old_key);
                END IF;
            ELSE
                -- A column is not there any more, or a row is no jsonb: nothing says whose key it was.
                INSERT INTO api_key_changes DEFAULT VALUES;
            END IF;
            IF op = 'INSERT' THEN
                done := 'issue';
            ELSIF op = 'DELETE' THEN
                done := 'delete';
            ELSIF is_rotated THEN
                done := 'rotate';
            ELSIF coalesce(was_active, FALSE) AND NOT coalesce(is_active, FALSE) THEN
                done := 'revoke';
            ELSIF coalesce(is_active, FALSE) AND NOT coalesce(was_active, FALSE) THEN
                done := 'reactivate';
            ELSIF had_grace AND NOT has_grace THEN
                done := 'end_grace';
            ELSE
                done := 'update';
            END IF;
            PERFORM api_key_write_audit(done, of_key, of_user, o, n);
            -- As api_key_notify does.
            IF current_setting('max_prepared_transactions') = '0' THEN
                PERFORM pg_notify('api_key_changes', '');
            END IF;
        END
        $body$
    $sql$;
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_key() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        BEGIN
            PERFORM api_key_note_row(TG_OP, OLD, NEW);
            RETURN NULL;
        END
        $body$
    $sql$;
    -- Records the rows of an INSERT at once, which takes a quarter of the time. The values are collected first: a handler
    -- that encloses a write would take a transaction id for each statement. Larger statements, and rows with values that
    -- can't be converted, are recorded row by row. Replication fires no triggers of statements.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_added() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        DECLARE
            setting TEXT := nullif(current_setting('api_key.attribution', TRUE), '');
            added_row RECORD; total BIGINT; revisions BIGINT[]; ids BIGINT[]; owners BIGINT[]; current_ids TEXT[];
            previous_ids TEXT[]; audited JSONB[]; made_by JSONB; made_by_key BIGINT;
        BEGIN
            SELECT count(*) INTO total FROM (SELECT FROM added LIMIT 10001) AS a;
            IF total = 0 THEN
                RETURN NULL;
            END IF;
            IF total <= 10000 THEN
                BEGIN
                    SELECT array_agg(a.api_key_revision), array_agg(a.id), array_agg(a.user_id), array_agg(a.key_prefix),
                        array_agg(a.previous_key_prefix), array_agg(jsonb_build_object(
                        'id', a.id,
                        'user_id', a.user_id,
                        'key_prefix', a.key_prefix,
                        'previous_key_prefix', a.previous_key_prefix,
                        'previous_expires_at', a.previous_expires_at,
                        'name', a.name,
                        'description', a.description,
                        'is_active', a.is_active,
                        'permissions', a.permissions,
                        'scopes', a.scopes,
                        'rate_limit_per_minute', a.rate_limit_per_minute,
                        'rate_limit_per_hour', a.rate_limit_per_hour,
                        'rate_limit_per_day', a.rate_limit_per_day,
                        'allowed_models', a.allowed_models,
                        'allowed_endpoints', a.allowed_endpoints,
                        'allowed_ips', a.allowed_ips,
                        'is_unlimited', a.is_unlimited,
                        'budget_limit_cents', a.budget_limit_cents,
                        'budget_type', a.budget_type,
                        'expires_at', a.expires_at,
                        'not_before', a.not_before,
                        'metadata', a.metadata,
                        'created_by', a.created_by,
                        'created_by_key', a.created_by_key,
                        'revoked_at', a.revoked_at,
                        'revoked_by', a.revoked_by,
                        'revoke_reason', a.revoke_reason))
                    INTO revisions, ids, owners, current_ids, previous_ids, audited FROM added AS a;
                EXCEPTION WHEN undefined_column OR datatype_mismatch OR undefined_function OR data_exception THEN
                    audited := NULL;
                END;
            END IF;
            IF audited IS NULL THEN
                FOR added_row IN SELECT * FROM added LOOP
                    PERFORM api_key_note_row(TG_OP, NULL, added_row);
                END LOOP;
                RETURN NULL;
            END IF;
            INSERT INTO api_key_changes (revision, key_prefix, api_key_id)
                SELECT a.revision, a.lookup_id, a.id FROM unnest(revisions, current_ids, ids) AS a (revision, lookup_id, id)
                    WHERE a.lookup_id IS NOT NULL
                UNION ALL SELECT a.revision, a.previous_id, a.id
                    FROM unnest(revisions, current_ids, previous_ids, ids) AS a (revision, lookup_id, previous_id, id)
                    WHERE a.previous_id IS NOT NULL AND a.previous_id IS DISTINCT FROM a.lookup_id;
            -- As api_key_write_audit does.
            IF setting IS NOT NULL THEN
                BEGIN
                    made_by := setting::jsonb;
                    made_by_key := made_by ->> 'key';
                EXCEPTION WHEN data_exception THEN
                    made_by_key := NULL;
                END;
            END IF;
            INSERT INTO api_key_audit (action, actor, actor_key, database_role, api_key_id, user_id, after, reason, request_id)
                SELECT 'issue', made_by ->> 'actor', made_by_key, coalesce(nullif(current_setting('role'), 'none'), session_user),
                    a.id, a.user_id, a.audited, made_by ->> 'reason', made_by ->> 'request_id'
                FROM unnest(ids, owners, audited) AS a (id, user_id, audited);
            PERFORM api_key_notify();
            RETURN NULL;
        END
        $body$
    $sql$;
    -- A change of a user without keys is recorded as well: a key may be inserted in another open transaction. No
    -- notification is sent for it.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_user() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        DECLARE
            o      JSONB;  n     JSONB;  is_known BOOLEAN := TRUE;
            old_id BIGINT; new_id BIGINT; has_keys BOOLEAN;
        BEGIN
            BEGIN
                IF TG_OP <> 'INSERT' THEN o := to_jsonb(OLD); END IF;
                IF TG_OP <> 'DELETE' THEN n := to_jsonb(NEW); END IF;
                is_known := coalesce(n, o) ? 'id' AND coalesce(n, o) ? 'api_key_revision';
                old_id := o ->> 'id';
                new_id := n ->> 'id';
                has_keys := EXISTS (SELECT FROM api_keys WHERE user_id = new_id AND key_prefix IS NOT NULL);
            -- A row is no jsonb, or the table of keys or a column of it is not there: no reason to refuse the statement.
            EXCEPTION WHEN data_exception OR undefined_column OR undefined_table THEN
                is_known := FALSE;
            END;
            IF NOT is_known THEN
                INSERT INTO api_key_changes DEFAULT VALUES;
                PERFORM api_key_notify();
                RETURN NULL;
            END IF;
            IF TG_OP = 'INSERT' THEN
                IF NOT has_keys THEN
                    RETURN NULL;
                END IF;
                -- Keys that were stored before their owner were unknown until now.
                INSERT INTO api_key_changes (key_prefix, api_key_id)
                    SELECT key_prefix, id FROM api_keys WHERE user_id = new_id AND key_prefix IS NOT NULL
                    UNION ALL SELECT previous_key_prefix, id FROM api_keys
                        WHERE user_id = new_id AND previous_key_prefix IS DISTINCT FROM key_prefix
                            AND previous_key_prefix IS NOT NULL;
                INSERT INTO api_key_changes (user_id) VALUES (new_id);
            ELSIF TG_OP = 'UPDATE' THEN
                INSERT INTO api_key_changes (revision, user_id)
                    VALUES ((n ->> 'api_key_revision')::bigint, new_id);
            END IF;
            IF old_id IS DISTINCT FROM new_id AND old_id IS NOT NULL THEN
                INSERT INTO api_key_changes (revision, user_id) VALUES (
                    greatest(nextval('api_key_revisions'), (o ->> 'api_key_revision')::bigint + 1), old_id);
            END IF;
            IF old_id IS DISTINCT FROM new_id OR has_keys THEN
                PERFORM api_key_notify();
            END IF;
            RETURN NULL;
        END
        $body$
    $sql$;
    -- The audit contains changes of users who own keys, and all changes by statements of this crate. It is written before a
    -- deletion: after it, the keys may have been deleted with their owner.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_audit_user() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        DECLARE
            o JSONB; n JSONB; of_user BIGINT; is_audited BOOLEAN := TRUE;
        BEGIN
            BEGIN
                IF TG_OP <> 'INSERT' THEN o := to_jsonb(OLD); END IF;
                IF TG_OP <> 'DELETE' THEN n := to_jsonb(NEW); END IF;
                of_user := coalesce(n, o) ->> 'id';
                is_audited := nullif(current_setting('api_key.attribution', TRUE), '') IS NOT NULL
                    OR EXISTS (SELECT FROM api_keys WHERE user_id IN (of_user, (o ->> 'id')::bigint));
            -- A row is no jsonb, or the table of keys or a column of it is not there: no reason to refuse the statement.
            EXCEPTION WHEN data_exception OR undefined_column OR undefined_table THEN
                o := NULL;
                n := NULL;
            END;
            IF is_audited THEN
                PERFORM api_key_write_audit(
                    CASE TG_OP WHEN 'INSERT' THEN 'create_user' WHEN 'UPDATE' THEN 'update_user' ELSE 'delete_user' END,
                    NULL, of_user,
                    CASE WHEN o IS NOT NULL THEN jsonb_build_object(
                        'id', o -> 'id', 'email', o -> 'email', 'role', o -> 'role', 'is_active', o -> 'is_active') END,
                    CASE WHEN n IS NOT NULL THEN jsonb_build_object(
                        'id', n -> 'id', 'email', n -> 'email', 'role', n -> 'role', 'is_active', n -> 'is_active') END);
            END IF;
            RETURN CASE TG_OP WHEN 'DELETE' THEN OLD END;
        END
        $body$
    $sql$;
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_all() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        BEGIN
            INSERT INTO api_key_changes DEFAULT VALUES;
            PERFORM api_key_write_audit('truncate', NULL, NULL, jsonb_build_object('table', TG_TABLE_NAME), NULL);
            PERFORM api_key_notify();
            RETURN NULL;
        END
        $body$
    $sql$;
    -- A notification is a hint: the change is in the table. PostgreSQL sends equal notifications once per transaction.
    -- It rejects PREPARE TRANSACTION after NOTIFY, so that none is sent if the server allows prepared transactions;
    -- nodes then poll more often.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_notify() RETURNS VOID $sql$ || options || $sql$ AS $body$
        BEGIN
            IF current_setting('max_prepared_transactions') = '0' THEN
                PERFORM pg_notify('api_key_changes', '');
            END IF;
        END
        $body$
    $sql$;
    -- Rows that COPY, a restored dump or logical replication brings from another database are skipped: their numbers
    -- have no meaning here, and the changed rows themselves fire the triggers above.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_skip_foreign() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        BEGIN
            RETURN NULL;
        END
        $body$
    $sql$;
    -- Entries of the audit that COPY or logical replication brings get ids of this database.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_renumber() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        BEGIN
            NEW.id := nextval('api_key_audit_ids');
            RETURN NEW;
        END
        $body$
    $sql$;
    -- Returns the name of the cluster and the database. A copy at file level, such as a standby, has the same name.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_cluster() RETURNS TEXT STABLE $sql$ || options || $sql$ AS $body$
        BEGIN
            RETURN (SELECT system_identifier FROM pg_control_system()) || ':'
                || (SELECT oid FROM pg_database WHERE datname = current_database());
        END
        $body$
    $sql$;
    -- Returns the start position for a new node: what became visible in the last `seconds`, or everything.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_horizon(
            seconds BIGINT, OUT next_xid XID8, OUT in_progress XID8[]
        ) $sql$ || options || $sql$ AS $body$
        BEGIN
            SELECT h.next_xid, h.in_progress INTO next_xid, in_progress FROM api_key_horizons h
                WHERE h.cluster = api_key_cluster() AND h.taken_at < clock_timestamp() - seconds * INTERVAL '1 s'
                ORDER BY h.taken_at DESC LIMIT 1;
            next_xid := coalesce(next_xid, '0');
            in_progress := coalesce(in_progress, '{}');
        END
        $body$
    $sql$;
    -- Records a snapshot and deletes rows that have been visible for two hours, at most 10,000 per call. Returns the
    -- number of rows, the time of the oldest, and whether there are more to delete.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_prune(
            OUT remaining BIGINT, OUT oldest TIMESTAMPTZ, OUT has_more BOOLEAN
        ) $sql$ || options || $sql$ AS $body$
        DECLARE
            own     XID8;
            here    TEXT := api_key_cluster();
            current PG_SNAPSHOT;
            visible XID8;
            deleted BIGINT := 0;
        BEGIN
            IF pg_try_advisory_xact_lock(hashtextextended('api_key_prune ' || current_schema(), 0)) THEN
                -- The id first: a crash forgets those of younger transactions that wrote nothing.
                own := pg_current_xact_id();
                current := pg_current_snapshot();
                IF NOT EXISTS (
                    SELECT FROM api_key_horizons
                    WHERE cluster = here AND taken_at > clock_timestamp() - INTERVAL '5 min'
                ) THEN
                    INSERT INTO api_key_horizons (cluster, next_xid, in_progress) VALUES (
                        here, least(own, pg_snapshot_xmax(current)),
                        ARRAY(SELECT x FROM pg_snapshot_xip(current) AS x WHERE x < own));
                END IF;
                SELECT least(next_xid, (SELECT min(x) FROM unnest(in_progress) AS x)) INTO visible
                    FROM api_key_horizons
                    WHERE cluster = here AND taken_at < clock_timestamp() - INTERVAL '2 h'
                    ORDER BY taken_at DESC LIMIT 1;
                -- The last rows stay: nodes take it for another database if one that they have read is gone.
                DELETE FROM api_key_changes WHERE id IN (
                    SELECT id FROM api_key_changes WHERE xid < visible AND xid < (
                        SELECT xid FROM api_key_changes ORDER BY xid DESC, revision DESC OFFSET 100 LIMIT 1)
                    ORDER BY xid, revision LIMIT 10000);
                GET DIAGNOSTICS deleted = ROW_COUNT;
                DELETE FROM api_key_horizons WHERE taken_at < clock_timestamp() - INTERVAL '1 day';
            END IF;
            has_more := deleted = 10000;
            SELECT count(*), min(changed_at) INTO remaining, oldest FROM api_key_changes;
        END
        $body$
    $sql$;
END
$make$;

-- This prevents a trigger on a temporary table of another role from recording changes, and entries of the audit without
-- a change.
REVOKE EXECUTE ON FUNCTION
    api_key_revise_key(), api_key_revise_user(), api_key_note_key(), api_key_note_added(), api_key_note_user(),
    api_key_note_all(), api_key_skip_foreign(), api_key_renumber(), api_key_audit_user(),
    api_key_note_row(TEXT, RECORD, RECORD), api_key_write_audit(TEXT, BIGINT, BIGINT, JSONB, JSONB) FROM PUBLIC;

DO $make$
DECLARE
    wanted   RECORD;
    is_whole BOOLEAN := TRUE;
BEGIN
    FOR wanted IN
        SELECT *, (
            SELECT count(*) = 1 FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
            WHERE t.tgrelid = to_regclass(in_table) AND t.tgname = name AND t.tgenabled = left(mode, 1) AND t.tgtype = type
                AND p.proname = function AND p.pronamespace = current_schema()::regnamespace
        ) AS is_there
        FROM (VALUES
            -- By its name, this is the last trigger before a row is written, so that it sees the changes of the others.
            ('api_keys', 'zzz_api_key_revision', 23, 'BEFORE INSERT OR UPDATE', 'ROW', 'api_key_revise_key', 'ALWAYS'),
            ('api_keys', 'api_key_note_added', 4, 'AFTER INSERT', 'STATEMENT', 'api_key_note_added', 'ORIGIN'),
            ('api_keys', 'api_key_note_new', 5, 'AFTER INSERT', 'ROW', 'api_key_note_key', 'REPLICA'),
            ('api_keys', 'api_key_note_gone', 9, 'AFTER DELETE', 'ROW', 'api_key_note_key', 'ALWAYS'),
            ('api_keys', 'api_key_note', 17, 'AFTER UPDATE', 'ROW', 'api_key_note_key', 'ALWAYS'),
            ('api_keys', 'api_key_note_all', 32, 'AFTER TRUNCATE', 'STATEMENT', 'api_key_note_all', 'ALWAYS'),
            ('users', 'zzz_api_key_revision', 19, 'BEFORE UPDATE', 'ROW', 'api_key_revise_user', 'ALWAYS'),
            -- With a foreign key, no key is stored before its user, except by replication.
            ('users', 'api_key_note_new', 5, 'AFTER INSERT', 'ROW', 'api_key_note_user', (
                SELECT CASE WHEN count(*) > 0 THEN 'REPLICA' ELSE 'ALWAYS' END FROM pg_constraint c
                WHERE c.conrelid = to_regclass('api_keys') AND c.confrelid = to_regclass('users')
                    AND c.contype = 'f' AND c.convalidated AND c.confkey = ARRAY(
                        SELECT attnum FROM pg_attribute WHERE attrelid = to_regclass('users') AND attname = 'id'))),
            -- Only for statements of this crate, so that sign-ups of another service cost nothing.
            ('users', 'api_key_audit_new', 5, 'AFTER INSERT', 'ROW', 'api_key_audit_user', 'ALWAYS'),
            ('users', 'api_key_audit', 17, 'AFTER UPDATE', 'ROW', 'api_key_audit_user', 'ALWAYS'),
            ('users', 'zzz_api_key_audit', 11, 'BEFORE DELETE', 'ROW', 'api_key_audit_user', 'ALWAYS'),
            ('users', 'api_key_note_gone', 9, 'AFTER DELETE', 'ROW', 'api_key_note_user', 'ALWAYS'),
            ('users', 'api_key_note', 17, 'AFTER UPDATE', 'ROW', 'api_key_note_user', 'ALWAYS'),
            ('users', 'api_key_note_all', 32, 'AFTER TRUNCATE', 'STATEMENT', 'api_key_note_all', 'ALWAYS'),
            ('api_key_changes', 'api_key_skip_foreign', 7, 'BEFORE INSERT', 'ROW', 'api_key_skip_foreign', 'ALWAYS'),
            ('api_key_audit', 'api_key_renumber', 7, 'BEFORE INSERT', 'ROW', 'api_key_renumber', 'ALWAYS')
        ) AS triggers (in_table, name, type, event, level, function, mode)
    LOOP
        CONTINUE WHEN wanted.is_there;
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %I', wanted.name, wanted.in_table);
        EXECUTE format('CREATE TRIGGER %I %s ON %I %s FOR EACH %s %s EXECUTE FUNCTION %I()',
            wanted.name, wanted.event, wanted.in_table,
            CASE WHEN wanted.mode = 'ORIGIN' THEN 'REFERENCING NEW TABLE AS added' ELSE '' END, wanted.level,
            CASE
                WHEN wanted.event = 'AFTER UPDATE'
                    THEN 'WHEN (OLD.api_key_revision IS DISTINCT FROM NEW.api_key_revision)'
                WHEN wanted.name = 'api_key_audit_new'
                    THEN 'WHEN (nullif(current_setting(''api_key.attribution'', TRUE), '''') IS NOT NULL)'
                WHEN wanted.in_table IN ('api_key_changes', 'api_key_audit') THEN 'WHEN (pg_trigger_depth() = 0)'
                ELSE ''
            END,
            wanted.function);
        -- ALWAYS: also for rows that replication writes, and under session_replication_role = replica. REPLICA: only then.
        -- ORIGIN: only otherwise.
        EXECUTE format('ALTER TABLE %I ENABLE %s TRIGGER %I', wanted.in_table, nullif(wanted.mode, 'ORIGIN'), wanted.name);
        is_whole := FALSE;
    END LOOP;
    -- Changes while a trigger was missing are unknown: every node reads everything again. In a new database, the first
    -- row has a lookup id that no key has, so that there is always a last row.
    IF NOT is_whole OR NOT EXISTS (SELECT FROM api_key_changes) THEN
        ALTER TABLE api_key_changes DISABLE TRIGGER api_key_skip_foreign;
        INSERT INTO api_key_changes (key_prefix)
            VALUES (CASE WHEN NOT EXISTS (SELECT FROM api_key_changes) THEN '' END);
        ALTER TABLE api_key_changes ENABLE ALWAYS TRIGGER api_key_skip_foreign;
    END IF;
END
$make$;
