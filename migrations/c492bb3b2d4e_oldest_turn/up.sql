-- Revises: b7d2e4c19a35

-- Also gives the tasks of one owner in their order, but by way of all others: Postgres chooses it where
-- it believes that there is but one owner. So only who asks for it by its condition is to get it.
DROP INDEX job_turn_oldest_idx;
CREATE INDEX job_turn_oldest_idx ON job_turn (queue, priority, held_at, job_id)
    WHERE granted_at IS NULL AND NOT on_hold AND held_at > '-infinity';
