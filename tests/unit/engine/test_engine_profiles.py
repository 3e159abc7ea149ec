"""Every engine profile in `configs/models/` is a configuration that would be served as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.config import build_engine_argv
from server.host import engine_config
from server.settings import load_settings

ROOT = Path(__file__).parents[3]
PROFILES = sorted((ROOT / "configs" / "models").glob("*.yaml"))


def argv_of(profile: Path) -> list[str]:
    settings = load_settings(profile)
    (model,) = settings.models
    config = engine_config(model, max_model_len=4096, manifest_digest="0" * 64, network_isolation="auto")
    return build_engine_argv(config, Path("/run/engine.sock"))


def test_there_are_profiles_for_cpus_one_gpu_and_several():
    names = [profile.stem for profile in PROFILES]
    assert any("cpu" in name for name in names)
    assert any("-1x" in name for name in names)
    assert any("-2x" in name or "-8x" in name for name in names)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.stem)
def test_profile_parses_and_makes_an_engine(profile):
    settings = load_settings(profile)
    assert settings.policy.directory.resolve() == ROOT / "configs" / "policy"
    assert settings.templates.directory.resolve() == ROOT / "configs" / "templates"
    assert settings.guard.directory.resolve() == ROOT / "configs" / "guard"
    argv = argv_of(profile)
    for option in ("--enable-prefix-caching", "--enable-chunked-prefill", "--speculative-config", "--max-num-seqs",
                   "--max-num-batched-tokens"):  # fmt: skip
        assert option in argv


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.stem)
def test_profile_says_what_it_is_for_and_whether_it_was_measured(profile):
    text = profile.read_text()
    assert f"configs/models/{profile.name}" in text
    assert ("not measured here" in text) != ("Measured" in text)
    assert max(map(len, text.splitlines())) <= 130
