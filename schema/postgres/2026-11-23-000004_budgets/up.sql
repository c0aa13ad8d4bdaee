-- Leases of budgets, which nodes may spend without a further request. A lease counts until it expires, and its row is
-- kept until then: a request with a sequence that is not higher is old, and is ignored.
CREATE TABLE IF NOT EXISTS api_key_leases (
    api_key_id         BIGINT      NOT NULL,
    holder             TEXT        NOT NULL,
    sequence           BIGINT      NOT NULL,
    amount_micro_cents BIGINT      NOT NULL CHECK (amount_micro_cents >= 0),
    expires_at         TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (api_key_id, holder)
);

-- Grants a holder a lease on what is left of a key's budget in the current period (UTC), which replaces its previous
-- lease: `asked`, but at most `needed` and a quarter of what is left after it. If less than `needed` is left, the
-- holder keeps its previous lease. It is a function, so that it reads data as of the lock: every statement that spends
-- or grants holds the lock.
CREATE OR REPLACE FUNCTION api_key_lease(
    of_key BIGINT, by_holder TEXT, at_sequence BIGINT, asked BIGINT, needed BIGINT, life_ms BIGINT,
    OUT granted BIGINT, OUT expires TIMESTAMPTZ, OUT resets TIMESTAMPTZ
) LANGUAGE plpgsql AS $$
DECLARE
    budget  RECORD;
    present TIMESTAMPTZ;
    today   DATE;
    first   DATE;
    after   DATE;
    spent   NUMERIC;
    others  NUMERIC;
    own     api_key_leases;
    room    NUMERIC;
BEGIN
    -- Many services write -1 for "unlimited". The period counts only with a limit.
    SELECT nullif(k.budget_limit_cents, -1)::numeric * 1000000 AS total,
            CASE WHEN nullif(k.budget_limit_cents, -1) IS NULL THEN 'total'
                ELSE coalesce(nullif(lower(k.budget_type::text), ''), 'total') END AS period,
            coalesce(k.total_cost, 0)::numeric * 1000000 AS total_cost
        INTO budget FROM api_keys k WHERE k.id = of_key FOR NO KEY UPDATE;
    present := clock_timestamp();
    today := (present AT TIME ZONE 'UTC')::date;
    expires := present + life_ms * INTERVAL '1 ms';
    IF NOT FOUND THEN
        granted := 0;
        RETURN;
    END IF;
    IF budget.total < 0 THEN
        RAISE EXCEPTION 'budget_limit_cents is negative';
    END IF;
    CASE budget.period
        WHEN 'total' THEN NULL;
        WHEN 'daily' THEN first := today; after := today + 1;
        WHEN 'weekly' THEN first := date_trunc('week', today)::date; after := first + 7;
        WHEN 'monthly' THEN first := date_trunc('month', today)::date;
            after := (first + INTERVAL '1 month')::date;
    END CASE;
    resets := after::timestamp AT TIME ZONE 'UTC';
    SELECT coalesce(sum(cost_micro_cents), 0) INTO spent FROM api_key_usage
        WHERE api_key_id = of_key AND (first IS NULL OR day >= first AND day < after);
    IF first IS NULL THEN
        -- The column of an adopted table may be too coarse for single requests, but know of what was before.
        spent := greatest(spent, budget.total_cost);
    END IF;
    DELETE FROM api_key_leases WHERE api_key_id = of_key AND expires_at <= present;
    SELECT * INTO own FROM api_key_leases WHERE api_key_id = of_key AND holder = by_holder;
    IF own.sequence >= at_sequence THEN
        granted := own.amount_micro_cents;
        expires := own.expires_at;
        RETURN;
    END IF;
    SELECT coalesce(sum(amount_micro_cents), 0) INTO others FROM api_key_leases
        WHERE api_key_id = of_key AND holder <> by_holder;
    -- Without a limit, whatever is asked for.
    room := CASE WHEN budget.total IS NULL THEN 9223372036854775807
        ELSE least(greatest(budget.total - spent - others, 0), 9223372036854775807) END;
    IF needed > room THEN
        granted := least(coalesce(own.amount_micro_cents, 0), room);
    ELSE
        granted := least(asked, needed + trunc((room - needed) / 4));
    END IF;
    INSERT INTO api_key_leases (api_key_id, holder, sequence, amount_micro_cents, expires_at)
        VALUES (of_key, by_holder, at_sequence, granted, expires)
        ON CONFLICT (api_key_id, holder) DO UPDATE SET sequence = excluded.sequence,
            amount_micro_cents = excluded.amount_micro_cents, expires_at = excluded.expires_at;
END
$$;
