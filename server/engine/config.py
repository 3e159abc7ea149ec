"""One engine's settings, turned into vLLM's arguments and environment; what would weaken vLLM is refused by name."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import orjson

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NetworkIsolation = Literal["auto", "require", "off"]

EXIT_REFUSED = 78  # EX_CONFIG: what a child exits with when starting it again would not help

MAX_STOP_STRINGS = 64  # Continue sends up to 20; vLLM's default of 4 refuses them
# sun_path holds 107 bytes and a NUL; vLLM's own sockets are `<folder>/<uuid4>`, 37 bytes beside the folder.
MAX_SOCKET_PATH_BYTES = 107
RPC_NAME_BYTES = 37
LOAD_FORMATS = ("strongroom", "safetensors")
# vLLM keeps whole blocks of a prompt in its prefix cache: what a template leaves over of its last block is computed
# anew for every request. On a CPU that is 2 to 3 ms a token, and vLLM's own choice there is 128.
CPU_BLOCK_TOKENS = 32
KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

# Options an operator may pass through: sizes, batching and parallelism, nothing that opens a route, runs code, reads
# from elsewhere or logs texts. The pattern is what the value must look like; None is a switch.
_NUMBER, _NAME = r"\d+(\.\d+)?", r"[A-Za-z0-9_.-]{1,64}"
_EXTRA_ARGS: dict[str, str | None] = {
    "--attention-backend": _NAME,
    "--block-size": _NUMBER,
    "--disable-custom-all-reduce": None,
    "--enable-chunked-prefill": None,
    "--enable-expert-parallel": None,
    "--enable-lora": None,
    "--fully-sharded-loras": None,
    "--kv-cache-dtype": "|".join(KV_CACHE_DTYPES),
    "--kv-cache-memory-bytes": _NUMBER,
    "--long-prefill-token-threshold": _NUMBER,
    "--lora-dtype": _NAME,
    "--max-cpu-loras": _NUMBER,
    "--max-logprobs": _NUMBER,
    "--max-lora-rank": _NUMBER,
    "--max-loras": _NUMBER,
    "--max-num-batched-tokens": _NUMBER,
    "--num-gpu-blocks-override": _NUMBER,
    "--optimization-level": r"\d",
    "--pipeline-parallel-size": _NUMBER,
    "--seed": _NUMBER,
    "--stream-interval": _NUMBER,
    "--tool-strict-level": _NAME,
}

_KNOWN_ARGS = frozenset(_EXTRA_ARGS) | {
    "--additional-config", "--disable-fastapi-docs", "--disable-uvicorn-access-log", "--dtype",
    "--enable-auto-tool-choice",
    "--enable-prefix-caching", "--enable-prompt-tokens-details", "--enforce-eager", "--generation-config",
    "--gpu-memory-utilization", "--load-format", "--lora-modules", "--max-model-len", "--max-num-seqs", "--model",
    "--model-loader-extra-config", "--no-enable-prefix-caching", "--pooler-config", "--quantization",
    "--reasoning-parser", "--runner",
    "--served-model-name", "--speculative-config", "--tensor-parallel-size", "--tool-call-parser", "--uds",
}  # fmt: skip

# What vLLM must never be started with, each with the reason that goes into the error.
_WEAKENING_ARGS: dict[str, str] = {
    "--allowed-local-media-path": "it opens local files to requests",
    "--allowed-media-domains": "the engine must fetch nothing",
    "--api-key": "keys end at the gateway; the engine must never see one",
    "--chat-template": "prompts are rendered by the gateway",
    "--collect-detailed-traces": "traces hold texts and leave the machine",
    "--config": "settings must be visible, in one place",
    "--enable-log-deltas": "texts must not reach a log",
    "--enable-log-outputs": "texts must not reach a log",
    "--enable-log-requests": "texts must not reach a log",
    "--enable-mm-embeds": "it lets a caller pass tensors",
    "--enable-prompt-embeds": "it lets a caller pass tensors",
    "--enable-scale-out": "it opens routes around the pipeline",
    "--enable-sleep-mode": "it opens routes that unload the model",
    "--enable-tokenizer-info-endpoint": "it opens a route that shows the tokenizer's configuration",
    "--host": "the engine listens on a unix socket only",
    "--io-processor-plugin": "it runs code that was not signed",
    "--logits-processors": "it runs code that was not signed",
    "--middleware": "it runs code that was not signed",
    "--otlp-traces-endpoint": "traces hold texts and leave the machine",
    "--port": "the engine listens on a unix socket only",
    "--profiler-config": "the profiler opens routes and writes files",
    "--reasoning-parser-plugin": "it runs code that was not signed",
    "--scheduler-cls": "it runs code that was not signed",
    "--tokens-only": "it opens routes around the pipeline",
    "--tool-parser-plugin": "it runs code that was not signed",
    "--tool-server": "it connects the engine to other servers",
    "--trust-remote-code": "it runs code that comes with the model",
    "--trust-request-chat-template": "it lets a caller replace the prompt template",
    "--trust-request-mm-kwargs": "it lets a caller steer the processor",
    "--weight-transfer-config": "it opens routes that replace the weights",
    "--worker-cls": "it runs code that was not signed",
    "--worker-extension-cls": "it runs code that was not signed",
}
_WEAKENING_ENV: dict[str, str] = {
    "PYTHONOPTIMIZE": "vLLM checks some inputs by assert",
    "TORCH_LOAD_DISABLE_WEIGHTS_ONLY": "it unpickles what a file holds",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "it unpickles what a file holds",
    "TRUST_REMOTE_CODE": "it runs code that comes with the model",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "it unpickles what a socket brings",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "the context length is checked against the model",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "it opens routes that load adapters",
    "VLLM_CUSTOM_SCOPES_FOR_PROFILING": "the profiler writes files",
    "VLLM_DEBUG_DUMP_PATH": "it writes what the engine computes to files",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "texts must not reach a log",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "a dead engine must end, to be started again",
    "VLLM_MODEL_REDIRECT_PATH": "it replaces the model by another path",
    "VLLM_NVTX_SCOPES_FOR_PROFILING": "the profiler writes files",
    "VLLM_SERVER_DEV_MODE": "it opens routes that run any method of a worker",
    "VLLM_TORCH_PROFILER_DIR": "the profiler opens routes and writes files",
    "VLLM_TRACE_FUNCTION": "it writes every call to a file",
    "VLLM_USE_MODELSCOPE": "the engine must download nothing",
}
_HARMLESS_ENV_VALUES = frozenset({"", "0", "false", "no", "off"})

# What the engine's environment takes over from ours. Everything else stays behind: credentials, proxies, cloud roles.
_INHERITED_ENV = (
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES", "PATH", "PYTHONSAFEPATH", "TZ", "VIRTUAL_ENV", "VLLM_LOGGING_LEVEL",
)  # fmt: skip
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One model's engine.

    Attributes:
        model_id: The id that callers use; the engine knows the model by the same name.
        path: Folder that vLLM reads config and tokenizer from: of a plain model, or of a sealed one's staged files.
        load_format: `strongroom` for a sealed model, `safetensors` for a plain one.
        task: `generate` or `embed`.
        pooling: How an embedding model makes one vector of many: `mean`, `cls` or `last`; None leaves it to vLLM, which
            can't see it in a sealed model.
        max_model_len: Context length in tokens.
        kv_cache_gb: KV cache on the CPU, in GiB; None leaves it to vLLM (a GPU).
        cpu_cores: Cores that the engine's threads are bound to; two engines must not share any.
        ngram_tokens: Tokens guessed ahead by n-gram look-up; 0 is off. It pays where answers copy their prompt.
        tensor_parallel_size: Over how many devices the model is spread.
        gpu_memory_utilization: Share of the device's memory that vLLM may take; None leaves it to vLLM.
        max_num_seqs: Requests in one batch; None leaves it to vLLM.
        tool_parser: vLLM's parser for the tool calls of this model, or None for no tools.
        reasoning_parser: vLLM's parser for the thoughts of this model, or None.
        adapters: LoRA adapters by name, each a folder.
        manifest_sha256: Digest of the manifest that was verified; the loader opens no other.
        sealed_path: Folder of the sealed model, where `path` holds its staged files.
        device_open: Where a ChaCha20-Poly1305 model is opened: `auto` takes a CUDA device, `off` the CPU, `interpret`
            tries the device's kernels on the CPU (slow).
        ban_control_tokens: Never let the model say a control token other than those that end an answer.
        keep_control_tokens: Texts of control tokens that it may say all the same (a tool parser's markers).
        extra_args: Further options of vLLM, from an allow-list.
    """

    model_id: str
    path: Path
    max_model_len: int
    load_format: str = "strongroom"
    task: Literal["generate", "embed"] = "generate"
    pooling: Literal["mean", "cls", "last"] | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_gb: int | None = None
    cpu_cores: tuple[int, ...] = ()
    prefix_caching: bool = True
    ngram_tokens: int = 0
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    manifest_sha256: str | None = None
    sealed_path: Path | None = None
    device_open: Literal["auto", "interpret", "off"] = "auto"
    ban_control_tokens: bool = False
    keep_control_tokens: tuple[str, ...] = ()
    extra_args: Mapping[str, str | None] = field(default_factory=dict)
    network_isolation: NetworkIsolation = "auto"

    def __post_init__(self) -> None:
        """Refuse what can be known to be wrong before a process is started.

        Raises:
            ConfigError: A value is out of range, or an extra option is not on the list.
        """
        where = f"engine of model '{self.model_id}'"
        if not _MODEL_ID.fullmatch(self.model_id):
            raise ConfigError(
                "A model id has letters, digits and . _ : / - only, at most 128, and begins with the first."
            )
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(f"{where}: load_format '{self.load_format}' is refused; expected one of {LOAD_FORMATS}.")
        if self.max_model_len < 1 or (self.kv_cache_gb is not None and self.kv_cache_gb < 1) or self.ngram_tokens < 0:
            raise ConfigError(f"{where}: max_model_len, kv_cache_gb must be at least 1, ngram_tokens at least 0.")
        if self.device_open not in ("auto", "interpret", "off"):
            raise ConfigError(f"{where}: device_open '{self.device_open}' is not one of auto, interpret, off.")
        if self.ban_control_tokens and self.ngram_tokens:
            # vLLM leaves every logits processor of ours out, without a word, where it speculates.
            raise ConfigError(
                f"{where}: ban_control_tokens has no effect while ngram_tokens is on; choose one of them."
            )
        for option, value in self.extra_args.items():
            if option in _WEAKENING_ARGS:
                raise ConfigError(f"{where}: the option {option} is refused: {_WEAKENING_ARGS[option]}.")
            if option not in _EXTRA_ARGS:
                raise ConfigError(f"{where}: the option {option} is not on the list of options that may be passed on.")
            pattern = _EXTRA_ARGS[option]
            if (pattern is None) != (value is None) or (pattern and value and not re.fullmatch(pattern, value)):
                raise ConfigError(f"{where}: the option {option} has a value that it can't have.")


