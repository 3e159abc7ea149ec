"""Keys, incidents, version floors and usage.

Revision ID: 0001
Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "counters",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    # The row is here from the start: two first writers at once would both find it missing.
    op.execute("INSERT INTO counters (name, value) VALUES ('changes', 0)")
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("pepper", sa.Integer, nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("groups", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("note", sa.String(256), nullable=False),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("created_by", sa.String(256), nullable=False),
        sa.Column("expires_at_s", sa.Double),
        sa.Column("revoked_at_s", sa.Double),
        sa.Column("revoked_reason", sa.String(256)),
        sa.Column("replaces", sa.String(64)),
        sa.Column("last_used_at_s", sa.Double),
        sa.Column("seq", sa.BigInteger, nullable=False),
    )
    op.create_index("keys_by_seq", "keys", ["seq"])
    op.create_index("keys_by_tenant", "keys", ["tenant", "subject"])
    op.create_table(
        "incidents",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("target", sa.String(256), nullable=False),
        sa.Column("reason", sa.String(256), nullable=False),
        sa.Column("opened_at_s", sa.Double, nullable=False),
        sa.Column("opened_by", sa.String(256), nullable=False),
        sa.Column("lifted_at_s", sa.Double),
        sa.Column("lifted_by", sa.String(256)),
        sa.Column("seq", sa.BigInteger, nullable=False),
    )
    op.create_index("incidents_by_seq", "incidents", ["seq"])
    op.create_table(
        "model_floors",
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("set_at_s", sa.Double, nullable=False),
        sa.Column("set_by", sa.String(256), nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("hour", sa.BigInteger, primary_key=True),
        sa.Column("tenant", sa.String(256), primary_key=True),
        sa.Column("subject", sa.String(256), primary_key=True),
        sa.Column("key_id", sa.String(128), primary_key=True),
        sa.Column("teams", sa.String(1024), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_micros", sa.BigInteger, nullable=False),
    )
    op.create_index("usage_by_tenant", "usage", ["tenant", "hour"])
