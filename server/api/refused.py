"""Request fields that every wire format refuses by name, with the reason the caller is given.

A field is refused when it would get around the security template, the tokenizer's exactness, the tenant's isolation or
the engine's own protections. A value that changes nothing (`echo: false`) is accepted.
"""

from __future__ import annotations

from typing import Any

_TEMPLATE = "the server renders the prompt, so that its security template can't be left out."
_IDS = "send text; the server makes the token ids."
_TENSORS = "tensors and engine hand-over data are never taken from a client."
_GRAMMAR = "use response_format with a JSON schema."
_LEAK = "it would return the security template or raw token ids."
_ROUTING = "the server alone decides where a request goes and with which credentials."
_SCHEDULING = "the server alone schedules and isolates requests."
_STOPPING = "it would make the engine ignore the model's own control tokens."

REFUSED_FIELDS: dict[str, str] = {
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "add_generation_prompt": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "documents": _TEMPLATE,
    "prompt_token_ids": _IDS,
    "allowed_token_ids": _IDS,
    "bad_words_token_ids": _IDS,
    "stop_token_ids": _IDS,
    "prompt_embeds": _TENSORS,
    "kv_transfer_params": _TENSORS,
    "ec_transfer_params": _TENSORS,
    "mm_processor_kwargs": _TENSORS,
    "media_io_kwargs": _TENSORS,
    "mm_hashes": _TENSORS,
    "multi_modal_data": _TENSORS,
    "multi_modal_uuids": _TENSORS,
    "vllm_xargs": _TENSORS,
    "structured_outputs": _GRAMMAR,
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "guided_decoding_backend": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "grammar": _GRAMMAR,
    "echo": _LEAK,
    "prompt_logprobs": _LEAK,
    "return_token_ids": _LEAK,
    "return_tokens_as_token_ids": _LEAK,
    "return_prompt_text": _LEAK,
    "skip_special_tokens": _LEAK,
    "spaces_between_special_tokens": _LEAK,
    "api_base": _ROUTING,
    "base_url": _ROUTING,
    "endpoint": _ROUTING,
    "proxy": _ROUTING,
    "headers": _ROUTING,
    "extra_headers": _ROUTING,
    "api_key": _ROUTING,
    "cache_salt": _SCHEDULING,
    "priority": _SCHEDULING,
    "data_parallel_rank": _SCHEDULING,
    "truncate_prompt_tokens": _SCHEDULING,
    "use_beam_search": _SCHEDULING,
    "logits_processors": _SCHEDULING,
    "ignore_eos": _STOPPING,
    "min_tokens": _STOPPING,
    "include_stop_str_in_output": _STOPPING,
    "bad_words": _STOPPING,
}
"""Field name to the reason that stands in the 400."""

HARMLESS: dict[str, Any] = {
    "continue_final_message": False,
    "echo": False,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "skip_special_tokens": True,
    "use_beam_search": False,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "min_tokens": 0,
    "priority": 0,
}
"""The one value of a refused field that asks for nothing; clients send defaults."""
