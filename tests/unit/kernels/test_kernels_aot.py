"""Every kernel compiles for every target, within its registers and without a spill."""

from __future__ import annotations

import pytest

from serving_kernels import aot, launch

CASES = [(spec, f"sm_{target}") for spec in aot.kernel_specs() for target in aot.TARGETS]


@pytest.mark.parametrize(("spec", "target"), CASES, ids=[f"{spec.name}-{target}" for spec, target in CASES])
def test_no_spills_and_the_stated_registers(static_counts, spec, target):
    check(static_counts[spec.name, target], spec)


def check(counts, spec):
    assert counts["spill_instructions"] == counts["stack_bytes"] == counts["local_bytes"] == 0
    assert 0 < counts["registers"] <= spec.max_registers


@pytest.mark.parametrize("spec", aot.variant_specs(), ids=lambda spec: spec.name)
def test_few_chunks_odd_sizes_and_fp16_do_not_spill_either(variant_counts, spec):
    check(variant_counts[spec.name, "sm_90"], spec)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("spec", aot.variant_specs(), ids=lambda spec: spec.name)
def test_no_variant_spills_on_the_other_targets(all_variant_counts, spec, target):
    check(all_variant_counts[spec.name, target], spec)


def test_every_number_of_chunks_has_its_variant():
    """`chunk_lanes` is a compile-time constant: each value that it takes is another kernel."""
    compiled = {
        spec.constants["LANES"] for spec in (*aot.kernel_specs(), *aot.variant_specs()) if "verify" in spec.name
    }
    assert {launch.chunk_lanes(num_chunks) for num_chunks in range(1, 200)} == compiled


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_cipher_is_as_short_as_rfc_8439_allows(static_counts, target):
    """A double round is 8 quarter rounds of 4 sums, 4 exclusive-ors and 4 rotations: 96, and a loop's own few."""
    loop = static_counts["chacha20.decrypt", target]["loops"][0]
    assert 96 <= sum(loop.values()) <= 104


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_bulk_loads_and_stores_are_16_bytes_wide(static_counts, target):
    decrypt = static_counts["chacha20.decrypt", target]["instructions"]
    assert (decrypt["LDG.128"], decrypt["STG.128"]) == (4, 4)
    assert static_counts["poly1305.segments", target]["loops"][0]["LDG.128"] == 2  # Text and associated data.


def test_an_interpreting_process_refuses_to_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        aot.compile_kernel(aot.kernel_specs()[0], 90)
