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

    from server.sealed.stage import OpenedFiles
    from server.settings import ModelSettings, SealSettings

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What the gateway and the supervisor need to know of a sealed model.

    `digest` is the core's, in hex; `end_ids` are the tokens that may end an answer.
    """

    digest: str
    manifest_digest: str
    version: int
    signer: str | None
    max_model_len: int
    end_ids: frozenset[int]
    files: Mapping[str, bytes]


def open_model(
    model: ModelSettings, seal: SealSettings, *, floor: int, opened: OpenedFiles | None = None
) -> ModelSource:
    """Check a sealed model's folder and read its configuration.

    Args:
        model: The model's settings.
        seal: Whose signature counts.
        floor: The lowest version that may be opened.
        opened: The files of a model that has them sealed; needed for such a model, and for no other.

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
    if sealed.sealed_files is None:
        names = {record.name for record in sealed.manifest.files} & {*TOKENIZER_FILES, CONFIG_NAME, GENERATION_NAME}
        contents: Mapping[str, bytes] = {name: read_plain_file(sealed, name) for name in names}
    elif opened is not None and opened.manifest_digest == sealed.manifest_digest.hex():
        contents = opened.files
    else:
        raise ConfigError(
            f"{model.path} has its config and tokenizer sealed; only 'strongroom serve' can hand them to this process."
            if opened is None
            else f"{model.path} was replaced since its files were opened. Start again."
        )
    files = {name: contents[name] for name in TOKENIZER_FILES if name in contents}
    if CONFIG_NAME not in contents:
        raise ConfigError(f"{model.path} was sealed without a {CONFIG_NAME}, so no engine can serve it. Seal it again.")
    config: dict[str, Any] = json.loads(contents[CONFIG_NAME])
    max_model_len = config.get("max_position_embeddings")
    if not isinstance(max_model_len, int):
        raise ConfigError(f"{model.path}/config.json names no context length; set engine.max_model_len.")
    return ModelSource(
        digest=sealed.core_digest.hex(),
        manifest_digest=sealed.manifest_digest.hex(),
        version=sealed.core.version,
        signer=sealed.signer,
        max_model_len=max_model_len,
        end_ids=_end_ids(config) | _end_ids(json.loads(contents.get(GENERATION_NAME, b"{}"))),
        files=files,
    )


def _end_ids(config: dict[str, Any]) -> frozenset[int]:
    found = config.get("eos_token_id")
    return frozenset([found] if isinstance(found, int) else found or [])
