DROP INDEX job_history_runs_idx;
ALTER TABLE job RESET (fillfactor);
ALTER TABLE job
    DROP COLUMN progress_at,
    DROP COLUMN progress_message,
    DROP COLUMN progress,
    DROP COLUMN priority;
