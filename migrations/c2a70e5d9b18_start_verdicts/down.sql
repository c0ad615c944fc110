ALTER TABLE job_history DROP COLUMN start_ids;
DROP INDEX job_starts_suspected_idx;
ALTER TABLE job_starts DROP COLUMN verdict;
DROP TABLE broker_session;
