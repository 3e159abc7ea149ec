"""How long `strongroom audit verify` takes and what it holds in memory, by size of the log and of its commits.

    python -m benchmarks.audit.verify --entries 1000000

Each verification runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from server.audit.log import AuditLog
from server.audit.tiles import pack_entries
from tests.unit.audit.audit_kit import event, new_signer, request_pair

CHILD = """
import json, resource, sys, time
from pathlib import Path
from server.audit.checkpoint import VerifierKey
from server.audit.verify import Verifier
start = time.perf_counter()
report = Verifier(Path(sys.argv[1]), key=VerifierKey.parse(sys.argv[2])).verify()
seconds = time.perf_counter() - start
print(json.dumps({"entries": report.size, "commits": report.num_commits, "seconds": round(seconds, 2),
                  "cpu_s": round(time.process_time(), 2),
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
"""


def write(directory: Path, num_entries: int, group: int) -> None:
    """Write a log without waiting for the disk: what is measured is reading it."""
    log = AuditLog(directory, new_signer())
    real, os.fdatasync = os.fdatasync, lambda _descriptor: None
    extra = {"principal": {"subject": "alice", "tenant": "blue"}, "model": "smol", "filler": "x" * 150}
    pending: list[bytes] = []
    for number in range(num_entries // 2):
        pending += request_pair(number, **extra)
        if len(pending) >= group:
            if log.is_segment_full:
                digest = log.rotate()
                pending.insert(0, event("audit:segment:opened", number, open=[], previous_sha256=digest))
            log.commit(pack_entries(pending), pending)
            pending = []
            if number % 4096 < group:
                log.publish()
    if pending:
        log.commit(pack_entries(pending), pending)
    os.fdatasync = real
    log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 8])
    parser.add_argument("--dir", type=Path, default=None)
    args = parser.parse_args()
    for group in args.groups:
        for entries in (args.entries // 10, args.entries):
            with tempfile.TemporaryDirectory(dir=args.dir) as folder:
                directory = Path(folder) / "audit"
                write(directory, entries, group)
                size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
                start_s = time.perf_counter()
                output = subprocess.run(
                    [sys.executable, "-c", CHILD, str(directory), str(new_signer().key)],
                    check=True,
                    capture_output=True,
                ).stdout
                row = {**json.loads(output), "log_mib": size >> 20, "wall_s": round(time.perf_counter() - start_s, 2)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
