DROP INDEX job_registered_idx;
ALTER TABLE job_history DROP COLUMN why;
