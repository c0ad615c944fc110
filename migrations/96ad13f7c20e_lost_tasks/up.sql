-- Revises: d5b8e2137fa9
-- The tables in the order in which the service's transactions lock them.
-- On which queue its task was put, of a job that has no row in job_step: the workflow definitions may say
-- something else by now. Null in rows of earlier versions and of the Python service.
ALTER TABLE job ADD COLUMN task_queue varchar;
-- The same of one that has ended.
ALTER TABLE job_story ADD COLUMN task_queue varchar;
-- How many more tasks are as absent as those in absent_task of which somebody was told.
ALTER TABLE worker_look ADD COLUMN more_absent bigint;
