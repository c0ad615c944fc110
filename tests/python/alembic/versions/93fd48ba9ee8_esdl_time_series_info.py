"""What is known of time series."""

import sqlalchemy as sa
from alembic import op

revision = "93fd48ba9ee8"
down_revision = "60506a3a582f"


def upgrade():
    op.create_table(
        "esdl_time_series_info",
        sa.Column("row_id", sa.UUID(), nullable=False),
        sa.Column("esdl_id", sa.String(), nullable=True),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deactivated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("job_id", sa.UUID(), nullable=True),
        sa.Column("job_reference", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("row_id"),
    )


def downgrade():
    op.drop_table("esdl_time_series_info")
