-- Revises: nothing
CREATE TYPE jobstatus AS ENUM ('REGISTERED', 'SUBMITTED', 'RUNNING');
CREATE TABLE job (
    job_id uuid NOT NULL,
    celery_id varchar,
    workflow_type varchar NOT NULL,
    status jobstatus NOT NULL,
    registered_at timestamptz NOT NULL,
    submitted_at timestamptz,
    running_at timestamptz,
    timeout_after_ms integer,
    PRIMARY KEY (job_id)
);