def build_engine_argv(config: EngineConfig, socket_path: Path, *, python: str = sys.executable) -> list[str]:
    """Return the command that starts the engine, isolation first.

    Raises:
        ConfigError: A value was smuggled in that would weaken the engine, or the socket's path is too long.
    """
    check_socket_path(socket_path)
    args = ["--model", str(config.path), "--served-model-name", config.model_id, "--uds", str(socket_path)]
    args += ["--load-format", config.load_format, "--dtype", config.dtype]
    if config.manifest_sha256 is not None:
        pinned = {"manifest_sha256": config.manifest_sha256}
        if config.sealed_path is not None:
            pinned["folder"] = str(config.sealed_path)
        if config.device_open != "auto":
            pinned["device_open"] = config.device_open
        args += ["--model-loader-extra-config", orjson.dumps(pinned).decode()]
    args += ["--max-model-len", str(config.max_model_len)]
    args += ["--disable-fastapi-docs", "--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
    # Sampling defaults are the gateway's to set; a file in the model folder must not change what was asked for.
    args += ["--generation-config", "vllm"]
    if config.quantization is not None:
        args += ["--quantization", config.quantization]
    if config.tensor_parallel_size > 1:
        args += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    if config.gpu_memory_utilization is not None:
        args += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    if config.max_num_seqs is not None:
        args += ["--max-num-seqs", str(config.max_num_seqs)]
    if config.enforce_eager:
        args.append("--enforce-eager")
    if config.task == "embed":
        args += ["--runner", "pooling"]
        if config.pooling is not None:
            args += ["--pooler-config", orjson.dumps({"seq_pooling_type": config.pooling.upper()}).decode()]
    else:
        args.append("--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching")
        if config.kv_cache_gb is not None and "--block-size" not in config.extra_args:
            args += ["--block-size", str(CPU_BLOCK_TOKENS)]
        if config.ngram_tokens:
            speculation = {"method": "ngram", "num_speculative_tokens": config.ngram_tokens}
            speculation |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
            args += ["--speculative-config", orjson.dumps(speculation).decode()]
        if config.reasoning_parser is not None:
            args += ["--reasoning-parser", config.reasoning_parser]
        if config.ban_control_tokens:
            bans = {"control_tokens": True, "keep": list(config.keep_control_tokens)}
            args += ["--additional-config", orjson.dumps({"strongroom_token_bans": bans}).decode()]
        if config.tool_parser is not None:
            args += ["--enable-auto-tool-choice", "--tool-call-parser", config.tool_parser]
    if config.adapters:
        args += ["--enable-lora", "--lora-modules"]
        args += [f"{name}={path}" for name, path in config.adapters.items()]
    for option, value in config.extra_args.items():
        args += [option] if value is None else [option, value]
    refuse_weakening(args, {})
    entry = [python, "-m", "server.engine.vllm.entry", "--network-isolation", config.network_isolation, "--"]
    return entry + args


def check_socket_path(path: Path) -> None:
    """Refuse a path that the kernel would cut.

    Raises:
        ConfigError: Longer than a unix socket's path may be.
    """
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"The socket path {path} has {length} bytes, {MAX_SOCKET_PATH_BYTES} are possible. "
            "Choose a state folder with a shorter path."
        )


