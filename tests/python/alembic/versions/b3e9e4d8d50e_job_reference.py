"""The client's name for a job."""

import sqlalchemy as sa
from alembic import op

revision = "b3e9e4d8d50e"
down_revision = "93fd48ba9ee8"


def upgrade():
    op.add_column("job", sa.Column("job_reference", sa.String(), nullable=True))


def downgrade():
    op.drop_column("job", "job_reference")
