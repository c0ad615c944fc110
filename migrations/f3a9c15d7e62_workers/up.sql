-- Revises: f2a86b0c47d1
-- What Celery's workers have said of themselves; forgotten a day after they have gone.
CREATE TABLE worker (
    -- Celery's name of it: worker-<tasks>@<host>.
    host varchar PRIMARY KEY,
    state varchar NOT NULL,
    state_since timestamptz NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    -- How many looks in a row it has not answered.
    misses integer NOT NULL,
    -- Of its main process.
    pid bigint,
    began_at timestamptz,
    pool varchar,
    pool_size bigint,
    prefetch bigint,
    celery varchar,
    -- The queues from which it takes tasks, and those of which it has since its process began; lists in
    -- JSON.
    queues text NOT NULL,
    serves text NOT NULL,
    -- What an operator wants of its process: DRAINED or RESUMED.
    wish varchar,
    -- Tasks that its process says that it has begun, those that were counted over all its processes, and
    -- what that was at times of the last hour, in JSON.
    process_count bigint NOT NULL,
    begun bigint NOT NULL,
    samples text NOT NULL
);
-- The tasks that workers were seen with in the last hour.
CREATE TABLE worker_task (
    host varchar NOT NULL,
    celery_id varchar NOT NULL,
    task varchar NOT NULL,
    job_id uuid,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    is_current boolean NOT NULL,
    PRIMARY KEY (host, celery_id)
);
-- Tasks of running jobs that no worker has.
CREATE TABLE absent_task (
    celery_id varchar PRIMARY KEY,
    job_id uuid NOT NULL,
    since timestamptz NOT NULL,
    confirmed_at timestamptz NOT NULL,
    -- Whether it may be waiting in its queue.
    may_wait boolean NOT NULL,
    -- Whether the log has it.
    is_told boolean NOT NULL
);
-- When that was last seen.
CREATE TABLE worker_look (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    looked_at timestamptz NOT NULL
);
