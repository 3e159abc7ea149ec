"""What a text that was put together, an assertion and the calls in a file do to a finding."""

from __future__ import annotations

import time

import pytest

from server.guard import scan


def _found(code: str, language: str) -> set[str]:
    return {finding.rule for finding in scan.scan_text(code, language=language).findings}


# --- an ending makes a text put together, but for a path ---


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", 'def rows(c, where):\n    c.execute(where + " LIMIT 1")\n'),
        ("python", 'def rows(c, where):\n    c.execute(f"{where} LIMIT 1")\n'),
        ("python", 'def rows(c, where):\n    text = f"{where} LIMIT"\n    c.execute(text + " 1")\n'),
        ("javascript", 'function rows(db, where) {\n  return db.query(where + " LIMIT 1");\n}\n'),
        ("javascript", "function rows(db, where) {\n  return db.query(`${where} LIMIT 1`);\n}\n"),
        (
            "java",
            "class Rows {\n    ResultSet rows(Statement statement, String where) throws SQLException {\n"
            '        return statement.executeQuery(where + " LIMIT 1");\n    }\n}\n',
        ),
        ("python", 'def save(path, name):\n    with open(f"{path}/{name}", "w") as out:\n        out.write("x")\n'),
    ],
)
def test_a_text_with_an_ending_is_put_together(language: str, code: str) -> None:
    assert _found(code, language)


@pytest.mark.parametrize(
    "code",
    [
        'def save(path):\n    with open(path + ".tmp", "w") as out:\n        out.write("x")\n',
        'def save(path):\n    with open(f"{path}.tmp", "w") as out:\n        out.write("x")\n',
    ],
)
def test_a_path_with_an_ending_is_the_path(code: str) -> None:
    assert not _found(code, "python")


# --- an assertion is one that raises ---

_HANDLER = (
    'import { exec } from "node:child_process";\n{head}\n'
    "router.post('/run', (ctx) => {{\n  const name = ctx.request.body.name;\n  {check}(/^[a-z]+$/.test(name){rest});\n"
    "  exec('convert ' + name);\n}});\n"
).replace("{ exec }", "{{ exec }}")


@pytest.mark.parametrize(
    ("head", "check"),
    [
        ("", "console.assert"),
        ("", "log.assert"),
        ("", "this.logger.assert"),
        ('import { assert } from "../logger";', "assert"),
        ("const { assert } = console;", "assert"),
        ("const assert = console.assert;", "assert"),
        ("function assert(holds) {\n  if (!holds) console.warn('no');\n}", "assert"),
        ("", "checks.isTrue"),
        ("", "isTrue"),
    ],
)
def test_what_goes_on_is_no_assertion(head: str, check: str) -> None:
    assert _found(_HANDLER.format(head=head, check=check, rest=""), "javascript")


@pytest.mark.parametrize(
    ("head", "check", "rest"),
    [
        ('import assert from "node:assert";', "assert", ""),
        ('import assert from "node:assert";', "assert.ok", ""),
        ('const assert = require("assert");', "assert", ""),
        ('import invariant from "invariant";', "invariant", ""),
        ("", "ctx.assert", ", 400"),
        ("function assert(holds) {\n  if (!holds) throw new Error('no');\n}", "assert", ""),
    ],
)
def test_what_raises_is_an_assertion(head: str, check: str, rest: str) -> None:
    assert not _found(_HANDLER.format(head=head, check=check, rest=rest), "javascript")


# --- what a function is given in its file ---

_ARCHIVE = 'import os\n\n\ndef archive(path):\n    os.system("tar czf out.tgz " + path)\n\n\n'
_CHECKED = (
    "def named(job):\n    name = str(job['name'])\n    if not NAME.fullmatch(name):\n"
    "        raise ValueError\n    return name\n\n\n"
)


