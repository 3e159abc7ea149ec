"""Arguments and environment of an engine: what is passed, what is kept back, what is refused by name."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.engine.config import EngineConfig, build_engine_argv, engine_environment, refuse_weakening
from server.engine.local import engine_paths
from server.errors import ConfigError
from server.folders import runtime_dir

CONFIG = EngineConfig("smollm2", Path("/models/m"), 4096, manifest_sha256="ab" * 32)
SOCKET = Path("/run/e.sock")


def value_of(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_argv_of_a_sealed_model() -> None:
    argv = build_engine_argv(CONFIG, SOCKET, python="py")
    assert argv[:6] == ["py", "-m", "server.engine.vllm.entry", "--network-isolation", "auto", "--"]
    assert value_of(argv, "--load-format") == "strongroom"
    assert value_of(argv, "--model-loader-extra-config") == '{"manifest_sha256":"%s"}' % ("ab" * 32)
    assert value_of(argv, "--uds") == "/run/e.sock"
    assert value_of(argv, "--generation-config") == "vllm"
    assert "--host" not in argv
    assert "--port" not in argv
    assert "--trust-remote-code" not in argv


def test_argv_of_options() -> None:
    config = replace(
        CONFIG,
        ngram_tokens=5,
        tool_parser="hermes",
        enforce_eager=True,
        quantization="fp8",
        prefix_caching=False,
        adapters={"sql": Path("/a/sql")},
        max_num_seqs=8,
        tensor_parallel_size=2,
        gpu_memory_utilization=0.5,
        reasoning_parser="qwen3",
        extra_args={"--max-loras": "3", "--enable-chunked-prefill": None},
    )
    argv = build_engine_argv(config, SOCKET)
    assert value_of(argv, "--speculative-config") == (
        '{"method":"ngram","num_speculative_tokens":5,"prompt_lookup_min":2,"prompt_lookup_max":4}'
    )
    assert value_of(argv, "--tool-call-parser") == "hermes"
    assert value_of(argv, "--lora-modules") == "sql=/a/sql"
    assert value_of(argv, "--max-num-seqs") == "8"
    assert value_of(argv, "--tensor-parallel-size") == "2"
    assert value_of(argv, "--gpu-memory-utilization") == "0.5"
    assert value_of(argv, "--reasoning-parser") == "qwen3"
    assert value_of(argv, "--max-loras") == "3"
    assert {"--enforce-eager", "--enable-chunked-prefill", "--no-enable-prefix-caching"} <= set(argv)


def test_blocks_on_a_cpu_are_small_so_that_a_template_is_cached_nearly_whole() -> None:
    on_cpu = replace(CONFIG, kv_cache_gb=1)
    assert value_of(build_engine_argv(on_cpu, SOCKET), "--block-size") == "32"
    chosen = build_engine_argv(replace(on_cpu, extra_args={"--block-size": "64"}), SOCKET)
    assert [value for option, value in itertools.pairwise(chosen) if option == "--block-size"] == ["64"]
    assert "--block-size" not in build_engine_argv(replace(CONFIG, kv_cache_gb=None), SOCKET)


def test_argv_of_an_embedding_model() -> None:
    argv = build_engine_argv(replace(CONFIG, task="embed"), SOCKET)
    assert value_of(argv, "--runner") == "pooling"
    assert "--enable-auto-tool-choice" not in argv


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": ""},
        {"model_id": "../x"},
        {"model_id": "--trust-remote-code"},
        {"model_id": "a" * 129},
        {"load_format": "auto"},
        {"load_format": "pt"},
        {"load_format": "gguf"},
        {"max_model_len": 0},
        {"kv_cache_gb": 0},
        {"ngram_tokens": -1},
        {"extra_args": {"--trust-remote-code": None}},
        {"extra_args": {"--no-such-option": None}},
        {"extra_args": {"--max-loras": None}},
        {"extra_args": {"--max-loras": "--trust-remote-code"}},
        {"extra_args": {"--enable-chunked-prefill": "x"}},
        {"extra_args": {"--kv-cache-dtype": "pickle"}},
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "option",
    [
        "--trust-remote-code",
        "--trust_remote_code",
        "--trust-remote-code=true",
        "--trust-remote",
        "--profiler-config",
        "--profiler-config.profiler=torch",
        "--enable-tokenizer-info-endpoint",
        "--enable-scale-out",
        "--host",
        "--port=1",
        "--api-key",
        "--middleware",
        "--load-format=pt",
        "--config",
        "-tp",
        "-O3",
    ],
)
def test_weakening_arguments_are_refused_however_they_are_spelled(option: str) -> None:
    with pytest.raises(ConfigError):
        refuse_weakening(["--model", "m", option], {})


@pytest.mark.parametrize("load_format", ["pt", "auto", "dummy", "runai_streamer", "sharded_state", ""])
def test_other_load_formats_are_refused(load_format: str) -> None:
    with pytest.raises(ConfigError, match="load-format"):
        refuse_weakening(["--load-format", load_format], {})


def test_load_format_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError):
        refuse_weakening(["--load-format"], {})


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_TORCH_PROFILER_DIR",
        "PYTHONOPTIMIZE",
        "VLLM_USE_MODELSCOPE",
        "TRUST_REMOTE_CODE",
    ],
)
def test_weakening_environment_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        engine_environment(CONFIG, Path("/r"), {name: "1"})
    engine_environment(CONFIG, Path("/r"), {name: "0"})  # switched off says nothing


def test_environment_is_an_allow_list() -> None:
    ours = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "s", "HTTPS_PROXY": "p", "HF_TOKEN": "t", "PYTHONPATH": "/x"}
    env = engine_environment(CONFIG, Path("/r"), ours)
    assert env["PATH"] == "/bin"
    assert not {"AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "HF_TOKEN", "PYTHONPATH"} & set(env)
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    assert env["VLLM_RPC_BASE_PATH"] == env["TMPDIR"] == "/r"
    assert int(env["VLLM_MAX_STOP_STRINGS"]) >= 32
    assert "VLLM_CPU_OMP_THREADS_BIND" not in env


def test_cores_are_bound() -> None:
    env = engine_environment(replace(CONFIG, cpu_cores=(2, 3), kv_cache_gb=2), Path("/r"), {})
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_a_path_that_the_kernel_would_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="shorter path"):
        build_engine_argv(CONFIG, Path("/" + "x" * 107))
    with pytest.raises(ConfigError, match="shorter path"):
        engine_environment(CONFIG, Path("/" + "x" * 70), {})


@pytest.mark.parametrize("model_id", ["m", "org/model:v1", "x" * 128, "ü"])
@pytest.mark.parametrize("depth", [1, 40, 200])
def test_sockets_fit_wherever_the_state_is(model_id: str, depth: int) -> None:
    paths = engine_paths(Path("/" + "s" * depth), model_id)
    assert len(str(paths.socket)) <= 107
    assert len(str(paths.run_dir)) + 37 <= 107
    assert paths.socket.parent == paths.run_dir.parent == runtime_dir(Path("/" + "s" * depth))


def test_two_models_never_share_a_socket() -> None:
    ids = ["a/b", "a-b", "a:b", "a_b", "x" * 100, "x" * 101]
    paths = [engine_paths(Path("/s"), model_id) for model_id in ids]
    assert len({path.socket for path in paths}) == len({path.run_dir for path in paths}) == len(ids)
