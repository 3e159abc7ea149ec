# ruff: noqa: E501  # a pattern is read whole
"""Data flow within one file: values from outside, followed through assignments, calls and guards to where they harm.

Each function is walked once, statement by statement. A value carries, for every place it came from (its roots), the dangers
it still has; a sanitizer takes dangers from the value, a guard (`if x not in ALLOWED: raise`) takes them from the root.
Branches are joined. Functions of the same file are summarised: what they return of their parameters, which parameters they
check, and which of their sinks wait for a caller with a value from outside. Roots begin with `!` where the value certainly
comes from outside (a request, the command line) and with `~` where it is a parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.guard.rules import ALL, BITS, MAX_CALLEES, Language, Rule, Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from server.guard.tree import Node, Tree

_FUNCTIONS = frozenset(
    {
        "function_definition", "function_declaration", "method_declaration", "constructor_declaration", "arrow_function", "function_expression",
        "method_definition", "generator_function_declaration", "generator_function", "func_literal", "lambda_expression", "lambda",
    }
)  # fmt: skip
_ARGUMENTS = frozenset({"argument_list", "arguments", "initializer_list"})
_MEMBERS = frozenset(
    {
        "attribute",
        "member_expression",
        "field_access",
        "selector_expression",
        "field_expression",
        "qualified_identifier",
        "scoped_identifier",
    }
)
_SUBSCRIPTS = frozenset({"subscript", "subscript_expression", "index_expression", "array_access", "slice_expression"})
_NAMES = frozenset(
    {
        "identifier", "shorthand_property_identifier", "shorthand_property_identifier_pattern", "this", "self", "field_identifier",
        "property_identifier", "variable_name",
    }
)  # fmt: skip
_TYPES = frozenset(
    {
        "type",
        "type_annotation",
        "type_identifier",
        "generic_type",
        "integral_type",
        "primitive_type",
        "array_type",
        "type_arguments",
    }
)
_EXITS = re.compile(
    r"\b(?:return|raise|throw|continue|break|exit|abort|panic|die|goto|_exit|os\.Exit|sys\.exit|System\.exit|process\.exit|log\.Fatal\w*|"
    r"redirect|HTTPException|notFound|badRequest|http\.Error|AbortWith\w*|fail)\b"
)
_CLEAN_PROPERTY = re.compile(r"\.(?:length|size|count|byteLength)$")
_COPIES = re.compile(
    r"^(?:std::)?(?:strn?cpy|strn?cat|strl?cpy|strlcat|memcpy|memmove|mempcpy|stpcpy|v?sn?printf|bcopy|wcscpy|wcscat)$"
)
_FORMATS = re.compile(
    r"(?i)(?:format|sprintf|concat|join|append|replace|interpolate|f_string|snprintf|strcat|template|add|resolve|mkstring)\W*$"
)
_VALIDATING = re.compile(
    r"(?i)^(?:[\w.]*[._])?(?:validate|check|ensure|assert|verify|require|sanitize|guard|must_be|reject|enforce)[\w]*(?:valid|safe|allowed|name|path|url|host|input|id|"
    r"target|file|identifier|column|user|key|param|within|inside|public|domain|origin|scheme|arg|expr|pattern|filter|table|order|sort|request|address|ip)\w*$"
)


class Value:
    """What is known of one value: its roots with their dangers, and whether it is a text put together from parts."""

    __slots__ = ("built", "canonical", "roots")

    def __init__(self, roots: dict[str, int] | None = None, *, built: bool = False, canonical: bool = False) -> None:
        self.roots = roots or {}
        self.built = built
        self.canonical = canonical

    def without(self, mask: int) -> Value:
        """Return the value after a sanitizer took `mask` away."""
        return Value({r: m & ~mask for r, m in self.roots.items() if m & ~mask}, built=self.built)


CLEAN = Value()


def union(values: Iterable[Value], *, built: bool = False) -> Value:
    """Return a value that may be any of `values`, or all of them put together."""
    roots: dict[str, int] = {}
    canonical = False
    for value in values:
        built = built or (value.built and bool(value.roots))
        canonical = canonical or value.canonical
        for root, mask in value.roots.items():
            roots[root] = roots.get(root, 0) | mask
    return Value(roots, built=built and bool(roots), canonical=canonical) if roots else CLEAN


@dataclass(slots=True)
class Summary:
    """What a function of this file does with its parameters, by the root each one was given."""

    params: list[str]
    roots: list[str]
    returned: Value = CLEAN
    cleared: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, Sink, Node]] = field(default_factory=list)


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
        self._pending: list[tuple[str, Sink, Node]] = []
        self._aliases = aliases_of(tree)
        self.calls: list[tuple[str, Node, Node | None]] = []

    def run(self) -> list[tuple[Rule, Node]]:
        """Walk the file."""
        for node in self._tree.root.walk():
            if node.kind in _FUNCTIONS:
                name = self._function_name(node)
                if name:
                    self._functions.setdefault(name, node)
        self._visit(self._tree.root)
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
        params = self._bound_params(node)
        summary = Summary([name for name, _ in params], [next(iter(v.roots), "") for _, v in params])
        outer = self._env, self._cleared, self._returns, self._pending
        self._env, self._cleared, self._returns, self._pending = dict(self._env), dict(self._cleared), [], []
        self._env.update(params)
        body = node.field("body") or (node.kids[-1] if node.kids else None)
        if body is not None:
            value = self._visit(body)
            if node.kind in ("arrow_function", "lambda", "lambda_expression") and not body.kind.endswith(
                ("block", "compound_statement")
            ):
                self._returns.append(self._alive(value))
        summary.returned = union(self._returns)
        summary.cleared = {root: mask for root, mask in self._cleared.items() if root in summary.roots}
        summary.pending = self._pending
        self._env, self._cleared, self._returns, self._pending = outer
        self._summaries[node.start] = summary
        return summary

    def _bound_params(self, node: Node) -> list[tuple[str, Value]]:
        language, tree = self._language, self._tree
        header_start = node.start
        if node.parent is not None and node.parent.kind in ("decorated_definition", "export_statement"):
            header_start = node.parent.start
        elif node.kind == "method_definition" and node.parent is not None:
            header_start = max(
                [
                    node.parent.start,
                    *(kid.end for kid in node.parent.kids if kid.end <= node.start and kid.kind != "decorator"),
                ]
            )
        body = node.field("body")
        header = tree.code[header_start : body.start if body is not None else node.end]
        is_handler = language.handler is not None and language.handler.search(header) is not None
        bound = []
        for name, text in self._params(node):
            if (language.safe_type and language.safe_type.search(text)) or (
                language.ignored_param and language.ignored_param.search(name)
            ):
                bound.append((name, CLEAN))
                continue
            strong = is_handler or (
                language.strong_param is not None and language.strong_param.search(text) is not None
            )
            bound.append((name, Value({("!" if strong else "~") + f"{name}@{node.start}": ALL})))
        return bound

    def _params(self, node: Node) -> list[tuple[str, str]]:
        """Return (name, text with its type and annotations) of each parameter."""
        tree = self._tree
        listing = node.field("parameters") or node.first(
            "parameters", "formal_parameters", "parameter_list", "lambda_parameters"
        )
        if listing is None:
            declarator = node.field("declarator")
            while (
                declarator is not None
                and declarator.field("parameters") is None
                and declarator.field("declarator") is not None
            ):
                declarator = declarator.field("declarator")
            listing = declarator.field("parameters") if declarator is not None else None
        if listing is None:
            single = node.field("parameter") or (
                node.kids[0] if node.kids and node.kind in ("arrow_function", "lambda_expression") else None
            )
            return (
                [(tree.text(single), tree.text(single))] if single is not None and single.kind == "identifier" else []
            )
        if listing.kind == "identifier":
            return [(tree.text(listing), tree.text(listing))]
        found = []
        for param in listing.kids:
            text = tree.text(param)
            if tree.language in ("c", "cpp"):
                names = [n for n in param.walk() if n.kind == "identifier"][-1:]
            elif tree.language == "go":
                names = [kid for kid in param.kids if kid.kind == "identifier"]
            elif tree.language == "java":
                name = param.field("name")
                names = [name] if name is not None else [param] if param.kind == "identifier" else []
            elif tree.language == "python":
                names = [n for n in param.walk() if n.kind == "identifier"][:1]
            else:
                parts = [kid for kid in param.kids if kid.kind not in ("decorator", "accessibility_modifier")]
                pattern = parts[0] if parts else param
                names = [n for n in pattern.walk() if n.kind in ("identifier", "shorthand_property_identifier_pattern")]
            found += [(tree.text(name), text) for name in names]
        return found

    def _function_name(self, node: Node) -> str | None:
        name = node.field("name")
        if (
            name is None
            and node.parent is not None
            and node.parent.kind in ("variable_declarator", "assignment_expression", "pair")
        ):
            name = node.parent.kids[0]
        if name is None:
            declarator = node.field("declarator")
            while declarator is not None and declarator.field("declarator") is not None:
                declarator = declarator.field("declarator")
            name = declarator
        return re.split(r"\.|::|->", self._tree.text(name))[-1].strip() if name is not None else None

    # --- expressions ---------------------------------------------------------------------------------------------

    def _alive(self, value: Value) -> Value:
        if not self._cleared or not value.roots:
            return value
        roots = {r: m & ~self._cleared.get(r, 0) for r, m in value.roots.items()}
        return Value({r: m for r, m in roots.items() if m}, built=value.built, canonical=value.canonical)

    def _name(self, node: Node) -> Value:
        text = self._tree.text(node)
        value = self._env.get(text)
        if value is not None:
            return value
        return self._source_value(text) or CLEAN

    def _source_value(self, text: str) -> Value | None:
        language = self._language
        if language.sources is not None and language.sources.search(text):
            return Value({"!" + text: ALL})
        if language.weak_sources is not None and language.weak_sources.search(text):
            return Value({"~" + text: ALL})
        return None

    def _member(self, node: Node) -> Value:
        text = squeezed(self._tree.text(node))
        known = self._env.get(text)
        if known is not None:
            return known
        found = self._source_value(text)
        if found is not None:
            return found
        base = self._visit(node.kids[0]) if node.kids else CLEAN
        if node.kind in _SUBSCRIPTS:
            for kid in node.kids[1:]:
                self._visit(kid)
        elif _CLEAN_PROPERTY.search(text):
            return base.without(ALL & ~BITS["size"])
        return base

    def _string(self, node: Node) -> Value:
        values = [self._visit(kid) for kid in node.kids if kid.kind in ("interpolation", "template_substitution")]
        if node.kind == "concatenated_string":
            values = [self._visit(kid) for kid in node.kids]
        return union(values, built=bool(values)) if values else CLEAN

    def _binary(self, node: Node) -> Value:
        values = [self._visit(kid) for kid in node.kids]
        if len(node.kids) == 2:
            operator = self._tree.masked[node.kids[0].end : node.kids[1].start].strip()
            if operator in _COMPARISONS:
                return CLEAN
            if operator in ("+", "%", "||", "/", "..", "+=", "<<"):
                joins = (operator != "||" and operator != "/") or (operator == "/" and self._tree.language == "python")
                return union(values, built=joins)
        return union(values)

    def _ternary(self, node: Node) -> Value:
        kids = node.kids
        if len(kids) != 3:
            return union([self._visit(kid) for kid in kids])
        body, cond, other = kids if self._tree.language == "python" else (kids[1], kids[0], kids[2])
        self._visit(cond)
        cleared = dict(self._cleared)
        self._apply_guard(cond)
        value = union([self._alive(self._visit(body)), self._alive(self._visit(other))])
        self._cleared = cleared
        return value

    def _call(self, node: Node) -> Value:
        tree = self._tree
        arguments = next((kid for kid in reversed(node.kids) if kid.kind in _ARGUMENTS), None)
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
            elif function.kind in _MEMBERS and function.kids:
                receiver = self._visit(function.kids[0])
                known = self._env.get(squeezed(tree.text(function.kids[0])))
                receiver = known if known is not None and not receiver.roots else receiver
            elif function.kind not in _NAMES:
                receiver = self._visit(function)
        positional: list[Value] = []
        named: dict[str, Value] = {}
        callbacks: list[Node] = []
        for arg in arguments.kids:
            if arg.kind == "keyword_argument" and len(arg.kids) == 2:
                named[tree.text(arg.kids[0])] = self._visit(arg.kids[1])
            elif arg.kind in _FUNCTIONS:
                callbacks.append(arg)
                positional.append(CLEAN)
            else:
                positional.append(self._visit(arg))
        every = [*positional, *named.values()]
        self.calls.append((callee, node, arguments))
        for callback in callbacks:
            self._callback(callback, receiver)
        is_source, is_weak, cleans, propagates, canonical, sinks = self._known(callee)
        for sink in sinks:
            self._check_call(sink, node, receiver, positional, named)
        self._copy_out(callee, arguments, positional)
        if is_source or is_weak:
            text = squeezed(tree.text(node))
            return Value({("!" if is_source else "~") + text: ALL})
        local = self._functions.get(re.split(r"\.|::|->", callee)[-1].removeprefix("new "))
        if cleans:
            return union([receiver, *every]).without(cleans)
        if local is not None and not callee.startswith("new "):
            return self._apply_summary(self._summarise(local), positional, named, callee)
        if _VALIDATING.search(callee) and local is None:
            for value in every:
                self._clear(value, ALL & ~BITS["size"])
        joined = bool(_FORMATS.search(callee))
        if receiver.roots:
            value = union([receiver, *every] if joined or propagates else [receiver], built=joined)
        elif propagates or joined or "." not in callee or callee.startswith("new "):
            value = union(every, built=joined)
        else:
            value = CLEAN
        if canonical and value.roots:
            value = Value(value.roots, built=value.built, canonical=True)
        return value

    def _callback(self, node: Node, receiver: Value) -> None:
        """Walk a function that is handed to a call; its parameters are elements of what it is called on."""
        params = self._params(node)
        language = self._language
        names = [name for name, _ in params]
        if language.handler is not None and language.handler.search(self._tree.code[node.start : node.start + 200]):
            self._summarise(node)
            return
        saved = self._env
        self._env = dict(self._env)
        for name in names:
            self._env[name] = receiver if receiver.roots else CLEAN
            if language.sources is not None and language.sources.search(name):
                self._env.pop(name)
        returns, self._returns = self._returns, []
        body = node.field("body") or (node.kids[-1] if node.kids else None)
        if body is not None:
            self._visit(body)
        self._returns = returns
        changed = {k: v for k, v in self._env.items() if k not in names and k in saved}
        self._env = saved
        self._env.update(changed)

    def _apply_summary(self, summary: Summary, positional: list[Value], named: dict[str, Value], callee: str) -> Value:
        given: dict[str, Value] = {}
        names = summary.params
        offset = 1 if names[:1] in (["self"], ["cls"], ["this"]) else 0
        for index, value in enumerate(positional):
            if index + offset < len(names):
                given[summary.roots[index + offset]] = value
        for name, value in named.items():
            if name in names:
                given[summary.roots[names.index(name)]] = value
        for root, mask in summary.cleared.items():
            if root in given:
                self._clear(given[root], mask)
        for root, sink, where in summary.pending:
            value = self._alive(given.get(root, CLEAN))
            if any(r.startswith("!") and m & sink.danger for r, m in value.roots.items()):
                self._emit(sink.rule, where)
        parts = []
        for root, mask in summary.returned.roots.items():
            if root in given:
                parts.append(given[root].without(ALL & ~mask))
            elif root.startswith("!") and "@" not in root:
                parts.append(Value({root: mask}))
        return union(parts, built=summary.returned.built)

    def _copy_out(self, callee: str, arguments: Node, positional: list[Value]) -> None:
        if self._tree.language in ("c", "cpp") and _COPIES.search(callee) and len(positional) > 1:
            target = self._tree.text(arguments.kids[0]).lstrip("&(* ").split("[")[0].split("+")[0].strip()
            old = self._env.get(target, CLEAN) if "cat" in callee else CLEAN
            self._env[target] = union([old, *positional[1:]], built="printf" in callee or "cat" in callee)
        elif callee in _OUT_SOURCES or re.search(
            r"(?:\.|^)(?:Decode|Bind\w*|ShouldBind\w*|BodyParser|Unmarshal|ReadJSON|Scan\w*|Fscan\w*)$", callee
        ):
            if self._tree.language not in ("c", "cpp", "go"):
                return
            index = _OUT_SOURCES.get(callee)
            targets = (
                arguments.kids if index is None else arguments.kids[index : index + (9 if "scan" in callee else 1)]
            )
            for kid in targets:
                text = self._tree.text(kid).lstrip("&(* ").split("[")[0].split("+")[0].strip()
                outside = self._tree.language != "go" or re.search(
                    r"Bind|BodyParser|Body\b|Scan|ReadJSON", self._tree.text(arguments.parent or arguments)
                )
                if re.fullmatch(r"[\w.>-]+", text) and outside:
                    self._env[text] = Value({f"!{text}@{arguments.start}": ALL})

    def _known(self, callee: str) -> tuple[bool, bool, int, bool, bool, list[Sink]]:
        language = self._language
        known: tuple[bool, bool, int, bool, bool, list[Sink]] | None = language.callees.get(callee)
        if known is None:
            cleans = 0
            for pattern, mask in language.sanitizers:
                if pattern.search(callee):
                    cleans |= mask
            known = (
                language.sources is not None and language.sources.search(callee + "(") is not None,
                language.weak_sources is not None and language.weak_sources.search(callee + "(") is not None,
                cleans,
                language.propagators is not None and language.propagators.search(callee) is not None,
                language.canonical is not None and language.canonical.search(callee) is not None,
                [sink for sink in language.sinks if sink.call is not None and sink.call.search(callee)],
            )
            if len(language.callees) >= MAX_CALLEES:
                language.callees.clear()
            language.callees[callee] = known
        return known

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
        strong = any(root.startswith("!") for root in alive)
        if not strong and (sink.strong or (sink.built and not value.built)):
            self._pending += [(root, sink, node) for root in alive]
            return
        self._emit(sink.rule, node)

    def _scope_text(self, node: Node) -> str:
        scope: Node | None = node
        while scope is not None and scope.kind not in _FUNCTIONS:
            scope = scope.parent
        return self._tree.text(scope) if scope is not None else self._tree.code

    def _emit(self, rule: Rule, node: Node) -> None:
        self._found.setdefault((rule.id, node.start), (rule, node))

    # --- statements ----------------------------------------------------------------------------------------------

    def _assign(self, node: Node) -> Value:
        kids = [kid for kid in node.kids if kid.kind not in _TYPES]
        if not kids:
            return CLEAN
        if len(kids) == 1:
            if node.kind in ("variable_declarator", "init_declarator", "var_spec") and kids[0].kind in _NAMES:
                self._env[self._tree.text(kids[0])] = CLEAN
                return CLEAN
            return self._visit(kids[0])
        right = node.field("right") or node.field("value") or kids[-1]
        left = node.field("left") or node.field("declarator") or node.field("name") or kids[0]
        value = self._visit(right)
        gap = self._tree.masked[left.end : right.start]
        if node.kind.startswith("augmented") or re.search(r"[+.|]=", gap):
            value = union([self._visit(left), value], built=True)
        self._bind(left, value, right)
        self._check_target(self._tree.text(left), value, node)
        return value

    def _bind(self, left: Node, value: Value, right: Node | None = None) -> None:
        kind = left.kind
        if kind in ("expression_list", "pattern_list", "tuple_pattern", "list_pattern", "array_pattern"):
            values = [value] * len(left.kids)
            if (
                right is not None
                and right.kind in ("expression_list", "tuple", "array", "list")
                and len(right.kids) == len(left.kids)
            ):
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
                if kid.kind != "property_identifier":
                    self._bind(kid, value)
            return
        text = squeezed(self._tree.text(left)).lstrip("*&")
        text = (
            text.split("[")[0] if kind in ("array_declarator", "pointer_declarator", "subscript_expression") else text
        )
        if kind in _SUBSCRIPTS or kind == "subscript_expression":
            base = squeezed(self._tree.text(left.kids[0])) if left.kids else text
            self._env[base] = union([self._env.get(base, CLEAN), value])
        else:
            self._env[text] = value

    def _check_target(self, target: str, value: Value, node: Node) -> None:
        if not value.roots:
            return
        for sink in self._language.sinks:
            if sink.assign is not None and sink.assign.search(squeezed(target)):
                text = self._tree.text(node)
                if not (sink.when and not sink.when.search(text)) and not (sink.unless and sink.unless.search(text)):
                    self._check(sink, value, node)

    def _pair(self, node: Node) -> Value:
        if len(node.kids) != 2:
            return union([self._visit(kid) for kid in node.kids])
        value = self._visit(node.kids[1])
        self._check_target("key:" + self._tree.text(node.kids[0]).strip("\"'"), value, node)
        return value

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
        self._env, self._cleared = dict(env), dict(guarded) if leaves or negated else dict(cleared)
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
        for pattern, mask in self._language.validators:
            for match in pattern.finditer(text):
                if not match.groupdict().get("v"):
                    continue
                base = re.match(r"[\w$]+", match["v"].lstrip("*&!( "))
                value = (
                    self._env.get(squeezed(match["v"]))
                    or (self._env.get(base[0]) if base else None)
                    or self._source_value(squeezed(match["v"]))
                )
                if value is None or not value.roots:
                    continue
                if "canonical" in pattern.groupindex and not value.canonical:
                    continue
                self._clear(value, mask)

    def _clear(self, value: Value, mask: int) -> None:
        for root in value.roots:
            self._cleared[root] = self._cleared.get(root, 0) | mask

    def _loop(self, node: Node) -> Value:
        left, right, body = (
            node.field("left") or node.field("name"),
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
        return value

    def _return(self, node: Node) -> Value:
        value = union([self._visit(kid) for kid in node.kids])
        if value.roots:
            self._returns.append(self._alive(value))
            self._check_target("return", value, node)
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


_COMPARISONS = frozenset(
    {"==", "!=", "===", "!==", "<", ">", "<=", ">=", "&&", "in", "instanceof", "and", "or", "not in", "is"}
)
_OUT_SOURCES = {
    "fgets": 0, "gets": 0, "read": 1, "recv": 1, "recvfrom": 1, "fread": 0, "scanf": 1, "fscanf": 2, "sscanf": 2, "getline": 0, "std::getline": 1,
    "std::cin.getline": 0, "recvmsg": 1, "pread": 1, "SSL_read": 1, "BIO_read": 1,
}  # fmt: skip


def exits(tree: Tree, body: Node) -> bool:
    """Whether a body ends by leaving: its last statement returns, raises or the like."""
    last = body
    while last.kids and last.kind in (
        "block",
        "statement_block",
        "compound_statement",
        "statement_list",
        "else_clause",
    ):
        last = last.kids[-1]
    return _EXITS.search(tree.masked[last.start : last.end]) is not None


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


_SPACE = re.compile(r"\s+")
_INNER = re.compile(r"\([^()]*\)")
_GENERIC = re.compile(r"<[\w, .?\[\]]*>(?=\(|$|::)")


def squeezed(text: str) -> str:
    """Return a callee's or a member's text without blanks, with what stands in brackets taken out."""
    if not text.isidentifier():
        text = _SPACE.sub(" ", text).strip()
        if "(" in text:
            for _ in range(12):
                shorter = _INNER.sub("\0", text)
                if shorter == text:
                    break
                text = shorter
            text = text.replace("\0", "()")
        if "<" in text:
            text = _GENERIC.sub("", text)
        keep = "new " if text.startswith("new ") else ""
        text = keep + text.removeprefix("new ").replace(" ", "").replace("?.", ".")
    return text


_PY_IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n]+)$", re.MULTILINE)
_PY_FROM = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+import[ \t]+(?:\(([^)]*)\)|([^\n]+))", re.MULTILINE)
_JS_REQUIRE = re.compile(r"(?:const|let|var)\s+(\{[^}]*\}|\w+)\s*=\s*require\(\s*['\"]([^'\"]+)['\"]\s*\)(\.\w+)?")
_JS_IMPORT = re.compile(
    r"^\s*import\s+(?:(\w+)\s*,?\s*)?(?:\*\s+as\s+(\w+)|(\{[^}]*\}))?\s*from\s*['\"]([^'\"]+)['\"]", re.MULTILINE
)
_JS_PROMISIFY = re.compile(r"(?:const|let|var)\s+(\w+)\s*=\s*(?:util\.)?promisify\(\s*([\w.]+)\s*\)")


def aliases_of(tree: Tree) -> dict[str, str]:
    """Return what the file's imports call its names in full."""
    code = tree.code
    aliases: dict[str, str] = {}
    if tree.language == "python":
        for match in _PY_IMPORT.finditer(code):
            for part in match[1].split(","):
                name, _, alias = part.strip().partition(" as ")
                if alias:
                    aliases[alias.strip()] = name.strip()
        for match in _PY_FROM.finditer(code):
            for part in (match[2] or match[3]).split(","):
                name, _, alias = part.strip().partition(" as ")
                if name:
                    aliases[(alias or name).strip()] = f"{match[1]}.{name.strip()}"
    elif tree.language in ("javascript", "typescript", "tsx"):
        for names, module, prop in _JS_REQUIRE.findall(code):
            _js_names(aliases, names, module, prop)
        for default, star, names, module in _JS_IMPORT.findall(code):
            base = _js_module(module)
            if default and default != "type":
                aliases[default] = base
            if star:
                aliases[star] = base
            if names:
                _js_names(aliases, names, module, "")
        for name, original in _JS_PROMISIFY.findall(code):
            head, _, rest = original.partition(".")
            aliases[name] = aliases.get(head, head) + (f".{rest}" if rest else "")
    return aliases


