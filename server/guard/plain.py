# a pattern is read whole
"""Languages read without a grammar: their text without comments, cut into statements, instructions or blocks."""

from __future__ import annotations

import re

_SQL_TOKEN = re.compile(r"--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*(?:'|\Z)|\$(\w*)\$.*?(?:\$\1\$|\Z)", re.DOTALL)
_BODY = re.compile(r"(\$\w*\$)(.*?)(\$\w*\$|\Z)", re.DOTALL)
_HASH_COMMENT = re.compile(r"(?m)^[ \t]*#(?!!)[^\n]*")
_INSTRUCTION = re.compile(r"(?m)^[ \t]*[A-Z]+(?=\s)(?:[^\n\\]|\\(?!\s*\n)|\\[ \t]*\n(?:[ \t]*(?:#[^\n]*)?\n)*)*")
_HCL_TOKEN = re.compile(r"#[^\n]*|//[^\n]*|/\*.*?(?:\*/|\Z)|\"(?:[^\"\\\n]|\\.)*\"", re.DOTALL)


class PlainText:
    """What `Tree` is for a language with a grammar, as far as patterns need it."""

    def __init__(self, source: str, language: str) -> None:
        self.source = source
        self.language = language
        if language == "sql":
            self.code, self.masked = _sql(source)
            self.statements = _sql_statements(self.code, self.masked)
        else:
            self.code = self.masked = _HASH_COMMENT.sub(lambda m: " " * len(m[0]), source)
            self.statements = [match.span() for match in _INSTRUCTION.finditer(self.code)]


def _sql(source: str) -> tuple[str, str]:
    code, masked, position = [], [], 0
    for match in _SQL_TOKEN.finditer(source):
        between = source[position : match.start()]
        text = match[0]
        blank = re.sub(r"[^\n]", " ", text)
        body = _BODY.fullmatch(text)
        if body is not None:  # what stands between `$$` is code again, with texts and comments of its own
            inner = _sql(body[2])
            code += [between, body[1] + inner[0] + body[3]]
            masked += [between, body[1] + inner[1] + body[3]]
            position = match.end()
            continue
        is_comment = text.startswith(("--", "/*"))
        code += [between, blank if is_comment else text]
        masked += [between, blank if is_comment or text[0] == "'" else text]
        position = match.end()
    rest = source[position:]
    return "".join([*code, rest]), "".join([*masked, rest])


def _sql_statements(code: str, masked: str) -> list[tuple[int, int]]:
    """Split after `;` and at `GO` or `/` lines; a routine's body stays with its head."""
    spans, start, depth, in_dollar = [], 0, 0, False
    for match in re.finditer(
        r"(?i);|^[ \t]*(?:GO|/)[ \t\r]*$|\$\w*\$|\b(?:BEGIN|CASE)\b|\bEND(?:\s+(?:IF|LOOP|WHILE|REPEAT))?\b",
        masked,
        re.MULTILINE,
    ):
        word = match[0].strip().upper()
        if word.startswith("$"):
            in_dollar = not in_dollar
        elif word in ("BEGIN", "CASE"):
            following = masked[match.end() : match.end() + 14].lstrip().upper()
            depth += 0 if word == "BEGIN" and following.startswith((";", "TRAN", "WORK")) else 1
        elif word == "END":
            depth = max(0, depth - 1)
        elif word in ("GO", "/"):
            depth, in_dollar = 0, False
            spans.append((start, match.start()))
            start = match.end()
        elif word == ";" and depth == 0 and not in_dollar:
            head = masked[start : match.start()].lstrip()[:40].upper()
            if (
                re.match(
                    r"CREATE\s+(?:OR\s+REPLACE\s+)?(?:DEFINER.{0,30})?(?:PROCEDURE|FUNCTION|TRIGGER|PACKAGE)", head
                )
                and "BEGIN" not in masked[start : match.start()].upper()
                and re.search(r"(?i)\b(?:IS|AS)\b", masked[start : match.start()])
                and re.search(r"(?i)\bBEGIN\b", masked[match.end() : match.end() + 600])
            ):
                continue
            spans.append((start, match.end()))
            start = match.end()
    if code[start:].strip():
        spans.append((start, len(code)))
    return spans


def blocks(masked: str) -> list[tuple[int, int]]:
    """Return the top-level `head { … }` blocks of a brace language."""
    spans, depth, start = [], 0, 0
    for match in re.finditer(r"[{}]", masked):
        if match[0] == "{":
            if depth == 0:
                start = masked.rfind("\n", 0, match.start()) + 1
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                spans.append((start, match.end()))
    return spans
