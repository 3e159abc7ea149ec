"""Loads the security templates: parsed strictly, held to their lock, composed in a fixed order."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typing_extensions import override

from server.errors import ConfigError, RequestError
from server.template.rollout import Rollout
from server.types import TemplateRef

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_COMPOSED = 1024
# Composition order. What is the same for most requests comes first, so that the engine's prefix cache pays for it once.
SCOPES = ("organisation", "team", "language", "task")
FORMATS = frozenset({"chat", "completion", "fim", "embedding"})
LOCK_FORMAT = 1
SIGNATURE_SUFFIX = ".sig"
_ID = re.compile(r"[a-z][a-z0-9-]{1,63}")
_VERSION = re.compile(r"(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})")
_FIELDS = frozenset(
    {
        "id",
        "version",
        "title",
        "owner",
        "scope",
        "standards",
        "formats",
        "tasks",
        "languages",
        "variables",
        "preamble",
        "cases",
    }
)
_REQUIRED = ("id", "version", "title", "owner", "scope", "standards", "formats")


@dataclass(frozen=True, slots=True)
class Variable:
    """A template variable: its type, and what it may be."""

    type: str
    default: str | int | bool | None = None
    enum: tuple[str, ...] = ()
    pattern: str | None = None
    max_length: int = 200
    description: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """A test of a template: with these variables its text holds and lacks these strings."""

    name: str
    variables: dict[str, Any]
    contains: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Template:
    """One version of one template, as its file has it. `digest` is the SHA-256 of the file."""

    id: str
    version: str
    title: str
    owner: str
    scope: str
    standards: tuple[str, ...]
    formats: frozenset[str]
    body: str
    digest: str
    tasks: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    variables: dict[str, Variable] = field(default_factory=dict)
    preamble: str = ""
    cases: tuple[Case, ...] = ()

    def render(self, variables: Mapping[str, Any] | None = None) -> str:
        """Return the body with its variables filled in.

        Raises:
            RequestError: A variable is unknown, missing or outside its schema.
            ConfigError: The body can't be rendered.
        """
        values = _check_variables(self, variables or {})
        try:
            return _ENVIRONMENT.from_string(self.body).render(values).strip()
        except TemplateError as err:
            raise ConfigError(f"Template {self.id} {self.version} can't be rendered: {err.message}.") from err


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
        return TemplateSet(templates, rollout, digest)

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
        chosen = [self._choose(name, subject) for name in dict.fromkeys(ids)]
        return self._compose(chosen, variables or {})

    def shadow(
        self, ids: Sequence[str], variables: Mapping[str, Any] | None = None, *, subject: str = ""
    ) -> ComposedTemplate | None:
        """Return what the candidate versions in shadow would give for this subject; None where none is in shadow."""
        if not any(self.rollout.shadow_version(name) for name in ids):
            return None
        chosen = [
            self.templates[name][self.rollout.shadow_version(name) or self._choose(name, subject).version]
            for name in dict.fromkeys(ids)
        ]
        return self._compose(chosen, variables or {})

    def verify_values(self, variables: Mapping[str, Any]) -> None:
        """Check the deployment's own values of variables, once, at start.

        Raises:
            ConfigError: A variable that no template has, or a value outside its schema.
        """
        try:
            self._verify_names(variables)
            for versions in self.templates.values():
                for template in versions.values():
                    _check_variables(template, {k: v for k, v in variables.items() if k in template.variables})
        except RequestError as err:
            raise ConfigError(f"The templates' variables in the settings are wrong: {err}") from err

    def _verify_names(self, variables: Mapping[str, Any]) -> None:
        known = {name for versions in self.templates.values() for t in versions.values() for name in t.variables}
        if unknown := sorted(set(variables) - known):
            raise RequestError(
                f"Unknown template variable {unknown[0]!r}. Known: {', '.join(sorted(known)) or 'none'}."
            )

    def _choose(self, name: str, subject: str) -> Template:
        versions = self.templates.get(name)
        if not versions:
            raise ConfigError(
                f"Template '{name}' is not loaded. Add it to the templates directory and lock it, or mend the policy."
            )
        return versions[self.rollout.version_for(name, subject) or newest(versions)]

    def _compose(self, chosen: list[Template], variables: Mapping[str, Any]) -> ComposedTemplate:
        chosen = sorted(chosen, key=lambda t: SCOPES.index(t.scope))
        used = {name: value for name, value in variables.items() if any(name in t.variables for t in chosen)}
        if len(used) != len(variables):
            self._verify_names(variables)
        key = (tuple((t.id, t.version) for t in chosen), tuple(sorted(used.items())))
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
                parts=key[0],
            )
            self._composed[key] = composed
            if len(self._composed) > MAX_COMPOSED:
                self._composed.popitem(last=False)
        return composed


def newest(versions: Mapping[str, Template]) -> str:
    """Return the highest version."""
    return max(versions, key=version_key)


def version_key(version: str) -> tuple[int, ...]:
    """Return what versions are ordered by."""
    return tuple(map(int, version.split(".")))


def load_directory(directory: Path) -> dict[str, dict[str, Template]]:
    """Return every template below `directory`, by id and version.

    Raises:
        ConfigError: A file that is not a template of the name it has; named.
    """
    templates: dict[str, dict[str, Template]] = {}
    for path in sorted(directory.glob("*/*.md")):
        template = parse_template(path.read_bytes(), name=str(path))
        if (path.parent.name, path.stem) != (template.id, template.version):
            raise ConfigError(
                f"{path} says it is {template.id} {template.version}. Name it {template.id}/{template.version}.md."
            )
        templates.setdefault(template.id, {})[template.version] = template
    if not templates:
        raise ConfigError(f"No template was found in {directory}. Put ID/VERSION.md files there.")
    return templates


def parse_template(content: bytes, *, name: str) -> Template:
    """Return the template in a file's bytes.

    Args:
        content: Markdown with YAML front matter between `---` lines.
        name: What errors call it.

    Raises:
        ConfigError: Anything unknown, missing, doubled or too large.
    """
    if len(content) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{name} has {len(content)} bytes; the limit of a template is {MAX_TEMPLATE_BYTES}.")
    try:
        text = content.decode()
    except UnicodeDecodeError as err:
        raise ConfigError(f"{name} is not UTF-8.") from err
    match = re.match(r"---\n(.*?\n)---\n(.+)\Z", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"{name} has no front matter. Begin it with '---', the fields, '---', then the text.")
    front = _load_yaml(match[1], name)
    if unknown := sorted(set(front) - _FIELDS):
        raise ConfigError(f"{name}: unknown field {unknown[0]!r}. Known: {', '.join(sorted(_FIELDS))}.")
    if missing := [key for key in _REQUIRED if not front.get(key)]:
        raise ConfigError(f"{name}: the field {missing[0]!r} is missing.")
    if not _ID.fullmatch(str(front["id"])) or not _VERSION.fullmatch(str(front["version"])):
        raise ConfigError(f"{name}: id must be lower-case words with hyphens, version three numbers (1.0.0).")
    if front["scope"] not in SCOPES:
        raise ConfigError(f"{name}: scope must be one of {', '.join(SCOPES)}.")
    formats = frozenset(_strings(front, "formats", name))
    if not formats <= FORMATS:
        raise ConfigError(f"{name}: formats must be among {', '.join(sorted(FORMATS))}.")
    body = match[2].strip()
    template = Template(
        id=str(front["id"]),
        version=str(front["version"]),
        title=str(front["title"]),
        owner=str(front["owner"]),
        scope=str(front["scope"]),
        standards=_strings(front, "standards", name),
        formats=formats,
        body=body,
        digest=hashlib.sha256(content).hexdigest(),
        tasks=_strings(front, "tasks", name),
        languages=_strings(front, "languages", name),
        variables=_parse_variables(front.get("variables") or {}, name),
        preamble=" ".join(str(front.get("preamble") or "").split()),
        cases=_parse_cases(front.get("cases") or [], name),
    )
    try:
        _ENVIRONMENT.from_string(body)
    except TemplateError as err:
        raise ConfigError(f"{name}: the text is not a valid template: {err.message}.") from err
    return template


def verify_cases(template: Template) -> None:
    """Run a template's own test cases.

    Raises:
        ConfigError: A case fails; named.
    """
    for case in template.cases:
        where = f"Template {template.id} {template.version}, case '{case.name}'"
        try:
            text = template.render(case.variables)
        except RequestError as err:
            raise ConfigError(f"{where}: {err}") from err
        for wanted in case.contains:
            if wanted not in text:
                raise ConfigError(f"{where}: the text lacks {wanted!r}.")
        for unwanted in case.absent:
            if unwanted in text:
                raise ConfigError(f"{where}: the text holds {unwanted!r}.")


def verify_variables(templates: Mapping[str, Mapping[str, Template]]) -> None:
    """Check that a variable means the same in every template, since one value serves all that are put together.

    Raises:
        ConfigError: Two templates give one name different schemas; named.
    """
    owners: dict[str, Template] = {}
    for versions in templates.values():
        for template in versions.values():
            for name, schema in template.variables.items():
                owner = owners.setdefault(name, template)
                if owner.id != template.id and owner.variables[name] != schema:
                    raise ConfigError(
                        f"Templates {owner.id} and {template.id} give the variable {name!r} different schemas. "
                        "Rename one."
                    )


def load_lock(
    path: Path, *, require_signature: bool = False, public_key: bytes | None = None
) -> dict[str, dict[str, str]]:
    """Return the locked digests by id and version.

    Raises:
        ConfigError: Missing, not canonical, or without a valid signature where one is demanded.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"The template lock {path} can't be read. Make it with 'strongroom template lock'.") from err
    if require_signature:
        verify_signature(content, path.with_name(path.name + SIGNATURE_SUFFIX), public_key)
    try:
        data = json.loads(content)
        lock: dict[str, dict[str, str]] = data["templates"]
        canonical = encode_lock(lock)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(
            f"The template lock {path} can't be parsed. Make it again with 'strongroom template lock'."
        ) from err
    if data.get("format") != LOCK_FORMAT or content != canonical:
        raise ConfigError(
            f"The template lock {path} is not in canonical form. Make it again with 'strongroom template lock'."
        )
    return lock


