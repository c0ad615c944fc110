-- Revises: d07a4462be15
-- When a task that one replica does for all of them was last begun.
CREATE TABLE maintenance_run (
    task varchar NOT NULL,
    last_run timestamptz NOT NULL,
    PRIMARY KEY (task)
);
