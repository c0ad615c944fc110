ALTER TABLE job_input DROP COLUMN owner;
DROP TABLE turn_owner;
DROP TABLE job_turn;
DROP TABLE queue_limit;
