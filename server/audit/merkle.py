"""RFC 6962 Merkle trees: an append-only tree in memory, proofs, and their verification. Pure."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT
HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()


class ProofError(ValueError):
    """A Merkle proof does not prove what it should."""


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of one entry (RFC 6962, section 2.1)."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an interior node (RFC 6962, section 2.1)."""
    return sha256(b"\x01" + left + right).digest()


def subtree_hash(hashes: Sequence[bytes]) -> bytes:
    """Return the Merkle tree hash over nodes of one height."""
    level = list(hashes)
    if not level:
        return EMPTY_ROOT
    while len(level) > 1:
        pairs = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) & ~1 :]
    return level[0]


class Tree:
    """An append-only tree that keeps the roots of its complete subtrees and the hashes of its open tiles.

    Attributes:
        size: Number of leaves.
        stack: Roots of the maximal complete subtrees, largest first.
        levels: For each tile level, the hashes that no full tile has taken yet.
    """

    __slots__ = ("levels", "size", "stack")

    def __init__(self) -> None:
        self.size = 0
        self.stack: list[bytes] = []
        self.levels: list[list[bytes]] = [[]]

    @classmethod
    def from_tiles(cls, size: int, read_tile: Callable[[int, int, int], list[bytes]]) -> Tree:
        """Return the tree of `size` leaves from its open tiles.

        Args:
            size: Number of leaves.
            read_tile: (level, index, width) to that many hashes.
        """
        tree = cls()
        tree.size = size
        widths = []
        level = 0
        while size >> (TILE_HEIGHT * level):
            widths.append((size >> (TILE_HEIGHT * level)) % TILE_WIDTH)
            level += 1
        tree.levels = [
            read_tile(at, (size >> (TILE_HEIGHT * at)) // TILE_WIDTH, width) if width else []
            for at, width in enumerate(widths)
        ] or [[]]
        for hashes in reversed(tree.levels):
            start = 0
            for bit in reversed(range(TILE_HEIGHT)):
                if len(hashes) >> bit & 1:
                    tree.stack.append(subtree_hash(hashes[start : start + (1 << bit)]))
                    start += 1 << bit
        return tree

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        count, height = self.size, 0
        levels, stack = self.levels, self.stack
        levels[0].append(leaf)
        node = leaf
        while count & 1:
            node = sha256(b"\x01" + stack.pop() + node).digest()
            count >>= 1
            height += 1
            if not height & 7:
                level = height >> 3
                if level == len(levels):
                    levels.append([])
                levels[level].append(node)
        stack.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Return the Merkle tree hash over all leaves."""
        if not self.stack:
            return EMPTY_ROOT
        node = self.stack[-1]
        for left in reversed(self.stack[:-1]):
            node = sha256(b"\x01" + left + node).digest()
        return node

    def mark(self) -> tuple[int, list[bytes], list[int]]:
        """Return what `reset` needs to undo the appends from here on."""
        return self.size, self.stack.copy(), [len(level) for level in self.levels]

    def reset(self, mark: tuple[int, list[bytes], list[int]]) -> None:
        """Undo every append since `mark`; no tile may have been taken in between."""
        self.size, stack, lengths = mark
        self.stack = stack.copy()
        del self.levels[len(lengths) :]
        for level, length in zip(self.levels, lengths, strict=True):
            del level[length:]

    def take_full_tiles(self) -> Iterator[tuple[int, int, list[bytes]]]:
        """Yield (level, index, 256 hashes) of every tile that is full, and let go of it."""
        for level, hashes in enumerate(self.levels):
            while len(hashes) >= TILE_WIDTH:
                total = self.size >> (TILE_HEIGHT * level)
                yield level, (total - len(hashes)) // TILE_WIDTH, hashes[:TILE_WIDTH]
                del hashes[:TILE_WIDTH]

    def open_tiles(self) -> Iterator[tuple[int, int, list[bytes]]]:
        """Yield (level, index, hashes) of every tile that is not full and not empty; take the full ones first."""
        for level, hashes in enumerate(self.levels):
            if hashes:
                yield level, (self.size >> (TILE_HEIGHT * level)) // TILE_WIDTH, hashes


def _split(count: int) -> int:
    return 1 << (count - 1).bit_length() - 1


def inclusion_proof(index: int, size: int, range_hash: Callable[[int, int], bytes]) -> list[bytes]:
    """Return the audit path of leaf `index` in the tree of `size` leaves (RFC 6962, section 2.1.1).

    Args:
        index: The leaf.
        size: The tree.
        range_hash: (low, high) to the Merkle tree hash over those leaves.
    """
    if not 0 <= index < size:
        raise ProofError(f"Entry {index} is not in a tree of {size}.")
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            path.append(range_hash(middle, high))
            high = middle
        else:
            path.append(range_hash(low, middle))
            low = middle
    return path[::-1]


def consistency_proof(old: int, new: int, range_hash: Callable[[int, int], bytes]) -> list[bytes]:
    """Return the proof that the tree of `old` leaves is a prefix of that of `new` (RFC 6962, section 2.1.2)."""
    if not 0 <= old <= new:
        raise ProofError(f"A tree of {old} is no prefix of a tree of {new}.")
    if old in (0, new):
        return []
    path: list[bytes] = []
    low, high, whole = 0, new, True
    while old != high:
        middle = low + _split(high - low)
        if old <= middle:
            path.append(range_hash(middle, high))
            high = middle
        else:
            path.append(range_hash(low, middle))
            low, whole = middle, False
    if not whole:
        path.append(range_hash(low, high))
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check an audit path (RFC 9162, section 2.1.3.2).

    Raises:
        ProofError: The path does not lead from the leaf to the root.
    """
    if not 0 <= index < size:
        raise ProofError(f"Entry {index} is not in a tree of {size}.")
    node, position, last = leaf, index, size - 1
    for sibling in proof:
        if last == 0:
            raise ProofError("The inclusion proof is too long.")
        if position & 1 or position == last:
            node = node_hash(sibling, node)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            node = node_hash(node, sibling)
        position >>= 1
        last >>= 1
    if last != 0 or node != root:
        raise ProofError("The inclusion proof does not lead to the root.")


def verify_consistency(old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> None:
    """Check a consistency proof (RFC 9162, section 2.1.4.2).

    Raises:
        ProofError: The old tree is not a prefix of the new one, or the proof does not show it.
    """
    if not 0 <= old <= new:
        raise ProofError(f"A tree of {old} is no prefix of a tree of {new}.")
    if old in (0, new):
        if proof or (old == new and old_root != new_root) or (old == 0 and old_root != EMPTY_ROOT):
            raise ProofError("The two trees conflict.")
        return
    path = list(proof)
    if old & (old - 1) == 0:
        path.insert(0, old_root)
    if not path:
        raise ProofError("The consistency proof is empty.")
    position, last = old - 1, new - 1
    while position & 1:
        position >>= 1
        last >>= 1
    first = second = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise ProofError("The consistency proof is too long.")
        if position & 1 or position == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            second = node_hash(second, sibling)
        position >>= 1
        last >>= 1
    if last != 0 or first != old_root or second != new_root:
        raise ProofError("The consistency proof does not lead to both roots.")
