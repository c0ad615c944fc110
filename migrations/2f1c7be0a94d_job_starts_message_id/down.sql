ALTER TABLE job_starts DROP COLUMN message_id;
