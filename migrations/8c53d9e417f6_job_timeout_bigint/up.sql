-- Revises: 2f1c7be0a94d
-- A timeout is an unsigned 32-bit number of milliseconds on the wire: 30 days do not fit the
-- signed column.
ALTER TABLE job ALTER COLUMN timeout_after_ms TYPE bigint;
