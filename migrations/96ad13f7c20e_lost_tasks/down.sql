ALTER TABLE worker_look DROP COLUMN more_absent;
ALTER TABLE job_story DROP COLUMN task_queue;
ALTER TABLE job DROP COLUMN task_queue;
