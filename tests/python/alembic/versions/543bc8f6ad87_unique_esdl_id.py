"""One row for each ESDL."""

from alembic import op

revision = "543bc8f6ad87"
down_revision = "b3e9e4d8d50e"


def upgrade():
    op.create_unique_constraint(
        "esdl_time_series_info_esdl_id_key", "esdl_time_series_info", ["esdl_id"]
    )


def downgrade():
    op.drop_constraint("esdl_time_series_info_esdl_id_key", "esdl_time_series_info")
