-- Revises: 543bc8f6ad87
-- A redelivered START has the message id of the one already counted. The Python service leaves
-- the column null.
ALTER TABLE job_starts ADD COLUMN message_id varchar;
