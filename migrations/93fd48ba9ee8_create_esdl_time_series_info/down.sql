DROP TABLE esdl_time_series_info;