def _js_module(module: str) -> str:
    return re.sub(r"\W+", "_", module.removeprefix("node:").removesuffix("/promises").removesuffix("/promise"))


def _js_names(aliases: dict[str, str], names: str, module: str, prop: str) -> None:
    base = _js_module(module) + prop
    if not names.startswith("{"):
        aliases[names] = base
        return
    for part in names.strip("{} \n").split(","):
        name, _, alias = re.sub(r"\s+as\s+", ":", part.strip().removeprefix("type ")).partition(":")
        if name.strip():
            aliases[(alias or name).strip()] = f"{base}.{name.strip()}"


_HANDLERS: dict[str, Callable[[Flow, Node], Value]] = {}
for _handler, _kinds in (
    (Flow._function, _FUNCTIONS),
    (Flow._call, ("call", "call_expression", "method_invocation", "new_expression", "object_creation_expression", "explicit_constructor_invocation")),
    (Flow._name, _NAMES),
    (Flow._member, (*_MEMBERS, *_SUBSCRIPTS)),
    (Flow._string, ("string", "template_string", "concatenated_string", "formatted_string")),
    (Flow._binary, ("binary_operator", "binary_expression")),
    (Flow._comparison, ("comparison_operator", "not_operator", "instanceof_expression", "sizeof_expression")),
    (Flow._ternary, ("ternary_expression", "conditional_expression")),
    (
        Flow._assign,
        ("assignment", "augmented_assignment", "named_expression", "variable_declarator", "assignment_expression", "augmented_assignment_expression",
         "short_var_declaration", "assignment_statement", "var_spec", "const_spec", "init_declarator", "field_definition", "public_field_definition", "resource"),
    ),
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
