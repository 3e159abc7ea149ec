"""Unknown packages and copied code: both need the operator's lists, and say nothing without."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import ConfigError
from server.guard import licence, packages, public
from server.guard.code import find_insecure

SHIPPED = Path(__file__).parents[3] / "configs" / "guard" / "public"
COPY = "\n".join(f"def step_{i}(a, b):\n    total = a * {i} + b\n    return total - {i}\n" for i in range(12))


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from server.guard import rules

    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "python.txt").write_text("requests\npyyaml  # config\nacme-*\n")
    (folder / "javascript.txt").write_text("express\n@acme/ui\n")
    (folder / "go.txt").write_text("github.com/gorilla/*\n")
    (tmp_path / "rules").symlink_to(rules.rules_folder())
    monkeypatch.setattr(packages, "rules_folder", lambda: tmp_path / "rules")
    packages.allowed.cache_clear()
    yield folder
    packages.allowed.cache_clear()


def unknown(source: str, language: str) -> list[str]:
    return [source[f.start : f.end] for f in find_insecure(source, language) if f.rule == "unknown-package"]


@pytest.mark.usefixtures("lists")
def test_names_on_no_list_are_found() -> None:
    assert unknown("import os\nimport yaml\nimport reqeusts_pro\nfrom requests import get\n", "python") == [
        "reqeusts_pro"
    ]
    assert unknown(
        "import x from 'expres';\nimport { A } from '@acme/ui/a';\nimport fs from 'node:fs';\n", "javascript"
    ) == ["expres"]
    assert unknown('package a\nimport "github.com/gorilla/mux"\nimport "github.com/gorrila/mux"\n', "go") == [
        "github.com/gorrila/mux"
    ]
    assert unknown("pip install requests acme-tools fastjsonx==1.0\nnpm i -g express leftpadder\n", "shell") == [
        "fastjsonx==1.0",
        "leftpadder",
    ]
    assert unknown("FROM x\nRUN pip install --no-cache-dir fakelib\nUSER a\n", "dockerfile") == ["fakelib"]


@pytest.mark.usefixtures("lists")
def test_what_an_option_takes_is_no_package() -> None:
    assert unknown("pip install -r requirements.txt --target out requests\n", "shell") == []


def test_the_public_names_count_where_a_list_asks_for_them(lists: Path) -> None:
    (lists / "python.txt").write_text("@public\nacme-*\n")
    (lists / "javascript.txt").write_text("@public\n")
    (lists.parent / "public").symlink_to(SHIPPED)
    packages.allowed.cache_clear()
    assert unknown("pip install requests Flask_SQLAlchemy acme-tools zq-no-such-name-7f3a9\n", "shell") == [
        "zq-no-such-name-7f3a9"
    ]
    assert unknown("npm install express @types/node zq-no-such-name-7f3a9\n", "shell") == ["zq-no-such-name-7f3a9"]
    assert unknown("pip install --index-url https://packages.internal/ zq-no-such-name-7f3a9\n", "shell") == []
    assert unknown("import my_own_module\n", "python") == []


def test_public_names_are_known_for_certain_and_few_others() -> None:
    names = [f"package-{n}" for n in range(3000)]
    path = SHIPPED / "python.bloom"
    assert path.stat().st_size < 1_048_576
    data = public.build(names)
    head, _, bits = data.partition(b"\n")
    made = public.Names(int(head.split()[1]), int(head.split()[2]), bits)
    assert all(name in made for name in names)
    assert sum(f"other-{n}" in made for n in range(3000)) < 150


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_public_list_that_is_not_whole_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.bloom"
    path.write_bytes(public.build(["a", "b"] * 200 + [f"n{n}" for n in range(300)])[:cut])
    with pytest.raises(ConfigError):
        public.load(path)
    with pytest.raises(ConfigError):
        public.load(tmp_path / "none.bloom")


def test_without_a_list_nothing_is_said() -> None:
    packages.allowed.cache_clear()
    assert unknown("import reqeusts_pro\n", "python") == []


def test_a_copy_is_found_whatever_its_layout() -> None:
    index = licence.build([("lib/steps.py", "GPL-3.0-only", COPY), ("lib/other.py", "MIT", "x = 1\n" * 60)])
    changed = "# mine\n" + COPY.replace("    ", "  ").replace("\n\n", "\n")
    found = licence.find_copies(changed, index)
    assert [f.rule for f in found] == ["copied-code"]
    assert "lib/steps.py" in found[0].message
    assert "GPL-3.0-only" in found[0].message
    assert licence.find_copies("def other(x):\n    return [y for y in x if y]\n" * 10, index) == []


def test_an_index_survives_the_disk_and_refuses_another(tmp_path: Path) -> None:
    path = tmp_path / "protected.json"
    index = licence.build([("a.py", "MIT", COPY)])
    licence.save(index, path)
    assert licence.load(path) == index
    assert "total" not in path.read_text()
    path.write_text('{"version": 2}')
    with pytest.raises(ConfigError):
        licence.load(path)
