ALTER TABLE job_story DROP COLUMN delivery;
ALTER TABLE job_submission DROP COLUMN sender;
ALTER TABLE queue_limit DROP COLUMN acts;
DROP TABLE job_act;
