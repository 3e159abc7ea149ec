"""Whether a regular expression can take exponential time: rules find what looks nested, this tells what is.

The expression becomes an automaton of its characters (Glushkov's), in which an edge says which character may follow
which, and how many ways lead there. One text can be read in two ways, over and over, where two different paths go from
a state back to it: then a backtracking engine tries all of them. `(?:-[a-z]+)*` only looks like that; `(?:-?[a-z]+)*`
is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MAX_POSITIONS = 40
MAX_GROUPS = 60
MAX_STEPS = 20_000
_LOOPS_FROM = 10  # `{1,5}` is no loop worth counting
_ALL = (1 << 129) - 1  # ASCII, and one bit for all the rest


def _range(first: int, last: int) -> int:
    first, last = min(first, 128), min(last, 128)
    return ((1 << (last + 1)) - 1) & ~((1 << first) - 1)


_DIGITS = _range(48, 57)
_WORD = _DIGITS | _range(65, 90) | _range(97, 122) | (1 << 95) | (1 << 128)
_SPACE = _range(9, 13) | (1 << 32)
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE, "h": 1 << 9 | 1 << 32}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}


@dataclass(slots=True)
class _Part:
    """A piece of the expression: whether it may be empty, and at which positions it begins and ends."""

    empty: bool = True
    first: Counter[int] = field(default_factory=Counter)
    last: Counter[int] = field(default_factory=Counter)


class _Automaton:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.sets: list[int] = []
        self.follow: Counter[tuple[int, int]] = Counter()
        self._any()

    # --- reading ---------------------------------------------------------------------------------------------------

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _any(self) -> _Part:
        part = self._sequence()
        while self._peek() == "|":
            self.at += 1
            other = self._sequence()
            part = _Part(part.empty or other.empty, part.first + other.first, part.last + other.last)
        return part

    def _sequence(self) -> _Part:
        whole = _Part()
        while self._peek() not in ("", "|", ")"):
            part = self._repeated()
            self._join(whole.last, part.first)
            whole = _Part(
                whole.empty and part.empty,
                whole.first + part.first if whole.empty else whole.first,
                part.last + whole.last if part.empty else part.last,
            )
        return whole

    def _join(self, ends: Counter[int], starts: Counter[int]) -> None:
        for end, ways in ends.items():
            for start, others in starts.items():
                self.follow[end, start] += ways * others

    def _repeated(self) -> _Part:
        part = self._single()
        while True:
            sign = self._peek()
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign, (1, 1))
            if sign == "{":
                end = self.text.find("}", self.at)
                numbers = self.text[self.at + 1 : end].split(",") if end > 0 else ["x"]
                if not all(number.isdigit() or (number == "" and at) for at, number in enumerate(numbers)):
                    return part
                low, high = int(numbers[0]), int(numbers[-1]) if numbers[-1] else None
                self.at = end
            elif sign not in ("*", "+", "?") or not sign:
                return part
            self.at += 1
            kept = self._peek() == "+"  # a possessive one gives nothing back, so that there is no second way
            if kept or self._peek() == "?":
                self.at += 1
            if not kept and (high is None or high >= _LOOPS_FROM):
                self._join(part.last, part.first)
            part = _Part(part.empty or low == 0, part.first, part.last)

    def _single(self) -> _Part:
        char = self._peek()
        self.at += 1
        if char == "(":
            looks = False
            if self._peek() == "?":
                looks = self.text.startswith(("?=", "?!", "?<=", "?<!"), self.at)
                while self._peek() not in (":", "=", "!", ">", ")", ""):
                    self.at += 1
                self.at += self._peek() != ")"
            part = self._any()
            self.at += 1
            return _Part() if looks else part
        if char in ("^", "$"):
            return _Part()
        if char == "\\" and self._peek() in ("b", "B", "A", "Z", "z", "G"):
            self.at += 1
            return _Part()
        chars = self._brackets() if char == "[" else _ALL & ~(1 << 10) if char == "." else self._char(char)
        self.sets.append(chars)
        here = Counter([len(self.sets) - 1])
        return _Part(False, here, here)

    def _char(self, char: str) -> int:
        if char != "\\":
            return 1 << min(ord(char), 128)
        escaped = self._peek()
        self.at += 1
        if escaped.lower() in _CLASSES:
            known = _CLASSES[escaped.lower()]
            return known if escaped.islower() else _ALL & ~known
        if escaped in ("p", "P", "x", "u") or escaped.isdigit():
            return _ALL  # not worth reading
        return 1 << _CONTROLS.get(escaped, min(ord(escaped or " "), 128))

    def _brackets(self) -> int:
        negated = self._peek() == "^"
        self.at += negated
        chars, start = 0, self.at
        while self._peek() and (self._peek() != "]" or self.at == start):
            first = self._peek()
            self.at += 1
            low = self._char(first)
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", "") and low.bit_count() == 1:
                self.at += 2
                high = self._char(self.text[self.at - 1])
                low = _range(low.bit_length() - 1, high.bit_length() - 1)
            chars |= low
        self.at += 1
        return _ALL & ~chars if negated else chars


def is_ambiguous(text: str) -> bool:
    """Whether `text`, a regular expression, can be slow beyond measure; one that is too long to tell counts as such."""
    if text.count("(") > MAX_GROUPS:
        return True
    made = _Automaton(text)
    sets, edges = made.sets, made.follow
    if len(sets) > MAX_POSITIONS:
        return True
    after: dict[int, list[int]] = {}
    for one, other in edges:
        after.setdefault(one, []).append(other)
    # Both readers begin at the same character; where they can be apart and meet there again, there are two ways round.
    steps = 0
    for start in range(len(sets)):
        seen: set[tuple[int, int, bool]] = set()
        waiting = [(start, start, False)]
        while waiting:
            one, other, apart = waiting.pop()
            for left in after.get(one, ()):
                for right in after.get(other, ()):
                    steps += 1
                    if steps > MAX_STEPS:
                        return True
                    if not sets[left] & sets[right]:
                        continue
                    twice = one == other and left == right and edges[one, left] > 1
                    state = (left, right, apart or left != right or twice)
                    if state == (start, start, True):
                        return True
                    if state not in seen:
                        seen.add(state)
                        waiting.append(state)
    return False


def literal_in(code: str, start: int) -> str:
    """Return the expression that is written at or after `start`, as the engine gets it: between quotes or slashes."""
    while start < len(code) and code[start] not in "\"'`/":
        start += 1
    quote, end = code[start : start + 1], start + 1
    raw = quote == "/" or (start > 0 and code[start - 1] in "rR")
    while end < len(code) and code[end] not in (quote, "\n"):
        end += 2 if code[end] == "\\" else 1
    text = code[start + 1 : end]
    return text if raw else text.replace("\\\\", "\\")