def verify_signature(content: bytes, path: Path, public_key: bytes | None) -> None:
    """Check the Ed25519 signature of a lock.

    Raises:
        ConfigError: No key, no signature, or one that is not valid.
    """
    if public_key is None:
        raise ConfigError("Template signatures are demanded, but no public key is set. Set the templates' public key.")
    try:
        signature = base64.b64decode(path.read_bytes().strip(), validate=True)
    except OSError as err:
        raise ConfigError(
            f"The template lock is unsigned: {path} is missing. Sign it with 'strongroom template lock'."
        ) from err
    except (binascii.Error, ValueError) as err:
        raise ConfigError(f"{path} is not a signature.") from err
    try:
        key = load_pem_public_key(public_key) if public_key.startswith(b"-----") else None
        if key is not None and not isinstance(key, Ed25519PublicKey):
            raise ConfigError("The key that template locks are signed with must be an Ed25519 key.")
        (key or Ed25519PublicKey.from_public_bytes(public_key)).verify(signature, content)
    except (InvalidSignature, ValueError) as err:
        raise ConfigError(f"{path} is not a valid signature of the template lock by the key that is set.") from err


def encode_lock(templates: Mapping[str, Mapping[str, str]]) -> bytes:
    """Return the one way to write a lock down."""
    data = {"format": LOCK_FORMAT, "templates": {i: dict(sorted(v.items())) for i, v in sorted(templates.items())}}
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def digests(templates: Mapping[str, Mapping[str, Template]]) -> dict[str, dict[str, str]]:
    """Return what a lock of these templates holds."""
    return {name: {v: t.digest for v, t in versions.items()} for name, versions in templates.items()}


