# ruff: noqa: E501  # a pattern is read whole
"""What the grammars and libraries of all languages call the things that a walk over a file has to know."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.guard.tree import Node, Tree

ARGUMENTS = frozenset({"argument_list", "arguments", "initializer_list"})
MEMBERS = frozenset(
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
SUBSCRIPTS = frozenset({"subscript", "subscript_expression", "index_expression", "array_access", "slice_expression"})
NAMES = frozenset(
    {
        "identifier", "shorthand_property_identifier", "shorthand_property_identifier_pattern", "this", "self", "field_identifier",
        "property_identifier", "variable_name",
    }
)  # fmt: skip
TYPES = frozenset(
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
LITERALS = frozenset(
    {
        "string", "string_literal", "interpreted_string_literal", "raw_string_literal", "template_string", "integer", "number", "float", "int_literal",
        "decimal_integer_literal", "number_literal", "true", "false", "none", "null", "nil", "null_literal",
    }
)  # fmt: skip
SPREADS = frozenset({"list_splat", "dictionary_splat", "spread_element", "variadic_argument"})
HOLES = frozenset({"interpolation", "template_substitution"})  # what makes a text of a literal and a value
PUT_TOGETHER = HOLES | {"binary_expression", "binary_operator", "parenthesized_expression", "concatenated_string"}
_EXITS = re.compile(
    r"\b(?:return|raise|throw|continue|break|exit|abort|panic|die|goto|_exit|os\.Exit|sys\.exit|System\.exit|process\.exit|log\.Fatal\w*|"
    r"redirect|HTTPException|notFound|badRequest|http\.Error|AbortWith\w*|fail)\b"
)
CLEAN_PROPERTY = re.compile(r"\.(?:length|size|count|byteLength)$")
COPIES = re.compile(
    r"^(?:std::)?(?:strn?cpy|strn?cat|strl?cpy|strlcat|memcpy|memmove|mempcpy|stpcpy|v?sn?printf|bcopy|wcscpy|wcscat)$"
)
FORMATS = re.compile(
    r"(?i)(?:format|sprintf|concat|join|append|replace|interpolate|f_string|snprintf|strcat|template|add|resolve|mkstring)\W*$"
)
JOINS_PATHS = re.compile(r"(?:^|\.)(?:os\.path\.join|path\.join|path\.resolve|filepath\.Join|Paths\.get|Path\.of)$")
COLLECTS = re.compile(
    r"((?:self\.|this\.)?\w+)\..*?\b(append|add|push|insert|extend|unshift|WriteString|push_back|put)$"
)
BUILDS = frozenset({"append", "insert", "WriteString"})
VALIDATING = re.compile(
    r"(?i)^(?:[\w.]*[._])?(?:validate|check|ensure|assert|verify|require|sanitize|guard|must_be|reject|enforce)[\w]*(?:valid|safe|allowed|name|path|url|host|input|id|"
    r"target|file|identifier|column|user|key|param|within|inside|public|trusted|domain|origin|scheme|arg|expr|pattern|filter|table|order|sort|request|address|ip)\w*$"
)


# What a predicate returns: a comparison, or a call that asks; a text or a choice of two values is no answer.
ANSWERS = frozenset({"comparison_operator", "boolean_operator", "not_operator", "unary_expression"})
CALLS = frozenset({"call", "call_expression", "method_invocation"})
ASKS = re.compile(
    r"(?i)(?:^|\.)(?:has\w*|includes|test|match\w*|fullmatch|contains\w*|starts_?with|ends_?with|some|every|any|all|is_?\w+|equals\w*|"
    r"anyMatch|allMatch|noneMatch|Boolean|bool)$"
)
# Raises unless its first argument holds, by whose it is: `console.assert` and a logger's go on.
ASSERTS = re.compile(
    r"^(?:(?:chai\.)?assert(?:\.(?:ok|isTrue))?|(?:this\.)?(?:ctx|context)\.assert|(?:(?:ts_invariant|outvariant|_epic_web_invariant)\.)?invariant|"
    r"(?:Preconditions\.)?checkArgument|(?:Assert|Validate)\.isTrue)$"
)
RAISES = re.compile(r"\b(?:throw|raise|panic|exit|abort)\b")
RAISES_OUTSIDE = re.compile(r"\.relative_to$")  # Python: raises where the path is not under the folder
ESCAPES_HTML = re.compile(r"&lt;|&#60;|&#x3[cC];|&#x?(?:[\"'`]|%|\$?\{)|\[[^\]\n^]{0,12}<[^\]\n]{0,12}>[^\]\n]{0,12}\]")
ESCAPES_LDAP = re.compile(r"\\\\(?:5c|2a|28|29)", re.IGNORECASE)
MAPS = re.compile(r"(?:\.(?:map|flatMap)|^Array\.from|(?:^|\.)useMemo)$")  # calls that give what their function returns
ESCAPES_REGEX = re.compile(r"\\\\\$&")  # `replace(/[.*+?]/g, '\\$&')`
WHOLE_FIELDS = re.compile(r"^key:(?:data|values|set|\$set|update|create|doc)$")  # what holds the fields of a record
COMPARISONS = frozenset(
    {"==", "!=", "===", "!==", "<", ">", "<=", ">=", "&&", "in", "instanceof", "and", "or", "not in", "is"}
)
OUT_SOURCES = {
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


MAX_CALLEE_CHARS = 4000
_SPACE = re.compile(r"\s+")
_INNER = re.compile(r"\([^()]*\)")
_GENERIC = re.compile(r"<[\w, .?\[\]]*>(?=\(|$|::)")


def squeezed(text: str) -> str:
    """Return a callee's or a member's text without blanks, with what stands in brackets taken out."""
    if not text.isidentifier():
        if len(text) > MAX_CALLEE_CHARS:  # a chain over a long text is read once a link
            text = text[: MAX_CALLEE_CHARS // 2] + text[-MAX_CALLEE_CHARS // 2 :]
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
