"""`configs/strongroom.yaml` holds every setting, with the default that the code has."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from server.errors import ConfigError
from server.settings import EngineSettings, ModelSettings, Settings, load_settings, parse_settings

FILE = Path("configs/strongroom.yaml")
# What the file sets for the embedded model, or by hand for the one machine.
CHOSEN = {"models", "admin.port", "admin.max_connections"}


def sections(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting by dotted name, with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= sections(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.get_default(call_default_factory=True)
    return found


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict) and item:
            found |= flatten(item, f"{prefix}{name}.")
        else:
            found[prefix + name] = item
    return found


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def test_every_setting_stands_in_the_file_with_its_default():
    ours = sections(Settings)
    written = flatten(yaml.safe_load(FILE.read_text()))
    assert set(ours) - CHOSEN == set(written) - CHOSEN
    for name in set(ours) - CHOSEN:
        assert plain(ours[name]) == written[name], name


@pytest.mark.parametrize(("model", "path"), [(ModelSettings, ()), (EngineSettings, ("engine",))])
def test_every_setting_of_a_model_stands_in_the_file(model, path):
    written = yaml.safe_load(FILE.read_text())["models"][0]
    for name in path:
        written = written[name]
    assert set(written) == set(model.model_fields)


def test_the_file_loads():
    settings = load_settings(FILE)
    assert settings.models[0].id == "smollm2-135m-instruct"
    assert settings.policy.directory.is_dir()
    assert settings.templates.directory.is_dir()
    assert (settings.guard.directory / "rules").is_dir()


@pytest.mark.parametrize(
    "engine", [{"prompts": "messages"}, {"prompts": "messages", "kind": "remote", "runner": "pooling"}]
)
def test_our_own_engines_get_no_messages(engine: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match="'prompts: messages' is for remote engines"):
        parse_settings({"models": [{"id": "m", "path": "m", "engine": engine}]}, base=tmp_path)
