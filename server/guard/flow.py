# ruff: noqa: E501  # a pattern is read whole
"""Data flow within one file: values from outside, followed through assignments, calls and guards to where they harm.

Each function is walked once, statement by statement. A value carries, for every place it came from (its roots), the dangers
it still has; a sanitizer takes dangers from the value, a guard (`if x not in ALLOWED: raise`) takes them from the root.
Branches are joined. Functions of the same file are summarised: what they return of their parameters, which parameters they
check, and which of their sinks wait for a caller with a value from outside. Roots begin with `!` where the value certainly
comes from outside (a request, the command line), with `~` where it is a parameter, and with `_` where that parameter's name
says that it is no input: it is followed for what a caller gives, and is no finding by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from server.guard.aliases import aliases_of
from server.guard.callers import Callers, function_around, named_functions
from server.guard.parameters import BY_NAME, FUNCTIONS, SILENT, bound_parameters, function_name, parameters
from server.guard.rules import ALL, BITS, Language, Rule, Sink
from server.guard.syntax import (
    ANSWERS,
    ARGUMENTS,
    ASKS,
    ASSERTS,
    BUILDS,
    CALLS,
    CLEAN_PROPERTY,
    COLLECTS,
    COMPARISONS,
    COPIES,
    ESCAPES_HTML,
    ESCAPES_LDAP,
    ESCAPES_REGEX,
    FORMATS,
    HOLES,
    JOINS_PATHS,
    LITERALS,
    MAPS,
    MEMBERS,
    NAMES,
    OUT_SOURCES,
    PUT_TOGETHER,
    RAISES,
    RAISES_OUTSIDE,
    SPREADS,
    SUBSCRIPTS,
    TYPES,
    VALIDATING,
    WHOLE_FIELDS,
    exits,
    squeezed,
)
from server.guard.values import CLEAN, Value, joined, union

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from server.guard.tree import Node, Tree


# `path + ".tmp"` names as much from outside as it did; `where + " LIMIT 1"` is put together
_ENDED = ALL & ~BITS["path"]
MAX_WAITING = 256  # sinks of one function: each is looked at again wherever it is called
MAX_PUTS = 8  # of one name in one function; of more, nothing is known
MAX_STEPS = 60  # back from an argument to what it was made of
_ONE_VALUE = re.compile(r"\(?\s*[\w.$]+\s*===?\s*(?:[\"'][^\"']*[\"']|\w+)\s*\)?")
_HELD = re.compile(
    r"(?:^|\(|!|&&|\|\||\b(?:and|or|not)\b)\s*(?!and\b|or\b|not\b|true\b|false\b)([A-Za-z_]\w*)\s*(?=$|\)|;|&&|\|\||\b(?:and|or)\b)"
)
_LISTS = frozenset({"expression_list", "tuple", "array", "list"})
_LOOKS_UP = re.compile(r"\(\s*(?:this\.)?\w+::(?:get|getOrDefault|contains|containsKey)\s*\)")
_BLANKS = re.compile(r"\s+")
_HEAD = re.compile(r"\w+")
_TEXT = re.compile(r"\bchar\b|string")
_SCHEME = re.compile(r"\.(?:[sS]cheme|[pP]rotocol|get(?:Scheme|Protocol)\(\)|[pP]ort|getPort\(\)|username|password)$")
_UNKNOWN, _FIXED, _CHECKED = range(3)  # what the text of an argument tells


def _start_of(root: str) -> int:
    """Return where the function begins whose parameter `root` is, or -1."""
    start = root.rpartition("@")[2].rstrip(BY_NAME)
    return int(start) if start.isdecimal() else -1


@dataclass(slots=True)
class Summary:
    """What a function of this file does with its parameters, by the root each one was given."""

    params: list[str]
    roots: list[str]
    slots: list[tuple[int, bool]] = field(default_factory=list)  # the position, and whether a pattern takes it apart
    returned: Value = CLEAN
    cleared: dict[str, int] = field(default_factory=dict)
    pending: dict[tuple[str, str, int], tuple[str, Sink, Node]] = field(default_factory=dict)


class Flow:
    """One walk over one file; `run` returns (rule, node) for every sink that a dangerous value reaches."""

    def __init__(self, tree: Tree, language: Language) -> None:
        self._tree = tree
        self._language = language
        self._env: dict[str, Value] = {}
        self._cleared: dict[str, int] = {}
        self._returns: list[Value] = []
        self._found: dict[tuple[str, int], tuple[Rule, Node]] = {}
        self._functions: dict[str, Node] = {}
        self._summaries: dict[int, Summary | None] = {}
        self._pending: dict[tuple[str, str, int], tuple[str, Sink, Node]] = {}
        self._answered: dict[str, int] = {}
        self._doubted: dict[tuple[str, int], tuple[Sink, Node, list[str]]] = {}
        self._given: dict[tuple[str, int], set[str]] = {}
        self._puts: dict[str, list[Node | None]] = {}
        self._aliases = aliases_of(tree)
        self._fit: dict[int, dict[str, int]] = {}  # by danger: what is known of the names in `_puts`
        self._callers = Callers(tree, self._aliases)
        self._file_sources = [match for has, match in language.file_sources if has.search(tree.code)]
        self.calls: list[tuple[str, Node, Node | None]] = []

    def run(self) -> list[tuple[Rule, Node]]:
        """Walk the file."""
        for name, node in named_functions(self._tree):
            self._functions.setdefault(name, node)
            self._callers.add(name, node)
        self._visit(self._tree.root)
        for sink, node, roots in self._doubted.values():
            if self._may_come(roots, sink.danger):
                self._emit(sink.rule, node)
        return list(self._found.values())

    # --- walking -------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> Value:
        handler = _HANDLERS.get(node.kind)
        if handler is not None:
            return handler(self, node)
        if len(node.kids) == 1:
            return self._visit(node.kids[0])
        return union([self._visit(kid) for kid in node.kids])

    def _function(self, node: Node) -> Value:
        self._summarise(node)
        return CLEAN

    def _summarise(self, node: Node) -> Summary:
        known = self._summaries.get(node.start)
        if node.start in self._summaries:
            return known or Summary([], [])
        self._summaries[node.start] = None  # a recursive call sees nothing
        listed = parameters(node, self._tree)
        params = bound_parameters(node, self._tree, self._language, listed)
        summary = Summary([name for name, _ in params], [next(iter(v.roots), "") for _, v in params])
        slot, before = -1, ""
        for _, text in listed:
            apart = text.startswith("{")
            slot += not (apart and text == before)
            before = text
            summary.slots.append((slot, apart))
        outer = self._env, self._cleared, self._returns, self._pending, self._answered, self._puts, self._fit
        self._env, self._cleared, self._returns, self._pending = dict(self._env), dict(self._cleared), [], {}
        self._answered, self._puts, self._fit = {}, {}, {}
        self._env.update(params)
        body = node.field("body") or (node.kids[-1] if node.kids else None)
        if body is not None:
            value = self._visit(body)
            if node.kind in ("arrow_function", "lambda", "lambda_expression") and not body.kind.endswith(
                ("block", "compound_statement")
            ):
                self._returns.append(self._alive(value))
                self._check_return(value, body)
                self._answer(body)
        summary.returned = union(self._returns)
        shapes = {tuple(value.fields or ()) for value in self._returns}
        if len(shapes) == 1 and shapes != {()}:
            every = [value.fields for value in self._returns if value.fields]
            fields = {name: union([one[name] for one in every]) for name in every[0]}
            summary.returned = summary.returned.with_fields(fields)
        for root, mask in self._answered.items():
            self._cleared[root] = self._cleared.get(root, 0) | mask
        summary.cleared = {root: mask for root, mask in self._cleared.items() if root in summary.roots}
        summary.pending = self._pending
        self._env, self._cleared, self._returns, self._pending, self._answered, self._puts, self._fit = outer
        self._summaries[node.start] = summary
        return summary

    def _answer(self, node: Node) -> None:
        """`return x in ALLOWED` and the like: what is returned is whether a parameter is fit, so a call of it is a check."""
        while len(node.kids) == 1 and node.kind in ("parenthesized_expression", "expression_list"):
            node = node.kids[0]
        kids = node.kids
        if node.kind == "binary_expression" and len(kids) == 2:
            if self._tree.masked[kids[0].end : kids[1].start].strip() not in COMPARISONS | {"||"}:
                return
        elif node.kind in CALLS:
            if not ASKS.search(self._callee(self._tree.code[node.start : kids[-1].start] if kids else "")):
                return
        elif node.kind not in ANSWERS:
            return
        before = self._cleared
        self._cleared = {}
        self._apply_guard(node)
        for root, mask in self._cleared.items():
            self._answered[root] = self._answered.get(root, 0) | mask
        self._cleared = before

    # --- expressions ---------------------------------------------------------------------------------------------

    def _alive(self, value: Value) -> Value:
        if not self._cleared or not value.roots:
            return value
        roots = {r: m & ~self._cleared.get(r, 0) for r, m in value.roots.items()}
        fields = value.fields and {name: self._alive(part) for name, part in value.fields.items()}
        return Value({r: m for r, m in roots.items() if m}, built=value.built, canonical=value.canonical, fields=fields)

    def _name(self, node: Node) -> Value:
        text = self._tree.text(node)
        value = self._env.get(text)
        if value is not None:
            return value
        return self._source_value(text) or CLEAN

    def _source_value(self, text: str) -> Value | None:
        language = self._language
        if language.sources is not None and language.sources.search(text):
            return Value({"!" + text: self._dangers(text)})
        if any(sources.search(text) for sources in self._file_sources):
            return Value({"!" + text: ALL})
        if language.weak_sources is not None and language.weak_sources.search(text):
            return Value({"~" + text: ALL})
        return None

    def _dangers(self, source: str) -> int:
        return next((mask for pattern, mask in self._language.source_dangers if pattern.search(source)), ALL)

    def _member(self, node: Node) -> Value:
        text = squeezed(self._tree.text(node))
        known = self._env.get(text)
        if known is not None:
            return known
        found = self._source_value(text)
        if found is not None:
            return found
        base = self._visit(node.kids[0]) if node.kids else CLEAN
        if node.kind in SUBSCRIPTS:
            index = union([self._visit(kid) for kid in node.kids[1:]])
            drawn = index.without(ALL)  # `letters[i]` is as random as `i`
            return union([base, drawn]) if drawn.roots else base
        if not base.roots:
            return base
        if CLEAN_PROPERTY.search(text):
            return base.without(ALL & ~BITS["size"])
        return base.part(text.rsplit(".", 1)[-1], BITS["fields"])

    def _object(self, node: Node) -> Value:
        values = [self._visit(kid) for kid in node.kids]
        whole = union(values)
        if not whole.roots:
            return CLEAN
        fields = {}
        for kid, value in zip(node.kids, values, strict=True):
            if kid.kind in NAMES:
                fields[self._tree.text(kid)] = value
            elif kid.kind == "pair" and kid.kids:
                fields[self._tree.text(kid.kids[0]).strip("\"'")] = value
        return whole.with_fields(fields)

    def _string(self, node: Node) -> Value:
        holes = [kid for kid in node.kids if kid.kind in HOLES]
        values = [self._visit(kid) for kid in holes]
        if node.kind == "concatenated_string":
            values = [self._visit(kid) for kid in node.kids]
        elif values and values[0].roots and not any(value.roots for value in values[1:]):
            before = self._tree.code[node.start : holes[0].start]
            if not before.rstrip("\"'`").strip("fFrRbB"):  # f"{path}.tmp"
                return union(values, built=_ENDED)
        return union(values, built=ALL) if values else CLEAN

    def _binary(self, node: Node) -> Value:
        values = [self._visit(kid) for kid in node.kids]
        if len(node.kids) == 2:
            operator = self._tree.masked[node.kids[0].end : node.kids[1].start].strip()
            if operator in COMPARISONS:
                return CLEAN
            if operator in ("+", "%", "||", "/", "..", "+=", "<<"):
                if operator == "<<" and self._tree.language == "cpp" and len(node.kids) == 2 and values[1].roots:
                    left = node.kids[0]
                    while left.kind == "binary_expression" and left.kids:
                        left = left.kids[0]
                    self._env[self._tree.text(left)] = union(values, built=ALL)  # a text stream takes what it is given
                joins = operator != "||" and (operator != "/" or self._tree.language in ("python", "cpp"))
                built = ALL if joins else 0
                if operator == "/" and not values[1].roots:
                    built = 0  # a folder from outside with a name of our own under it
                if operator == "+" and not values[1].roots:
                    built = _ENDED
                return union(values, built=built)
        return union(values)

    def _ternary(self, node: Node) -> Value:
        kids = node.kids
        if len(kids) != 3:
            return union([self._visit(kid) for kid in kids])
        body, cond, other = kids if self._tree.language == "python" else (kids[1], kids[0], kids[2])
        self._visit(cond)
        cleared = dict(self._cleared)
        rest = None
        if _ONE_VALUE.fullmatch(self._tree.text(cond)):  # `x == "/" ? "index" : x`: the last is still anything
            rest = self._alive(self._visit(other))
        self._apply_guard(cond)
        value = self._alive(self._visit(body))
        value = union([value, self._alive(self._visit(other)) if rest is None else rest])
        self._cleared = cleared
        return value

    def _call(self, node: Node) -> Value:
        tree = self._tree
        arguments = next((kid for kid in reversed(node.kids) if kid.kind in ARGUMENTS), None)
        if arguments is None:
            for kid in node.kids:
                self._visit(kid)
            if node.first("template_string") is not None:
                return CLEAN  # a tagged template: the tag gets the values apart from the text
            return CLEAN
        callee = self._callee(tree.code[node.start : arguments.start])
        function = node.kids[0]
        receiver = CLEAN
        if function is not arguments and node.kind != "object_creation_expression":
            if tree.language == "java":
                owner = node.field("object")
                receiver = self._visit(owner) if owner is not None else CLEAN
            elif function.kind in MEMBERS and function.kids:
                receiver = self._visit(function.kids[0])
                known = self._env.get(squeezed(tree.text(function.kids[0])))
                receiver = known if known is not None and not receiver.roots else receiver
            elif function.kind not in NAMES:
                receiver = self._visit(function)
        positional: list[Value] = []
        named: dict[str, Value] = {}
        callbacks: list[Node] = []
        for arg in arguments.kids:
            if arg.kind == "keyword_argument" and len(arg.kids) == 2:
                named[tree.text(arg.kids[0])] = self._visit(arg.kids[1])
            elif arg.kind in FUNCTIONS:
                callbacks.append(arg)
                positional.append(CLEAN)
            else:
                positional.append(self._visit(arg))
        if callee == "new URL" and len(positional) == 2:
            positional[1] = positional[1].without(BITS["redirect"])  # the address that the request came to
        every = [*positional, *named.values()]
        if callee not in self._functions:  # a function of this file is not the library's of the same name
            self.calls.append((callee, node, arguments))
        is_source, is_weak, cleans, propagates, canonical, sinks = self._language.called[callee]
        elements = union(positional) if callee == "Array.from" else receiver
        if is_source and callbacks:  # what a socket hands to a function
            elements = Value({"!" + callee: self._dangers(callee)})
        mapped = union([self._callback(callback, elements) for callback in callbacks])
        if callbacks and callee.endswith(".filter"):
            receiver = self._kept(callbacks[0], receiver)
        if callee not in self._functions:
            for sink in sinks:
                self._check_call(sink, node, receiver, positional, named)
        self._copy_out(callee, arguments, positional, receiver)
        self._collect(callee, every)
        if arguments.kids and ASSERTS.search(callee) and self._asserts(node, callee):
            self._apply_guard(arguments.kids[0])
        if is_source or is_weak:
            text = squeezed(tree.text(node))
            harmless = self._language.harmless_sources
            if harmless is not None and harmless.search(tree.text(node)):
                return CLEAN
            root = ("!" if is_source else "~") + _BLANKS.sub("", tree.text(node))  # each field it was asked for is one
            return Value({root: self._dangers(text) if is_source else ALL}).without(cleans)
        local = self._functions.get(re.split(r"\.|::|->", callee)[-1].removeprefix("new "))
        if local is not None and "." in callee and self._aliases:
            head = _HEAD.match(tree.code, node.start)
            if head is not None and head[0] in self._aliases:
                local = None  # what an import brought: `subprocess.run` is no `run` of ours
        if local is not None and local.start in self._summaries and self._summaries[local.start] is None:
            local = None  # within itself: `root.resolve(name)` in a `resolve` of ours is the library's
        if callee == "map" and len(arguments.kids) > 1 and tree.language == "python":
            return self._mapped(self._callee(tree.text(arguments.kids[0])), positional[1:], arguments.kids)
        if callbacks and MAPS.search(callee):
            return mapped  # what the function makes of each element, whatever the elements are
        if callee.endswith((".map", ".filter")) and _LOOKS_UP.fullmatch(tree.text(arguments)):
            return CLEAN  # `.map(COLUMNS::get)`: what a table of ours has, or nothing
        owner_name, _, method = callee.rpartition(".")
        if method in ("get", "getOrDefault") and not receiver.roots and owner_name in self._env:
            return CLEAN  # what a table of this file has under that name
        if tree.enumerations and callee.removeprefix("new ") in tree.enumerations:
            return CLEAN
        if callee.endswith((".replace", ".replaceAll")) and receiver.roots:
            text = tree.text(arguments)
            cleans |= BITS["regex"] if ESCAPES_REGEX.search(text) else 0
            cleans |= BITS["html"] if ESCAPES_HTML.search(text) else 0
        if cleans:
            if local is not None:
                self._apply_local(local, callee, positional, named, arguments)  # for what it checks
                cleans |= BITS["ldap"] if ESCAPES_LDAP.search(tree.text(local)) else 0
                cleans |= BITS["html"] if ESCAPES_HTML.search(tree.text(local)) else 0
            return union([receiver, *every]).without(cleans)
        if local is not None and not callee.startswith("new "):
            result = self._apply_local(local, callee, positional, named, arguments)
            if result.roots and ESCAPES_HTML.search(tree.text(local)):  # a function that writes entities escapes
                result = result.without(BITS["html"])
            if result.roots and ESCAPES_LDAP.search(tree.text(local)):
                result = result.without(BITS["ldap"])
            return result
        if RAISES_OUTSIDE.search(callee):
            self._clear(receiver, BITS["path"])
        if VALIDATING.search(callee) and local is None:
            for value in every:
                self._clear(value, ALL & ~BITS["size"])
        joined = bool(FORMATS.search(callee))
        under = any(mask & BITS["path"] for value in every[1:] for mask in value.roots.values())
        if joined and JOINS_PATHS.search(callee) and not under and not receiver.roots:
            joined = False  # a folder from outside with a name of our own under it
        if receiver.roots:
            value = union([receiver, *every] if joined or propagates else [receiver], built=ALL if joined else 0)
        elif propagates or joined or "." not in callee or callee.startswith("new "):
            value = union(every, built=ALL if joined else 0)
        else:
            value = CLEAN
        if canonical and value.roots:
            value = Value(value.roots, built=value.built, canonical=True)
        return value

    def _asserts(self, node: Node, callee: str) -> bool:
        """Whether what the file calls like an assertion is one."""
        if self._tree.language in ("c", "cpp"):  # a build may leave it out
            return False
        local = self._functions.get(callee)
        if local is not None:
            return RAISES.search(self._tree.masked[local.start : local.end]) is not None
        head = _HEAD.match(self._tree.code, node.start)
        if head is None or callee.endswith(("ctx.assert", "context.assert")):  # a framework hands these in
            return head is not None
        return head[0] not in self._env or head[0] in self._aliases

    def _mapped(self, callee: str, values: list[Value], nodes: list[Node]) -> Value:
        """Python's `map(function, values)`: what the function makes of each value."""
        cleans = self._language.called[callee][2]
        local = self._functions.get(callee)
        if local is None or cleans:
            return union(values).without(cleans)
        known = local.start in self._summaries and self._summaries[local.start] is None
        if known:
            return union(values)
        self._callers.heard.add(nodes[0].end)
        return self._apply_summary(self._summarise(local), values, {}, nodes[1:], is_told=False)

    def _apply_local(
        self, local: Node, callee: str, positional: list[Value], named: dict[str, Value], arguments: Node
    ) -> Value:
        """Apply what is known of a function of this file where it is called."""
        callers = self._callers
        callers.heard.add(arguments.start)
        is_told = callers.is_of(local.start, callee) and not callers.is_example(arguments)
        nodes = [kid for kid in arguments.kids if kid.kind != "keyword_argument"]
        return self._apply_summary(self._summarise(local), positional, named, nodes, is_told=is_told)

    def _callback(self, node: Node, receiver: Value) -> Value:
        """Walk a function that is handed to a call; its parameters are elements of what it is called on. Return its result."""
        params = parameters(node, self._tree)
        language = self._language
        names = [name for name, _ in params]
        if language.handler is not None and language.handler.search(self._tree.code[node.start : node.start + 200]):
            self._summarise(node)
            return CLEAN
        saved = self._env
        self._env = dict(self._env)
        for name in names:
            self._env[name] = receiver if receiver.roots else CLEAN
            self._put(name, None)
            if language.sources is not None and language.sources.search(name):
                self._env.pop(name)
        returns, self._returns = self._returns, []
        body = node.field("body") or (node.kids[-1] if node.kids else None)
        value = self._visit(body) if body is not None else CLEAN
        result = union([self._alive(value), *self._returns])
        self._returns = returns
        changed = {k: v for k, v in self._env.items() if k not in names and k in saved}
        self._env = saved
        self._env.update(changed)
        return result

    def _kept(self, node: Node, receiver: Value) -> Value:
        """Return what `filter` leaves of a value: what its function checks of an element holds for the rest."""
        body = node.field("body")
        if body is None or not receiver.roots or "!" in self._tree.text(body):
            return receiver
        saved = self._env, self._cleared
        self._env, self._cleared = (
            {**self._env, **dict.fromkeys((n for n, _ in parameters(node, self._tree)), receiver)},
            {},
        )
        self._apply_guard(body)
        kept = self._alive(receiver)
        self._env, self._cleared = saved
        return kept

    def _apply_summary(
        self,
        summary: Summary,
        positional: list[Value],
        named: dict[str, Value],
        arguments: list[Node],
        *,
        is_told: bool,
    ) -> Value:
        """Return what a function makes of what it is given; `is_told`: the call says what this function is given."""
        given: dict[str, Value] = {}
        nodes: dict[str, Node] = {}
        names = summary.params
        offset = 1 if names[:1] in (["self"], ["cls"], ["this"]) else 0
        for name, root, (slot, apart) in zip(names, summary.roots, summary.slots, strict=False):
            if offset <= slot < len(positional) + offset:
                value = positional[slot - offset]
                given[root] = value.part(name, BITS["fields"]) if apart else value
                nodes[root] = arguments[slot - offset]
        for name, value in named.items():
            if name in names:
                given[summary.roots[names.index(name)]] = value
        for root, mask in summary.cleared.items():
            if root in given:
                self._clear(given[root], mask)
        alive = {root: self._alive(value) for root, value in given.items() if value.roots}
        noted: set[tuple[str, int]] = set()
        is_spread = any(node.kind in SPREADS for node in arguments)
        for root, sink, where in summary.pending.values():
            value = alive.get(root, CLEAN)
            if is_spread and not value.roots:  # which of them is what, nobody knows
                self._given.setdefault((root, sink.danger), set()).add("")
            elif root in given and (root, sink.danger) not in noted:
                noted.add((root, sink.danger))
                self._note(root, sink.danger, value, given[root], nodes.get(root), is_told=is_told)
            if not value.roots:
                continue
            doubted = (
                not sink.strong
                and (value.built & sink.danger or not sink.built)
                and self._is_only_called_here(where, {root})
            )
            if any(
                (r.startswith("!") or (doubted and not r.startswith(SILENT))) and m & sink.danger
                for r, m in value.roots.items()
            ):
                self._emit(sink.rule, where)
            else:  # a caller's caller may give it
                self._wait([r for r, m in value.roots.items() if m & sink.danger], sink, where)

        def returned(made: Value) -> Value:
            parts = []
            for root, mask in made.roots.items():
                if root in given:
                    parts.append(given[root].without(ALL & ~mask))
                elif root.startswith("!") and "@" not in root:
                    parts.append(Value({root: mask}))
            value = union(parts, built=made.built)
            if not made.fields or not value.roots:
                return value
            fields = {name: returned(part) for name, part in made.fields.items()}
            return value.with_fields(fields)

        return returned(summary.returned)

    def _copy_out(self, callee: str, arguments: Node, positional: list[Value], receiver: Value) -> None:
        if self._tree.language in ("c", "cpp") and COPIES.search(callee) and len(positional) > 1:
            target = self._tree.text(arguments.kids[0]).lstrip("&(* ").split("[")[0].split("+")[0].strip()
            old = self._env.get(target, CLEAN) if "cat" in callee else CLEAN
            self._put(target, None)
            self._env[target] = union([old, *positional[1:]], built=ALL if re.search("printf|cat", callee) else 0)
        elif callee in OUT_SOURCES or re.search(
            r"(?:\.|^)(?:Decode|Bind\w*|ShouldBind\w*|BodyParser|Unmarshal|ReadJSON|Scan\w*|Fscan\w*)$", callee
        ):
            if self._tree.language not in ("c", "cpp", "go"):
                return
            index = OUT_SOURCES.get(callee)
            targets = (
                arguments.kids if index is None else arguments.kids[index : index + (9 if "scan" in callee else 1)]
            )
            for kid in targets:
                text = self._tree.text(kid).lstrip("&(* ").split("[")[0].split("+")[0].strip()
                outside = (
                    self._tree.language != "go"
                    or any(root.startswith("!") for root in receiver.roots)
                    or re.search(
                        r"Bind|BodyParser|Body\b|Scan|ReadJSON", self._tree.text(arguments.parent or arguments)
                    )
                )
                if re.fullmatch(r"[\w.>-]+", text) and outside:
                    self._env[text] = Value({f"!{text}@{arguments.start}": ALL})

    def _collect(self, callee: str, values: list[Value]) -> None:
        """`parts.append(value)` and the like: what is put in, the collection or the text under construction has."""
        match = COLLECTS.match(callee)
        given = union(values)
        if match is None or not given.roots:
            return
        name = match[1]
        own = self._env.get(name)
        if own is not None:
            self._env[name] = union([own, given], built=ALL if match[2] in BUILDS else given.built)

    def _callee(self, text: str) -> str:
        callee = squeezed(text)
        head = re.match(r"\w+", callee)
        if head and head[0] in self._aliases:
            callee = self._aliases[head[0]] + callee[head.end() :]
        return callee

    # --- sinks ---------------------------------------------------------------------------------------------------

    def _check_call(
        self, sink: Sink, node: Node, receiver: Value, positional: list[Value], named: dict[str, Value]
    ) -> None:
        if sink.receiver:
            values = [receiver]
        elif sink.args:
            values = [positional[a] for a in sink.args if isinstance(a, int) and a < len(positional)]
            values += [named[a] for a in sink.args if isinstance(a, str) and a in named]
        else:
            values = [*positional, *named.values()]
        text = None
        for value in values:
            if not value.roots:
                continue
            if text is None:
                text = self._tree.text(node)
                if (sink.when and not sink.when.search(text)) or (sink.unless and sink.unless.search(text)):
                    return
            self._check(sink, value, node)

    def _check(self, sink: Sink, value: Value, node: Node) -> None:
        alive = [root for root, mask in self._alive(value).roots.items() if mask & sink.danger]
        if not alive:
            return
        if sink.unless_function is not None and sink.unless_function.search(self._scope_text(node)):
            return
        if sink.when_function is not None and not sink.when_function.search(self._scope_text(node)):
            return
        if sink.unless_file is not None and sink.unless_file.search(self._tree.code):
            return
        if sink.when_file is not None and not sink.when_file.search(self._tree.code):
            return
        strong = any(root.startswith("!") and not self._doubtful(root, sink, value, node) for root in alive)
        silent = all(root.startswith(SILENT) for root in alive)
        if not strong and (
            silent
            or sink.strong
            or (sink.built and not value.built & sink.danger)
            or self._is_only_called_here(node, alive)
        ):
            is_built = value.built & sink.danger  # here, if not by the caller
            self._wait(alive, replace(sink, built=False) if is_built else sink, node)
            return
        if strong:
            self._emit(sink.rule, node)
            return
        self._wait(alive, sink, node)
        self._doubted.setdefault((sink.rule.id, node.start), (sink, node, alive))

    def _note(self, root: str, danger: int, value: Value, given: Value, node: Node | None, *, is_told: bool) -> None:
        """Keep what a call gives the weak `root`: whose values these are, that they are fit, or that nothing is known."""
        harmful = [r for r, m in value.roots.items() if m & danger]
        fitness = _CHECKED if given.roots else self._fitness(node, danger) if node is not None else _UNKNOWN
        if not harmful and fitness == _FIXED:  # `archive("/tmp/x")` shows how it is called: others call it with more
            start = _start_of(root)
            is_told = is_told and self._callers.is_own(start) and function_around(node) is not None
        if harmful or fitness == _UNKNOWN or is_told:
            givers = self._given.setdefault((root, danger), set())
            givers.update(harmful)
            if not harmful and fitness == _UNKNOWN:
                givers.add("")

    def _fitness(self, node: Node, danger: int, depth: int = 0) -> int:
        """Whether the text says that this is no input: a literal or a constant; of a table of ours, or what a check returned."""
        tree, kids = self._tree, node.kids
        if depth > MAX_STEPS:
            return _UNKNOWN
        if node.kind in NAMES:
            name = tree.text(node)
            known = self._fit.setdefault(danger, {})
            if name not in known:
                puts = self._puts.get(name, ())
                known[name] = _FIXED if name.isupper() else _UNKNOWN
                if puts and not name.isupper():
                    known[name] = min(
                        self._fitness(put, danger, depth + 1) if put is not None else _UNKNOWN for put in puts
                    )
            return known[name]
        if node.kind in ("ternary_expression", "conditional_expression") and len(kids) == 3:
            ends = (kids[0], kids[2]) if tree.language == "python" else kids[1:]
            return _CHECKED if all(self._fitness(kid, danger, depth + 1) for kid in ends) else _UNKNOWN
        if node.kind in CALLS:
            callee = self._callee(tree.text(node).split("(", 1)[0])
            local = self._functions.get(re.split(r"\.|::|->", callee)[-1])
            if local is None:
                return _CHECKED if self._language.called[callee][2] & danger else _UNKNOWN
            summary = self._summaries.get(local.start)
            if summary is None or not summary.params:
                return _UNKNOWN
            return _UNKNOWN if any(mask & danger for mask in summary.returned.roots.values()) else _CHECKED
        if node.kind in SUBSCRIPTS:
            return _CHECKED if kids and tree.text(kids[0]).isupper() else _UNKNOWN
        if node.kind in LITERALS:
            kids = [kid for kid in kids if kid.kind in HOLES]
        elif node.kind not in PUT_TOGETHER:
            return _UNKNOWN
        parts = [self._fitness(kid, danger, depth + 1) for kid in kids]
        return max(parts, default=_FIXED) if all(parts) else _UNKNOWN

    def _may_come(self, roots: list[str], danger: int) -> bool:
        """Whether one of the weak `roots` may come with `danger`: not where the file has all calls, and all give what is fit."""
        seen, waiting = set(roots), list(roots)
        while waiting:
            root = waiting.pop()
            givers = self._given.get((root, danger))
            if givers is None or not self._callers.has_all(_start_of(root)):  # somebody elsewhere gives it
                return True
            waiting += givers - seen
            seen |= givers
        return False

    def _wait(self, roots: list[str], sink: Sink, node: Node) -> None:
        """Keep a sink until a caller of this function gives something from outside."""
        if len(self._pending) < MAX_WAITING:
            self._pending.update({(root, sink.rule.id, node.start): (root, sink, node) for root in roots})

    def _doubtful(self, root: str, sink: Sink, value: Value, node: Node) -> bool:
        """Whether a root is strong by a parameter's name alone, and that is too little here.

        `open(filename)` is what a file name is for; it takes a folder before it to leave one. And what any function returns
        is no page. `log(format, ...)` hands its format on: whoever calls it may have made that of input.
        """
        if not root.endswith(BY_NAME):
            return False
        if sink.danger == BITS["format"] and "va_" in self._scope_text(node):
            return True
        if sink.danger == BITS["header"] and root.startswith(("!body@", "!html@", "!payload@")):
            return True
        return (sink.danger == BITS["path"] and not value.built & sink.danger) or (
            sink.danger == BITS["html"] and sink.call is None
        )

    def _is_only_called_here(self, node: Node, roots: Iterable[str]) -> bool:
        """Whether `roots` are texts that a function of C around `node` gets, and this file has all calls of it.

        It has them of a `static` function, and of all where the file is a whole program.
        """
        if self._tree.language not in ("c", "cpp"):
            return False
        scope = function_around(node)
        if scope is None:
            return False
        is_static = re.match(r"(?:inline\s+)?static\b", self._tree.code[scope.start : scope.start + 20])
        if not is_static and (not self._callers.is_program or re.search(r">>\s*[A-Za-z_]", self._tree.masked)):
            return False  # what `std::cin >> name` brings is not followed
        texts = {f"{name}@{scope.start}" for name, text in parameters(scope, self._tree) if _TEXT.search(text)}
        if not all(root.strip("!~_?") in texts for root in roots):
            return False
        name = function_name(scope, self._tree)
        return name is not None and len(re.findall(rf"\b{re.escape(name)}\s*\(", self._tree.masked)) > 1

    def _scope_text(self, node: Node) -> str:
        scope = function_around(node)
        if scope is not None and scope.parent is not None and scope.parent.kind == "decorated_definition":
            scope = scope.parent
        return self._tree.text(scope) if scope is not None else self._tree.code

    def _emit(self, rule: Rule, node: Node) -> None:
        self._found.setdefault((rule.id, node.start), (rule, node))

    # --- statements ----------------------------------------------------------------------------------------------

    def _assign(self, node: Node) -> Value:
        kids = [kid for kid in node.kids if kid.kind not in TYPES]
        if not kids:
            return CLEAN
        if len(kids) == 1:
            if node.kind in ("variable_declarator", "init_declarator", "var_spec") and kids[0].kind in NAMES:
                self._env[self._tree.text(kids[0])] = CLEAN
                return CLEAN
            return self._visit(kids[0])
        right = node.field("right") or node.field("value") or kids[-1]
        left = node.field("left") or node.field("declarator") or node.field("name") or kids[0]
        value = self._alive(self._visit(right))  # what was checked here, stays checked where the ways meet again
        if right.kind == "argument_list" and node.parent is not None:  # C++: `std::ifstream in(path);` is a call too
            made = node.parent.field("type")
            for sink in self._language.called[squeezed(self._tree.text(made))][-1] if made is not None else ():
                self._check_call(sink, node, CLEAN, [self._visit(kid) for kid in right.kids], {})
        gap = self._tree.masked[left.end : right.start]
        if node.kind.startswith("augmented") or re.search(r"[+.|]=", gap):
            value = union([self._visit(left), value], built=ALL)
        self._bind(left, value, right)
        self._check_target(self._tree.text(left), value, node)
        return value

    def _declaration(self, node: Node) -> Value:
        """C++: `std::ifstream in(path, std::ios::binary);` reads as the declaration of a function, and is a call."""
        if node.parent is not None and node.parent.kind == "condition_clause" and node.field("value") is not None:
            return self._assign(node)  # `if (auto found = look(name))`
        declared = node.first("function_declarator")
        made = node.field("type") if declared is not None else None
        if made is None or declared is None or node.parent is None or node.parent.kind != "compound_statement":
            return union([self._visit(kid) for kid in node.kids])
        listing = declared.field("parameters")
        values = [self._env.get(self._tree.text(kid), CLEAN) for kid in listing.kids] if listing is not None else []
        for sink in self._language.called[squeezed(self._tree.text(made))][-1]:
            self._check_call(sink, node, CLEAN, values, {})
        return CLEAN

    def _bind(self, left: Node, value: Value, right: Node | None = None) -> None:
        kind = left.kind
        if kind in ("expression_list", "pattern_list", "tuple_pattern", "list_pattern", "array_pattern"):
            values = [value.part(str(place), 0) for place in range(len(left.kids))]
            if right is not None and right.kind in _LISTS and len(right.kids) == len(left.kids):
                values = [self._visit(kid) for kid in right.kids]
            for kid, part in zip(left.kids, values, strict=True):
                self._bind(kid, part)
            return
        if kind in (
            "object_pattern",
            "pair_pattern",
            "rest_pattern",
            "object_assignment_pattern",
            "assignment_pattern",
        ):
            for kid in left.kids:
                if kind == "object_pattern" and kid.kind != "rest_pattern" and value.roots:
                    name = kid.kids[0] if kid.kids else kid
                    self._bind(kid, value.part(self._tree.text(name), BITS["fields"]))
                elif kid.kind != "property_identifier":
                    self._bind(kid, value)
            return
        text = squeezed(self._tree.text(left)).lstrip("*&")
        text = (
            text.split("[")[0] if kind in ("array_declarator", "pointer_declarator", "subscript_expression") else text
        )
        if kind in SUBSCRIPTS or kind == "subscript_expression":
            base = squeezed(self._tree.text(left.kids[0])) if left.kids else text
            self._env[base] = union([self._env.get(base, CLEAN), value])
            self._put(base, None)
        else:
            self._env[text] = value
            self._put(text, right)

    def _put(self, name: str, right: Node | None) -> None:
        """Keep what a name is set to; None: something of which the text tells nothing."""
        puts = self._puts.setdefault(name, [])
        if any(name in known for known in self._fit.values()):
            self._fit = {}
        if right not in puts:
            puts.append(right if len(puts) < MAX_PUTS else None)
        if puts[-1] is None:
            puts[:] = [None]

    def _check_target(self, target: str, value: Value, node: Node) -> None:
        if not value.roots:
            return
        for sink in self._language.assigned[squeezed(target)]:
            text = self._tree.text(node)
            if not (sink.when and not sink.when.search(text)) and not (sink.unless and sink.unless.search(text)):
                self._check(sink, value, node)

    def _check_return(self, value: Value, node: Node) -> None:
        """What is returned is checked as `return`, and as `return:NAME` of its function."""
        if not value.roots:
            return
        owner = function_around(node.parent)
        if node.kind in ("return_statement", "yield", "throw_statement"):
            self._check_target("return", value, node)
        self._check_target(f"return:{function_name(owner, self._tree) if owner is not None else None}", value, node)

    def _pair(self, node: Node) -> Value:
        if len(node.kids) != 2:
            return union([self._visit(kid) for kid in node.kids])
        value = self._visit(node.kids[1])
        target = "key:" + self._tree.text(node.kids[0]).strip("\"'")
        self._check_target(target, value, node)
        return value if not value.roots or WHOLE_FIELDS.search(target) else value.part("", BITS["fields"])

    def _if(self, node: Node) -> Value:
        body = node.field("consequence") or node.field("body")
        cond = node.field("condition")
        first = next((kid for kid in node.kids if kid is not body), None)
        for kid in node.kids:  # `if x := f(); cond` and the like
            if (
                kid is not body
                and kid is not cond
                and kid.kind.endswith(("declaration", "statement"))
                and kid.start < (cond or node).start
            ):
                self._visit(kid)
        cond = cond or first
        if cond is not None:
            self._visit(cond)
        env, cleared = self._env, self._cleared
        self._env, self._cleared = dict(env), dict(cleared)
        negated = cond is not None and re.search(
            r"!(?!=)|\bnot\b|==\s*(?:false|-1|NULL|nil|None)|<\s*0|!=", self._tree.code[cond.start : cond.end]
        )
        if cond is not None:
            self._apply_guard(cond, node)
        guarded = self._cleared
        if negated:
            self._cleared = dict(cleared)
        if body is not None:
            self._visit(body)
        leaves = body is not None and exits(self._tree, body)
        after_body = self._env, self._cleared
        checked = {root for root, mask in guarded.items() if mask != cleared.get(root, 0)}
        replaces = any(  # `if bad(x): x = DEFAULT` leaves x as checked as an exit would
            checked & value.roots.keys() and not checked & after_body[0].get(name, CLEAN).roots.keys()
            for name, value in env.items()
            if checked
        )
        self._env, self._cleared = dict(env), dict(guarded) if leaves or negated or replaces else dict(cleared)
        others = [kid for kid in node.kids if body is not None and kid.start >= body.end]
        for kid in others:
            self._visit(kid)
        if not leaves:
            self._env = joined(self._env, after_body[0])
            self._cleared = (
                {r: m & after_body[1].get(r, 0) for r, m in self._cleared.items()} if not negated else self._cleared
            )
        elif others and all(exits(self._tree, kid) for kid in others):
            self._env, self._cleared = after_body
        return CLEAN

    def _apply_guard(self, cond: Node, node: Node | None = None) -> None:
        """Take from the roots what the condition has checked."""
        text = self._tree.code[cond.start : cond.end]
        if node is not None and self._tree.language == "go":
            text = self._tree.code[node.start : cond.end]
            previous = self._tree.code[max(0, node.start - 300) : node.start]
            if re.search(r"\b(?:ok|found|allowed|exists|valid|known|matched)\b", text):
                text = previous.rsplit("\n\n", 1)[-1] + text
        if (
            re.search(r"\b(?:is_?[a-z_]*(?:valid|allowed|safe|ok|matched|member)|valid|allowed|ok|found|safe)\b", text)
            and node is not None
        ):
            start = max(0, node.start - 240)
            text = (
                self._tree.code[start : node.start].rsplit("\n", 3)[-2:][0] + "\n" + text if "(" not in text else text
            )
        for held in list(_HELD.finditer(text))[:4]:  # the check stands in a variable: what was put there counts
            before = self._tree.code[max(0, cond.start - 1500) : cond.start]
            puts = list(
                re.finditer(
                    rf"\b{held[1]}\s*(?::\s*\w+\s*)?:?=(?!=)([^;{{}}]{{0,300}}?)(?:;|\n(?!\s*(?:&&|\|\||and\b|or\b|\?|:)))",
                    before,
                )
            )
            text += " ; " + puts[-1][1] if puts else ""
        text = text.replace("?.", ".")
        for pattern, mask in self._language.validators:
            for match in pattern.finditer(text):
                if not match.groupdict().get("v"):
                    continue
                checked = squeezed(match["v"])
                base = re.match(r"[\w$]+", match["v"].lstrip("*&!( "))
                value = (
                    self._env.get(checked) or self._source_value(checked) or (self._env.get(base[0]) if base else None)
                )
                if value is None or not value.roots:
                    continue
                if "canonical" in pattern.groupindex and not value.canonical:
                    continue
                if _SCHEME.search(checked):  # says how a server is asked, not which
                    self._clear(value, mask & (BITS["redirect"] | BITS["html"]))
                    continue
                folder = match.groupdict().get("base")
                if folder and not self._ends_with_separator(folder):
                    continue
                self._clear(value, mask)

    def _ends_with_separator(self, name: str) -> bool:
        """Whether `name` is set to a text that ends with a path separator: `/srv/data` also begins `/srv/data-old`."""
        pattern = rf"\b{re.escape(name.split('.')[-1])}\s*(?::[^=\n]+)?:?=[^\n]*(?:[sS]ep(?:arator(?:Char)?)?\b|/[\"'`])\s*\)*\s*;?\s*$"
        if re.search(pattern, self._tree.code, re.MULTILINE) is not None:
            return True
        # Java's Path compares whole names
        return (
            self._tree.language == "java" and re.search(rf"\bPath\s+{re.escape(name)}\b", self._tree.code) is not None
        )

    def _clear(self, value: Value, mask: int) -> None:
        for root in value.roots:
            self._cleared[root] = self._cleared.get(root, 0) | mask

    def _loop(self, node: Node) -> Value:
        left, right, body = (
            node.field("left") or node.field("name") or self._each(node),
            node.field("right") or node.field("value"),
            node.field("body"),
        )
        if left is None or right is None:
            for kid in node.kids:
                if kid.kind == "range_clause" and len(kid.kids) == 2:
                    self._bind(kid.kids[0], self._visit(kid.kids[1]))
                elif kid.kind == "parenthesized_expression":
                    self._visit(kid)
                else:
                    self._visit(kid)
            return CLEAN
        self._bind(left, self._visit(right))
        before = dict(self._env)
        if body is not None:
            self._visit(body)
        for kid in node.kids:
            if body is not None and kid.start >= body.end:
                self._visit(kid)
        self._env = joined(before, self._env)
        return CLEAN

    def _each(self, node: Node) -> Node | None:
        """C++: what `for (auto& x : all)` names; a text that is gone through letter by letter is being cleaned, mostly."""
        kind = node.field("type")
        if kind is None or self._tree.text(kind).endswith("char"):
            return None
        declared = node.field("declarator")
        while declared is not None and declared.kind not in NAMES and declared.kids:
            declared = declared.kids[-1]
        return None if declared is not None and self._tree.text(declared) in ("c", "ch", "b") else declared

    def _comprehension(self, node: Node) -> Value:
        saved = dict(self._env)
        for kid in node.kids[1:]:
            if kid.kind == "for_in_clause" and len(kid.kids) >= 2:
                self._bind(kid.kids[0], self._visit(kid.kids[1]))
            elif kid.kind == "if_clause":
                self._visit(kid)
                self._apply_guard(kid)
        value = self._alive(self._visit(node.kids[0])) if node.kids else CLEAN
        self._env = saved
        return value

    def _as(self, node: Node) -> Value:
        value = self._visit(node.kids[0])
        if len(node.kids) > 1:
            target = node.kids[1].kids[0] if node.kids[1].kids else node.kids[1]
            self._env[self._tree.text(target)] = value
            self._put(self._tree.text(target), None)
        return value

    def _return(self, node: Node) -> Value:
        several = node.kids[0] if len(node.kids) == 1 and node.kids[0].kind in _LISTS else node
        values = [self._visit(kid) for kid in several.kids]
        value = union(values)
        if len(values) > 1:  # `return sql, arguments`: a tuple's places are its fields
            fields = {str(place): part for place, part in enumerate(values)}
            value = value.with_fields(fields)
        if value.roots:
            self._returns.append(self._alive(value))
            self._check_return(value, node)
        if node.kids and node.kind == "return_statement":
            self._answer(node.kids[-1])
        return CLEAN

    def _switch(self, node: Node) -> Value:
        env = self._env
        merged = dict(env)
        for kid in node.kids:
            for part in kid.kids if kid.kind.endswith(("body", "block")) else [kid]:
                self._env = dict(env)
                self._visit(part)
                if not exits(self._tree, part) or "break" in self._tree.code[part.start : part.end]:
                    merged = joined(merged, self._env) if merged is not env else dict(self._env)
        self._env = merged
        return CLEAN

    def _comparison(self, node: Node) -> Value:
        for kid in node.kids:
            self._visit(kid)
        return CLEAN

    def _nothing(self, node: Node) -> Value:
        return CLEAN


