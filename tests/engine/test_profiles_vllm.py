"""vLLM's own parser takes the command that each engine profile of `configs/models/` makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.config import build_engine_argv
from server.host import engine_config
from server.settings import load_settings

ROOT = Path(__file__).parents[2]
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

found = {}
for name, argv in json.load(sys.stdin).items():
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    validate_parsed_serve_args(args)
    found[name] = [args.tensor_parallel_size, args.kv_cache_dtype, args.max_num_batched_tokens,
                   args.enable_prefix_caching, args.speculative_config["num_speculative_tokens"]]
print("FOUND " + json.dumps(found))
"""


@pytest.mark.timeout(600)
def test_vllm_understands_every_profile():
    commands, expected = {}, {}
    for profile in sorted((ROOT / "configs" / "models").glob("*.yaml")):
        (model,) = load_settings(profile).models
        config = engine_config(model, max_model_len=4096, manifest_digest="0" * 64, network_isolation="auto")
        argv = build_engine_argv(config, Path("/run/engine.sock"))
        commands[profile.stem] = argv[argv.index("--") + 1 :]
        extra = model.engine.extra_args
        batched = int(extra["--max-num-batched-tokens"] or 0)
        expected[profile.stem] = [
            model.engine.tensor_parallel_size,
            extra.get("--kv-cache-dtype", "auto"),
            batched,
            True,
            model.engine.speculative_ngram,
        ]
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr[-2000:]
    assert json.loads(found[0][6:]) == expected
