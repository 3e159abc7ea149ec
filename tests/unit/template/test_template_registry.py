"""Templates are parsed strictly, held to their lock and signature, composed in a fixed order."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.errors import AuditUnavailableError, ConfigError, RequestError
from server.follow import follow
from server.template import lock as locking
from server.template import registry as room
from server.template import source
from server.template.rollout import Rollout, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

FRONT = """---
id: {id}
version: {version}
title: T
owner: o
scope: {scope}
standards: [CWE Top 25]
formats: [chat]
{more}---
Rules of {id} {version}.
"""


def write(
    folder: Path, name: str = "base", version: str = "1.0.0", scope: str = "organisation", more: str = ""
) -> Path:
    path = folder / name / f"{version}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(FRONT.format(id=name, version=version, scope=scope, more=more))
    return path


def lock(folder: Path) -> Path:
    path = folder / "templates.lock"
    path.write_bytes(locking.encode_lock(locking.digests(source.load_directory(folder))))
    return path


def test_what_ships_loads():
    folder = Path(__file__).parents[3] / "configs" / "templates"
    loaded = room.TemplateRegistry.load(folder, folder / "templates.lock")
    assert set(loaded.templates) == {
        *("secure-coding", "python", "javascript", "java", "go", "c-cpp", "rust", "sql", "shell", "infrastructure"),
        *("review", "tests", "refactor", "explain", "commit-message", "structured-extraction", "control"),
    }
    for versions in loaded.templates.values():
        for template in versions.values():
            assert template.standards
            assert template.cases
            assert template.preamble or "fim" not in template.formats


def test_standards_are_named_by_their_ids():
    """Requirements by number, so that a reviewer can look each one up; chapters of ASVS 5.0.0 go from 1 to 17."""
    folder = Path(__file__).parents[3] / "configs" / "templates"
    loaded = room.TemplateRegistry.load(folder, folder / "templates.lock")
    requirement = re.compile(r"(?:[1-9]|1[0-7])\.[1-9]\.(?:[1-9]|1[0-2])")
    for name, versions in loaded.templates.items():
        for template in versions.values():
            listed = [s.removeprefix("OWASP ASVS 5.0.0: ") for s in template.standards if "ASVS" in s]
            for entry in (e for text in listed for e in text.split(", ")):
                assert requirement.fullmatch(entry), f"{name}: {entry}"
            if template.scope == "language" or name == "secure-coding":
                assert listed, f"{name} names no requirement of ASVS"
                assert any("CWE-" in s or "CWE Top 25" in s for s in template.standards), name


def test_all_that_ships_composes():
    folder = Path(__file__).parents[3] / "configs" / "templates"
    loaded = room.TemplateRegistry.load(folder, folder / "templates.lock")
    composed = loaded.compose(sorted(loaded.templates, reverse=True), {"organisation": "Example Ltd"})
    assert composed.text.startswith("## Security rules of Example Ltd")
    assert composed.text.index("### Python") < composed.text.index("### Task: review")
    assert "{{" not in composed.text


def test_composition_order_is_by_scope_and_digest_is_of_the_text(tmp_path: Path):
    write(tmp_path, "python", scope="language")
    write(tmp_path, "base")
    composed = room.TemplateRegistry.load(tmp_path, lock(tmp_path)).compose(["python", "base"])
    assert composed.text == "Rules of base 1.0.0.\n\nRules of python 1.0.0."
    assert composed.ref.id == "base+python"
    assert composed.ref.digest == hashlib.sha256(composed.text.encode()).hexdigest()


def test_newest_version_is_by_number(tmp_path: Path):
    write(tmp_path, version="1.9.0")
    write(tmp_path, version="1.10.0")
    assert room.TemplateRegistry.load(tmp_path, lock(tmp_path)).compose(["base"]).ref.version == "1.10.0"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda f: write(f, "other"), "other 1.0.0 is not in the lock"),
        (lambda f: write(f, more="tasks: [x]\n"), "base 1.0.0 is not what was locked"),
        (lambda f: (f / "base" / "1.0.0.md").rename(f / "base" / "2.0.0.md"), "says it is base 1.0.0"),
        (lambda f: (write(f, "second"), (f / "base" / "1.0.0.md").unlink()), "missing|not in the lock"),
        (lambda f: write(f, more="surprise: 1\n"), "unknown field 'surprise'"),
        (lambda f: write(f, more="id: base\n"), "a key stands twice"),
        (lambda f: (f / "base" / "1.0.0.md").write_bytes(b"\xff"), "not UTF-8"),
        (lambda f: (f / "base" / "1.0.0.md").write_text("no front matter"), "no front matter"),
        (lambda f: (f / "base" / "1.0.0.md").write_text("x" * (source.MAX_TEMPLATE_BYTES + 1)), "the limit"),
        (lambda f: (f / "templates.lock").write_text("{}"), "can't be parsed"),
        (lambda f: (f / "templates.lock").write_bytes((f / "templates.lock").read_bytes() + b" "), "canonical"),
        (lambda f: (f / "templates.lock").unlink(), "can't be read"),
    ],
)
def test_broken_set_is_refused_by_name_and_the_old_stays(tmp_path: Path, break_it, reason: str):
    write(tmp_path)
    loaded = room.TemplateRegistry.load(tmp_path, lock(tmp_path))
    before = loaded.compose(["base"])
    break_it(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        loaded.reload()
    assert loaded.compose(["base"]) == before


def test_signature_is_demanded_and_checked(tmp_path: Path):
    write(tmp_path)
    path = lock(tmp_path)
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()

    def load(public_key: bytes | None = public) -> room.TemplateRegistry:
        return room.TemplateRegistry.load(tmp_path, path, require_signature=True, public_key=public_key)

    with pytest.raises(ConfigError, match="unsigned"):
        load()
    signature = tmp_path / "templates.lock.sig"
    signature.write_bytes(base64.b64encode(Ed25519PrivateKey.generate().sign(path.read_bytes())))
    with pytest.raises(ConfigError, match="not a valid signature"):
        load()
    signature.write_bytes(b"???")
    with pytest.raises(ConfigError, match="not a signature"):
        load()
    signature.write_bytes(base64.b64encode(key.sign(path.read_bytes())))
    with pytest.raises(ConfigError, match="no public key"):
        load(None)
    assert load().templates
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert load(pem).templates
    with pytest.raises(ConfigError, match="not a valid signature"):
        load(b"short")


VARIABLES = """variables:
  language: {type: string, enum: [go, rust], default: go}
  lines: {type: integer, default: 10}
  owner: {type: string, pattern: "[a-z]+", max_length: 5, default: me}
