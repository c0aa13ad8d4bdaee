-- Slices of budgets that nodes may spend without asking. One counts until it expires, and its row stays until then:
-- an ask with a sequence that is not higher is old, and changes nothing.
CREATE TABLE IF NOT EXISTS api_key_leases (
    api_key_id         INTEGER NOT NULL,
    holder             TEXT    NOT NULL,
    sequence           INTEGER NOT NULL,
    amount_micro_cents INTEGER NOT NULL CHECK (amount_micro_cents >= 0),
    -- Milliseconds since the Unix epoch.
    expires_at         INTEGER NOT NULL,
    PRIMARY KEY (api_key_id, holder)
) WITHOUT ROWID;
