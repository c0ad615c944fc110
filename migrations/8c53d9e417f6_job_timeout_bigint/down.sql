-- Not `least`, which makes a limit of none.
ALTER TABLE job ALTER COLUMN timeout_after_ms TYPE integer
    USING CASE WHEN timeout_after_ms > 2147483647 THEN 2147483647 ELSE timeout_after_ms END;
