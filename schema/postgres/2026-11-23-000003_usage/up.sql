-- Usage by day (UTC). It does not reference api_keys: the cost of a key is kept after the key is deleted.
CREATE TABLE IF NOT EXISTS api_key_usage (
    api_key_id       BIGINT NOT NULL,
    day              DATE   NOT NULL,
    requests         BIGINT NOT NULL DEFAULT 0,
    tokens           BIGINT NOT NULL DEFAULT 0,
    -- In millionths of a cent.
    cost_micro_cents BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (api_key_id, day)
);

-- The last counted batch of each writer, which makes retries idempotent.
CREATE TABLE IF NOT EXISTS api_key_usage_writers (
    writer   TEXT        PRIMARY KEY,
    sequence BIGINT      NOT NULL,
    seen_at  TIMESTAMPTZ NOT NULL
);

-- Runs a statement that has five parameters and returns one text, with the rights of its caller, and returns an error
-- as data: {"row": text} or {"sqlstate": code, "message": text}. The statement is rolled back on an error. Some clients
-- do not expose the code of an error, and the message is in the server's language. A cancelled statement returns an
-- error as usual.
CREATE OR REPLACE FUNCTION api_key_try(
    statement TEXT, first TEXT, second TEXT, third BIGINT, fourth TEXT, fifth BIGINT
) RETURNS TEXT LANGUAGE plpgsql AS $$
DECLARE
    answer TEXT;
BEGIN
    EXECUTE statement INTO answer USING first, second, third, fourth, fifth;
    RETURN json_build_object('row', answer)::text;
EXCEPTION WHEN OTHERS THEN
    RETURN json_build_object('sqlstate', SQLSTATE, 'message', SQLERRM)::text;
END
$$;