"""


@pytest.mark.parametrize(
    "given",
    [{"language": "perl"}, {"lines": "10"}, {"lines": True}, {"owner": "toolong"}, {"owner": "A"}, {"what": "x"}],
)
def test_variable_outside_its_schema_is_refused(tmp_path: Path, given: dict[str, object]):
    write(tmp_path, more=VARIABLES)
    with pytest.raises(RequestError):
        room.TemplateRegistry.load(tmp_path, lock(tmp_path)).compose(["base"], given)


def test_values_of_the_deployment_serve_every_composition(tmp_path: Path):
    write(tmp_path, more=VARIABLES)
    write(tmp_path, "other")
    loaded = room.TemplateRegistry.load(tmp_path, lock(tmp_path))
    room.verify_values(loaded.templates, {"language": "rust"})
    assert loaded.compose(["other"], {"language": "rust"}).ref == loaded.compose(["other"]).ref
    for wrong in ({"language": "perl"}, {"nothing": 1}):
        with pytest.raises(ConfigError, match="variables in the settings are wrong"):
            room.verify_values(loaded.templates, wrong)


def test_a_set_that_the_deployment_s_values_do_not_fit_is_refused_at_load(tmp_path: Path):
    """Not at the next request, which would then be refused for what an operator did."""
    write(tmp_path, more=VARIABLES)
    loaded = room.TemplateRegistry.load(tmp_path, lock(tmp_path))
    loaded.require(lambda fresh: room.verify_values(fresh.templates, {"language": "rust"}))
    before = loaded.current
    write(tmp_path, more=VARIABLES.replace("rust", "ruby"))
    lock(tmp_path)
    with pytest.raises(ConfigError, match="'language' must be one of"):
        loaded.reload()
    assert loaded.current is before


def test_a_text_changed_under_its_version_is_what_is_served(tmp_path: Path):
    """Also where a thread that began under the old set finishes after the new one is in force."""
    path = write(tmp_path)
    loaded = room.TemplateRegistry.load(tmp_path, lock(tmp_path))
    old = [loaded.templates["base"]["1.0.0"]]
    path.write_text(path.read_text() + "Be brief.\n")
    lock(tmp_path)
    loaded.reload()
    loaded._compose(old, {})
    assert loaded.compose(["base"]).text.endswith("Be brief.")


def test_variable_with_two_meanings_is_refused(tmp_path: Path):
    write(tmp_path, more="variables:\n  kind: {type: string, default: a}\n")
    write(tmp_path, "other", more="variables:\n  kind: {type: integer, default: 1}\n")
    with pytest.raises(ConfigError, match="base and other give the variable 'kind' different schemas"):
        room.TemplateRegistry.load(tmp_path, lock(tmp_path))


def test_failing_case_is_refused(tmp_path: Path):
    write(tmp_path, more="cases:\n  - {name: c, contains: [nowhere]}\n")
    with pytest.raises(ConfigError, match=r"base 1\.0\.0, case 'c': the text lacks 'nowhere'"):
        room.TemplateRegistry.load(tmp_path, lock(tmp_path))


def test_template_text_runs_in_a_sandbox(tmp_path: Path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="can't be rendered"):
        room.TemplateRegistry.load(tmp_path, lock(tmp_path)).compose(["base"])


def test_rollout_gives_each_subject_always_the_same_version(tmp_path: Path):
    write(tmp_path)
    write(tmp_path, version="1.1.0")
    path = lock(tmp_path)
    subjects = [f"subject-{n}" for n in range(2000)]

    def chosen(percent: float) -> dict[str, str]:
        (tmp_path / "rollout.json").write_bytes(Rollout({"base": Stage("1.0.0", "1.1.0", percent)}).encode())
        loaded = room.TemplateRegistry.load(tmp_path, path)
        return {s: loaded.compose(["base"], subject=s).ref.version for s in subjects}

    ten, again, fifty = chosen(10), chosen(10), chosen(50)
    assert ten == again
    share = sum(v == "1.1.0" for v in ten.values()) / len(subjects)
    assert 0.07 < share < 0.13
    assert all(fifty[s] == "1.1.0" for s, v in ten.items() if v == "1.1.0")
    assert set(chosen(0).values()) == {"1.0.0"}
    assert set(chosen(100).values()) == {"1.1.0"}


def test_shadow_is_composed_but_given_to_nobody(tmp_path: Path):
    write(tmp_path)
    write(tmp_path, version="1.1.0")
    (tmp_path / "rollout.json").write_bytes(Rollout({"base": Stage("1.0.0", "1.1.0", 100, shadow=True)}).encode())
    loaded = room.TemplateRegistry.load(tmp_path, lock(tmp_path))
    assert loaded.compose(["base"], subject="ann").ref.version == "1.0.0"
    shadow = loaded.shadow(["base"], subject="ann")
    assert shadow is not None
    assert shadow.ref.version == "1.1.0"


def test_rollout_of_an_unloaded_version_is_refused(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "rollout.json").write_bytes(Rollout({"base": Stage("9.0.0")}).encode())
    with pytest.raises(ConfigError, match=r"base 9\.0\.0, which is not loaded"):
        room.TemplateRegistry.load(tmp_path, lock(tmp_path))


async def test_a_change_is_followed_put_on_record_and_a_bad_set_left_out(tmp_path: Path):
    write(tmp_path)
    loaded = room.TemplateRegistry.load(tmp_path, lock(tmp_path))
    entries: list[dict[str, object]] = []
    down = True

    async def record(event: str, **fields: object) -> None:
        if down:
            raise AuditUnavailableError("no log")
        entries.append({"event": event, **fields})

    async def until(check: Callable[[], bool]) -> None:
        for _ in range(500):
            if check():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not happen")

    task = asyncio.create_task(follow(loaded, "admin:template:changed", record, interval_s=0.01))
    await asyncio.sleep(0.05)
    write(tmp_path, version="2.0.0")
    lock(tmp_path)
    await asyncio.sleep(0.1)
    assert loaded.compose(["base"]).ref.version == "1.0.0", "in force before it was on record"
    down = False
    await until(lambda: loaded.compose(["base"]).ref.version == "2.0.0")
    assert entries[0]["event"] == "admin:template:changed"
    assert entries[0]["after"] == loaded.current.digest
    (tmp_path / "templates.lock").write_text("broken")
    await until(lambda: len(entries) == 2)
    assert entries[1]["refused"] is True
    assert loaded.compose(["base"]).ref.version == "2.0.0"
    lock(tmp_path)
    (tmp_path / "rollout.json").write_bytes(Rollout({"base": Stage("1.0.0")}).encode())
    await until(lambda: loaded.compose(["base"]).ref.version == "1.0.0")
    await asyncio.sleep(0.05)
    assert len(entries) == 3
    task.cancel()


def test_rollout_file_round_trips(tmp_path: Path):
    rollout = Rollout({"base": Stage("1.0.0", "1.1.0", 12.5)})
    path = tmp_path / "rollout.json"
    path.write_bytes(rollout.encode())
    assert Rollout.load(path).stages == rollout.stages
    path.write_text('{"base": {"stable": "1.0.0", "percent": 101}}')
    with pytest.raises(ConfigError, match="percentage"):
        Rollout.load(path)
    assert Rollout.load(tmp_path / "none.json").stages == {}
