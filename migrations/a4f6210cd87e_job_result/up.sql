-- Revises: 91d3c05e7b48
-- Output ESDLs that no client has taken, compressed with zlib; kept for KEEP_RESULTS_SEC, and no longer
-- than the history.
CREATE TABLE job_result (
    job_id uuid PRIMARY KEY,
    kept_at timestamptz NOT NULL,
    -- Of the ESDL itself.
    bytes bigint NOT NULL,
    esdl bytea NOT NULL
);
ALTER TABLE job_result ALTER COLUMN esdl SET STORAGE EXTERNAL;
CREATE INDEX job_result_kept_at_idx ON job_result (kept_at);
