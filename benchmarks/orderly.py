"""The orderly end of a benchmark that is told to stop."""

from __future__ import annotations

import signal
import sys
import threading


def end_orderly() -> None:
    """Let SIGTERM unwind this process, so that no server is left behind."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
