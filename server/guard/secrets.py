# ruff: noqa: E501  # a pattern is read whole
r"""Credentials in text: which spans are one, and how far back an unfinished one may reach.

Two kinds of rule. A *token* rule knows a provider's format, which begins with a literal at a word boundary. A *context*
rule knows what stands before a value (`password = "`, `https://user:`, `Authorization: Basic `); its finding is the value
alone, so that text before it may leave a stream at once. Both are bounded, so no input makes them slow.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

import hyperscan

from server.guard.formats import AFTER_NAME, ANCHORED, CONTEXTS, EDGE, KEY_HEAD, KEY_TAIL, NAME, NAME_WORDS, TOKENS
from server.guard.plausible import entropy_bits, is_context_secret, is_example, is_monotone, is_public
from server.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_VALUE_CHARS = 512
MAX_KEY_CHARS = 16_384
MAX_CANDIDATES = 4_000


class TooManyCandidatesError(ValueError):
    """A text names credentials so often that judging them all would take too long; the scan is not finished."""


_PEM_BEGIN = "-----BEGIN "
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:\s{0,4}(?:Proc-Type|DEK-Info|Version|Comment|Hash):[^\r\n]{0,100}){0,4}"
    r"(?P<b>[^-`]{32,16384})(?:-----END [A-Z0-9 ]{0,40}-----)?"
)


@lru_cache(maxsize=1)
def _compiled() -> tuple[
    list[tuple[str, tuple[str, ...], re.Pattern[str], float]], list[tuple[str, str, re.Pattern[str]]]
]:
    tokens = [
        (rule, literals, re.compile(EDGE + "(?:" + "|".join(map(re.escape, literals)) + ")(?P<v>" + rest + ")"), floor)
        for rule, literals, rest, floor in TOKENS
    ]
    anchored = [(rule, literal, re.compile(pattern)) for rule, literal, pattern in ANCHORED]
    return tokens, anchored


@lru_cache(maxsize=1024)
def _rules_of(word: str) -> tuple[int, ...]:
    """Which token rules a literal may begin."""
    return tuple(number for number, (_, literals, _, _) in enumerate(_compiled()[0]) if word in literals)


def _pattern(before: str, chars: str, minimum: int, *, live: bool) -> re.Pattern[str]:
    quantity = f"{{1,{MAX_VALUE_CHARS}}}\\Z" if live else f"{{{minimum},{MAX_VALUE_CHARS}}}"
    return re.compile(f"(?:{before})(?P<v>{chars}{quantity})")


_CONTEXT_RULES = [
    (c, _pattern(c.before, c.chars, c.min_chars, live=False), _pattern(c.before, c.chars, 1, live=True))
    for c in CONTEXTS
]
_NAMED_RULES = [
    (
        re.compile(head) if head else None,
        _pattern(sep, chars, minimum, live=False),
        _pattern(sep, chars, 1, live=True),
        kind,
    )
    for head, sep, chars, minimum, kind in AFTER_NAME
]
_LINE_WORDS = tuple(sorted({w for c in CONTEXTS for w in c.needs} | set(NAME_WORDS)))


def has_context(line: str) -> bool:
    """Whether `line` holds a word without which no context rule matches; a cheap first look."""
    return not _words().found(line).isdisjoint(_LINE_WORDS)


# A literal that stands in nearly every text is looked for with what must stand around it.
_AROUND = {".": r"[A-Za-z0-9_-]{23}\.[A-Za-z0-9_-]{6}\."}


class _Words:
    """Finds which of many words a text holds in one pass: Hyperscan, for a search each costs a rule's time or more."""

    def __init__(self, exact: tuple[str, ...], caseless: tuple[str, ...]) -> None:
        self._words = (*exact, *caseless)
        flags = [hyperscan.HS_FLAG_SINGLEMATCH] * len(exact)
        flags += [hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_CASELESS] * len(caseless)
        self._database = hyperscan.Database()
        self._database.compile(
            expressions=[_AROUND.get(word, re.escape(word)).encode() for word in self._words],
            ids=list(range(len(self._words))),
            flags=flags,
        )
        self._scratch = threading.local()  # one scan at a time may use a scratch space

    def found(self, text: str) -> set[str]:
        """Return the words that stand in `text`."""
        scratch = getattr(self._scratch, "value", None)
        if scratch is None:
            scratch = self._scratch.value = hyperscan.Scratch(self._database)
        found: set[str] = set()
        words = self._words

        def on_match(index: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            found.add(words[index])

        self._database.scan(text.encode("utf-8", "surrogatepass"), match_event_handler=on_match, scratch=scratch)
        return found


@lru_cache(maxsize=1)
def _words() -> _Words:
    exact = {*_LITERALS, *(literal for _, literal, _ in _compiled()[1]), _PEM_BEGIN}
    return _Words(tuple(sorted(exact)), _LINE_WORDS)


def _contexts(line: str, *, live: bool) -> Iterator[tuple[str, str, re.Match[str], str]]:
    """Yield (rule, kind, match, key) of every context in one line; `live` asks for values that touch its end."""
    low = line.lower()
    for context, full, open_ended in _CONTEXT_RULES:
        if any(word in low for word in context.needs):
            for match in (open_ended if live else full).finditer(line):
                yield context.rule, context.kind, match, ""
    if not any(word in low for word in NAME_WORDS):
        return
    seen = -1
    for number, name in enumerate(NAME.finditer(line)):
        if number > MAX_CANDIDATES:
            raise TooManyCandidatesError
        key_end = KEY_TAIL.match(line, name.end()).end()  # type: ignore[union-attr]  # matches the empty string
        if key_end == seen:
            continue
        seen = key_end
        key_start = KEY_HEAD.search(line[max(0, name.start() - 48) : name.start()])  # the whole word before
        head_chars = len(key_start[0]) if key_start else 0
        start = name.start() - head_chars
        for head, full, open_ended, kind in _NAMED_RULES:
            if head is None or head.search(line[max(0, start - 24) : start]):
                found = (open_ended if live else full).match(line, key_end)
                if found:
                    yield "hardcoded-credential", kind, found, line[start:key_end]


_NEWLINE = re.compile(r"[\r\n]")
_LITERALS = tuple(sorted({literal for _, literals, _, _ in TOKENS for literal in literals}))
TOKEN_PREFIXES = frozenset(literal[:n] for literal in _LITERALS for n in range(1, len(literal) + 1))
_LITERAL_AT_EDGE = re.compile(EDGE + "(?:" + "|".join(map(re.escape, _LITERALS)) + ")")
_PEM_HEAD = re.compile(r"-{5}[A-Z0-9 ]{0,60}-{0,5}")
_PEM_CUT = re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----\s{0,4}\Z")
_PEM_HEADER = re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
# A run is tried where it can begin and nowhere inside, or a long one would cost its length squared.
_RUN = re.compile(r"(?<![^\s\"'`<>()\[\]{},])[^\s\"'`<>()\[\]{},]*+\Z")
_LAST_PIECE = re.compile(r"(?<![A-Za-z0-9_.\-])[A-Za-z0-9_.\-]*+\Z")
_ODD_RUN = re.compile(r"\d{8,10}:|[A-Za-z0-9_~.-]{12}|hooks|discord|webhook|office|sig|access|pat|[78]|\$")


def _finding(rule: str, start: int, end: int, message: str) -> Finding:
    return Finding(
        rule=rule,
        category="secret",
        severity="high",
        message=message,
        start=start,
        end=end,
        cwe="CWE-798",
        fix="Read the value from the environment or a secret store at run time, and rotate the one that was noted.",
    )


def _spans(text: str) -> Iterator[Finding]:
    tokens, anchored = _compiled()
    words = _words().found(text)
    if not words:
        return
    for number in sorted({number for word in words for number in _rules_of(word)}):
        rule, _, pattern, floor = tokens[number]
        for match in pattern.finditer(text):
            value = match["v"]
            if (
                entropy_bits(value) >= floor
                and not is_monotone(value)
                and not is_public(match[0])
                and not is_example(match[0])
            ):
                yield _finding(
                    rule, match.start(), match.end(), f"A credential in the format of {rule} is written in the text."
                )
    for rule, literal, pattern in anchored:
        if literal not in words:
            continue
        for match in pattern.finditer(text):
            if not is_example(match["v"]) and entropy_bits(match["v"]) >= 3.0:
                yield _finding(
                    rule,
                    match.start("v"),
                    match.end("v"),
                    f"A credential in the format of {rule} is written in the text.",
                )
    if _PEM_BEGIN in words:
        for match in _PEM.finditer(text):
            compact = "".join(match["b"].split())
            if len(compact) >= 32 and not is_monotone(compact) and not _KEY_ELIDED.search(match["b"]):
                yield _finding("private-key", match.start(), match.end(), "A private key is written in the text.")
        cut = _PEM_CUT.search(text, max(0, len(text) - 120))
        if cut is not None:  # what follows is not seen: a key, for all that is known
            yield _finding("private-key", cut.start(), cut.end(), "A private key begins where the text ends.")
    if not words.isdisjoint(_LINE_WORDS):
        for start, line in _lines(text):
            if has_context(line):
                for rule, kind, match, key in _contexts(line, live=False):
                    if is_context_secret(kind, match, key):
                        yield _finding(
                            rule,
                            start + match.start("v"),
                            start + match.end("v"),
                            "A credential is written in the text.",
                        )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for end in _NEWLINE.finditer(text):
        yield start, text[start : end.start()]
        start = end.end()
    yield start, text[start:]


_KEY_ELIDED = re.compile(r"\.\.\.|<|…|\{|(?i:your|redacted|example)")


def find_secrets(text: str) -> list[Finding]:
    """Return the credentials in `text`, first to last, without overlaps (the earliest, then the longest, wins)."""
    found: list[Finding] = []
    for finding in sorted(_spans(text), key=lambda f: (f.start, -f.end)):
        if not found or finding.start >= found[-1].end:
            found.append(finding)
    return found


def without_secrets(text: str) -> str:
    """Return `text` with a note in place of each credential; what the audit room keeps of a text."""
    pieces, at = [], 0
    for finding in find_secrets(text):
        pieces += [text[at : finding.start], f"[removed: {finding.rule}]"]
        at = finding.end
    return "".join([*pieces, text[at:]])


def live_from(line: str) -> int:
    """Return where in `line` (the unfinished end of a text, without a newline) a secret may be under way.

    Whatever follows, no finding of `find_secrets` that reaches past the end of `line` begins before this place; it is
    `len(line)` where none can be under way. A private key spans lines: its caller holds it from `private_key_start` on.
    """
    live = _run_start(line)
    dashes = len(line.rstrip("-"))
    if dashes < len(line):
        live = min(live, dashes)
    begin = line.rfind("-----")
    if begin >= 0 and _PEM_HEAD.fullmatch(line, begin):
        live = min(live, begin)
    if has_context(line):
        for _, _, match, _ in _contexts(line, live=True):
            live = min(live, match.start("v"))
    return live


# A word that may grow into a format whose literal stands inside it or at its end: digits (a bot's number), hexadecimal
# digits, and what begins like the rest. Few words of prose do, and those wait for the character after them.
GROWING = re.compile(
    r"(?<![0-9A-Za-z_.~-])(?:\d{1,10}:?A?|[a-f0-9]{1,32}(?:-(?:u(?:s\d{0,2})?)?)?|[MNO][A-Za-z0-9_.-]{0,80}|"
    r"p(?:a(?:t[A-Za-z0-9.]{0,80})?)?|a(?:c(?:c(?:e(?:s(?:s(?:_[a-z0-9_$]{0,80})?)?)?)?)?)?)\Z"
)


_HEADS = frozenset(literal[:2] for literal in _LITERALS)


def may_be_live(word: str) -> bool:
    """Whether the unfinished `word` at the end of a text may be, or become, the beginning of a token."""
    bare = word.lstrip("-.")
    if bare in TOKEN_PREFIXES or GROWING.search(word):
        return True
    if word.isalpha() and word[:2] not in _HEADS:
        return False  # most words of prose: no literal begins like this
    return _LITERAL_AT_EDGE.search(word) is not None or _ODD_RUN.search(word) is not None


def _run_start(line: str) -> int:
    match = _RUN.search(line)
    run = match[0] if match else ""
    if match is None or not run:
        return len(line)
    piece = _LAST_PIECE.search(run)
    partial = piece is not None and piece[0] != "" and piece[0].lstrip("-.") in TOKEN_PREFIXES
    return (
        match.start()
        if partial or _LITERAL_AT_EDGE.search(run) or _ODD_RUN.search(run) or GROWING.search(run)
        else len(line)
    )


def private_key_start(text: str) -> int | None:
    """Return where a private key begins in `text` that has not ended yet, or None."""
    start = text.rfind(_PEM_BEGIN)
    if start < 0 or len(text) - start > MAX_KEY_CHARS + 512:
        return None
    head = _PEM_HEADER.match(text, start)
    if head is None:
        return None
    rest = text[head.end() :]
    return (
        None
        if ("-----END" in rest and rest.rstrip().endswith("-") and rest.count("-----") >= 2) or "`" in rest
        else start
    )
