ALTER TABLE job ALTER COLUMN timeout_after_ms TYPE integer USING least(timeout_after_ms, 2147483647);
