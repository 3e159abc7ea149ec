"""The logits processor bans what it was told to, row by row, through every change of the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from server.engine.config import EngineConfig, build_engine_argv
from server.engine.vllm.token_mask import CONFIG_KEY, REQUEST_KEY, TokenMaskProcessor, control_tokens, parse_bans
from server.errors import ConfigError, StartError

NUM_TOKENS = 1000
ADDED = {
    0: SimpleNamespace(content="<|end|>", special=True),
    1: SimpleNamespace(content="<|start|>", special=True),
    2: SimpleNamespace(content="<repo>", special=True),
    3: SimpleNamespace(content="<tool_call>", special=True),
    4: SimpleNamespace(content="plain", special=False),
}


@pytest.fixture
def new_processor(monkeypatch):
    tokenizer = SimpleNamespace(eos_token_id=0, added_tokens_decoder=ADDED)
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda _: tokenizer)
    model_config = SimpleNamespace(
        get_vocab_size=lambda: NUM_TOKENS,
        hf_config=SimpleNamespace(eos_token_id=[0, 9]),
        try_get_generation_config=lambda: {"eos_token_id": 0},
    )

    def build(**bans):
        config = SimpleNamespace(model_config=model_config, additional_config={CONFIG_KEY: bans} if bans else {})
        return TokenMaskProcessor(config, torch.device("cpu"), is_pin_memory=False)

    return build


def request(*banned: int) -> SamplingParams:
    return SamplingParams(extra_args={REQUEST_KEY: list(banned)}) if banned else SamplingParams()


def update(size, added=(), removed=(), moved=()) -> BatchUpdate:
    rows: list[tuple[int, SamplingParams, None, list[int]]] = [(i, params, None, []) for i, params in added]
    return BatchUpdate(batch_size=size, removed=list(removed), added=rows, moved=list(moved))


def banned_rows(processor, size) -> list[set[int]]:
    logits = processor.apply(torch.zeros(size, NUM_TOKENS))
    return [set((row == float("-inf")).nonzero().flatten().tolist()) for row in logits]


def test_it_does_nothing_until_told_to(new_processor):
    processor = new_processor()
    processor.update_state(update(2, added=[(0, request()), (1, request())]))
    assert banned_rows(processor, 2) == [set(), set()]


def test_control_tokens_are_banned_but_those_that_end_an_answer_or_are_kept(new_processor):
    processor = new_processor(control_tokens=True, keep=["<tool_call>"], token_ids=[700, NUM_TOKENS + 5])
    processor.update_state(update(1, added=[(0, request())]))
    assert banned_rows(processor, 1) == [{1, 2, 700}]


def test_a_large_model_wide_set_goes_through_the_mask(new_processor):
    large = list(range(100, 600))
    processor = new_processor(token_ids=large)
    processor.update_state(update(2, added=[(0, request()), (1, request(5))]))
    assert banned_rows(processor, 2) == [set(large), {5, *large}]


def test_bans_follow_their_request_through_the_batch(new_processor):
    processor = new_processor(control_tokens=True)
    everyone = {1, 2, 3}
    processor.update_state(update(3, added=[(0, request(10)), (1, request()), (2, request(20, 21))]))
    assert banned_rows(processor, 3) == [{10} | everyone, everyone, {20, 21} | everyone]
    processor.update_state(None)
    assert banned_rows(processor, 3) == [{10} | everyone, everyone, {20, 21} | everyone]
    processor.update_state(update(3, moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert banned_rows(processor, 3) == [everyone, {10} | everyone, {20, 21} | everyone]
    processor.update_state(update(2, removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert banned_rows(processor, 2) == [everyone, {20, 21} | everyone]
    processor.update_state(update(2, added=[(1, request())]))
    assert banned_rows(processor, 2) == [everyone, everyone]
    processor.update_state(update(1, removed=[1]))
    assert banned_rows(processor, 1) == [everyone]


def test_a_batch_that_grows_keeps_every_row_right(new_processor):
    processor = new_processor()
    processor.update_state(update(1, added=[(0, request(10))]))
    processor.update_state(update(2, added=[(1, request())]))
    assert banned_rows(processor, 2) == [{10}, set()]


def test_no_request_can_ban_the_end_of_its_answer_or_tokens_that_do_not_exist(new_processor):
    processor = new_processor()
    processor.update_state(update(1, added=[(0, request(0, 9, 11, NUM_TOKENS, -1))]))
    assert banned_rows(processor, 1) == [{11}]


def test_the_kernel_gives_what_the_reference_gives(new_processor):
    from serving_kernels import token_mask

    rows: list[list[set[int]]] = []
    for ban in (None, token_mask.ban_tokens):
        processor = new_processor(token_ids=[8])
        processor._ban = ban or processor._ban
        processor.update_state(update(2, added=[(0, request(10)), (1, request())]))
        rows.append(banned_rows(processor, 2))
    assert rows[0] == rows[1] == [{8, 10}, {8}]


@pytest.mark.parametrize("value", ["10", [1.5], [True], ["a"], {"a": 1}, list(range(65_537))])
def test_a_malformed_ban_is_refused_before_the_request_runs(value):
    with pytest.raises(ValueError, match="at most 65536 token ids"):
        TokenMaskProcessor.validate_params(SamplingParams(extra_args={REQUEST_KEY: value}))


def test_greedy_sampling_sees_the_bans(new_processor):
    assert not new_processor().is_argmax_invariant()


@pytest.mark.parametrize(
    "bans", [{"control": True}, {"control_tokens": 1}, {"keep": "x"}, {"keep": [1]}, {"token_ids": ["1"]}]
)
def test_a_malformed_configuration_stops_the_engine(bans):
    with pytest.raises(StartError, match=CONFIG_KEY):
        parse_bans({CONFIG_KEY: bans})


def test_banning_the_end_of_every_answer_stops_the_engine(new_processor):
    with pytest.raises(StartError, match="no answer ends"):
        new_processor(token_ids=[9])


def test_keeping_a_token_that_does_not_exist_stops_the_engine():
    with pytest.raises(StartError, match="<typo>"):
        control_tokens(ADDED, ends=frozenset({0}), keep=frozenset({"<typo>"}))


def test_the_engine_is_told_of_the_bans_and_refuses_them_beside_speculation(tmp_path):
    config = EngineConfig("m", tmp_path, 100, ban_control_tokens=True, keep_control_tokens=("<tool_call>",))
    argv = build_engine_argv(config, tmp_path / "e.sock")
    told = argv[argv.index("--additional-config") + 1]
    assert told == '{"strongroom_token_bans":{"control_tokens":true,"keep":["<tool_call>"]}}'
    with pytest.raises(ConfigError, match="ban_control_tokens has no effect"):
        EngineConfig("m", tmp_path, 100, ban_control_tokens=True, ngram_tokens=3)
