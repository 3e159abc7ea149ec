"""Every permission there is; nothing else names one, and the policy schema must know exactly these."""

from __future__ import annotations

from enum import StrEnum

from server.types import WireFormat


class Permission(StrEnum):
    """`source:subject:action`."""

    CHAT = "model:chat:create"
    COMPLETION = "model:completion:create"
    RESPONSE = "model:response:create"
    RESPONSE_READ = "model:response:read"
    RESPONSE_DELETE = "model:response:delete"
    MESSAGE = "model:message:create"
    EMBEDDING = "model:embedding:create"
    FIM = "model:fim:create"
    COUNT = "model:token:count"
    LIST = "model:model:list"
    SCAN = "guard:text:scan"
    RECEIPT = "audit:receipt:read"
    RENDER = "admin:prompt:render"
    KEY_READ = "admin:key:read"
    KEY_CREATE = "admin:key:create"
    KEY_REVOKE = "admin:key:revoke"
    POLICY_READ = "admin:policy:read"
    POLICY_RELOAD = "admin:policy:reload"
    USAGE = "admin:usage:read"
    TENANTS = "admin:tenant:cross"
    INCIDENT_READ = "admin:incident:read"
    INCIDENT_OPEN = "admin:incident:open"
    INCIDENT_LIFT = "admin:incident:lift"
    METRICS = "admin:metrics:read"
    MODEL_READ = "admin:model:read"
    MODEL_MANAGE = "admin:model:manage"
    TEMPLATE_READ = "admin:template:read"
    TEMPLATE_MANAGE = "admin:template:manage"
    AUDIT_READ = "admin:audit:read"
    UNSEAL = "weights:model:unseal"


# What makes a model compute: a permit of one of these must say what is demanded of it.
GENERATING = frozenset(
    {
        Permission.CHAT,
        Permission.COMPLETION,
        Permission.RESPONSE,
        Permission.MESSAGE,
        Permission.EMBEDDING,
        Permission.FIM,
    }
)

# Wire formats without turns: no template can stand first in a system turn, so a permit must name what stands in.
WITHOUT_TURNS = frozenset({Permission.COMPLETION, Permission.EMBEDDING, Permission.FIM})

# What is asked of one model; everything else is asked of the service as a whole.
ON_A_MODEL = GENERATING | {Permission.COUNT, Permission.LIST, Permission.UNSEAL}

FOR_WIRE_FORMAT = {
    WireFormat.CHAT: Permission.CHAT,
    WireFormat.COMPLETION: Permission.COMPLETION,
    WireFormat.RESPONSE: Permission.RESPONSE,
    WireFormat.MESSAGE: Permission.MESSAGE,
    WireFormat.EMBEDDING: Permission.EMBEDDING,
    WireFormat.FIM: Permission.FIM,
    WireFormat.INFILL: Permission.FIM,
    WireFormat.TOKENIZE: Permission.COUNT,
}


def covers(scopes: frozenset[str], action: str) -> bool:
    """Whether a credential's scopes reach `action`: named whole, or by a prefix that ends in `*` after a colon.

    Scopes narrow what policy permits and never widen it; a credential without scopes reaches nothing.
    """
    if action in scopes or "*" in scopes:
        return True
    source, _, rest = action.partition(":")
    return f"{source}:*" in scopes or f"{source}:{rest.partition(':')[0]}:*" in scopes


def parse_scope(text: str) -> str:
    """Return a scope as given, if it can reach anything.

    Raises:
        ValueError: It names no permission and is no prefix of one.
    """
    if text == "*" or any(covers(frozenset({text}), permission) for permission in Permission):
        return text
    raise ValueError(f"'{text}' names no permission; use one of {', '.join(Permission)}, or a prefix such as model:*")