def verify_lock(templates: Mapping[str, Mapping[str, Template]], lock: Mapping[str, Mapping[str, str]]) -> None:
    """Check that files and lock agree both ways.

    Raises:
        ConfigError: A template is not locked, other than locked, or locked and gone; named.
    """
    for name, versions in templates.items():
        for version, template in versions.items():
            locked = lock.get(name, {}).get(version)
            if locked is None:
                raise ConfigError(
                    f"Template {name} {version} is not in the lock. Review it, then 'strongroom template lock'."
                )
            if locked != template.digest:
                raise ConfigError(
                    f"Template {name} {version} is not what was locked (digest {template.digest[:12]}, "
                    f"locked {locked[:12]}). Restore the file, or review it and lock it under a new version."
                )
    for name, locked_versions in lock.items():
        for version in locked_versions:
            if version not in templates.get(name, {}):
                raise ConfigError(f"Template {name} {version} is in the lock but its file is missing. Restore it.")


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=False
)
_ENVIRONMENT.globals.clear()


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses doubled keys."""

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if len(keys) != len(set(map(str, keys))):
            raise yaml.YAMLError("a key stands twice")
        return super().construct_mapping(node, deep)


def _load_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        front = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as err:
        raise ConfigError(f"{name}: the front matter is not valid YAML ({str(err).splitlines()[0]}).") from err
    if not isinstance(front, dict):
        raise ConfigError(f"{name}: the front matter must be fields.")
    return front


def _strings(front: Mapping[str, Any], key: str, name: str) -> tuple[str, ...]:
    value = front.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name}: {key} must be a list of strings.")
    return tuple(value)


def _parse_variables(value: object, name: str) -> dict[str, Variable]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: variables must be a mapping.")
    variables = {}
    for key, entry in value.items():
        if not isinstance(entry, dict) or entry.get("type") not in ("string", "integer", "boolean"):
            raise ConfigError(f"{name}: variable {key!r} needs a type: string, integer or boolean.")
        known = {"type", "default", "enum", "pattern", "max_length", "description"}
        if unknown := sorted(set(entry) - known):
            raise ConfigError(f"{name}: variable {key!r} has an unknown field {unknown[0]!r}.")
        variables[str(key)] = Variable(
            type=entry["type"],
            default=entry.get("default"),
            enum=_strings(entry, "enum", name),
            pattern=entry.get("pattern"),
            max_length=int(entry.get("max_length", 200)),
            description=str(entry.get("description", "")),
        )
    return variables


def _parse_cases(value: object, name: str) -> tuple[Case, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{name}: cases must be a list.")
    cases = []
    for entry in value:
        if (
            not isinstance(entry, dict)
            or set(entry) - {"name", "variables", "contains", "absent"}
            or "name" not in entry
        ):
            raise ConfigError(f"{name}: a case has name, variables, contains, absent and nothing else.")
        cases.append(
            Case(
                name=str(entry["name"]),
                variables=dict(entry.get("variables") or {}),
                contains=_strings(entry, "contains", name),
                absent=_strings(entry, "absent", name),
            )
        )
    return tuple(cases)


_TYPES: dict[str, type] = {"string": str, "integer": int, "boolean": bool}


def _check_variables(template: Template, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every variable's value, by its schema.

    Raises:
        RequestError: One is unknown, missing or outside its schema.
    """
    if unknown := sorted(set(given) - set(template.variables)):
        raise RequestError(f"Template {template.id} has no variable {unknown[0]!r}.")
    values: dict[str, Any] = {}
    for key, schema in template.variables.items():
        value = given.get(key, schema.default)
        if value is None:
            raise RequestError(f"Template {template.id} needs the variable {key!r}.")
        wrong = not isinstance(value, _TYPES[schema.type]) or (schema.type == "integer" and isinstance(value, bool))
        if isinstance(value, str):
            wrong = (
                wrong
                or len(value) > schema.max_length
                or bool(schema.enum and value not in schema.enum)
                or bool(schema.pattern and not re.fullmatch(schema.pattern, value))
            )
        if wrong:
            allowed = f"one of {', '.join(schema.enum)}" if schema.enum else f"a {schema.type} that fits its schema"
            raise RequestError(f"Template {template.id}: {key!r} must be {allowed}.")
        values[key] = value
    return values
