"""Whether who opened an incident manages all tenants; of the older ones nobody knows, so they count as such.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("incidents", sa.Column("across_tenants", sa.Boolean, nullable=False, server_default=sa.true()))
