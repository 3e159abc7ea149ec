# ruff: noqa: E501  # a pattern is read whole
"""A block of code as a syntax tree, and its text without comments and without the insides of strings."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from ast_grep_py import SgRoot

if TYPE_CHECKING:
    from ast_grep_py import SgNode

_GRAMMARS = {
    "python": "python",
    "javascript": "javascript",
    "typescript": "typescript",
    "tsx": "tsx",
    "java": "java",
    "go": "go",
    "c": "c",
    "cpp": "cpp",
    "shell": "bash",
    "terraform": "hcl",
}
_COMMENTS = frozenset({"comment", "line_comment", "block_comment", "html_comment", "hash_bang_line"})
_STRING_BODIES = frozenset(
    {
        "string_content", "string_fragment", "interpreted_string_literal_content", "raw_string_literal_content", "string_literal_content",
        "escape_sequence", "multiline_string_fragment", "raw_string_literal", "raw_string", "character", "template_literal", "heredoc_body",
        "heredoc_content", "char_literal", "character_literal", "ansi_c_string", "regex_pattern", "raw_string_content",
    }
)  # fmt: skip
# Kinds that have nothing below them in any grammar: most nodes are one of these, and asking costs as much as reading one.
_LEAVES = frozenset(
    {
        "identifier", "type_identifier", "field_identifier", "property_identifier", "namespace_identifier", "package_identifier", "statement_identifier",
        "shorthand_property_identifier", "shorthand_property_identifier_pattern", "variable_name", "special_variable_name", "primitive_type", "predefined_type",
        "integral_type", "number", "integer", "float", "number_literal", "int_literal", "float_literal", "decimal_integer_literal", "numeric_lit", "this", "self", "super",
        "true", "false", "null", "nil", "none", "string_start", "string_end", "quoted_template_start", "quoted_template_end", "block_start", "block_end",
        "type_qualifier", "string_fragment", "escape_sequence", "interpreted_string_literal_content", "system_lib_string", "character", "template_literal",
    }
)  # fmt: skip
MAX_DEPTH = 220
_ENUMERATIONS = re.compile(r"\benum\s+(?:class\s+|struct\s+)?(\w+)|^[ \t]*class\s+(\w+)\([^)\n]*Enum\b", re.MULTILINE)


class Node:
    """One named node; `kids` leave comments out, offsets are characters of the source."""

    __slots__ = ("_sg", "end", "kids", "kind", "parent", "start")

    def __init__(self, sg: SgNode, kind: str, start: int, end: int, parent: Node | None) -> None:
        self._sg = sg
        self.kind = kind
        self.start = start
        self.end = end
        self.parent = parent
        self.kids: list[Node] = []

    def field(self, name: str) -> Node | None:
        """Return the child that the grammar calls `name`."""
        child = self._sg.field(name)
        if child is None:
            return None
        start, kind = child.range().start.index, child.kind()
        return next((kid for kid in self.kids if kid.start == start and kid.kind == kind), None)

    def first(self, *kinds: str) -> Node | None:
        """Return the first child of one of these kinds."""
        return next((kid for kid in self.kids if kid.kind in kinds), None)

    def walk(self) -> list[Node]:
        """Return this node and all below it, first to last."""
        found, stack = [], [self]
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(reversed(node.kids))
        return found


class Tree:
    """The parsed block.

    `code` has comments blanked out, `masked` the insides of strings as well; both are as long as `source`.
    """

    def __init__(self, source: str, language: str, root: SgNode | None = None) -> None:
        self.source = source
        self.language = language
        self._blank: list[tuple[int, int, bool]] = []
        root = root or parsed(source, language)
        self.root = self._convert(root, root.kind(), None, 0)
        self.code = _blanked(source, [(a, b) for a, b, is_comment in self._blank if is_comment])
        self.masked = _blanked(source, [(a, b) for a, b, _ in self._blank])

    @cached_property
    def enumerations(self) -> frozenset[str]:
        """The types of this file that have only named values: what is of one is none of a caller's texts."""
        return frozenset(name for pair in _ENUMERATIONS.findall(self.masked) for name in pair if name)

    def text(self, node: Node) -> str:
        """Return the node's text without comments."""
        return self.code[node.start : node.end]

    def _convert(self, sg: SgNode, kind: str, parent: Node | None, depth: int) -> Node:
        span = sg.range()
        node = Node(sg, kind, span.start.index, span.end.index, parent)
        if depth > MAX_DEPTH:
            raise RecursionError
        if kind in _LEAVES:
            return node
        for child in sg.named_children():
            kind = child.kind()
            if kind in _COMMENTS:
                where = child.range()
                self._blank.append((where.start.index, where.end.index, True))
                continue
            kid = self._convert(child, kind, node, depth + 1)
            if kind in _STRING_BODIES:
                self._blank.append((kid.start, kid.end, False))
            node.kids.append(kid)
        return node


def parsed(source: str, language: str) -> SgNode:
    """Return the root of the grammar's own tree."""
    return SgRoot(source, _GRAMMARS[language]).root()


def mask_of_broken(source: str, root: SgNode) -> str | None:
    """Return `source` without comments and the insides of strings where it does not parse, or None where it does.

    Only these are looked at: a text that was cut short is parsed again with an end, and one such tree is enough.
    """
    if root.find(kind="ERROR") is None:
        return None
    spans: list[tuple[int, int]] = []
    stack = [(root, 0)]
    while stack:
        sg, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise RecursionError
        for child in sg.named_children():
            kind = child.kind()
            if kind in _COMMENTS or kind in _STRING_BODIES:
                where = child.range()
                spans.append((where.start.index, where.end.index))
            if kind not in _COMMENTS:
                stack.append((child, depth + 1))
    return _blanked(source, spans)


def _blanked(source: str, spans: list[tuple[int, int]]) -> str:
    parts, position = [], 0
    for start, end in sorted(spans):
        if start < position:
            continue
        parts.append(source[position:start])
        parts.append(re.sub(r"[^\n]", " ", source[start:end]))
        position = end
    parts.append(source[position:])
    return "".join(parts)


def has_grammar(language: str) -> bool:
    """Whether blocks in `language` can be parsed."""
    return language in _GRAMMARS
