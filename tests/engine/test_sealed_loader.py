"""vLLM's own model classes get, from a sealed model, the very parameters they get from plain safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from safetensors.torch import load_file, save_file

from server.sealed.format import HEADER_BYTES, Suite, parse_header
from server.sealed.quantize import METHODS, is_linear, quantize_source
from server.sealed.source import load_source
from server.sealed.unseal import unseal
from tests.engine.sealed_loading import run_jobs
from tests.unit.sealed.test_sealed_unseal import release
from tests.unit.sealed.workshop import Workshop, open_workshop

# compressed-tensors imports a part of torch that announces its end.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

ROOT = Path(__file__).parents[2]
CHUNK_BYTES = 1 << 16
SECOND_CHUNK_BYTES = 1 << 17  # the interpreter pays by the call
SECOND_SUITE = {"second suite": {"device_open": "off"}, "second suite, kernels": {"device_open": "interpret"}}
GROUP = 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512),
}  # fmt: skip


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(torch.bfloat16) * 0.05


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


def plain_linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": draw(rows, columns)}


def awq_linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.qweight": integers(columns, rows // 8),
        f"{name}.qzeros": integers(columns // GROUP, rows // 8),
        f"{name}.scales": draw(columns // GROUP, rows).half(),
    }


def gptq_linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.qweight": integers(columns // 8, rows),
        f"{name}.qzeros": integers(columns // GROUP, rows // 8),
        f"{name}.scales": draw(columns // GROUP, rows).half(),
        f"{name}.g_idx": (torch.arange(columns) // GROUP).to(torch.int32),
    }


def write_model(folder: Path, linear, quantization: dict[str, Any] | None) -> None:
    torch.manual_seed(7)
    tensors = {"model.embed_tokens.weight": draw(512, 256), "lm_head.weight": draw(512, 256)}
    tensors["model.norm.weight"] = draw(256)
    for layer in range(CONFIG["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = draw(256)
        for name, (rows, columns) in LINEARS.items():
            tensors |= linear(f"{stem}.{name}", rows, columns)
    folder.mkdir()
    names = sorted(tensors)
    for part in range(2):
        save_file({n: tensors[n] for n in names[part::2]}, folder / f"model-{part}.safetensors")
    config = CONFIG | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return open_workshop(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def results(workshop: Workshop) -> dict[str, dict[str, Any]]:
    """All variants in one process: importing vLLM costs more than loading them."""
    folder = workshop.folder
    write_model(folder / "bf16", plain_linear, None)
    awq = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    write_model(folder / "awq", awq_linear, awq)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    write_model(folder / "gptq", gptq_linear, gptq)
    for name in ("bf16", "awq", "gptq"):
        workshop.seal(f"{name}-sealed", source=load_source(folder / name), chunk_bytes=CHUNK_BYTES)
    second = {"suite": Suite.CHACHA20_POLY1305, "chunk_bytes": SECOND_CHUNK_BYTES}
    workshop.seal("second-sealed", source=load_source(folder / "bf16"), **second)
    for method in METHODS:
        source = quantize_source(load_source(folder / "bf16"), method)
        released = release(workshop, workshop.seal(f"{method}-sealed", source=source, chunk_bytes=CHUNK_BYTES))
        unseal(released.model, released.data_key.reveal(), folder / method)
    workshop.seal("damaged-sealed", source=load_source(folder / "bf16"), chunk_bytes=CHUNK_BYTES)
    flip_last_chunk(folder / "damaged-sealed" / "model-00002-of-00002.sealed")
    (folder / "signer.pub").write_bytes(
        workshop.signer.public_key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    common = {"signer": str(folder / "signer.pub"), "key": str(folder / "kms.key")}
    variants: dict[str, tuple[str, dict[str, Any]]] = {n: (n, {}) for n in ("bf16", "awq", "gptq", *METHODS)}
    variants |= {"bf16 not lazy": ("bf16", {"lazy": False}), "bf16 one thread": ("bf16", {"threads": 1})}
    jobs: list[dict[str, Any]] = [
        common | {"name": name, "plain": str(folder / n), "sealed": str(folder / f"{n}-sealed"), "extra": extra}
        for name, (n, extra) in variants.items()
    ]
    in_flight = {"name": "bnb in flight", "quantization": "bitsandbytes"}
    jobs.append(common | in_flight | {"plain": str(folder / "bf16"), "sealed": str(folder / "bf16-sealed")})
    in_second = {"plain": str(folder / "bf16"), "sealed": str(folder / "second-sealed")}
    jobs += [common | in_second | {"name": name, "extra": extra} for name, extra in SECOND_SUITE.items()]
    jobs.append(common | {"name": "damaged", "plain": str(folder / "bf16"), "sealed": str(folder / "damaged-sealed")})
    found = run_jobs(jobs, folder)
    assert len(found) == len(jobs)
    return {result["name"]: result for result in found}


def flip_last_chunk(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[parse_header(bytes(data[:HEADER_BYTES]), path.name).tags_offset - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["bf16", "bf16 not lazy", "bf16 one thread", "awq", "gptq", "bnb in flight", *METHODS, *SECOND_SUITE]
)
def test_parameters_are_those_of_the_plain_model(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["equal"]
    assert results[name]["num_parameters"] >= 19


def test_only_the_second_suite_goes_through_the_kernels_and_all_of_it(results: dict[str, dict[str, Any]]) -> None:
    opened = {name: result["num_kernel_bytes"] for name, result in results.items() if name != "damaged"}
    model_bytes = opened.pop("second suite, kernels")
    assert model_bytes > 1 << 20
    assert model_bytes == results["second suite, kernels"]["num_bytes"]
    assert not any(opened.values())


def test_a_flipped_bit_stops_the_load_and_names_file_and_chunk(results: dict[str, dict[str, Any]]) -> None:
    assert results["damaged"]["refused"] == "payload"
    assert results["damaged"]["detail"].startswith("model-00002-of-00002.sealed: chunk ")


@pytest.mark.parametrize(("method", "bound"), [("w8a8", 0.02), ("w4a16", 0.2)])
def test_quantized_weights_are_near_the_original(
    results: dict[str, Any], workshop: Workshop, method: str, bound: float
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    original: dict[str, torch.Tensor] = {}
    quantized: dict[str, torch.Tensor] = {}
    for part in sorted((workshop.folder / "bf16").glob("*.safetensors")):
        original |= load_file(part)
    for part in sorted((workshop.folder / method).glob("*.safetensors")):
        quantized |= load_file(part)
    linear = [e.name for s in load_source(workshop.folder / "bf16").shards for e in s.index.entries if is_linear(e)]
    assert len(linear) == len(LINEARS) * CONFIG["num_hidden_layers"]
    for name in linear:
        weight, scale = original[name].float(), quantized[f"{name}_scale"].float()
        values = (
            quantized[name] if method == "w8a8" else unpack_from_int32(quantized[f"{name}_packed"], 4, weight.shape)
        ).float()
        restored = (values.reshape(*scale.shape, -1) * scale[..., None]).reshape(weight.shape)
        assert (restored - weight).norm() / weight.norm() < bound
