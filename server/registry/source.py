"""A model folder as the gateway reads it: digest, signer and tokenizer files, verified; never its weights or key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError
from server.sealed.model import open_sealed, read_plain_file
from server.sealed.signature import TrustedSigner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from server.settings import ModelSettings, SealSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What the gateway and the supervisor need to know of a sealed model. `digest` is the core's, in hex."""

    digest: str
    manifest_digest: str
    version: int
    signer: str | None
    max_model_len: int
    files: Mapping[str, bytes]


def open_model(model: ModelSettings, seal: SealSettings, *, floor: int) -> ModelSource:
    """Check a sealed model's folder and read its configuration.

    Raises:
        SealError: The model was refused.
        ConfigError: Its configuration lacks what serving needs.
    """
    trusted = [TrustedSigner.load(path) for path in seal.trusted_signers]
    sealed = open_sealed(model.path, trusted_signers=trusted, floor=floor, allow_unsigned=seal.allow_unsigned)
    if sealed.core.model_id != model.id:
        raise ConfigError(
            f"{model.path} holds the model '{sealed.core.model_id}', the settings expect '{model.id}'; mend either."
        )
    names = {record.name for record in sealed.manifest.files}
    files = {name: read_plain_file(sealed, name) for name in TOKENIZER_FILES if name in names}
    config: dict[str, Any] = json.loads(read_plain_file(sealed, "config.json"))
    max_model_len = config.get("max_position_embeddings")
    if not isinstance(max_model_len, int):
        raise ConfigError(f"{model.path}/config.json names no context length; set engine.max_model_len.")
    return ModelSource(
        digest=sealed.core_digest.hex(),
        manifest_digest=sealed.manifest_digest.hex(),
        version=sealed.core.version,
        signer=sealed.signer,
        max_model_len=max_model_len,
        files=files,
    )
