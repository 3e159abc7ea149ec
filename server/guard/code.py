# ruff: noqa: E501  # a pattern is read whole
"""Insecure code in one block, whatever its language."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from server.guard import advisories, assembled, languages, licence, manifests, origins, packages, plain
from server.guard.flow import Flow
from server.guard.literals import Text
from server.guard.repeats import is_ambiguous, literal_in
from server.guard.rules import load_language
from server.guard.tree import Tree, has_grammar, mask_of_broken, parsed
from server.types import Finding

if TYPE_CHECKING:
    from server.guard.rules import Language, Pattern, Rule
    from server.guard.tree import Node

_SCOPES = frozenset(
    {
        "function_definition", "function_declaration", "method_declaration", "constructor_declaration", "arrow_function", "function_expression",
        "method_definition", "func_literal", "generator_function_declaration",
    }
)  # fmt: skip
_LOOK_BEHIND_CHARS = 400


def find_insecure(source: str, language: str | None) -> list[Finding]:
    """Return the weaknesses in one block; a language that is None is guessed from what the block says."""
    name = language or manifests.guess(source) or languages.guess(source)
    if name is None:
        return []
    text, lines = dedented(source)
    findings = [*_found(text, name), *licence.find_copies(text)]
    if lines:
        starts, shifts = lines
        findings = [
            replace(
                f,
                start=f.start + shifts[bisect_right(starts, f.start) - 1],
                end=f.end + shifts[bisect_right(starts, max(f.start, f.end - 1)) - 1],
            )
            for f in findings
        ]
    return findings


def warm() -> None:
    """Load all rules."""
    for name in languages.LANGUAGES:
        load_language(name)
    licence.shipped()
    advisories.database()
    advisories.licences()
    for ecosystem in packages.ECOSYSTEMS:
        packages.allowed(ecosystem)


def dedented(source: str) -> tuple[str, tuple[list[int], list[int]] | None]:
    """Return `source` without an indent that all its lines share, and how offsets move back (line starts, shifts)."""
    lines = source.splitlines(keepends=True)
    filled = [line for line in lines if line.strip()]
    margin = min((len(line) - len(line.lstrip(" \t")) for line in filled), default=0)
    if margin == 0:
        return source, None
    starts, shifts, out, position, taken = [], [], [], 0, 0
    for line in lines:
        cut = min(margin, len(line) - len(line.lstrip(" \t")))
        taken += cut
        starts.append(position)
        shifts.append(taken)
        out.append(line[cut:])
        position += len(line) - cut
    return "".join(out), (starts, shifts)


def _found(source: str, name: str) -> list[Finding]:
    if name in manifests.KINDS:
        return advisories.find_refused(source, name)
    rules = load_language(name)
    if rules is None:
        return []
    if not has_grammar(name):
        text = plain.PlainText(source, name)
        found = _patterns(rules, text.code, text.masked, text.statements, [], name)
        found += packages.find_unknown(source, text.code, name)
        return [*found, *advisories.find_refused(text.code, name)] if name == "dockerfile" else found
    root = parsed(source, name)
    mask = mask_of_broken(source, root)
    closers = unclosed(mask) if mask is not None else ""
    if closers:  # a text that was cut short: what is there is read as if it had been ended
        return [replace(f, end=min(f.end, len(source))) for f in _found_in(Tree(source + closers, name), rules, name)]
    return _found_in(Tree(source, name, root), rules, name)


def _found_in(tree: Tree, rules: Language, name: str) -> list[Finding]:
    flow = Flow(tree, rules)
    reached = flow.run()
    functions = sorted(outermost_functions(tree.root)) if name not in ("terraform",) else []
    spans = plain.blocks(tree.masked) if name == "terraform" else _lines(tree.code)
    findings = _patterns(rules, tree.code, tree.masked, spans, functions, name)
    findings += [_finding(rule, node.start, node.end, name) for rule, node in reached]
    findings += packages.find_unknown(tree.source, tree.code, name)
    if name == "shell":
        findings += advisories.find_refused(tree.code, name)
    file_facts: dict[int, bool] = {}
    for callee, node, arguments in flow.calls:
        findings += [
            _finding(pattern.rule, node.start, node.end, name)
            for pattern in rules.call_patterns[callee]
            if _call_fits(pattern, tree, node, arguments, functions, file_facts)
        ]
    return findings


def unclosed(masked: str) -> str:
    """Return the brackets that would close what is open at the end of `masked`."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    stack: list[str] = []
    for char in masked:
        if char in pairs:
            stack.append(pairs[char])
        elif stack and char == stack[-1]:
            stack.pop()
    return "".join(reversed(stack)) if len(stack) <= 64 else ""


def _call_fits(
    pattern: Pattern,
    tree: Tree,
    node: Node,
    arguments: Node | None,
    functions: list[tuple[int, int]],
    facts: dict[int, bool],
) -> bool:
    text = tree.text(arguments) if arguments is not None else ""
    if pattern.masked and arguments is not None:
        text = tree.masked[arguments.start : arguments.end]
    if (pattern.args and not pattern.args.search(text)) or (pattern.args_lack and pattern.args_lack.search(text)):
        return False
    if not _file_fits(pattern, tree.code, facts):
        return False
    if not pattern.has and not pattern.lacks:
        return True
    start, end = _scope(pattern.scope, node.start, node.end, tree.code, [], functions)
    return _scope_fits(pattern, tree.code[start:end])


