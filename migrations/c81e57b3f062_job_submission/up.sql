-- Revises: a4f6210cd87e
-- The messages by which clients submitted jobs, compressed with zlib, for another run of the same; kept for
-- KEEP_INPUTS_SEC, and no longer than the history.
CREATE TABLE job_submission (
    job_id uuid PRIMARY KEY,
    kept_at timestamptz NOT NULL,
    -- Of the message itself.
    bytes bigint NOT NULL,
    message bytea NOT NULL
);
ALTER TABLE job_submission ALTER COLUMN message SET STORAGE EXTERNAL;
CREATE INDEX job_submission_kept_at_idx ON job_submission (kept_at);
