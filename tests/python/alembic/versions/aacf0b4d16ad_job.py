"""The jobs."""

import sqlalchemy as sa
from alembic import op

revision = "aacf0b4d16ad"
down_revision = None


def upgrade():
    op.create_table(
        "job",
        sa.Column("job_id", sa.UUID(), nullable=False),
        sa.Column("celery_id", sa.String(), nullable=True),
        sa.Column("workflow_type", sa.String(), nullable=False),
        sa.Column(
            "status",
            sa.Enum("REGISTERED", "SUBMITTED", "RUNNING", name="jobstatus"),
            nullable=False,
        ),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("running_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("timeout_after_ms", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("job_id"),
    )


def downgrade():
    op.drop_table("job")
    op.execute("DROP TYPE jobstatus")
