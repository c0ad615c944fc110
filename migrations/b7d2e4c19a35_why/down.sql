ALTER TABLE job_history DROP COLUMN why;
