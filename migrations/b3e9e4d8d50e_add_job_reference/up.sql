-- Revises: 93fd48ba9ee8
ALTER TABLE job ADD COLUMN job_reference varchar;
