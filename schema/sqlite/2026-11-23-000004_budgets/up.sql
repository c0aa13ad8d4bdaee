-- Leases of budgets, which nodes may spend without a further request. A lease counts until it expires, and its row is
-- kept until then: a request with a sequence that is not higher is old, and is ignored.
CREATE TABLE IF NOT EXISTS api_key_leases (
    api_key_id         INTEGER NOT NULL,
    holder             TEXT    NOT NULL,
    sequence           INTEGER NOT NULL,
    amount_micro_cents INTEGER NOT NULL CHECK (amount_micro_cents >= 0),
    -- In milliseconds since the Unix epoch.
    expires_at         INTEGER NOT NULL,
    PRIMARY KEY (api_key_id, holder)
) WITHOUT ROWID;
