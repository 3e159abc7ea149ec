# ruff: noqa: E501  # a pattern is read whole
"""Whether a file has all calls of a function of its own, and whether a call says what others would give it too."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from server.guard.parameters import FUNCTIONS, function_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.guard.tree import Node, Tree

_METHODS = frozenset({"method_declaration", "method_definition"})
_CLASSES = frozenset({"class_definition", "class_declaration", "class", "class_specifier", "struct_specifier"})
# What is declared with one of these is called by whoever reads it; these are called as if they stood alone.
_PLAIN_DECORATOR = re.compile(
    r"(?:staticmethod|classmethod|(?:functools\.)?(?:lru_cache|cache|wraps)|(?:contextlib\.)?contextmanager|SuppressWarnings|Deprecated|"
    r"Nullable|Nonnull|NotNull|SafeVarargs|VisibleForTesting)\b"
)
_DECORATOR = re.compile(r"@([\w.]+)")
_WORD = re.compile(r"(?<![\w$])[A-Za-z_$][\w$]*(\s*\()?")
_OWNER = re.compile(r"([A-Za-z_$][\w$]*)[\w$.?]*\.\s*$")
_AS_PROGRAM = re.compile(r"\b__name__\b|\brequire\.main\b|\bimport\.meta\.main\b")
_EXPORTS = re.compile(r"\bexport\b|\bexports\b")
_PROGRAM = re.compile(r"\bint\s+main\s*\(")
_OWNER_CHARS = 100


class Callers:
    """The functions of one file, and where their names stand."""

    def __init__(self, tree: Tree, aliases: dict[str, str]) -> None:
        self._tree = tree
        self._aliases = aliases
        self._names: dict[int, tuple[str, Node]] = {}
        self._count: dict[str, int] = {}
        self._known: dict[int, bool] = {}
        self._own: dict[int, bool] = {}
        self.heard: set[int] = set()  # where the calls begin whose arguments were looked at

    def add(self, name: str, node: Node) -> None:
        """Take a function of the file."""
        self._names[node.start] = name, node
        self._count[name] = self._count.get(name, 0) + 1

    def has_all(self, start: int) -> bool:
        """Whether the function at `start` is used by calls alone, and each of them was looked at."""
        if start not in self._known:
            self._known[start] = self._has_all(start)
        return self._known[start]

    def is_own(self, start: int) -> bool:
        """Whether nobody outside of this file can call the function at `start`."""
        if start not in self._own:
            self._own[start] = self._is_own(start)
        return self._own[start]

    def _is_own(self, start: int) -> bool:
        if start not in self._names:
            return False
        name, node = self._names[start]
        language, header = self._tree.language, self._header(node)
        if language == "python":
            return (name.startswith("_") and not name.endswith("__")) or function_around(node.parent) is not None
        if language == "go":
            return name[0].islower()
        if language == "java":
            return re.search(r"\bprivate\b", header) is not None
        if language in ("c", "cpp"):
            return re.search(r"\bstatic\b", header) is not None or self.is_program
        if node.kind in _METHODS:
            return name.startswith("#") or re.search(r"\bprivate\b", header) is not None
        return _EXPORTS.search(self._tree.masked) is not None

    def is_example(self, call: Node) -> bool:
        """Whether a call stands in what is only run where the file itself is the program."""
        if not self._has_program:
            return False
        node: Node | None = call
        while node is not None:
            condition = node.kind == "if_statement" and node.kids and node.kids[0]
            if condition and _AS_PROGRAM.search(self._tree.masked, condition.start, condition.end):
                return True
            node = node.parent
        return False

    def is_of(self, start: int, callee: str) -> bool:
        """Whether `callee` can be the function at `start`: what something else has under its name is none of ours."""
        if "." not in callee or callee.startswith(("self.", "this.", "cls.")):
            return True
        node = self._names[start][1] if start in self._names else None
        return node is not None and _is_method(node)

    @cached_property
    def is_program(self) -> bool:
        """Whether a file of C is a whole program, which nobody else calls into."""
        return _PROGRAM.search(self._tree.masked) is not None

    @cached_property
    def _has_program(self) -> bool:
        return _AS_PROGRAM.search(self._tree.masked) is not None

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int, bool]]]:
        """Where the name of each function stands: its begin, its end or that of the `(` after it, and whether there is one."""
        places: dict[str, list[tuple[int, int, bool]]] = {}
        for match in _WORD.finditer(self._tree.masked):
            name = match[0].rstrip("( \t\r\n") if match[1] else match[0]
            if name in self._count:
                places.setdefault(name, []).append((match.start(), match.end(), bool(match[1])))
        return places

    @cached_property
    def _declared(self) -> set[int]:
        """Where the parameters of C's declarations begin."""
        nodes = self._tree.root.walk() if self._tree.language in ("c", "cpp") else []
        return {node.kids[-1].start for node in nodes if node.kind == "function_declarator" and node.kids}

    def _has_all(self, start: int) -> bool:
        if start not in self._names:
            return False
        name, node = self._names[start]
        if self._count[name] > 1 or self._is_handed_on(node):
            return False
        is_method = _is_method(node)
        body = node.field("body")
        begin = (
            node.parent.start if node.parent is not None and node.parent.kind == "variable_declarator" else node.start
        )
        for place, end, is_call in self._others(name, begin, body.start if body is not None else node.end):
            owner = _OWNER.search(self._tree.masked[max(0, place - _OWNER_CHARS) : place])
            if owner is not None and (owner[1] in self._aliases or not is_method):
                continue  # what an import or another value has under this name
            if (end - 1 if is_call else end) not in self.heard:
                return False
        return True

    def _others(self, name: str, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Where a name stands, but for what defines it."""
        for place in self._places.get(name, ()):
            if not begin <= place[0] < end and place[1] - 1 not in self._declared:
                yield place

    def _header(self, node: Node) -> str:
        body = node.field("body")
        return self._tree.masked[node.start : body.start if body is not None else node.end]

    def _is_handed_on(self, node: Node) -> bool:
        """Whether a function is exported, put into something, or declared to somebody who will call it."""
        header, parent = self._header(node), node.parent
        if parent is not None and parent.kind in ("decorated_definition", "class_body"):
            before = [kid for kid in parent.kids if kid.kind == "decorator" and kid.end <= node.start]
            if parent.kind == "decorated_definition":
                header = self._tree.masked[parent.start : node.start]
            elif before and before[-1].end + 40 > node.start:
                header = self._tree.masked[before[-1].start : node.start] + header
        if any(not _PLAIN_DECORATOR.match(match[1]) for match in _DECORATOR.finditer(header)):
            return True
        for _ in range(4):  # `export const name = () => …`, `{ name() {} }`, `module.exports.name = function`
            if parent is None:
                break
            if parent.kind in ("export_statement", "object", "pair", "assignment_expression", "arguments"):
                return True
            if parent.kind not in (
                "variable_declarator",
                "lexical_declaration",
                "variable_declaration",
                "parenthesized_expression",
            ):
                break
            parent = parent.parent
        return False


def _is_method(node: Node) -> bool:
    if node.kind in _METHODS:
        return True
    owner = node.parent
    while owner is not None and owner.kind not in FUNCTIONS:
        if owner.kind in _CLASSES:
            return True
        owner = owner.parent
    return False


def function_around(node: Node | None) -> Node | None:
    """Return the function that a node stands in."""
    while node is not None and node.kind not in FUNCTIONS:
        node = node.parent
    return node


def named_functions(tree: Tree) -> Iterator[tuple[str, Node]]:
    """Yield each function of the file that has a name."""
    for node in tree.root.walk():
        if node.kind in FUNCTIONS:
            name = function_name(node, tree)
            if name:
                yield name, node
