"""The set of templates in force: loaded whole or not at all, composed in a fixed order."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError, RequestError
from server.template.lock import SIGNATURE_SUFFIX, encode_lock, load_lock, verify_lock
from server.template.rollout import Rollout
from server.template.source import SCOPES, check_variables, load_directory, newest, verify_cases, verify_variables
from server.types import TemplateRef

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from server.template.source import Template

MAX_COMPOSED = 1024


@dataclass(frozen=True, slots=True)
class ComposedTemplate:
    """Templates put together: the text that stands first in the prompt, and the short form for fill-in-the-middle."""

    text: str
    preamble: str
    ref: TemplateRef
    parts: tuple[tuple[str, str], ...]


NO_TEMPLATE = ComposedTemplate("", "", TemplateRef("none", "0", hashlib.sha256(b"").hexdigest()), ())


@dataclass(frozen=True, slots=True)
class TemplateSet:
    """All templates by id and version, with their roll-out. `digest` is of the lock and the roll-out together."""

    templates: dict[str, dict[str, Template]]
    rollout: Rollout
    digest: str


class TemplateRegistry:
    """The set in force, composed on demand. A new set replaces it whole or not at all.

    Args:
        directory: `ID/VERSION.md` files.
        lock_path: The lock with the digest of each file.
        require_signature: Refuse a lock without a valid signature beside it.
        public_key: Ed25519 key (32 raw bytes, or PEM) that signs locks.
        rollout_path: Says which version a subject gets; `rollout.json` in the directory where None. A template that it
            does not name is served in its newest version.
    """

    def __init__(
        self,
        directory: Path,
        lock_path: Path,
        *,
        require_signature: bool = False,
        public_key: bytes | None = None,
        rollout_path: Path | None = None,
    ) -> None:
        self._directory = directory
        self._lock_path = lock_path
        self._require_signature = require_signature
        self._public_key = public_key
        self._rollout_path = rollout_path or directory / "rollout.json"
        self.current = TemplateSet({}, Rollout(), "")
        self._composed: OrderedDict[tuple[Any, ...], ComposedTemplate] = OrderedDict()
        self._checks: list[Callable[[TemplateSet], None]] = []

    @classmethod
    def load(
        cls,
        directory: Path,
        lock_path: Path,
        *,
        require_signature: bool = False,
        public_key: bytes | None = None,
        rollout_path: Path | None = None,
    ) -> TemplateRegistry:
        """Return a registry with every template of `directory`.

        Raises:
            ConfigError: A template is broken, not in the lock, other than locked, or unsigned where that is demanded.
        """
        registry = cls(
            directory,
            lock_path,
            require_signature=require_signature,
            public_key=public_key,
            rollout_path=rollout_path,
        )
        registry.reload()
        return registry

    @property
    def templates(self) -> dict[str, dict[str, Template]]:
        """The templates in force, by id and version."""
        return self.current.templates

    @property
    def rollout(self) -> Rollout:
        """The roll-out in force."""
        return self.current.rollout

    def reload(self) -> None:
        """Load the set again; on any error the old set stays.

        Raises:
            ConfigError: As `load`.
        """
        self.adopt(self.read_next())

    def read_next(self) -> TemplateSet:
        """Return the set that the files hold now; it is not in force until it is adopted.

        Raises:
            ConfigError: As `load`.
        """
        lock = load_lock(self._lock_path, require_signature=self._require_signature, public_key=self._public_key)
        templates = load_directory(self._directory)
        verify_lock(templates, lock)
        for versions in templates.values():
            for template in versions.values():
                verify_cases(template)
        verify_variables(templates)
        rollout = Rollout.load(self._rollout_path)
        rollout.verify(templates)
        digest = hashlib.sha256(encode_lock(lock) + rollout.encode()).hexdigest()
        fresh = TemplateSet(templates, rollout, digest)
        for check in self._checks:
            check(fresh)
        return fresh

    def adopt(self, fresh: TemplateSet) -> None:
        """Put a set in force; prompts that are being rendered keep the one they began with."""
        self.current = fresh
        self._composed = OrderedDict()

    def stamp(self) -> tuple[int, ...]:
        """Return what changes when the lock, its signature or the roll-out file changes."""
        signature = self._lock_path.with_name(self._lock_path.name + SIGNATURE_SUFFIX)
        state: list[int] = []
        for path in (self._lock_path, signature, self._rollout_path):
            try:
                stat = path.stat()
            except OSError:
                state += (0, 0, 0)
            else:
                state += (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        return tuple(state)

    def compose(
        self, ids: Sequence[str], variables: Mapping[str, Any] | None = None, *, subject: str = ""
    ) -> ComposedTemplate:
        """Return the templates put together, in the fixed order of their scopes, for one subject.

        Raises:
            ConfigError: An id is not loaded.
            RequestError: A variable is outside its schema.
        """
        if not ids:
            return NO_TEMPLATE
        # One look at the set in force: prompts are rendered in threads too, and the set may change meanwhile.
        in_force = self.current
        chosen = [_choose(in_force, name, subject) for name in dict.fromkeys(ids)]
        return self._compose(chosen, variables or {})

    def shadow(
        self, ids: Sequence[str], variables: Mapping[str, Any] | None = None, *, subject: str = ""
    ) -> ComposedTemplate | None:
        """Return what the candidate versions in shadow would give for this subject; None where none is in shadow."""
        in_force = self.current
        candidates = {name: in_force.rollout.shadow_version(name) for name in dict.fromkeys(ids)}
        if not any(candidates.values()):
            return None
        chosen = [
            in_force.templates[name][version] if version else _choose(in_force, name, subject)
            for name, version in candidates.items()
        ]
        return self._compose(chosen, variables or {})

    def require(self, check: Callable[[TemplateSet], None]) -> None:
        """Hold the set in force, and every later one before it is adopted, to a check of whoever renders with it.

        Args:
            check: Raises ConfigError for a set that it can't work with.

        Raises:
            ConfigError: The set in force does not pass.
        """
        check(self.current)
        self._checks.append(check)

    def _compose(self, chosen: list[Template], variables: Mapping[str, Any]) -> ComposedTemplate:
        chosen = sorted(chosen, key=lambda t: SCOPES.index(t.scope))
        used = {name: value for name, value in variables.items() if any(name in t.variables for t in chosen)}
        if len(used) != len(variables):
            _verify_names(self.templates, variables)
        # By digest: a text that was changed under its version must not be found in place of the new one.
        key = (tuple(t.digest for t in chosen), tuple(sorted(used.items())))
        composed = self._composed.get(key)
        if composed is None:
            texts = [t.render({k: v for k, v in variables.items() if k in t.variables}) for t in chosen]
            text = "\n\n".join(texts)
            composed = ComposedTemplate(
                text=text,
                preamble=" ".join(t.preamble for t in chosen if t.preamble),
                ref=TemplateRef(
                    "+".join(t.id for t in chosen),
                    "+".join(t.version for t in chosen),
                    hashlib.sha256(text.encode()).hexdigest(),
                ),
                parts=tuple((t.id, t.version) for t in chosen),
            )
            self._composed[key] = composed
            if len(self._composed) > MAX_COMPOSED:
                self._composed.popitem(last=False)
        return composed


def verify_values(templates: Mapping[str, Mapping[str, Template]], variables: Mapping[str, Any]) -> None:
    """Check the deployment's own values of variables.

    Raises:
        ConfigError: A variable that no template has, or a value outside its schema.
    """
    try:
        _verify_names(templates, variables)
        for versions in templates.values():
            for template in versions.values():
                check_variables(template, {k: v for k, v in variables.items() if k in template.variables})
    except RequestError as err:
        raise ConfigError(f"The templates' variables in the settings are wrong: {err}") from err


def _verify_names(templates: Mapping[str, Mapping[str, Template]], variables: Mapping[str, Any]) -> None:
    known = {name for versions in templates.values() for t in versions.values() for name in t.variables}
    if unknown := sorted(set(variables) - known):
        raise RequestError(f"Unknown template variable {unknown[0]!r}. Known: {', '.join(sorted(known)) or 'none'}.")


def _choose(in_force: TemplateSet, name: str, subject: str) -> Template:
    versions = in_force.templates.get(name)
    if not versions:
        raise ConfigError(
            f"Template '{name}' is not loaded. Add it to the templates directory and lock it, or mend the policy."
        )
    return versions[in_force.rollout.version_for(name, subject) or newest(versions)]
