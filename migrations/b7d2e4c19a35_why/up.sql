-- Revises: f3a9c15d7e62
-- The line of what its client was told that says most of why a job failed.
ALTER TABLE job_history ADD COLUMN why varchar;
-- Jobs that wait for their turn, in the order in which they are listed: there may be many, and a page
-- shows few.
CREATE INDEX job_registered_idx ON job (registered_at, job_id) WHERE status = 'REGISTERED';