def engine_environment(config: EngineConfig, run_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the engine's whole environment: an allow-list of ours, and what keeps vLLM quiet, offline and private.

    Args:
        config: The engine.
        run_dir: A folder of its own, 0700, for vLLM's sockets and temporary files.
        environ: The parent's environment.

    Raises:
        ConfigError: The parent's environment holds a variable that would weaken the engine, or `run_dir` is too long.
    """
    refuse_weakening((), environ)
    if len(os.fsencode(run_dir)) + RPC_NAME_BYTES > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"The folder {run_dir} is too long for vLLM's sockets: at most {MAX_SOCKET_PATH_BYTES - RPC_NAME_BYTES} "
            "bytes. Choose a state folder with a shorter path."
        )
    env = {name: environ[name] for name in _INHERITED_ENV if name in environ}
    env |= {
        "DO_NOT_TRACK": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(run_dir),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5",
        "VLLM_MAX_STOP_STRINGS": str(MAX_STOP_STRINGS),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": str(run_dir),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if config.kv_cache_gb is not None:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gb)
    if config.cpu_cores:
        # Left to itself, vLLM binds every engine's worker to the same core, and two engines starve each other.
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in config.cpu_cores)
        env["OMP_NUM_THREADS"] = str(len(config.cpu_cores))
    return env


def refuse_weakening(args: Sequence[str], env: Mapping[str, str]) -> None:
    """Refuse arguments and environment that take a protection away from vLLM.

    Arguments are held against a list of those that may be there: vLLM also takes `--a_b`, `--a=b`, `--a.b` and any
    unambiguous beginning of an option, so a list of those that may not would have holes.

    Raises:
        ConfigError: Names the first one, and says why.
    """
    load_format = LOAD_FORMATS[0]
    for index, arg in enumerate(args):
        if not arg.startswith("-"):
            continue
        if arg not in _KNOWN_ARGS:
            name = arg.partition("=")[0].replace("_", "-").lower()
            reason = _WEAKENING_ARGS.get(name, "it is not on the list of options that may be passed on")
            raise ConfigError(f"The engine must not be started with {name}: {reason}. Take it out.")
        if arg == "--load-format":
            load_format = args[index + 1] if index + 1 < len(args) else ""
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"The engine must not be started with --load-format {load_format}; use one of {LOAD_FORMATS}."
        )
    for name, reason in _WEAKENING_ENV.items():
        if env.get(name, "").strip().lower() not in _HARMLESS_ENV_VALUES:
            raise ConfigError(f"The environment variable {name} is set: {reason}. Unset it and start again.")
