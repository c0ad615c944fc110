DROP TABLE job_story;
ALTER TABLE job
    DROP COLUMN marks,
    DROP COLUMN parameters;
