-- Revises: c492bb3b2d4e
-- What its task is given beside the ESDL, as JSON, and where its progress was on the way: a line of JSON each,
-- few of them. Null in rows of the Python service.
ALTER TABLE job
    ADD COLUMN parameters text,
    ADD COLUMN marks text;
-- What is told of a job that has ended beside its row in job_history, and deleted with that.
CREATE TABLE job_story (
    job_id uuid PRIMARY KEY,
    -- As the job had them in its own row.
    priority varchar,
    timeout_ms bigint,
    parameters text,
    progress double precision,
    progress_message varchar,
    progress_at timestamptz,
    marks text,
    -- JSON: when its last task was started, with the verdicts; which workers were seen with its tasks; who
    -- asked it to end.
    starts text,
    hosts text,
    ended_by text,
    -- Of its result, the beginning and the end if they are long.
    logs text,
    -- JSON.
    esdl_messages text
);
