-- Revises: 60506a3a582f
CREATE TABLE esdl_time_series_info (
    row_id uuid NOT NULL,
    esdl_id varchar,
    registered_at timestamptz,
    deactivated_at timestamptz,
    job_id uuid,
    job_reference varchar,
    PRIMARY KEY (row_id)
);
