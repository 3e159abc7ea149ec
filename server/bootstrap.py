"""First start of a state folder: its secrets, the embedded model sealed under a fresh key, and the first API keys.

Every step finds what an earlier run has made and makes the rest; nothing is made twice.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.audit.checkpoint import new_audit_key
from server.auth.key_admin import KeyAdmin, KeySpec
from server.auth.pepper import load_pepper, new_pepper, new_secret
from server.errors import ConfigError
from server.sealed.embedded import EMBEDDED, LICENCE, load_embedded
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.signature import LocalSigner, create_signing_key
from server.store.database import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.settings import Settings

KMS_KEY = "kms.key"
SIGNING_KEY = "model-signing.pem"
MIN_FREE_BYTES = 1024 * 1024 * 1024

CLIENT_SCOPES = frozenset({"model:*", "guard:text:scan", "audit:receipt:read"})
CLIENT_GROUPS = frozenset({"developers"})
ADMIN_SCOPES = frozenset({"*"})
ADMIN_GROUPS = frozenset({"developers", "operators", "security", "auditors"})


def prepare_folders(state: Path) -> None:
    """Make the state folder and its own, closed to other users.

    Raises:
        ConfigError: It can't be made, or the disk is full.
    """
    try:
        for folder in (state, state / "keys", state / "models", state / "logs", state / "audit"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_mode & 0o077:
                folder.chmod(0o700)
        free_bytes = shutil.disk_usage(state).free
    except OSError as err:
        raise ConfigError(
            f"The state folder {state} can't be used: {err.strerror}. Choose another with --state."
        ) from err
    if free_bytes < MIN_FREE_BYTES:
        raise ConfigError(
            f"The disk of {state} has {free_bytes // 2**20} MiB free, at least {MIN_FREE_BYTES // 2**20} are needed."
        )


def prepare_secrets(settings: Settings) -> None:
    """Draw the server's own secrets that are not there yet.

    Raises:
        ConfigError: One can't be written.
    """
    keys = settings.keys_dir
    if not (keys / "pepper").exists():
        new_pepper(keys / "pepper")
    for name in ("cache-salt", "audit-text"):
        if not (keys / name).exists():
            new_secret(keys / name)
    if settings.audit.key is None and not (keys / "audit.key").exists():
        new_audit_key(keys / "audit.key", name=settings.audit.origin)


def prepare_embedded(settings: Settings, say: Callable[[str], None]) -> None:
    """Seal the embedded models that the settings name and the state folder lacks.

    The conversion runs in a process of its own, so that its gigabyte of memory, plaintext weights among it, is gone
    with it.

    Raises:
        ConfigError: The conversion failed; says what its last words were. Or a model is missing that no package holds.
    """
    keys = settings.keys_dir
    if not (keys / KMS_KEY).exists():
        create_key_file(keys / KMS_KEY)
    if not (keys / SIGNING_KEY).exists():
        create_signing_key(keys / SIGNING_KEY)
    for model in settings.models:
        if model.path.exists() or model.engine.kind != "vllm":
            continue
        if model.id not in EMBEDDED:  # never an embedded model's weights under another model's name
            raise ConfigError(
                f"The model {model.id} is not at {model.path}. Seal it there (strongroom seal), or take it out of the "
                f"configuration; only {' and '.join(EMBEDDED)} can be made from packages."
            )
        say(f"sealing the embedded model {model.id} (the chat model takes about half a minute)")
        command = [
            sys.executable,
            "-P",
            "-m",
            "server.bootstrap",
            model.id,
            str(model.path),
            "--kms",
            str(keys / KMS_KEY),
            "--signer",
            str(keys / SIGNING_KEY),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise ConfigError(f"The embedded model {model.id} can't be sealed: {last}")


def prepare_clients(settings: Settings, record: Callable[..., Any]) -> None:
    """Write `client.env` and `admin.env`, with keys that are drawn once; a changed port changes only the address.

    Args:
        settings: The settings.
        record: Puts the creation on the audit log; durable on return.
    """
    chat = next((model.id for model in settings.models if model.engine.runner == "generate"), "")
    embedder = next((model.id for model in settings.models if model.engine.runner == "pooling"), "")
    host = settings.public.host if ":" not in settings.public.host else f"[{settings.public.host}]"
    scheme = "https" if settings.public.tls else "http"
    _write_env(
        settings,
        "client.env",
        record,
        KeySpec("local-developer", "local", CLIENT_GROUPS, CLIENT_SCOPES),
        {
            "OPENAI_BASE_URL": f"{scheme}://{host}:{settings.public.port}/v1",
            "OPENAI_API_KEY": "",
            "MODEL": chat,
            **({"EMBEDDING_MODEL": embedder} if embedder else {}),
        },
    )
    _write_env(
        settings,
        "admin.env",
        record,
        KeySpec("local-operator", "local", ADMIN_GROUPS, ADMIN_SCOPES),
        {
            "ADMIN_BASE_URL": f"http://{settings.admin.host}:{settings.admin.port}",
            "ADMIN_API_KEY": "",
        },
    )


def _write_env(
    settings: Settings, name: str, record: Callable[..., Any], spec: KeySpec, values: dict[str, str]
) -> None:
    path = settings.state / name
    secret_name = next(key for key, value in values.items() if key.endswith("API_KEY") and not value)
    known = read_env(path).get(secret_name)
    if known is None:
        store = Store.open(settings.store_url)
        try:
            admin = KeyAdmin(store, load_pepper(settings.keys_dir / "pepper"), record=record, by="first start")
            _, secret = admin.create(spec)
        finally:
            store.close()
        known = secret.reveal()
    values[secret_name] = known
    lines = [f"{key}={value}\n" for key, value in values.items()]
    text = "".join(lines) + "export " + " ".join(values) + "\n"
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def read_env(path: Path) -> dict[str, str]:
    """Return the `NAME=value` lines of an env file; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def main(argv: list[str] | None = None) -> int:
    """Convert and seal one embedded model; what `prepare_embedded` runs."""
    from server.sealed.seal import seal_model

    parser = argparse.ArgumentParser(prog="python -m server.bootstrap", description=main.__doc__)
    parser.add_argument("model_id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kms", type=Path, required=True)
    parser.add_argument("--signer", type=Path, required=True)
    args = parser.parse_args(argv)
    seal_model(
        load_embedded(args.model_id),
        args.out,
        model_id=args.model_id,
        version=1,
        services=[LocalKMS(args.kms)],
        signer=LocalSigner.load(args.signer),
        lineage={"source": "embedded package"},
        licence=LICENCE,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
