"""The starts of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "60506a3a582f"
down_revision = "aacf0b4d16ad"


def upgrade():
    op.create_table(
        "job_starts",
        sa.Column("job_id", sa.UUID(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.job_id"]),
        sa.PrimaryKeyConstraint("job_id", "started_at"),
    )


def downgrade():
    op.drop_table("job_starts")
