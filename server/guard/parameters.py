# ruff: noqa: E501  # a table is read whole
"""Functions and their parameters, in every language: their names, and what a caller may put in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from server.guard.rules import ALL, BITS
from server.guard.values import CLEAN, Value

if TYPE_CHECKING:
    from server.guard.rules import Language
    from server.guard.tree import Node, Tree

FUNCTIONS = frozenset(
    {
        "function_definition", "function_declaration", "method_declaration", "constructor_declaration", "arrow_function", "function_expression",
        "method_definition", "generator_function_declaration", "generator_function", "func_literal", "lambda_expression", "lambda",
    }
)  # fmt: skip
_WORD = re.compile(r"\w+")
BY_NAME = "?"  # ends the root of a parameter that nothing but its name says to come from outside
SILENT = "_"  # begins the root of a parameter whose name says that it is no input
# `req renderRequest` is what a handler has decoded, and no request of the framework's
_OWN_REQUEST = re.compile(r"^req\w*\s+\*?(?!http\b)\w*(?:Request|Input|Params|Form|Payload)$")
# `options: SearchOptions` is what somebody looks for; other options are the caller's
_SOUGHT = re.compile(r"^(?:options|opts|config|params)\??\s*:\s*\w*(?:Search|Filter|Query|List|Find|Page|Sort)\w*")
# a body that is declared has the fields of its type
_DECLARED = re.compile(r":\s*(?!any\b|unknown\b|object\b|Record\b|Partial\b|\{\s*\[)[\w{]")
_FILE_NAME = re.compile(r"(?i)file|path|url|entry")


def bound_parameters(
    node: Node, tree: Tree, language: Language, listed: list[tuple[str, str]]
) -> list[tuple[str, Value]]:
    """Return (name, what it may hold) of each parameter `listed`: from outside, perhaps, or harmless by its type."""
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
    if tree.language == "python":
        header = _class_header(node, tree) + header
    is_handler = language.handler is not None and language.handler.search(header) is not None
    bound = []
    for name, text in listed:
        annotated = text.startswith("@") and language.strong_param and language.strong_param.search(text)
        if tree.enumerations and not tree.enumerations.isdisjoint(_WORD.findall(text)):
            bound.append((name, CLEAN))
            continue
        if language.safe_type and language.safe_type.search(text):
            bound.append((name, CLEAN))
            continue
        if language.ignored_param and language.ignored_param.search(name) and not annotated:
            own = (_OWN_REQUEST.search(text) or _SOUGHT.search(text)) is not None and not is_handler
            bound.append((name, Value({("~" if own else SILENT) + f"{name}@{node.start}": ALL})))
            continue
        strong = is_handler or (language.strong_param is not None and language.strong_param.search(text) is not None)
        by_name = strong and not is_handler and not annotated
        named = strong and not is_handler and tree.language in ("c", "cpp") and not _FILE_NAME.search(name)
        # C has no request to name: a parameter that sounds like input is trusted less where it makes a path
        dangers = ALL & ~BITS["path"] if named else ALL
        if by_name:
            dangers &= ~BITS["log"]
        if text.startswith("{") or ((annotated or by_name) and _DECLARED.search(text)):
            dangers &= ~BITS["fields"]
        roots = {("!" if strong else "~") + f"{name}@{node.start}" + (BY_NAME if by_name else ""): dangers}
        bound.append((name, Value(roots)))
    return bound


def _class_header(node: Node, tree: Tree) -> str:
    """Return `class Name(Base):` of a method: a `get` is a handler in a view, and none in a client."""
    owner = node.parent
    while owner is not None and owner.kind != "class_definition":
        if owner.kind in FUNCTIONS:
            return ""
        owner = owner.parent
    if owner is None:
        return ""
    body = owner.field("body")
    return tree.code[owner.start : body.start if body is not None else owner.end].rstrip() + "\n"


def parameters(node: Node, tree: Tree) -> list[tuple[str, str]]:
    """Return (name, text with its type and annotations) of each parameter."""
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
        return [(tree.text(single), tree.text(single))] if single is not None and single.kind == "identifier" else []
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
            takes_apart = param.kind in ("object_pattern", "array_pattern")  # TypeScript has these within a parameter
            pattern = parts[0] if parts and not takes_apart else param
            names = [n for n in pattern.walk() if n.kind in ("identifier", "shorthand_property_identifier_pattern")]
        found += [(tree.text(name), text) for name in names]
    return found


def function_name(node: Node, tree: Tree) -> str | None:
    """Return the name that a function is called by, or None."""
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
    return re.split(r"\.|::|->", tree.text(name))[-1].strip() if name is not None else None
