DROP TABLE job_input;
DROP TABLE job_step;
