"""The gateway process, without the cycle collector; on SIGUSR1 it writes what only the collector could have freed.

What reference counts free is gone when a request is; what needs the collector stays until it runs, half an hour at a
time, and looks like a leak.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections import Counter
from pathlib import Path

from server import gateway


def write_cycles(path: Path) -> None:
    """Write how many objects of each class stood in cycles, but for Python's own, and free them."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    names = Counter(f"{type(it).__module__}.{type(it).__qualname__}" for it in gc.garbage)
    gc.garbage.clear()
    gc.collect()
    found = {name: count for name, count in names.items() if not name.startswith("builtins.")}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(path)


if __name__ == "__main__":
    where = Path(sys.argv.pop(1))
    signal.signal(signal.SIGUSR1, lambda *_: write_cycles(where))
    gc.set_threshold = lambda *_: None
    gc.disable()
    sys.exit(gateway.main())
