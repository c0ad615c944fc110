DROP TABLE job_submission;
