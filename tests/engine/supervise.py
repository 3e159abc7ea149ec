"""A supervisor with one or two real engines, for tests that kill it: events as JSON lines on stdout.

python tests/engine/supervise.py STATE CONFIG_JSON…
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from server.engine.child import RestartPolicy
from server.engine.config import EngineConfig
from server.engine.local import local_engine_spec
from server.engine.supervisor import Supervisor
from server.engine.tree import tree_members


async def main(state: Path, configs: list[EngineConfig]) -> None:
    """Run until a signal comes."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    policy = RestartPolicy(initial_s=1.0, max_s=5.0)
    specs = tuple(local_engine_spec(config, state, environ, restart_policy=policy) for config in configs)

    def tell(event: str, child: str, detail: dict[str, object]) -> None:
        tree = sorted(tree_members(int(str(detail["pid"])))) if "pid" in detail else []
        sys.stdout.write(json.dumps({"event": event, "child": child, "tree": tree, **detail}) + "\n")
        sys.stdout.flush()

    supervisor = Supervisor(specs, tell)
    supervisor.handle_signals()
    await supervisor.start()
    await supervisor.run()


if __name__ == "__main__":
    parsed = [json.loads(text) for text in sys.argv[2:]]
    for fields in parsed:
        fields["path"] = Path(fields["path"])
        fields["cpu_cores"] = tuple(fields.get("cpu_cores", ()))
    asyncio.run(main(Path(sys.argv[1]), [EngineConfig(**fields) for fields in parsed]))
