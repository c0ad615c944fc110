DROP TABLE job_starts;
