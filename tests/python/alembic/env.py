"""Alembic as the Python orchestrator runs it, on the database that DATABASE_URL names."""

import os
from logging.config import fileConfig

from alembic import context
from sqlalchemy import create_engine

# It tells which revisions it applies.
fileConfig(context.config.config_file_name, disable_existing_loggers=False)
engine = create_engine(os.environ["DATABASE_URL"])
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
