"""A public list of package names as a Bloom filter: a name in the list is always known, one in fifty others too.

The file is a line of ASCII (`strongroom-names-1 <bits> <hashes> <names>`), then the bits. `build` makes one of
any list, so that an operator can replace it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_MAGIC = b"strongroom-names-1"
_BITS_A_NAME = 8
_NUM_HASHES = 6
_MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Names:
    """A set of names that can be asked and not read back."""

    num_bits: int
    num_hashes: int
    bits: bytes

    def __contains__(self, name: str) -> bool:
        return all(self.bits[at >> 3] >> (at & 7) & 1 for at in _places(name, self.num_bits, self.num_hashes))


def plain(name: str) -> str:
    """Return `name` as lists compare it: lower case, and `-`, `_` and `.` alike unless it has a scope or a path."""
    low = name.lower()
    return low if low.startswith("@") or "/" in low else re.sub(r"[-_.]+", "-", low)


def build(names: Iterable[str]) -> bytes:
    """Return the file of a list of names."""
    wanted = sorted({plain(name) for name in names})
    num_bits = max(64, _BITS_A_NAME * len(wanted))
    bits = bytearray((num_bits + 7) // 8)
    for name in wanted:
        for at in _places(name, num_bits, _NUM_HASHES):
            bits[at >> 3] |= 1 << (at & 7)
    return b"%s %d %d %d\n" % (_MAGIC, num_bits, _NUM_HASHES, len(wanted)) + bytes(bits)


@lru_cache(maxsize=4)
def load(path: Path) -> Names:
    """Read a list.

    Raises:
        ConfigError: The file is missing, or is none of `build`.
    """
    try:
        data = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
    except OSError as err:
        raise ConfigError(f"{path} is asked for by an @public line and cannot be read: {type(err).__name__}") from err
    head, _, bits = data.partition(b"\n")
    match = re.fullmatch(re.escape(_MAGIC) + rb" (\d{1,10}) (\d{1,2}) \d{1,10}", head)
    if match is None or len(bits) != (int(match[1]) + 7) // 8 or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"{path} is no list of public names: expected the file of server.guard.public.build")
    return Names(int(match[1]), int(match[2]), bits)


def _places(name: str, num_bits: int, num_hashes: int) -> Iterator[int]:
    digest = hashlib.sha256(name.encode()).digest()
    one, two = int.from_bytes(digest[:8]), int.from_bytes(digest[8:16]) | 1
    return ((one + number * two) % num_bits for number in range(num_hashes))
