#!/bin/bash
# A role for the orchestrator, which owns nothing but the database of its jobs.
psql --set ON_ERROR_STOP=1 --dbname postgres --set role="$ORCHESTRATOR_USER" --set password="$ORCHESTRATOR_PASSWORD" <<'SQL'
CREATE ROLE :"role" LOGIN PASSWORD :'password';
CREATE DATABASE omotes_jobs OWNER :"role";
SQL
