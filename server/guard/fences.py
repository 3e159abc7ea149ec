# ruff: noqa: E501  # a pattern is read whole
"""Where code stands in a model's answer, line by line, so that a stream and a whole text are cut alike.

Fences follow CommonMark, with more taken for a fence than it would (any indent, list and quote markers before it, an opener
at the end of a line of prose): what is wrongly taken for code is only scanned twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Nothing here may give back what it took: a line is as long as its writer likes, and no match may take its square.
_OPENER = re.compile(r"^(?P<lead>[ \t>]*+(?:(?:[*+-]|\d{1,9}[.)])[ \t>]++)*+)(?P<mark>`{3,}+|~{3,}+)(?P<info>[^`]*+)$")
_LATE_OPENER = re.compile(r"(?<!`)(?P<mark>`{3,}+)(?P<info>[\w+#.-]{0,24})[ \t]*+$")
_MAYBE_OPENER = re.compile(r"^[ \t>*+\-\d.)]*(?:`*|~*)$")
_LOOSE = re.compile(
    r"^[ \t]*(?:from [\w.]+ import |import (?:[\w.]+(?: as \w+)?(?:, ?[\w.]+)*;?$|.* from ['\"]|['\"]|\(|static |type |\{)|(?:async )?def \w+ ?\(|"
    r"class \w+ ?[(:{]|class \w+ (?:extends|implements) |@\w[\w.]*+(?:\(.*\))?$|if __name__|(?:const|let|var) [\w${\[][^.?!]*=|(?:async )?function[ *]\w*|"
    r"export (?:default|const|function|async|class|type|interface)|module\.exports|package [\w.]+;?$|"
    r"(?:public|private|protected) [\w<>\[\], ?]++[({;=]|func (?:\(.*\) )?\w+\(|type \w+ (?:struct|interface)|"
    r"#\s*(?:include|define|pragma|ifn?def)\b|using (?:namespace|std)|template ?<|namespace \w+ ?\{|"
    r"(?:static |inline |extern |unsigned |const )*(?:int|void|char|bool|double|float|long|size_t|struct \w+|FILE|auto|std::\w+(?:<.*>)?) [*&]?\w+ ?(?:\(|\[|=|;)|"
    r"typedef |#!|(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|ALTER|GRANT|DROP|DECLARE|EXEC|EXECUTE)\b.*(?:[*;(=,]|\bFROM\b|\bTO\b|$)|"
    r"FROM [\w./:@-]+(?: (?:AS|as) [\w-]+)?$|(?:resource|provider|variable|module|data|output) \"|(?:terraform|locals) \{|"
    r"</?(?:!DOCTYPE|html|head|body|script|pre|code|style|form|iframe|svg)\b|<\?(?:php|xml)|"
    r"(?:String|final|Integer|List<.*>|Map<.*>|Connection|Statement|ResultSet|File) \w+ ?=|(?:sudo|curl|wget|chmod|rm -|eval|apt-get|pip|npm) [-\w\"'$/.]+|"
    r"with open\()"
)
_WORDS = [
    "from",
    "import",
    "async",
    "def",
    "class",
    "if",
    "const",
    "let",
    "var",
    "function",
    "export",
    "module",
    "package",
    "public",
    "private",
    "protected",
    "func",
    "type",
    "using",
    "template",
    "namespace",
    "static",
    "inline",
    "extern",
    "unsigned",
    "int",
    "void",
    "char",
    "bool",
    "double",
    "float",
    "long",
    "size_t",
    "struct",
    "FILE",
    "auto",
    "typedef",
    "SELECT",
    "INSERT",
    "UPDATE",
    "DELETE",
    "CREATE",
    "ALTER",
    "GRANT",
    "DROP",
    "DECLARE",
    "EXEC",
    "EXECUTE",
    "FROM",
    "resource",
    "provider",
    "variable",
    "data",
    "output",
    "terraform",
    "locals",
    "String",
    "final",
    "Integer",
    "List",
    "Map",
    "Connection",
    "Statement",
    "ResultSet",
    "File",
    "sudo",
    "curl",
    "wget",
    "chmod",
    "rm",
    "eval",
    "apt-get",
    "pip",
    "npm",
    "with",
    "std",
]
_WORD_PREFIXES = frozenset(word[:n] for word in _WORDS for n in range(1, len(word) + 1))
_FIRST_WORD = re.compile(r"[A-Za-z](?:[A-Za-z_]|-(?=g))*")
_HEADING = re.compile(r"#{1,6} (?!\s*(?:i|d|p))")
_PROSE = re.compile(r"^[A-Z][a-z'’]*,? (?:[\w'’`\"*()/:+-]+,? ){2,}[\w'’`\"*(){}/.:;!?-]*")
_CODE_END = re.compile(r"[;{}]\s*$|^\S+ ?=|\);?\s*$")


@dataclass(slots=True)
class Segment:
    """A run of code: `start` and `end` bound all of it, `body_start` and `body_end` what is between its fences."""

    start: int
    body_start: int
    body_end: int
    end: int
    label: str | None
    closed: bool = False


def is_loose_code(line: str) -> bool:
    """Whether a line outside a fence reads as the first line of code."""
    return _LOOSE.match(line) is not None


def may_become_code(line: str) -> bool:
    """Whether an unfinished line outside a fence may still turn out to open code; prose is told apart by its first word."""
    if _MAYBE_OPENER.match(line) or _OPENER.match(line):
        return True
    stripped = line.lstrip()
    if not stripped or _HEADING.match(stripped):
        return not stripped
    word = _FIRST_WORD.match(stripped)
    if word is None:
        return stripped[0] in "<#@"
    if word.end() == len(stripped):
        return word[0] in _WORD_PREFIXES
    return word[0] in _WORDS


class Segmenter:
    """Cuts a text into prose and code, one whole line at a time.

    Feed each line with its newline, the last one without; then `finish()`. `open` is the code under way, `segments` the
    finished ones. The same lines give the same segments, however they came.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.open: Segment | None = None
        self._mark = ""
        self._position = 0

    @property
    def in_fence(self) -> bool:
        """Whether the code under way stands in a fence."""
        return self.open is not None and bool(self._mark)

    def feed(self, line: str) -> Segment | None:
        """Take one line; return the segment that it closed, if any."""
        start, end = self._position, self._position + len(line)
        self._position = end
        bare = line.rstrip("\r\n")
        if self.open is not None:
            if self._mark:
                if self._closes(bare):
                    return self._close(start, end)
                self.open.body_end = self.open.end = end
                return None
            opener = _OPENER.match(bare)
            if opener is None and not (_PROSE.match(bare) and not _CODE_END.search(bare)):
                self.open.body_end = self.open.end = end
                return None
            done = self._close(start, start)
            self._begin(bare, start, end)
            return done
        self._begin(bare, start, end)
        return None

    def finish(self) -> Segment | None:
        """End the text; return the code that was still open, if any."""
        if self.open is None:
            return None
        closed = self._close(self.open.body_end, self.open.body_end)
        closed.closed = False
        return closed

    def _begin(self, bare: str, start: int, end: int) -> None:
        opener = _OPENER.match(bare) or _LATE_OPENER.search(bare)
        if opener is not None:
            self._mark = opener["mark"]
            self.open = Segment(start, end, end, end, opener["info"].strip() or None)
        elif _LOOSE.match(bare):
            self._mark = ""
            self.open = Segment(start, start, end, end, None)

    def _closes(self, bare: str) -> bool:
        stripped = bare.strip(" \t>")
        return len(stripped) >= len(self._mark) and not stripped.strip(self._mark[0])

    def _close(self, body_end: int, end: int) -> Segment:
        segment = self.open
        if segment is None:
            raise RuntimeError("no code is under way")
        segment.body_end, segment.end, segment.closed = body_end, end, True
        self.segments.append(segment)
        self.open, self._mark = None, ""
        return segment


def split_lines(text: str) -> list[str]:
    r"""Split after every `\n` and after every `\r`, so that no client's idea of a line hides a fence."""
    return re.findall(r"[^\r\n]*[\r\n]|[^\r\n]+", text)


def segments_of(text: str) -> list[Segment]:
    """Return the runs of code in a whole text."""
    segmenter = Segmenter()
    for line in split_lines(text):
        segmenter.feed(line)
    segmenter.finish()
    return segmenter.segments
