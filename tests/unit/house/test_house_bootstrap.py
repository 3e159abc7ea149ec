"""The first start seals the embedded model under its own name only."""

from __future__ import annotations

import json
import subprocess

import pytest

from server import bootstrap
from server.errors import ConfigError
from server.sealed.embedded import load_embedded
from server.settings import ModelSettings, Settings


@pytest.fixture
def commands(monkeypatch):
    run: list[list[str]] = []

    def record(command, **_):
        run.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("server.bootstrap.subprocess.run", record)
    return run


def settings_with(state, **model):
    (state / "keys").mkdir(mode=0o700)
    return Settings(state=state, models=(ModelSettings.model_validate({"path": state / "models" / "m"} | model),))


def test_missing_embedded_model_is_sealed(tmp_path, commands):
    bootstrap.prepare_embedded(settings_with(tmp_path, id="smollm2-135m-instruct"), lambda _: None)
    assert [command[3:6] for command in commands] == [
        ["server.bootstrap", "smollm2-135m-instruct", str(tmp_path / "models" / "m")]
    ]


def test_each_embedded_model_is_sealed_under_its_own_name(tmp_path, commands):
    bootstrap.prepare_embedded(settings_with(tmp_path, id="all-minilm-l6-v2"), lambda _: None)
    assert commands[0][4] == "all-minilm-l6-v2"
    source = load_embedded("all-minilm-l6-v2")
    assert json.loads(source.files["config.json"])["hidden_size"] == 384
    assert source.num_bytes > 80_000_000
    with pytest.raises(ConfigError, match="No package carries the model our-coder"):
        load_embedded("our-coder")


def test_sealed_model_is_not_made_twice(tmp_path, commands):
    (tmp_path / "models" / "m").mkdir(parents=True)
    bootstrap.prepare_embedded(settings_with(tmp_path, id="smollm2-135m-instruct"), lambda _: None)
    assert commands == []


def test_other_model_is_not_replaced_by_the_embedded_one(tmp_path, commands):
    with pytest.raises(ConfigError, match=r"The model our-coder is not at .*strongroom seal"):
        bootstrap.prepare_embedded(settings_with(tmp_path, id="our-coder"), lambda _: None)
    assert commands == []


def test_remote_model_needs_no_folder(tmp_path, commands):
    remote = settings_with(tmp_path, id="our-coder", engine={"kind": "remote", "url": "https://gpu.example.com"})
    bootstrap.prepare_embedded(remote, lambda _: None)
    assert commands == []