@pytest.mark.parametrize(
    "rest",
    [
        "",
        'if __name__ == "__main__":\n    archive("/tmp/x")\n',
        'archive("/tmp/x")\n',
        'def main():\n    archive("/tmp/x")\n\n\nif __name__ == "__main__":\n    main()\n',
        'def first():\n    archive("a")\n\n\nclass Hooks:\n    on_close = archive\n',
        _CHECKED + "def run(job):\n    archive(named(job))\n\n\nHANDLERS = {'archive': archive}\n",
        _CHECKED + "def run(job):\n    archive(named(job))\n\n\ndef later(pool, job):\n    pool.submit(archive, job)\n",
        _CHECKED + "def run(job, more):\n    archive(named(job))\n    archive(*more)\n",
        _CHECKED + 'if __name__ == "__main__":\n    archive(named({"name": "x"}))\n',
        _CHECKED + "def run(job):\n    name = named(job)\n    for name in listing():\n        archive(name)\n",
        _CHECKED + "def run(job, box):\n    box.archive(named(job))\n",
        _CHECKED
        + "def run(job):\n    archive(named(job))\n\n\n"
        + "class Box:\n    def archive(self, path):\n        self.paths.append(path)\n",
    ],
)
def test_a_call_with_a_literal_or_a_use_of_another_kind_clears_nothing(rest: str) -> None:
    code = _ARCHIVE.replace("import os\n", "import os\nimport re\n\nNAME = re.compile('[a-z]+')\n") + rest
    assert "CWE-78" in {finding.cwe for finding in scan.scan_text(code, language="python").findings}


@pytest.mark.parametrize(
    "code",
    [
        _ARCHIVE.replace("import os\n", "import os\nimport re\n\nNAME = re.compile('[a-z]+')\n")
        + _CHECKED
        + "def run(job):\n    archive(named(job))\n",
        _ARCHIVE.replace("archive", "_archive") + 'def run():\n    _archive("a")\n    _archive("b")\n',
    ],
)
def test_a_function_whose_calls_all_give_what_is_fit_is_no_finding(code: str) -> None:
    assert not _found(code, "python")


def test_a_name_that_is_exported_is_called_elsewhere() -> None:
    code = (
        'import { exec } from "node:child_process";\n'
        "const TASKS = { a: 'a' };\n"
        'HEAD function pack(name) {\n  exec("pack " + name);\n}\n'
        "export function run(key) {\n  pack(TASKS[key]);\n}\n"
    )
    assert not _found(code.replace("HEAD ", ""), "javascript")
    assert _found(code.replace("HEAD", "export"), "javascript")
    assert _found(code.replace("HEAD ", "") + "export default pack;\n", "javascript")
    assert _found(code.replace("HEAD ", "") + "bus.on('pack', pack);\n", "javascript")


def test_what_map_gives_is_read_from_its_own_place() -> None:
    code = (
        "import os\n\n\ndef PACK(name):\n    os.system('pack ' + name)\n    return name\n\n\n"
        "def run(box):\n    return list(map(PACK, box.names()))\n"
    )
    assert _found(code, "python")


@pytest.mark.parametrize(
    "code",
    [
        "import os\n\n\ndef _a(c):\n    os.system('x ' + c)\n\n\ndef f():\n" + "    c = 'x'\n    _a(c)\n" * 900,
        "import os\n\n\n"
        + "".join(f"def _a{i}(c):\n    os.system('x ' + c)\n\n\ndef b{i}():\n    _a{i}('x')\n" for i in range(300)),
        "import os\n\n\ndef _a(c):\n" + "    os.system('x ' + c)\n" * 200 + "\n\ndef f():\n" + "    _a('x')\n" * 1500,
        "import os\n\n\ndef _a(c):\n"
        + "    os.system('x ' + c)\n" * 200
        + "\n\ndef f():\n    x0 = 'a'\n"
        + "".join(f"    x{i + 1} = x{i} + 'b'\n    _a(x{i})\n" for i in range(300)),
    ],
)
def test_many_calls_take_no_longer_than_they_should(code: str) -> None:
    began = time.perf_counter()
    scan.scan_text(code, language="python")
    assert time.perf_counter() - began < 4
