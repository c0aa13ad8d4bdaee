-- SQLite has no conditional statements. Adopted tables are kept, because this script fails before anything is dropped.
CREATE TEMP TABLE api_key_going_down (
    adopted_tables INTEGER,
    CONSTRAINT adopted_tables_are_not_dropped CHECK (adopted_tables = 0)
);
INSERT INTO api_key_going_down SELECT count(*) FROM api_key_adopted;
DROP TABLE api_key_going_down;

DROP TABLE api_keys;
DROP TABLE users;
DROP TABLE api_key_adopted;
