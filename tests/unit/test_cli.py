"""The command line: every verb has help with an example, errors are one line, unknown verbs are refused."""

import importlib.util

import pytest

from server.cli import load_command, main, verbs
from server.commands.bench import BENCHMARKS


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_explains_itself(verb, capsys):
    command = load_command(verb)
    assert command.HELP
    assert f"strongroom {verb}" in command.EPILOG
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "xample" in capsys.readouterr().out


def test_an_unknown_verb_is_refused_with_the_known_ones(capsys):
    assert main(["nope"]) == 2
    assert "serve" in capsys.readouterr().err


def test_no_verb_prints_the_help(capsys):
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out


def test_an_error_is_one_line(capsys, tmp_path):
    assert main(["serve", "--config", str(tmp_path / "missing.yaml")]) == 1
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert "missing.yaml" in out


def test_every_benchmark_is_there():
    for module in BENCHMARKS.values():
        assert importlib.util.find_spec(module) is not None
