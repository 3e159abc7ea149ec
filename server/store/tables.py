"""The tables of the store; migrations in `migrations/versions/` must lead to exactly these.

Times are seconds since the epoch, UTC. Sets are JSON arrays, sorted, so that equal sets are equal text. `seq` is the
number of the change that last touched a row: a replica that has seen changes up to N asks for `seq > N`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    true,
)

metadata = MetaData()

counters = Table(
    "counters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("pepper", Integer, nullable=False),
    Column("subject", String(256), nullable=False),
    Column("tenant", String(256), nullable=False),
    Column("groups", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("note", String(256), nullable=False),
    Column("created_at_s", Double, nullable=False),
    Column("created_by", String(256), nullable=False),
    Column("expires_at_s", Double),
    Column("revoked_at_s", Double),
    Column("revoked_reason", String(256)),
    Column("replaces", String(64)),
    Column("last_used_at_s", Double),
    Column("seq", BigInteger, nullable=False),
    Index("keys_by_seq", "seq"),
    Index("keys_by_tenant", "tenant", "subject"),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),
    Column("target", String(256), nullable=False),
    Column("reason", String(256), nullable=False),
    Column("opened_at_s", Double, nullable=False),
    Column("opened_by", String(256), nullable=False),
    Column("lifted_at_s", Double),
    Column("lifted_by", String(256)),
    Column("seq", BigInteger, nullable=False),
    Column("across_tenants", Boolean, nullable=False, server_default=true()),
    Index("incidents_by_seq", "seq"),
)

model_floors = Table(
    "model_floors",
    metadata,
    Column("model", String(256), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("set_at_s", Double, nullable=False),
    Column("set_by", String(256), nullable=False),
    Column("lowered_at_s", Double, nullable=False, server_default="0"),
)

usage = Table(
    "usage",
    metadata,
    Column("hour", BigInteger, primary_key=True),
    Column("tenant", String(256), primary_key=True),
    Column("subject", String(256), primary_key=True),
    Column("key_id", String(128), primary_key=True),
    Column("teams", String(1024), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cost_micros", BigInteger, nullable=False),
    Index("usage_by_tenant", "tenant", "hour"),
)

responses = Table(
    "responses",
    metadata,
    Column("tenant", String(256), primary_key=True),
    Column("subject", String(256), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("created_at_s", Double, nullable=False),
    Column("expires_at_s", Double, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Index("responses_by_expiry", "expires_at_s"),
)
