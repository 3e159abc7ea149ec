"""`strongroom template`: list, show, render, test, lock, roll out."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.commands import template as command
from server.errors import ConfigError, RequestError
from server.template.registry import TemplateRegistry

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """---
id: base
version: {version}
title: T
owner: o
scope: organisation
standards: [CWE Top 25]
formats: [chat]
variables:
  name: {{type: string, default: us}}
---
Rules of {{{{ name }}}}, {version}.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    for version in ("1.0.0", "1.1.0"):
        (tmp_path / "base" / f"{version}.md").write_text(TEXT.format(version=version))
    return tmp_path


def call(folder: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args(["--directory", str(folder), *arguments]))


def test_lock_then_list_show_test(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="can't be read"):
        call(folder, "list")
    assert call(folder, "lock") == 0
    assert call(folder, "lock", "--check") == 0
    capsys.readouterr()
    assert call(folder, "--json", "list") == 0
    assert [row["version"] for row in json.loads(capsys.readouterr().out)] == ["1.0.0", "1.1.0"]
    assert call(folder, "show", "base", "--version", "1.0.0") == 0
    assert "version: 1.0.0" in capsys.readouterr().out
    assert call(folder, "test") == 0
    assert "2 templates" in capsys.readouterr().out


def test_render_with_variables(folder: Path, capsys: pytest.CaptureFixture[str]):
    call(folder, "lock")
    capsys.readouterr()
    assert call(folder, "--json", "render", "base", "--set", "name=them") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "Rules of them, 1.1.0."
    with pytest.raises(RequestError, match="NAME=VALUE"):
        call(folder, "render", "base", "--set", "name")


def test_lock_check_fails_on_a_changed_file(folder: Path):
    call(folder, "lock")
    path = folder / "base" / "1.0.0.md"
    path.write_text(path.read_text() + "More.\n")
    with pytest.raises(ConfigError, match=r"base 1\.0\.0 is not what was locked"):
        call(folder, "lock", "--check")
    with pytest.raises(ConfigError, match=r"base 1\.0\.0 is not what was locked"):
        call(folder, "test")


def test_signed_lock_loads_where_signatures_are_demanded(folder: Path, tmp_path: Path):
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    call(folder, "lock", "--sign-key", str(tmp_path / "key.pem"))
    public = key.public_key().public_bytes_raw()
    lock = folder / "templates.lock"
    assert TemplateRegistry.load(folder, lock, require_signature=True, public_key=public).templates
    call(folder, "lock")
    with pytest.raises(ConfigError, match="unsigned"):
        TemplateRegistry.load(folder, lock, require_signature=True, public_key=public)
    (tmp_path / "key.pem").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a readable PEM"):
        call(folder, "lock", "--sign-key", str(tmp_path / "key.pem"))


def test_rollout_to_percent_promote_and_back(folder: Path, capsys: pytest.CaptureFixture[str]):
    call(folder, "lock")
    call(folder, "rollout", "base", "--stable", "1.0.0")
    call(folder, "rollout", "base", "--to", "1.1.0", "--percent", "25")
    assert "25 % of subjects get 1.1.0" in capsys.readouterr().out
    call(folder, "rollout", "base", "--subject", "ann")
    first = capsys.readouterr().out
    call(folder, "rollout", "base", "--subject", "ann")
    assert capsys.readouterr().out == first
    call(folder, "rollout", "base", "--to", "1.1.0", "--shadow")
    assert "in shadow" in capsys.readouterr().out
    call(folder, "rollout", "base", "--back")
    assert "everybody gets 1.0.0" in capsys.readouterr().out
    with pytest.raises(RequestError, match="no candidate"):
        call(folder, "rollout", "base", "--promote")
    call(folder, "rollout", "base", "--to", "1.1.0")
    call(folder, "rollout", "base", "--promote")
    assert "everybody gets 1.1.0" in capsys.readouterr().out
    loaded = TemplateRegistry.load(folder, folder / "templates.lock")
    assert loaded.compose(["base"], subject="ann").ref.version == "1.1.0"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["rollout", "other", "--to", "1.0.0"], "No template is called 'other'"),
        (["rollout", "base", "--to", "9.9.9"], "not loaded"),
        (["rollout", "base", "--percent", "101"], "from 0 to 100"),
        (["show", "other"], "No template is called 'other'"),
    ],
)
def test_wrong_use_is_one_clear_error(folder: Path, arguments: list[str], error: str):
    call(folder, "lock")
    with pytest.raises((ConfigError, RequestError), match=error):
        call(folder, *arguments)
