"""The entry point that vLLM loads in each of its processes (`vllm.general_plugins`); safe to call more than once."""

from __future__ import annotations

import importlib.util
import os
from multiprocessing import util
from typing import Any, Final

from server.sealed.agent import KEY_FD_ENV
from server.sealed.memory import forbid_core_dumps

LOAD_FORMAT: Final = "strongroom"
BNB_LOAD_FORMAT: Final = "bitsandbytes"
_SPAWNED_CHILD: Final = "--multiprocessing-fork"


def register() -> None:
    """Register the load format; in an engine of a supervisor also guard the process and hand the key socket on.

    Raises:
        StartError: The process can't be kept out of core dumps.
    """
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    from server.engine.vllm.int4 import register_int4
    from server.engine.vllm.loader import StrongroomLoader

    register_int4()
    if _LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not StrongroomLoader:
        register_model_loader(LOAD_FORMAT)(StrongroomLoader)
    if importlib.util.find_spec("vllm_bnb_plugin") is not None:
        _register_bitsandbytes()
    if KEY_FD_ENV in os.environ:
        forbid_core_dumps()
        pass_key_socket_on(int(os.environ[KEY_FD_ENV]))


def _register_bitsandbytes() -> None:
    """Stand in for that plug-in's loader; it is registered first, whichever of the two vLLM loads first."""
    import vllm_bnb_plugin
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    from server.engine.vllm.bnb import SealedBitsAndBytesLoader

    vllm_bnb_plugin.register()
    if _LOAD_FORMAT_TO_MODEL_LOADER.get(BNB_LOAD_FORMAT) is not SealedBitsAndBytesLoader:
        register_model_loader(BNB_LOAD_FORMAT)(SealedBitsAndBytesLoader)


def pass_key_socket_on(fd: int) -> None:
    """Let children that multiprocessing spawns inherit `fd`: it closes every descriptor that it was not told of.

    vLLM spawns EngineCore and Worker that way, and the loader runs in the last of them. Only such children get it;
    the resource tracker, which goes through the same function, does not.
    """
    original: Any = util.spawnv_passfds
    if getattr(original, "passes_key_socket", False):
        return
    if not _is_open(fd):  # vLLM inspects a model's class in a process that inherits the environment and no descriptor
        return
    os.set_inheritable(fd, False)  # a plain fork and exec must not carry it

    def spawnv_passfds(path: bytes, args: list[Any], passfds: Any) -> int:
        is_child = any(os.fsencode(arg) == _SPAWNED_CHILD.encode() for arg in args)
        pid: int = original(path, args, [*passfds, fd] if is_child and _is_open(fd) else passfds)
        return pid

    spawnv_passfds.passes_key_socket = True  # type: ignore[attr-defined]
    vars(util)["spawnv_passfds"] = spawnv_passfds


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
