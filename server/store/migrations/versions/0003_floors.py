"""When a version floor was last lowered.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("model_floors", sa.Column("lowered_at_s", sa.Double, nullable=False, server_default="0"))
