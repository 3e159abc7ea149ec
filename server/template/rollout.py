"""Which version of a template a subject gets: by percentage, always the same for the same subject."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Stage:
    """How one template is rolled out.

    `stable` is what everybody gets outside the percentage; `candidate` what the percentage gets. In `shadow` nobody
    gets the candidate: it is composed and recorded only.
    """

    stable: str
    candidate: str | None = None
    percent: float = 0.0
    shadow: bool = False


class Rollout:
    """The stages of all templates; a template without one is served in its newest version."""

    def __init__(self, stages: Mapping[str, Stage] | None = None) -> None:
        self.stages: dict[str, Stage] = dict(stages or {})

    @classmethod
    def load(cls, path: Path) -> Rollout:
        """Return the stages in a file; none where there is no file.

        Raises:
            ConfigError: The file is broken.
        """
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_bytes())
            stages = {str(name): _parse_stage(name, entry) for name, entry in data.items()}
        except (OSError, ValueError, AttributeError, TypeError) as err:
            raise ConfigError(
                f"The roll-out file {path} can't be read. Make it with 'strongroom template rollout'."
            ) from err
        return cls(stages)

    def encode(self) -> bytes:
        """Return the file's content."""
        data = {name: asdict(stage) for name, stage in sorted(self.stages.items())}
        return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()

    def version_for(self, name: str, subject: str) -> str | None:
        """Return the version this subject gets, or None for the newest.

        Who is in the percentage depends on template, candidate and subject only: a subject that has the candidate
        keeps it while the percentage grows, and another candidate draws another sample.
        """
        stage = self.stages.get(name)
        if stage is None:
            return None
        if stage.candidate is None or stage.shadow or not stage.percent:
            return stage.stable
        return stage.candidate if bucket(name, stage.candidate, subject) < stage.percent * 100 else stage.stable

    def shadow_version(self, name: str) -> str | None:
        """Return the candidate in shadow, if there is one."""
        stage = self.stages.get(name)
        return stage.candidate if stage is not None and stage.shadow else None

    def verify(self, templates: Mapping[str, Mapping[str, Any]]) -> None:
        """Check that every version named is loaded.

        Raises:
            ConfigError: One is not.
        """
        for name, stage in self.stages.items():
            for version in (stage.stable, stage.candidate):
                if version is not None and version not in templates.get(name, {}):
                    raise ConfigError(f"The roll-out names template {name} {version}, which is not loaded.")


def bucket(name: str, version: str, subject: str) -> int:
    """Return where a subject falls among 10,000 equal parts."""
    digest = hashlib.sha256(f"{name}\0{version}\0{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _BUCKETS


def _parse_stage(name: str, entry: Mapping[str, Any]) -> Stage:
    if set(entry) - {"stable", "candidate", "percent", "shadow"}:
        raise ConfigError(f"The roll-out of {name} has an unknown field.")
    stage = Stage(
        stable=str(entry["stable"]) if "stable" in entry else "",
        candidate=entry.get("candidate"),
        percent=float(entry.get("percent", 0.0)),
        shadow=bool(entry.get("shadow", False)),
    )
    if not stage.stable or not 0 <= stage.percent <= 100:
        raise ConfigError(f"The roll-out of {name} needs a stable version, and a percentage from 0 to 100.")
    return stage
