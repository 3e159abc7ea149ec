"""The locked lists hold every direct dependency at its exact version, each with hashes, and name no place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVE_EXTRAS = ("embedded-model", "kms-openbao", "kms-pkcs11", "kms-aws", "store-postgres", "limits-redis")


def read_lock(name: str) -> str:
    return (ROOT / "locks" / f"{name}.txt").read_text()


def pins_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", text, flags=re.MULTILINE))


def wanted(*extras: str) -> dict[str, str]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {re.split(r"[\[=]", line)[0].lower(): line.partition("==")[2] for line in lines}


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_serve_list_is_in_step_with_the_project(engine):
    pins = pins_of(read_lock(f"serve-{engine}"))
    expected = wanted(f"engine-{engine}", *SERVE_EXTRAS)
    assert {name: pins.get(name) for name in expected} == expected


def test_dev_list_is_in_step_with_the_project():
    pins = pins_of(read_lock("serve-cpu")) | pins_of(read_lock("dev"))
    expected = wanted("dev", "kms-tpm")
    assert {name: pins.get(name) for name in expected} == expected


@pytest.mark.parametrize("name", ["serve-cpu", "serve-gpu", "dev"])
def test_every_package_has_a_hash_and_no_list_names_a_place(name):
    text = read_lock(name)
    entries = re.findall(r"^[a-z].*(?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)*", text, flags=re.MULTILINE)
    assert entries
    assert [entry.split("\n")[0] for entry in entries if "--hash" not in entry] == []
    assert not re.search(r"https?:|file:|index-url|find-links|@ ", text)


@pytest.mark.parametrize("left_out", ["torchvision", "torchaudio", "torchcodec", "llama-cpp-python", "llm"])
def test_cpu_list_leaves_out_what_breaks_or_is_not_used(left_out):
    assert left_out not in pins_of(read_lock("serve-cpu"))


def test_every_direct_dependency_is_explained():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    names = wanted(*PROJECT["optional-dependencies"])
    assert [name for name in names if f"`{name}`" not in page] == []
