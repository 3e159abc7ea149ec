"""How far a text may be released where nothing is blocked: prose as it comes, code a statement at a time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from server.guard.fences import Segment, Segmenter

if TYPE_CHECKING:
    from server.types import Finding

# A bracket in a string is not told from one in code, so a statement is never waited for longer than this.
MAX_LINES = 24
LINE = re.compile(r"[^\r\n]*[\r\n]|[^\r\n]+")


class KeptText:
    """A text that comes in pieces, and what is known of it.

    Offsets are characters from the start. `safe` is where release must stop. `closed` are the blocks of code that ended
    and wait for a verdict.
    """

    def __init__(self) -> None:
        self.num_chars = 0
        self.safe = 0
        self.findings: list[Finding] = []
        self.closed: list[Segment] = []
        self._parts: list[str] = []
        self._segmenter = Segmenter()

    @property
    def segments(self) -> list[Segment] | None:
        """The runs of code that ended, as `fences.segments_of` would give them; None where nobody looked for any."""
        return self._segmenter.segments

    @property
    def text(self) -> str:
        """All of the text so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def settle(self, segment: Segment) -> None:
        """Say that the verdict on a closed block is in, or that somebody sees to it."""
        self.closed.remove(segment)


class LineHold(KeptText):
    r"""What `TextHold` is for `annotate`: in a fence a line stays until its statement has ended; nothing else is held.

    A statement has ended with its line, unless a round or square bracket is open or the line goes on (`\\`, `,`).
    Blocks in `closed` are judged while the answer goes on, and hold nothing back; nor do `findings`: they wait for the
    end, for nothing is taken out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._line: list[str] = []
        self._depth = 0
        self._num_waiting = 0

    def push(self, piece: str) -> None:
        """Take the next piece and move `safe`."""
        self._parts.append(piece)
        self.num_chars += len(piece)
        if "\n" not in piece and "\r" not in piece:
            self._line.append(piece)
        else:
            start = self.num_chars - len(piece)
            for part in LINE.findall(piece):
                start += len(part)
                self._line.append(part)
                if part[-1] in "\r\n":
                    self._end_line(start)
        if not self._segmenter.in_fence:
            self.safe = self.num_chars

    def finish(self) -> None:
        """The text has ended: code that is still open is closed, and all of it may leave."""
        if self._line:
            self._end_line(self.num_chars)
        last = self._segmenter.finish()
        if last is not None:
            self.closed.append(last)
        self.safe = self.num_chars

    def _end_line(self, end: int) -> None:
        line = "".join(self._line)
        self._line = []
        was_code = self._segmenter.in_fence
        closed = self._segmenter.feed(line)
        if closed is not None:
            self.closed.append(closed)
        if was_code and self._segmenter.in_fence:
            self._depth += line.count("(") + line.count("[") - line.count(")") - line.count("]")
            self._num_waiting += 1
            if self._num_waiting < MAX_LINES and (self._depth > 0 or line.rstrip().endswith(("\\", ","))):
                return
        self._depth = self._num_waiting = 0
        self.safe = end
