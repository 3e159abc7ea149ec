"""What is known of a value as it flows: where it came from, and what it can still do harm to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Value:
    """What is known of one value: its roots with their dangers.

    `built` are the dangers for which it counts as a text put together from parts. `fields` is what is known of an
    object's fields one by one.
    """

    __slots__ = ("built", "canonical", "fields", "roots")

    def __init__(
        self,
        roots: dict[str, int] | None = None,
        *,
        built: int = 0,
        canonical: bool = False,
        fields: dict[str, Value] | None = None,
    ) -> None:
        self.roots = roots or {}
        self.built = built
        self.canonical = canonical
        self.fields = fields

    def without(self, mask: int) -> Value:
        """Return the value after a sanitizer took `mask` away."""
        fields = self.fields and {name: value.without(mask) for name, value in self.fields.items()}
        return Value(self._roots_without(mask), built=self.built, fields=fields)

    def with_fields(self, fields: dict[str, Value] | None) -> Value:
        """Return the same value with `fields` known of it."""
        return Value(self.roots, built=self.built, canonical=self.canonical, fields=fields)

    def part(self, name: str, mask: int) -> Value:
        """Return what is in a field; of an object of which no fields are known, the object without `mask`."""
        known = self.fields.get(name) if self.fields else None
        if known is not None:
            return known
        return Value(self._roots_without(mask), built=self.built, canonical=self.canonical)

    def _roots_without(self, mask: int) -> dict[str, int]:
        return {r: m & ~mask for r, m in self.roots.items() if m & ~mask}


CLEAN = Value()


def union(values: Iterable[Value], *, built: int = 0) -> Value:
    """Return a value that may be any of `values`, or all of them put together, which counts for the dangers `built`."""
    values = [value for value in values if value.roots]
    if len(values) == 1 and values[0].built | built == values[0].built:
        return values[0]
    roots: dict[str, int] = {}
    canonical = False
    for value in values:
        built |= value.built
        canonical = canonical or value.canonical
        for root, mask in value.roots.items():
            roots[root] = roots.get(root, 0) | mask
    return Value(roots, built=built, canonical=canonical) if roots else CLEAN


def joined(one: dict[str, Value], other: dict[str, Value]) -> dict[str, Value]:
    """Return what holds after either of two ways."""
    if one is other:
        return one
    result = dict(one)
    for name, value in other.items():
        mine = one.get(name)
        if mine is None:
            result[name] = value
        elif mine is not value:
            result[name] = union([mine, value])
    return result
