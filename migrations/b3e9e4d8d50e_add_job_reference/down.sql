ALTER TABLE job DROP COLUMN job_reference;
