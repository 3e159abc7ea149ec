"""The verbs, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from server.cli import main
from server.commands import rewrap as rewrap_command
from server.commands import seal as seal_command
from server.commands.kms import least_policy
from server.errors import ConfigError
from server.sealed.kms.local import LocalKMS
from tests.unit.sealed.workshop import Workshop, load


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    import numpy

    folder = tmp_path / "plain"
    folder.mkdir()
    save_file({"w": numpy.arange(1000, dtype=numpy.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def seal(plain: Path, *more: str) -> Path:
    out, keys = plain.parent / "sealed", plain.parent
    arguments = ["seal", str(plain), str(out), "--kms", f"file:{keys / 'k'}", "--sign", str(keys / "s"), "--create-key"]
    assert main([*arguments, *more]) == 0
    return out


def test_seal_inspect_rewrap(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = seal(plain, "--json", "--model-version", "7", "--lineage", "base=tiny", "--licence", "MIT")
    assert json.loads(capsys.readouterr().out)["version"] == 7
    signer = ["--signer", str(tmp_path / "s.pub")]
    assert main(["inspect", str(out), "--verify", "--json", *signer]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["accepted"]
    assert facts["bytes_verified"]
    assert facts["lineage"] == ["base=tiny"]
    assert facts["dtype"] == "float32"
    assert main(["kms", "create-key", str(tmp_path / "k2")]) == 0
    second = f"file:{tmp_path / 'k2'}"
    assert main(["rewrap", str(out), "--kms", f"file:{tmp_path / 'k'}", "--to", second, "--keep", *signer]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    from server.sealed.signature import LocalSigner

    for key in ("k", "k2"):
        workshop = Workshop(tmp_path, LocalKMS(tmp_path / key), LocalSigner.load(tmp_path / "s"))
        assert len(load(out, workshop)["w"]) == 4000


def test_inspect_names_what_is_wrong(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = seal(plain)
    shard = out / "model-00001-of-00001.sealed"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    capsys.readouterr()
    assert main(["inspect", str(out), "--verify", "--json", "--signer", str(tmp_path / "s.pub")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "signature"
    assert shard.name in found["detail"]
    assert main(["inspect", str(out), "--verify"]) == 1
    assert "no trusted signer" in capsys.readouterr().out


def test_errors_are_one_line(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seal(plain)
    capsys.readouterr()
    (plain / "model.py").write_text("")
    assert main(["seal", str(plain), str(plain.parent / "other"), "--kms", f"file:{plain.parent / 'k'}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["kms", "check", "ftp:x"]) == 1
    assert "not understood" in capsys.readouterr().err


def test_kms_check_and_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kms", "create-key", str(tmp_path / "k")]) == 0
    assert main(["kms", "check", f"file:{tmp_path / 'k'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kms"] == "file"
    policy = json.loads(least_policy("aws:arn:aws:kms:eu-central-1:1:key/2"))
    assert policy["Statement"][0]["Action"] == ["kms:Decrypt"]
    assert "transit/encrypt/coder" in least_policy("openbao:transit/coder", sealing=True)
    with pytest.raises(ConfigError, match="only"):
        least_policy("file:x")


def test_acts_are_on_the_log_of_the_server_that_is_named(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    for command in (seal_command, rewrap_command):
        monkeypatch.setattr(command, "open_recorder", lambda _state: lambda tag, **f: events.append((tag, f)))
    out = seal(plain, "--state", str(tmp_path / "state"))
    assert [tag for tag, _ in events] == ["weights:model:sealed"]
    assert events[0][1]["signed"] is True
    assert main(["kms", "create-key", str(tmp_path / "k2")]) == 0
    old, new = (f"file:{tmp_path / name}" for name in ("k", "k2"))
    rewrap = ["rewrap", str(out), "--signer", str(tmp_path / "s.pub"), "--state", str(tmp_path / "state")]
    events.clear()
    assert main([*rewrap, "--kms", old, "--to", new]) == 0
    assert [tag for tag, _ in events] == ["weights:key:requested", "weights:key:released"]
    assert {fields["act"] for _, fields in events} == {"rewrap"}
    events.clear()
    assert main([*rewrap, "--kms", old, "--to", new]) == 1  # it is no recipient any more
    assert [tag for tag, _ in events] == ["weights:key:requested", "weights:key:refused"]
    assert events[-1][1]["code"] == "model_refused"
