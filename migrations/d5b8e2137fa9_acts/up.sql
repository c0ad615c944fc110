-- Revises: c81e57b3f062
-- What somebody has done to a job: through the page, or by a command. A few rows of a job, see
-- store/acts.rs; deleted with its history.
CREATE TABLE job_act (
    job_id uuid NOT NULL,
    -- Of those of the job, from 1. What is left out leaves a gap.
    number integer NOT NULL,
    at timestamptz NOT NULL,
    act varchar NOT NULL,
    -- JSON: by which way, who, from where.
    origin text,
    -- Of a change of the priority: what it had been, and what it is.
    was varchar,
    priority varchar,
    -- The job that this one runs again.
    other uuid,
    PRIMARY KEY (job_id, number)
);
CREATE INDEX job_act_other_idx ON job_act (other) WHERE other IS NOT NULL;
-- The tables in the order in which the service's transactions lock them.
-- What became of the result that its client was told. Null in rows of earlier versions.
ALTER TABLE job_story ADD COLUMN delivery varchar;
-- Whose a submission was, where its message has said that: another run of it is theirs too.
ALTER TABLE job_submission ADD COLUMN sender varchar;
-- Who has changed what is allowed there, and when, as JSON: the last pause, and the last limit.
ALTER TABLE queue_limit ADD COLUMN acts text;
