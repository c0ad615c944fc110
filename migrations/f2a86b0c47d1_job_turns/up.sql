-- Revises: e41d07b6a9c3

-- What operators allow at task queues, instead of what the definition file says.
CREATE TABLE queue_limit (
    queue varchar PRIMARY KEY,
    -- 0 is no limit; null is what the file says.
    max_waiting integer,
    max_running integer,
    paused boolean,
    changed_at timestamptz NOT NULL
);

-- A row for each task that has to wait for its turn, until it has ended.
CREATE TABLE job_turn (
    job_id uuid PRIMARY KEY,
    queue varchar NOT NULL,
    owner varchar NOT NULL,
    priority varchar NOT NULL,
    held_at timestamptz NOT NULL,
    -- An operator has put it first.
    moved_at timestamptz,
    -- An operator does not let it go.
    on_hold boolean NOT NULL DEFAULT false,
    -- An operator lets it go whatever is allowed.
    released boolean NOT NULL DEFAULT false,
    -- From then on it counts as handed over.
    granted_at timestamptz,
    -- When somebody last took it on to hand it over, if not then.
    taken_at timestamptz,
    -- The task that it has been granted.
    celery_id uuid
);
CREATE INDEX job_turn_line_idx ON job_turn (queue, owner, priority, held_at, job_id)
    WHERE granted_at IS NULL AND NOT on_hold;
CREATE INDEX job_turn_oldest_idx ON job_turn (queue, priority, held_at, job_id)
    WHERE granted_at IS NULL AND NOT on_hold;
CREATE INDEX job_turn_moved_idx ON job_turn (queue, moved_at)
    WHERE granted_at IS NULL AND NOT on_hold AND moved_at IS NOT NULL;
CREATE INDEX job_turn_released_idx ON job_turn (queue, held_at)
    WHERE granted_at IS NULL AND NOT on_hold AND released;
CREATE INDEX job_turn_granted_idx ON job_turn (queue) WHERE granted_at IS NOT NULL;

-- When an owner of jobs last had a turn at a queue.
CREATE TABLE turn_owner (
    queue varchar NOT NULL,
    owner varchar NOT NULL,
    served_at timestamptz NOT NULL,
    PRIMARY KEY (queue, owner)
);

ALTER TABLE job_input ADD COLUMN owner varchar;
