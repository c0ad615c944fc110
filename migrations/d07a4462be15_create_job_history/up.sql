-- Revises: 8c53d9e417f6
-- One row for each job that ended. It answers a redelivered submission or event, and a cancel
-- that overtook its submission (then everything but the outcome and its time is null).
CREATE TABLE job_history (
    job_id uuid NOT NULL,
    job_reference varchar,
    workflow_type varchar,
    celery_id varchar,
    registered_at timestamptz,
    submitted_at timestamptz,
    running_at timestamptz,
    finished_at timestamptz NOT NULL,
    starts integer NOT NULL,
    outcome varchar NOT NULL,
    result_bytes bigint NOT NULL,
    PRIMARY KEY (job_id)
);
CREATE INDEX job_history_finished_at_idx ON job_history (finished_at);
