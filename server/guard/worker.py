"""One scanning process: blocks of code in on stdin, verdicts out on stdout, one JSON line each."""

from __future__ import annotations

import json
import resource
import sys


def main() -> int:
    """Serve until stdin ends."""
    memory_bytes = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold a customer's code
    from server.guard import code, scan, workers

    code.warm()
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