_HANDLERS: dict[str, Callable[[Flow, Node], Value]] = {}
for _handler, _kinds in (
    (Flow._function, FUNCTIONS),
    (Flow._call, ("call", "call_expression", "method_invocation", "new_expression", "object_creation_expression", "explicit_constructor_invocation")),
    (Flow._name, NAMES),
    (Flow._member, (*MEMBERS, *SUBSCRIPTS)),
    (Flow._string, ("string", "template_string", "concatenated_string", "formatted_string")),
    (Flow._binary, ("binary_operator", "binary_expression")),
    (Flow._comparison, ("comparison_operator", "not_operator", "instanceof_expression", "sizeof_expression")),
    (Flow._ternary, ("ternary_expression", "conditional_expression")),
    (
        Flow._assign,
        ("assignment", "augmented_assignment", "named_expression", "variable_declarator", "assignment_expression", "augmented_assignment_expression",
         "short_var_declaration", "assignment_statement", "var_spec", "const_spec", "init_declarator", "field_definition", "public_field_definition", "resource"),
    ),
    (Flow._declaration, ("declaration",)),
    (Flow._object, ("object",)),
    (Flow._pair, ("pair", "keyed_element", "jsx_attribute")),
    (Flow._if, ("if_statement", "elif_clause")),
    (Flow._loop, ("for_statement", "for_in_statement", "enhanced_for_statement", "for_range_loop")),
    (Flow._comprehension, ("list_comprehension", "set_comprehension", "generator_expression", "dictionary_comprehension")),
    (Flow._as, ("as_pattern",)),
    (Flow._return, ("return_statement", "yield", "throw_statement")),
    (Flow._switch, ("switch_statement", "switch_expression", "expression_switch_statement", "match_statement")),
    (
        Flow._nothing,
        ("import_statement", "import_from_statement", "import_declaration", "package_declaration", "integer", "float", "number", "true", "false", "none",
         "null", "nil", "type_identifier", "preproc_include", "decimal_integer_literal", "number_literal", "int_literal", "string_literal",
         "interpreted_string_literal", "raw_string_literal", "char_literal", "regex", "type_annotation", "interface_declaration", "type_alias_declaration"),
    ),
):  # fmt: skip
    for _kind in _kinds:
        _HANDLERS[_kind] = _handler
