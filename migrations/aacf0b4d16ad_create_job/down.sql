DROP TABLE job;
DROP TYPE jobstatus;
