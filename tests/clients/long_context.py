"""The test-only engine profile "long-context": the embedded model told that it has 40,960 tokens of context.

Agents send 14,000 to 26,000 tokens with their first request, the embedded model was trained for 8,192. Its rotary base
is raised so that positions beyond that stay distinguishable; what it says there is worth little, but every part of the
path is real: sealed weights, vLLM's prefill and cache, the gateway. It ends its answers with their first
sentence, for agents take an answer that was cut at a length for a failure. Never a profile to serve people with.

    python -m tests.clients.long_context STATE
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from server.sealed.embedded import load_embedded
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner, create_signing_key

ROOT = Path(__file__).resolve().parents[2]
MODEL = "long-context-test-profile"
MAX_MODEL_LEN = 40_960
ANSWER_TOKENS = 1024  # agents ask for up to 32,000, and a sentence of this model may never end
FULL_STOP = 30
LAST_TOKEN_IDS = (2, 0, FULL_STOP)  # <|im_end|> and <|endoftext|> before it
SHORT_MODEL_LEN = 8_192


def stretch(config: dict[str, Any]) -> dict[str, Any]:
    """Return the model's configuration for the longer context (the rotary base rises with the stretch, NTK-aware)."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factor = (MAX_MODEL_LEN / SHORT_MODEL_LEN) ** (head_dim / (head_dim - 2))
    changed = {**config, "max_position_embeddings": MAX_MODEL_LEN}
    for place in (changed, changed.get("rope_parameters") or {}):
        if "rope_theta" in place:
            place["rope_theta"] = place["rope_theta"] * factor
    return changed


def end_early(generation: dict[str, Any]) -> dict[str, Any]:
    """Return the model's settings for answers, which the first of `LAST_TOKEN_IDS` ends."""
    return {**generation, "eos_token_id": list(LAST_TOKEN_IDS)}


def seal_profile(state: Path) -> Path:
    """Seal the profile below `state`, under keys that `strongroom serve` finds there, unless it is there already."""
    keys, folder, stamp = state / "keys", state / "models" / MODEL, state / "profile.sha256"
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="ascii") == digest:
        return folder
    shutil.rmtree(state, ignore_errors=True)
    for place in (state, keys, folder.parent):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    create_key_file(keys / "kms.key")
    create_signing_key(keys / "model-signing.pem")
    source = load_embedded()
    config = stretch(json.loads(source.files["config.json"]))
    generation = end_early(json.loads(source.files["generation_config.json"]))
    changed = {"config.json": config, "generation_config.json": generation}
    files = {**source.files, **{name: json.dumps(content).encode() for name, content in changed.items()}}
    seal_model(
        replace(source, files=files),
        folder,
        model_id=MODEL,
        version=1,
        services=[LocalKMS(keys / "kms.key")],
        signer=LocalSigner.load(keys / "model-signing.pem"),
        lineage={"source": "embedded package, context stretched for tests"},
        licence="Apache-2.0",
    )
    stamp.write_text(digest, encoding="ascii")
    return folder


def short_answers(folder: Path) -> Path:
    """Copy the default policies, with answers of chat routes cut to `ANSWER_TOKENS`."""
    shutil.copytree(ROOT / "configs" / "policy", folder)
    path = folder / "10-developers.cedar"
    text = path.read_text(encoding="utf-8")
    assert '@max_tokens("4096")' in text
    path.write_text(text.replace('@max_tokens("4096")', f'@max_tokens("{ANSWER_TOKENS}")'), encoding="utf-8")
    return folder


def write_config(state: Path, folder: Path, port: int, limits: Path) -> Path:
    """Write the configuration that serves the profile into `folder`."""
    path = folder / "long-context.yaml"
    engine = {
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_gib": 4,
        "enforce_eager": True,
        "tool_parser": "hermes",
        "start_timeout_s": 900,
    }
    raw = {
        "state": str(state),
        "public": {"port": port},
        "admin": {"port": port + 1},
        "models": [{"id": MODEL, "path": f"models/{MODEL}", "aliases": ["default"], "engine": engine}],
        "limits": {"file": str(limits)},
        "policy": {"directory": str(short_answers(folder / "policy"))},
        "templates": {"directory": str(ROOT / "configs" / "templates")},
        "guard": {"directory": str(ROOT / "configs" / "guard")},
    }
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(seal_profile(Path(sys.argv[1])))
