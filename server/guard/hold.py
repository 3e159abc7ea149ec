"""How far one stream of text may be released: the hold-back window, without I/O and without a clock."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from typing_extensions import override

from server.guard import characters, secrets
from server.guard.fences import may_become_code
from server.guard.lines import LINE, KeptText

if TYPE_CHECKING:
    from server.guard.fences import Segment

# The longest text a context rule wants before a value, with room to spare: older text of a line needs no second look.
_WINDOW_CHARS = 640
_HEAD_CHARS = 256
_PLAIN = re.compile(r"[A-Za-z ,.;!?’()]{0,24}")
_WORD_END = re.compile(r"(?<![A-Za-z0-9_.\-])[A-Za-z0-9_.\-]*+\Z")
_ESCAPE_END = re.compile(r"(?:\x1b[^A-Za-z~\x07]{0,70}|[^\x20-\x7e\w]+)\Z")


class TextHold(KeptText):
    """Takes one text piece by piece; knows which prefix can hold no part of a finding that is not known yet.

    Offsets are characters from the start of the text. `safe` is where release must stop. `findings` are those of prose
    (credentials, characters); one that begins before `safe` is complete. `closed` are the blocks of code that ended and
    wait for a verdict: nothing from the first of them on is safe until it is settled.

    Args:
        whole_is_code: The text has no prose (a raw completion): all of it is held to its end.
        placeholders: Strings that must leave whole, so that they can be replaced.
        passive: Nothing is ever held, so the text is only kept.
    """

    def __init__(
        self, *, whole_is_code: bool = False, placeholders: tuple[str, ...] = (), passive: bool = False
    ) -> None:
        super().__init__()
        self._passive = passive
        self._whole_is_code = whole_is_code
        self._placeholders = placeholders
        self._line_start = 0
        self._line_parts: list[str] = []
        self._head = ""
        self._maybe_code = True
        self._window = ""  # the end of the unfinished line
        self._live = 0  # where in the text something unfinished may begin
        self._key_start: int | None = None  # where a private key began that has not ended
        self._finished = False

    @property
    @override
    def segments(self) -> list[Segment] | None:
        return None if self._passive or self._whole_is_code else self._segmenter.segments

    def push(self, piece: str) -> None:
        """Take the next piece and move `safe`."""
        self._parts.append(piece)
        if self._passive:
            self.num_chars += len(piece)
            self.safe = self.num_chars
            return
        if self._whole_is_code:
            self.num_chars += len(piece)
        elif "\n" not in piece and "\r" not in piece:
            self._extend(piece)
        else:
            for part in LINE.findall(piece):
                self._extend(part)
                if part[-1] in "\r\n":
                    self._end_line()
        self._move()

    def finish(self) -> None:
        """The text has ended: code that is still open is closed, and nothing can grow any more."""
        if self._passive:
            return
        if self._line_parts and not self._whole_is_code:
            self._end_line()
        last = self._segmenter.finish()
        if last is not None:
            self.closed.append(last)
        if self._key_start is not None:
            self._look_at_key(self._key_start)
        self._finished = True
        self._move()

    @override
    def settle(self, segment: Segment) -> None:
        super().settle(segment)
        self._move()

    def _extend(self, part: str) -> None:
        was_live = self._live < self.num_chars
        self.num_chars += len(part)
        self._line_parts.append(part)
        if self._segmenter.open is not None:
            self._live = self.num_chars
            return  # held, and looked at whole when it closes
        if self._maybe_code and len(self._head) < _HEAD_CHARS:
            self._head += part
            self._maybe_code = may_become_code(self._head.rstrip("\r\n"))
        self._window += part
        if not was_live and _PLAIN.fullmatch(part) and not secrets.has_context(self._window[-_WINDOW_CHARS:]):
            word = _WORD_END.search(self._window)
            held = len(word[0]) if word and secrets.may_be_live(word[0]) else 0
            self._live = self.num_chars - held
        else:
            self._look()
        if len(self._window) > 2 * _WINDOW_CHARS + self.num_chars - self._live:
            self._window = self._window[-(_WINDOW_CHARS + self.num_chars - self._live) :]

    def _look(self) -> None:
        window, start = self._window, self.num_chars - len(self._window)
        found = [*secrets.find_secrets(window), *characters.find_characters(window)]
        if found or self.findings:
            self.findings = [f for f in self.findings if f.start < start]
            self.findings += [replace(f, start=f.start + start, end=f.end + start) for f in found]
        if window[-1:] in "\r\n":
            self._live = self.num_chars
        else:
            live = secrets.live_from(window)
            escape = _ESCAPE_END.search(window, max(0, len(window) - 80)) if characters.SUSPECT.search(window) else None
            self._live = start + min(live, escape.start() if escape else live)
        if self._key_start is None and "-----BEGIN" in window:
            begin = secrets.private_key_start(window)
            if begin is not None:
                self._key_start = start + begin

    def _look_at_key(self, start: int) -> None:
        found = secrets.find_secrets(self.text[start:])
        self.findings = [f for f in self.findings if f.start < start]
        self.findings += [replace(f, start=f.start + start, end=f.end + start) for f in found]
        self._key_start = None

    def _end_line(self) -> None:
        line = "".join(self._line_parts)
        was_code = self._segmenter.open is not None
        closed = self._segmenter.feed(line)
        if closed is not None:
            self.closed.append(closed)
            if was_code and self._segmenter.open is None:
                self._window = line  # it may be prose that ended the code, and was not looked at as such
                self._look()
        if (
            self._key_start is not None
            and secrets.private_key_start(self.text[self._key_start : self.num_chars]) is None
        ):
            self._look_at_key(self._key_start)
        self._line_parts, self._head, self._window, self._maybe_code = [], "", "", True
        self._line_start = self._live = self.num_chars

    def _move(self) -> None:
        """Let `safe` follow everything that holds it back; it never goes back."""
        if self._finished:
            safe = self.num_chars
        elif self._whole_is_code:
            safe = 0
        elif self._segmenter.open is not None:
            safe = self._segmenter.open.start
        else:
            safe = self._line_start if self._maybe_code else self._live
        if self.closed:
            safe = min(safe, self.closed[0].start)
        if self._key_start is not None:
            safe = min(safe, self._key_start)
        if self._placeholders and not self._finished:
            safe = min(safe, self._placeholder_start())
        self.safe = max(self.safe, safe)

    def _placeholder_start(self) -> int:
        tail = "".join(self._parts[-64:])
        for placeholder in self._placeholders:
            for n in range(min(len(placeholder) - 1, len(tail)), 0, -1):
                if tail.endswith(placeholder[:n]):
                    return self.num_chars - n
        return self.num_chars
