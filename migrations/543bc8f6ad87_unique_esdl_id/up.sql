-- Revises: b3e9e4d8d50e
ALTER TABLE esdl_time_series_info
    ADD CONSTRAINT esdl_time_series_info_esdl_id_key UNIQUE (esdl_id);
