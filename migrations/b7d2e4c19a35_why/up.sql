-- Revises: f3a9c15d7e62
-- The line of what its client was told that says most of why a job failed.
ALTER TABLE job_history ADD COLUMN why varchar;
-- The same of a task of several steps.
ALTER TABLE job_step ADD COLUMN why varchar;
