# ruff: noqa: E501  # a pattern is read whole
"""A block of code as a syntax tree, and its text without comments and without the insides of strings."""

from __future__ import annotations

import re
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
MAX_DEPTH = 220


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

    def __init__(self, source: str, language: str) -> None:
        self.source = source
        self.language = language
        self._blank: list[tuple[int, int, bool]] = []
        self.is_broken = False
        root = SgRoot(source, _GRAMMARS[language]).root()
        self.root = self._convert(root, None, 0)
        self.code = _blanked(source, [(a, b) for a, b, is_comment in self._blank if is_comment])
        self.masked = _blanked(source, [(a, b) for a, b, _ in self._blank])

    def text(self, node: Node) -> str:
        """Return the node's text without comments."""
        return self.code[node.start : node.end]

    def _convert(self, sg: SgNode, parent: Node | None, depth: int) -> Node:
        span = sg.range()
        node = Node(sg, sg.kind(), span.start.index, span.end.index, parent)
        if depth > MAX_DEPTH:
            raise RecursionError
        if node.kind == "ERROR":
            self.is_broken = True
        for child in sg.children():
            if not child.is_named():
                continue
            kind = child.kind()
            if kind in _COMMENTS:
                where = child.range()
                self._blank.append((where.start.index, where.end.index, True))
                continue
            if kind in _STRING_BODIES:
                where = child.range()
                self._blank.append((where.start.index, where.end.index, False))
            node.kids.append(self._convert(child, node, depth + 1))
        return node


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
