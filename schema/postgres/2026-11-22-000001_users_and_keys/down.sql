-- Removes only what up.sql created: adopted tables are kept, without the columns that were added to them.

DROP INDEX IF EXISTS api_keys_lookup;

DO $$
DECLARE
    made RECORD;
BEGIN
    FOR made IN
        SELECT c.relname AS in_table, a.attname AS name
        FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
        WHERE c.oid IN (to_regclass('users'), to_regclass('api_keys'))
          AND col_description(c.oid, a.attnum) = 'made by tower-api-key'
    LOOP
        EXECUTE format('ALTER TABLE %I DROP COLUMN %I', made.in_table, made.name);
    END LOOP;
    IF obj_description(to_regclass('api_keys'), 'pg_class') = 'made by tower-api-key' THEN
        DROP TABLE api_keys;
    END IF;
    IF obj_description(to_regclass('users'), 'pg_class') = 'made by tower-api-key' THEN
        DROP TABLE users;
    END IF;
END
$$;
