"""A logits processor of vLLM that keeps banned tokens from being sampled: control tokens, and what policy bans.

It is loaded in every engine (`vllm.logits_processors`) and does nothing until it is told to. Model-wide bans come from
vLLM's `additional_config`, bans of one request from its `vllm_xargs`, which only the gateway can set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from typing_extensions import override
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from server.engine.wire import BANS_FIELD
from server.errors import StartError
from serving_kernels.token_set import NO_SET, is_cheaper_by_index, pack_token_set

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

CONFIG_KEY: Final = "strongroom_token_bans"
REQUEST_KEY: Final = BANS_FIELD
MAX_REQUEST_TOKENS: Final = 65_536
_FIELDS: Final = {"control_tokens": bool, "keep": list, "token_ids": list}


def parse_bans(additional_config: Any) -> tuple[bool, frozenset[str], frozenset[int]]:
    """Return (ban control tokens, names of those to keep, further ids) from vLLM's `additional_config`.

    Raises:
        StartError: A field is unknown or has the wrong type.
    """
    raw = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(raw, dict):
        raise StartError(f"{CONFIG_KEY} must be an object.")
    for name, value in raw.items():
        if name not in _FIELDS or not isinstance(value, _FIELDS[name]):
            raise StartError(f"{CONFIG_KEY}.{name} is unknown or has the wrong type; expected {', '.join(_FIELDS)}.")
    keep, token_ids = raw.get("keep", []), raw.get("token_ids", [])
    if not all(isinstance(name, str) for name in keep) or not all(type(token) is int for token in token_ids):
        raise StartError(f"{CONFIG_KEY}.keep holds token texts and {CONFIG_KEY}.token_ids whole numbers.")
    return bool(raw.get("control_tokens")), frozenset(keep), frozenset(token_ids)


def control_tokens(added: dict[int, Any], *, ends: frozenset[int], keep: frozenset[str]) -> frozenset[int]:
    """Return the control tokens of a vocabulary that a model never needs to say.

    Args:
        added: Id to added token (with `content` and `special`), as a tokenizer lists them.
        ends: Tokens that end a turn.
        keep: Texts of tokens that stay, such as those a tool parser reads.

    Raises:
        StartError: A token to keep does not exist.
    """
    unknown = keep - {str(token.content) for token in added.values()}
    if unknown:
        raise StartError(f"{CONFIG_KEY}.keep names {sorted(unknown)}, which this model's vocabulary does not have.")
    return frozenset(i for i, token in added.items() if token.special and token.content not in keep) - ends


def request_bans(params: SamplingParams) -> frozenset[int]:
    """Return the tokens that a request's own policy bans.

    Raises:
        ValueError: They are not a list of at most `MAX_REQUEST_TOKENS` token ids.
    """
    banned = (params.extra_args or {}).get(REQUEST_KEY, [])
    if not isinstance(banned, list) or len(banned) > MAX_REQUEST_TOKENS or not all(type(t) is int for t in banned):
        raise ValueError(f"{REQUEST_KEY} must be a list of at most {MAX_REQUEST_TOKENS} token ids.")
    return frozenset(banned)


class TokenMaskProcessor(LogitsProcessor):
    """Sets banned logits to minus infinity before anything is sampled.

    Few tokens, the same for all, are written by index; larger or differing sets go through the mask kernel on a CUDA
    device and through its reference elsewhere.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        self._device = torch.device(device)
        self._num_tokens = int(vllm_config.model_config.get_vocab_size())
        ban_control, keep, further = parse_bans(vllm_config.additional_config)
        added, self._ends = _vocabulary(vllm_config.model_config)
        banned = further | (control_tokens(added, ends=self._ends, keep=keep) if ban_control else frozenset())
        if banned & self._ends:
            raise StartError(
                f"{CONFIG_KEY}.token_ids bans {sorted(banned & self._ends)}, without which no answer ends."
            )
        self._everyone = frozenset(token for token in banned if token < self._num_tokens)
        self._by_index = torch.tensor(sorted(self._everyone), dtype=torch.int64, device=self._device)
        self._is_few = is_cheaper_by_index(len(self._everyone), self._num_tokens)
        self._own: dict[int, frozenset[int]] = {}
        self._rows = torch.empty(0, dtype=torch.int32, device=self._device)
        self._sets = torch.empty(0, dtype=torch.int32, device=self._device)
        self._packed: dict[frozenset[int], torch.Tensor] = {}
        self._ban = _choose_op(self._device)

    @classmethod
    @override
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        request_bans(sampling_params)

    @override
    def is_argmax_invariant(self) -> bool:
        return False

    @override
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        changed = process_dict_updates(self._own, batch_update, lambda params, _, __: self._own_set(params))
        if not self._uses_sets():
            self._rows = self._rows[:0]
            return
        if batch_update is None or (not changed and self._rows.shape[0] == batch_update.batch_size):
            return
        distinct = [self._everyone, *sorted({*self._own.values()}, key=sorted)]
        number = {tokens: row for row, tokens in reversed(list(enumerate(distinct)))}
        rows = [number[self._own.get(i, self._everyone)] for i in range(batch_update.batch_size)]
        if not self._everyone:
            rows = [row or NO_SET for row in rows]
        self._rows = torch.tensor(rows, dtype=torch.int32, device=self._device)
        # Most requests are under the same few policies: a batch that changes packs only what is new in it.
        self._packed = {
            tokens: self._packed[tokens] if tokens in self._packed else pack_token_set(tokens, self._num_tokens)
            for tokens in distinct
        }
        self._sets = torch.stack([self._packed[tokens] for tokens in distinct]).to(self._device)

    @override
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._uses_sets():
            self._ban(logits, self._sets, self._rows)
        elif self._everyone:
            logits.index_fill_(1, self._by_index, float("-inf"))
        return logits

    def _uses_sets(self) -> bool:
        """Whether rows differ, or the one set is too large to be written by index."""
        return bool(self._own) or not self._is_few

    def _own_set(self, params: SamplingParams) -> frozenset[int] | None:
        # A token that ends the answer stays possible, so that no request can ban everything.
        own = frozenset(t for t in request_bans(params) if 0 <= t < self._num_tokens) - self._ends
        return own | self._everyone if own else None


def _vocabulary(model_config: Any) -> tuple[dict[int, Any], frozenset[int]]:
    """Return the tokenizer's added tokens and every token that may end an answer."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    ends: set[int] = set()
    for source in (tokenizer, model_config.hf_config, model_config.try_get_generation_config()):
        found = source.get("eos_token_id") if isinstance(source, dict) else getattr(source, "eos_token_id", None)
        ends.update([found] if isinstance(found, int) else found or [])
    return dict(getattr(tokenizer, "added_tokens_decoder", None) or {}), frozenset(ends)


def _choose_op(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    if device.type == "cuda":
        from serving_kernels import launch, token_mask

        if not launch.INTERPRETED:
            return token_mask.ban_tokens
    from serving_kernels.reference import token_mask as reference

    return reference.ban_tokens
