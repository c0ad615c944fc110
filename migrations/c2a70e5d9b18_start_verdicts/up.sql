-- Revises: 5b1e6a7f0c42
-- A worker that RabbitMQ has lost sight of is not dead. When a session with RabbitMQ was last begun
-- by any replica, in its only row; a start that follows a start from before it is excused.
CREATE TABLE broker_session (
    singleton boolean NOT NULL DEFAULT true CHECK (singleton),
    begun_at timestamptz NOT NULL,
    PRIMARY KEY (singleton)
);
-- Why a start does not count, or not yet; null where it does, as in rows of the Python service.
ALTER TABLE job_starts ADD COLUMN verdict varchar;
CREATE INDEX job_starts_suspected_idx ON job_starts (job_id) WHERE verdict = 'SUSPECTED';
-- The message ids of the job's starts, as a JSON list: any other START is a task that runs again.
ALTER TABLE job_history ADD COLUMN start_ids varchar;
