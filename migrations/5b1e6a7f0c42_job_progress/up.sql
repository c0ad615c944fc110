-- Revises: ee7f8b8df1b0
-- What operators want to see of a job: how far its task says it is, and how urgent it is. Null in
-- rows of the Python service. Progress is written often; the room left in each page keeps a row's
-- new version beside the old one, and the index out of it.
ALTER TABLE job
    ADD COLUMN priority varchar,
    ADD COLUMN progress double precision,
    ADD COLUMN progress_message varchar,
    ADD COLUMN progress_at timestamptz;
ALTER TABLE job SET (fillfactor = 70);
-- The last runs of a workflow, for estimates of the next one.
CREATE INDEX job_history_runs_idx ON job_history (workflow_type, finished_at)
    WHERE outcome = 'SUCCEEDED';
