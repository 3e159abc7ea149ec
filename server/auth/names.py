"""What a subject, tenant or group may be called."""

from __future__ import annotations

import re

# No slash: accounts and policy entities are named tenant/subject, and two pairs must never be one name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:|+=-]{0,127}", re.ASCII)


def parse_name(text: str, what: str) -> str:
    """Return `text` if it can name a subject, tenant or group.

    Raises:
        ValueError: It is empty, too long, or holds a character that names don't.
    """
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"the {what} must be 1 to 128 letters, digits or . _ @ : | + = -, and start with a letter or digit"
        )
    return text
