-- The functions and triggers that assign revisions to changed rows and record the changes. migrate() runs this file if
-- one of them is missing, disabled or outdated, with the search_path on the schema of the tables.
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
    -- A key without a lookup id can't be looked up, so that its changes are irrelevant. Fields are read from jsonb: a
    -- plan that names them would fail in open sessions after a column's type is altered. The handlers enclose no write:
    -- each would take a transaction id for each row.
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_key() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        DECLARE
            o JSONB; n JSONB; is_known BOOLEAN := TRUE;
        BEGIN
            BEGIN
                IF TG_OP <> 'INSERT' THEN o := to_jsonb(OLD); END IF;
                IF TG_OP <> 'DELETE' THEN n := to_jsonb(NEW); END IF;
                is_known := coalesce(n, o) ? 'key_prefix' AND coalesce(n, o) ? 'api_key_revision';
            EXCEPTION WHEN data_exception THEN
                is_known := FALSE;
            END;
            IF NOT is_known THEN
                -- A column is not there any more, or a row is no jsonb: nothing says whose key it was.
                INSERT INTO api_key_changes DEFAULT VALUES;
            END IF;
            IF is_known AND n ->> 'key_prefix' IS NOT NULL THEN
                INSERT INTO api_key_changes (revision, key_prefix, api_key_id)
                    VALUES ((n ->> 'api_key_revision')::bigint, n ->> 'key_prefix', (n ->> 'id')::bigint);
            END IF;
            IF is_known AND o ->> 'key_prefix' IS NOT NULL AND o ->> 'key_prefix' IS DISTINCT FROM n ->> 'key_prefix' THEN
                INSERT INTO api_key_changes (revision, key_prefix, api_key_id) VALUES (
                    greatest(nextval('api_key_revisions'), (o ->> 'api_key_revision')::bigint + 1),
                    o ->> 'key_prefix', (o ->> 'id')::bigint);
            END IF;
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
            before BIGINT; after BIGINT; has_keys BOOLEAN;
        BEGIN
            BEGIN
                IF TG_OP <> 'INSERT' THEN o := to_jsonb(OLD); END IF;
                IF TG_OP <> 'DELETE' THEN n := to_jsonb(NEW); END IF;
                is_known := coalesce(n, o) ? 'id' AND coalesce(n, o) ? 'api_key_revision';
                before := o ->> 'id';
                after := n ->> 'id';
                has_keys := EXISTS (SELECT FROM api_keys WHERE user_id = after AND key_prefix IS NOT NULL);
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
                    SELECT key_prefix, id FROM api_keys WHERE user_id = after AND key_prefix IS NOT NULL;
                INSERT INTO api_key_changes (user_id) VALUES (after);
            ELSIF TG_OP = 'UPDATE' THEN
                INSERT INTO api_key_changes (revision, user_id)
                    VALUES ((n ->> 'api_key_revision')::bigint, after);
            END IF;
            IF before IS DISTINCT FROM after AND before IS NOT NULL THEN
                INSERT INTO api_key_changes (revision, user_id) VALUES (
                    greatest(nextval('api_key_revisions'), (o ->> 'api_key_revision')::bigint + 1), before);
            END IF;
            IF before IS DISTINCT FROM after OR has_keys THEN
                PERFORM api_key_notify();
            END IF;
            RETURN NULL;
        END
        $body$
    $sql$;
    EXECUTE $sql$
        CREATE OR REPLACE FUNCTION api_key_note_all() RETURNS TRIGGER $sql$ || options || $sql$ AS $body$
        BEGIN
            INSERT INTO api_key_changes DEFAULT VALUES;
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

-- This prevents a trigger on a temporary table of another role from recording changes.
REVOKE EXECUTE ON FUNCTION
    api_key_revise_key(), api_key_revise_user(), api_key_note_key(), api_key_note_user(), api_key_note_all(),
    api_key_skip_foreign() FROM PUBLIC;

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
            ('api_keys', 'api_key_note_new', 13, 'AFTER INSERT OR DELETE', 'ROW', 'api_key_note_key', 'ALWAYS'),
            ('api_keys', 'api_key_note', 17, 'AFTER UPDATE', 'ROW', 'api_key_note_key', 'ALWAYS'),
            ('api_keys', 'api_key_note_all', 32, 'AFTER TRUNCATE', 'STATEMENT', 'api_key_note_all', 'ALWAYS'),
            ('users', 'zzz_api_key_revision', 19, 'BEFORE UPDATE', 'ROW', 'api_key_revise_user', 'ALWAYS'),
            -- With a foreign key, no key is stored before its user, except by replication.
            ('users', 'api_key_note_new', 5, 'AFTER INSERT', 'ROW', 'api_key_note_user', (
                SELECT CASE WHEN count(*) > 0 THEN 'REPLICA' ELSE 'ALWAYS' END FROM pg_constraint c
                WHERE c.conrelid = to_regclass('api_keys') AND c.confrelid = to_regclass('users')
                    AND c.contype = 'f' AND c.convalidated AND c.confkey = ARRAY(
                        SELECT attnum FROM pg_attribute WHERE attrelid = to_regclass('users') AND attname = 'id'))),
            ('users', 'api_key_note_gone', 9, 'AFTER DELETE', 'ROW', 'api_key_note_user', 'ALWAYS'),
            ('users', 'api_key_note', 17, 'AFTER UPDATE', 'ROW', 'api_key_note_user', 'ALWAYS'),
            ('users', 'api_key_note_all', 32, 'AFTER TRUNCATE', 'STATEMENT', 'api_key_note_all', 'ALWAYS'),
            ('api_key_changes', 'api_key_skip_foreign', 7, 'BEFORE INSERT', 'ROW', 'api_key_skip_foreign', 'ALWAYS')
        ) AS triggers (in_table, name, type, event, level, function, mode)
    LOOP
        CONTINUE WHEN wanted.is_there;
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %I', wanted.name, wanted.in_table);
        EXECUTE format('CREATE TRIGGER %I %s ON %I FOR EACH %s %s EXECUTE FUNCTION %I()',
            wanted.name, wanted.event, wanted.in_table, wanted.level,
            CASE
                WHEN wanted.event = 'AFTER UPDATE'
                    THEN 'WHEN (OLD.api_key_revision IS DISTINCT FROM NEW.api_key_revision)'
                WHEN wanted.in_table = 'api_key_changes' THEN 'WHEN (pg_trigger_depth() = 0)'
                ELSE ''
            END,
            wanted.function);
        -- Enabled also for rows that replication writes, and under session_replication_role = replica.
        EXECUTE format('ALTER TABLE %I ENABLE %s TRIGGER %I', wanted.in_table, wanted.mode, wanted.name);
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
