DROP INDEX job_turn_oldest_idx;
CREATE INDEX job_turn_oldest_idx ON job_turn (queue, priority, held_at, job_id)
    WHERE granted_at IS NULL AND NOT on_hold;
