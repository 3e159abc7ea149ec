"""Which type a model is computed in where the settings leave it open."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# What is imported here, in the tests, goes through a part of torch that announces its end.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def dtype() -> Any:
    from server.engine.vllm import dtype

    return dtype


@pytest.fixture
def args(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    return ["--model", str(tmp_path), "--dtype", "auto", "--max-model-len", "64"]


def on(monkeypatch: pytest.MonkeyPatch, dtype: Any, *, avx512: bool, cpu: bool = True) -> None:
    monkeypatch.setattr(dtype, "multiplies_bfloat16", lambda: avx512)
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: cpu)


def test_a_processor_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, args: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, dtype, avx512=False)
    with caplog.at_level("WARNING", "strongroom.engine"):
        assert dtype.with_fitting_dtype(args) == [*args[:3], "float32", *args[4:]]
    assert "twice the memory" in caplog.text


@pytest.mark.parametrize("kept", ["avx512", "cuda", "named", "quantized", "quantized in flight", "none"])
def test_elsewhere_the_type_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, args: list[str], tmp_path: Path, kept: str
) -> None:
    on(monkeypatch, dtype, avx512=kept == "avx512", cpu=kept != "cuda")
    if kept == "named":
        args[3] = "bfloat16"
    if kept == "none":
        args = args[:2]
    if kept == "quantized":
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    if kept == "quantized in flight":
        args += ["--quantization", "bitsandbytes"]
    assert dtype.with_fitting_dtype(args) == args
