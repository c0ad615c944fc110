-- Revises: c2a70e5d9b18
-- One row for each task that a job of several steps has had; kept with the history.
CREATE TABLE job_step (
    job_id uuid NOT NULL,
    number smallint NOT NULL,
    attempt smallint NOT NULL,
    -- 0 is the step itself, 1 its fallback, 2 the fallback of that.
    fallback smallint NOT NULL,
    title varchar NOT NULL,
    task varchar NOT NULL,
    celery_id varchar,
    timeout_ms bigint,
    due_at timestamptz,
    submitted_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    outcome varchar,
    starts integer,
    output_bytes bigint,
    esdl_id varchar,
    logs text,
    -- JSON.
    esdl_messages text,
    PRIMARY KEY (job_id, number, attempt)
);
CREATE INDEX ON job_step (due_at) WHERE due_at IS NOT NULL AND submitted_at IS NULL AND finished_at IS NULL;
CREATE INDEX ON job_step (started_at) WHERE timeout_ms IS NOT NULL AND finished_at IS NULL;
-- What a job of several steps still needs while it has a row in job.
CREATE TABLE job_input (
    job_id uuid PRIMARY KEY,
    -- As in the definition file at its submission; JSON, as are the two that follow.
    steps text NOT NULL,
    parameters text NOT NULL,
    reference text NOT NULL,
    -- Of the current step, as long as another attempt may need it.
    esdl text
);
