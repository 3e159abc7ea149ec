"""What a file's imports call its names in full: `run` is `subprocess.run` after `from subprocess import run`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.guard.tree import Tree

_PY_IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n]+)$", re.MULTILINE)
_PY_FROM = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+import[ \t]+(?:\(([^)]*)\)|([^\n]+))", re.MULTILINE)
_JS_REQUIRE = re.compile(
    r"(?:const|let|var)\s+(\{[^}]{0,4000}\}|\w+)\s*+=\s*+require\(\s*+['\"]([^'\"\n]{1,300})['\"]\s*\)(\.\w+)?"
)
_JS_IMPORT = re.compile(
    r"^[ \t]*+import\s++(?:(\w++)\s*+,?\s*+)?(?:\*\s++as\s++(\w++)|(\{[^}]{0,4000}\}))?"
    r"\s*+from\s*+['\"]([^'\"\n]{1,300})['\"]",
    re.MULTILINE,
)
_JS_SCHEMA = re.compile(
    r"(?:const|let|var)\s++(\w++)\s*+(?::\s*+[\w.<>]++\s*+)?=\s*+(z|zod|yup|[jJ]oi|vine|v|t|s)\.(\w++)\("
)
_JS_PROMISIFY = re.compile(r"(?:const|let|var)\s+(\w+)\s*=\s*(?:util\.)?promisify\(\s*([\w.]+)\s*\)")


def aliases_of(tree: Tree) -> dict[str, str]:
    """Return what the file's imports call its names in full."""
    code = tree.code
    aliases: dict[str, str] = {}
    if tree.language == "python":
        for match in _PY_IMPORT.finditer(code):
            for part in match[1].split(","):
                name, _, alias = part.strip().partition(" as ")
                if alias:
                    aliases[alias.strip()] = name.strip()
                elif name:  # a call of it is none of a function of this file
                    aliases[name.split(".")[0]] = name.split(".")[0]
        for match in _PY_FROM.finditer(code):
            for part in (match[2] or match[3]).split(","):
                name, _, alias = part.strip().partition(" as ")
                if name:
                    aliases[(alias or name).strip()] = f"{match[1]}.{name.strip()}"
    elif tree.language in ("javascript", "typescript", "tsx"):
        for names, module, prop in _JS_REQUIRE.findall(code):
            _js_names(aliases, names, module, prop)
        for default, star, names, module in _JS_IMPORT.findall(code):
            base = _js_module(module)
            if default and default != "type":
                aliases[default] = base
            if star:
                aliases[star] = base
            if names:
                _js_names(aliases, names, module, "")
        for name, library, kind in _JS_SCHEMA.findall(code):  # `Changes.parse` is the schema's
            aliases[name] = f"{library}.{kind}()"
        for name, original in _JS_PROMISIFY.findall(code):
            head, _, rest = original.partition(".")
            aliases[name] = aliases.get(head, head) + (f".{rest}" if rest else "")
    return aliases


def _js_module(module: str) -> str:
    return re.sub(r"\W+", "_", module.removeprefix("node:").removesuffix("/promises").removesuffix("/promise"))


def _js_names(aliases: dict[str, str], names: str, module: str, prop: str) -> None:
    base = _js_module(module) + prop
    if not names.startswith("{"):
        aliases[names] = base
        return
    for part in names.strip("{} \n").split(","):
        name, _, alias = re.sub(r"\s+as\s+", ":", part.strip().removeprefix("type ")).partition(":")
        if name.strip():
            aliases[(alias or name).strip()] = f"{base}.{name.strip()}"
