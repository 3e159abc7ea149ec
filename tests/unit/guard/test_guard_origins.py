"""Where a shell variable's value comes from."""

from __future__ import annotations

import time

import pytest

from server.guard.origins import Script


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("table=orders\n", "table"),
        ("for table in a b; do\n", "table"),
        ("root=${ROOT:-/srv}\ndir=$root/x\n", "dir"),
        ("n=$(date +%s)\n", "n"),
        ("id=$1\n[[ $id =~ ^[0-9]+$ ]] || exit\n", "id"),
        ('id=$1\nrequire_int "$id"\n', "id"),
        ("printf -v q '%q' \"$1\"\n", "q"),
        ("declare -A m=([a]=b)\nf=${m[$k]}\n", "k"),
        ("", "DEPLOY_ROOT"),
    ],
)
def test_a_value_of_the_script_or_a_checked_one_is_settled(code: str, name: str) -> None:
    assert Script(code).is_settled(name, len(code))


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("id=$1\n", "id"),
        ("read -r id\n", "id"),
        ('for f in "$@"; do\n', "f"),
        ("", "QUERY_STRING"),
        ("a=$b\nb=$a\n", "a"),
        (
            'read -ra pairs <<< "$QUERY_STRING"\nfor p in "${pairs[@]}"; do\ncase $p in\n n=*) n=${p#n=};;\n',
            "n",
        ),
        ("conf=/tmp/app.conf\n", "conf"),
    ],
)
def test_a_value_from_outside_is_not(code: str, name: str) -> None:
    assert not Script(code).is_settled(name, len(code))


def test_an_argument_is_what_the_calls_give() -> None:
    code = 'count() {\n  psql -c "select $1"\n}\ncount orders\n'
    at = code.index("$1")
    assert Script(code).is_settled("1", at)
    assert not Script(code + 'count "$2"\n').is_settled("1", at)
    assert not Script(code).is_settled("1", len(code))


def test_a_variable_that_may_be_empty_is_not_settled_where_that_matters() -> None:
    assert not Script("").is_settled("BUILD_ROOT", 0, environment=False)
    assert Script("BUILD_ROOT=/srv/build\n").is_settled("BUILD_ROOT", 20, environment=False)


def test_a_long_text_of_many_variables_is_judged_in_time() -> None:
    code = "".join(f"v{i}=$v{i + 1}\nf{i}() {{\n  f{i + 1} $1\n}}\n" for i in range(4000))
    script = Script(code)
    started = time.process_time()
    for i in range(4000):
        script.is_settled(f"v{i}", 0)
        script.is_settled("1", i * 20)
    assert time.process_time() - started < 10