def _file_fits(pattern: Pattern, code: str, facts: dict[int, bool]) -> bool:
    known = facts.get(id(pattern))
    if known is None:
        known = not (pattern.file_has and not pattern.file_has.search(code)) and not (
            pattern.file_lacks and pattern.file_lacks.search(code)
        )
        facts[id(pattern)] = known
    return known


def _scope_fits(pattern: Pattern, scope: str) -> bool:
    return all(p.search(scope) for p in pattern.has) and not any(p.search(scope) for p in pattern.lacks)


def _patterns(
    rules: Language, code: str, masked: str, spans: list[tuple[int, int]], functions: list[tuple[int, int]], name: str
) -> list[Finding]:
    findings = []
    facts: dict[int, bool] = {}
    statements: assembled.Statements | None = None
    seen: set[tuple[int, int]] = set()  # pieces of statements, each of which may be run in more places than one
    words = Text(code.lower())
    script = origins.Script(code, masked)
    for pattern in rules.patterns:
        if pattern.match is None or not words.holds(pattern.needs):
            continue
        if not _file_fits(pattern, code, facts):
            continue
        fits: dict[tuple[int, int], bool] = {}  # many matches stand in one scope: it is looked at once
        for match in pattern.match.finditer(masked if pattern.masked else code):
            if not pattern.masked and not masked[match.start() : match.end()].strip():
                continue  # all of it stands inside a string: it is talked about, not done
            where = match.span("at" if "at" in pattern.match.groupindex else 0)
            if pattern.assembled:
                statements = statements or assembled.Statements(code, masked)
                part = statements.foreign_part(match.end())
                if part is None or part in seen:
                    continue
                where = part
                seen.add(part)
            start, end = _scope(pattern.scope, *where, code, spans, functions)
            known = fits.get((start, end))
            if known is None:
                known = fits[start, end] = _scope_fits(pattern, code[start:end])
            if known and _group_fits(pattern, match, masked[start:end], script, name):
                findings.append(_finding(pattern.rule, *where, name))
    return findings


def _group_fits(pattern: Pattern, match: re.Match[str], scope: str, script: origins.Script, name: str) -> bool:
    if pattern.foreign and _is_own(pattern, match, script, name):
        return False
    if pattern.greater is not None and match[pattern.greater]:
        return int(match["v"]) > int(match[pattern.greater])
    if pattern.nested:
        return is_ambiguous(literal_in(match.string, match.start()))
    # held against something anywhere in the scope: a bounds check, most likely
    return not (pattern.unchecked and match["v"] and _comparison_of(match["v"]).search(scope))


def _is_own(pattern: Pattern, match: re.Match[str], script: origins.Script, name: str) -> bool:
    """Whether what the match says of shell variables is the script's own, so that nobody else has a say in it."""
    if "v" not in pattern.match.groupindex:  # type: ignore[union-attr]  # only a pattern that matches text is foreign
        settled = script.are_inputs_settled if name == "terraform" else script.are_settled
        return settled(*match.span())
    if not match["v"]:
        return False
    return script.is_settled(match["v"], match.start("v"), environment=pattern.foreign != "unset")


@lru_cache(maxsize=512)
def _comparison_of(name: str) -> re.Pattern[str]:
    """Return what finds a comparison of `name`; `f(to, name) < 0` is none, it asks how the call went."""
    word = rf"(?<![\w.>]){re.escape(name)}\b"
    return re.compile(
        rf"{word}\s*(?:[<>](?![<>])=?|[=!]=)|(?<!,)(?<!, )(?<!sizeof )(?<!sizeof\(){word}\s*\)\s*(?:[<>](?![<>])=?|[=!]=)"
        rf"|(?<![-<>=])[<>]=?\s*(?:\(\s*\w+\s*\)\s*)?{word}|%\s*{word}|{word}\s*%=?"
        rf"|\b(?i:min|clamp|max|valid\w*|check\w*|in_range|in_bounds|fits)(?:<[^<>;]{{0,60}}>)?\([^;]{{0,80}}?{word}"
    )


def _scope(
    kind: str, start: int, end: int, code: str, spans: list[tuple[int, int]], functions: list[tuple[int, int]]
) -> tuple[int, int]:
    if kind == "file":
        return 0, len(code)
    if kind == "match":
        return start, end
    if kind == "before":
        return max(0, start - _LOOK_BEHIND_CHARS), start
    if kind == "after":
        inside = _scope("function", start, end, code, spans, functions)
        return end, inside[1]
    if kind == "line":
        last = code.find("\n", end)
        return code.rfind("\n", 0, start) + 1, len(code) if last < 0 else last
    among = functions if kind == "function" else spans  # in order, and none within another
    at = bisect_right(among, start, key=lambda span: span[0]) - 1
    if at >= 0 and among[at][0] <= start < among[at][1]:
        return among[at]
    return 0, len(code)


def outermost_functions(root: Node) -> list[tuple[int, int]]:
    """Return the spans of the functions that stand in no other function, decorators included."""
    spans, stack = [], [root]
    while stack:
        node = stack.pop()
        if node.kind in _SCOPES:
            start = (
                node.parent.start
                if node.parent is not None and node.parent.kind == "decorated_definition"
                else node.start
            )
            spans.append((start, node.end))
        else:
            stack.extend(node.kids)
    return spans


def _lines(code: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"[^\n]*(?:\\\n[^\n]*)*", code)]


def _finding(rule: Rule, start: int, end: int, language: str) -> Finding:
    return Finding(
        rule.id, "code", rule.severity, rule.message, start, end, rule.cwe, language=language, fix=rule.fix or None
    )
