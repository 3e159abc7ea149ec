"""One scanning process: blocks of code in on stdin, verdicts out on stdout, one JSON line each."""

from __future__ import annotations

import gc
import json
import resource
import sys

# A tree's nodes refer to each other, so the collector is needed, but not ten times a block.
_COLLECT_AFTER = 100_000


def settle() -> None:
    """Load all rules, and keep the collector from walking over them again and again."""
    from server.guard import code

    code.warm()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 5, 5)


def main() -> int:
    """Serve until stdin ends."""
    memory_bytes = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold a customer's code
    from server.guard import scan, workers

    settle()
    out = sys.stdout.buffer
    out.write(b'"ready"\n')
    out.flush()
    for line in sys.stdin.buffer:
        source, language = json.loads(line)
        out.write(workers.encode(*scan.scan_code(source, language)))
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
