"""One security template: the file it is written in, its variables, its own test cases."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typing_extensions import override

from server.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_TEMPLATE_BYTES = 64 * 1024
# Composition order. What is the same for most requests comes first, so that the engine's prefix cache pays for it once.
SCOPES = ("organisation", "team", "language", "task")
FORMATS = frozenset({"chat", "completion", "fim", "embedding"})
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
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=False
)
_ENVIRONMENT.globals.clear()


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
        values = check_variables(self, variables or {})
        try:
            return _ENVIRONMENT.from_string(self.body).render(values).strip()
        except TemplateError as err:
            raise ConfigError(f"Template {self.id} {self.version} can't be rendered: {err.message}.") from err


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


def check_variables(template: Template, given: Mapping[str, Any]) -> dict[str, Any]:
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
