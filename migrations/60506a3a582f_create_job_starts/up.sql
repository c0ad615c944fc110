-- Revises: aacf0b4d16ad
CREATE TABLE job_starts (
    job_id uuid NOT NULL,
    started_at timestamptz NOT NULL,
    PRIMARY KEY (job_id, started_at),
    FOREIGN KEY (job_id) REFERENCES job (job_id)
);
