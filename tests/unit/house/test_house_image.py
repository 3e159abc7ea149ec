"""The Dockerfile is clean under hadolint, runs as an ordinary user and is checked by its health."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_dockerfile_is_clean_under_hadolint():
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_images_run_as_an_ordinary_user_with_a_health_check():
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n((?:(?!FROM ).*\n)*)", text, flags=re.MULTILINE))
    assert re.findall(r"^USER (.*)$", stages["cpu"] + stages["gpu"], flags=re.MULTILINE) == ["10001:10001"] * 2
    assert "/livez" in stages["runtime"]
    assert "PYTHONSAFEPATH=1" in stages["base"]


def test_the_guard_finds_its_rules_in_the_image():
    """What is installed there is the package alone; its folders of rules lie where the settings file is."""
    text = (ROOT / "Dockerfile").read_text()
    (rules,) = re.findall(r"STRONGROOM_GUARD_RULES=(\S+)", text)
    target = re.search(r"^COPY configs (\S+)$", text, flags=re.MULTILINE)
    assert target is not None
    copied = ROOT / "configs" / Path(rules).relative_to(target[1])
    assert (copied / "weaknesses.yml").is_file()


def test_image_gets_everything_that_the_build_copies():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"server", "kernels", "configs", "locks", "pyproject.toml", "README.md"} <= allowed
    assert "tests" not in allowed
