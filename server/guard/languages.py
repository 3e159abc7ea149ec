# ruff: noqa: E501  # a pattern is read whole
"""Which language a piece of code is written in: by its label, by its file's name, or by what it says."""

from __future__ import annotations

import re
from pathlib import PurePath

LANGUAGES = (
    "python", "javascript", "typescript", "tsx", "java", "go", "c", "cpp", "shell", "sql", "dockerfile", "terraform",
)  # fmt: skip

_LABELS = {
    "py": "python", "python3": "python", "py3": "python", "python2": "python", "pycon": "python", "ipython": "python", "flask": "python",
    "django": "python", "sage": "python", "jupyter": "python", "js": "javascript", "node": "javascript", "nodejs": "javascript", "jsx": "javascript",
    "mjs": "javascript", "cjs": "javascript", "ecmascript": "javascript", "express": "javascript", "react": "javascript",
    "ts": "typescript", "mts": "typescript", "cts": "typescript", "deno": "typescript", "golang": "go", "h": "c", "c99": "c", "c11": "c",
    "c++": "cpp", "cxx": "cpp", "cc": "cpp", "hpp": "cpp", "hh": "cpp", "hxx": "cpp", "arduino": "cpp", "sh": "shell", "bash": "shell",
    "zsh": "shell", "ksh": "shell", "shellscript": "shell", "shell-script": "shell", "dash": "shell", "console": "shell",
    "terminal": "shell", "shell-session": "shell", "docker": "dockerfile", "containerfile": "dockerfile", "tf": "terraform", "hcl": "terraform",
    "tfvars": "terraform", "opentofu": "terraform", "postgres": "sql", "postgresql": "sql", "mysql": "sql", "plsql": "sql", "plpgsql": "sql",
    "tsql": "sql", "t-sql": "sql", "pgsql": "sql", "sqlite": "sql", "mssql": "sql", "oracle": "sql", "psql": "sql",
    "springboot": "java", "spring": "java", "jsp": "java",
}  # fmt: skip
_SUFFIXES = {
    ".py": "python", ".pyw": "python", ".pyi": "python", ".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".jsx": "javascript",
    ".ts": "typescript", ".mts": "typescript", ".cts": "typescript", ".tsx": "tsx", ".java": "java", ".go": "go", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".c++": "cpp", ".hpp": "cpp", ".hh": "cpp", ".hxx": "cpp", ".ino": "cpp", ".sh": "shell", ".bash": "shell",
    ".zsh": "shell", ".ksh": "shell", ".bats": "shell", ".sql": "sql", ".psql": "sql", ".pgsql": "sql", ".ddl": "sql", ".pks": "sql", ".pkb": "sql",
    ".tf": "terraform", ".tfvars": "terraform", ".hcl": "terraform", ".dockerfile": "dockerfile", ".containerfile": "dockerfile",
}  # fmt: skip
# Programming languages without rules of ours: blocks of them are `unscanned`, for nobody has looked at what they do.
UNSUPPORTED = frozenset(
    [
        "ruby",
        "php",
        "rust",
        "csharp",
        "kotlin",
        "swift",
        "scala",
        "perl",
        "lua",
        "powershell",
        "r",
        "dart",
        "elixir",
        "haskell",
        "groovy",
        "objectivec",
        "vb",
        "clojure",
        "solidity",
        "zig",
    ]
)
_UNSUPPORTED_LABELS = {
    "rb": "ruby", "rs": "rust", "c#": "csharp", "cs": "csharp", "kt": "kotlin", "pl": "perl", "ps1": "powershell", "pwsh": "powershell",
    "ex": "elixir", "hs": "haskell", "objc": "objectivec", "objective-c": "objectivec", "vbnet": "vb", "rails": "ruby", "laravel": "php",
}  # fmt: skip
_UNSUPPORTED_SUFFIXES = {
    ".rb": "ruby", ".php": "php", ".rs": "rust", ".cs": "csharp", ".kt": "kotlin", ".swift": "swift", ".scala": "scala", ".pl": "perl",
    ".lua": "lua", ".ps1": "powershell", ".dart": "dart", ".ex": "elixir", ".exs": "elixir", ".hs": "haskell", ".groovy": "groovy", ".m": "objectivec",
    ".vb": "vb", ".clj": "clojure", ".sol": "solidity", ".zig": "zig",
}  # fmt: skip
_PROSE_SUFFIXES = frozenset({".md", ".markdown", ".mdx", ".rst", ".adoc", ".txt", ""})

# Each sign counts once; the language with most signs wins, and at least two are needed where no label was given.
_SIGNS: dict[str, tuple[str, ...]] = {
    "python": (
        r"^\s*def \w+\(.{0,400}\).{0,100}:\s*$", r"^\s*(?:from [\w.]+ )?import [\w., ]++\s*$", r"^\s*class \w+(?:\(.{0,400}\))?:\s*$",
        r"^\s*(?:if|for|while|with|elif|try|except|else)\b[^{};]{0,200}:\s*$", r"\bself\.\w+|\bprint\(|\bNone\b|__\w+__", r"^\s*@\w[\w.]*+(?:\(.{0,400}\))?\s*$",
        r"""\bf["'].{0,200}\{""", r"\b(?:os|sys|subprocess|requests|json|re)\.\w+\(",
    ),
    "javascript": (
        r"\b(?:const|let) [\w{[]", r"=>", r"\brequire\(['\"]", r"^\s*import .* from ['\"]", r"\bfunction\b\s*\w*\(", r"===|!==",
        r"\bconsole\.\w+\(|\bdocument\.|\bwindow\.", r"\bmodule\.exports|^\s*export (?:default|const|function|async)", r"`[^`]*\$\{", r"\basync \(|\bawait \w",
    ),
    "typescript": (
        r"\b(?:const|let|function) [^=\n]{0,200}: ?(?:string|number|boolean|any|unknown|void|Promise<|Record<|\w+\[\])", r"^\s*(?:export )?(?:interface|type) \w+",
        r"\bas (?:any|string|unknown|const)\b", r"\(\w+\??: ?(?:string|number|boolean|any|unknown|Request|Response)\b", r"^\s*import type|\bprivate readonly\b|\bimplements\b",
        r": (?:Promise<\w+|string|number|void)[>\[\]]* ?[{=]",
    ),
    "java": (
        r"\bpublic (?:static |final |abstract )*(?:class|interface|enum|void|\w+(?:<.{0,200}>)? \w+\()", r"^\s*import (?:static )?(?:java|javax|jakarta|org|com)\.[\w.*]+;",
        r"^\s*package [\w.]+;", r"\b(?:private|protected) (?:static )?(?:final )?\w+", r"\bnew \w+(?:<.{0,200}>)?\(", r"^\s*@(?:Override|GetMapping|PostMapping|RestController|RequestMapping|Autowired)",
        r"\bString \w+\s*[=;,)]", r"\bthrows \w+",
    ),
    "go": (
        r"^\s*package \w+\s*$", r"^\s*func (?:\(\w+ \*?\w+\) )?\w+\(", r":=", r"^\s*import \(|^\s*import \"", r"\bif err != nil\b", r"\bfmt\.\w+\(", r"\bnil\b",
        r"\bhttp\.(?:ResponseWriter|Request|HandleFunc)\b", r"\bdefer \w|\bchan \w|\bgo func",
    ),
    "c": (
        r"^\s*#\s*include\s*[<\"]\w+(?:/\w+)*\.h[>\"]", r"\b(?:char|int|void|size_t|unsigned|struct \w+|FILE) \*?\w+\s*[\[(=;,]", r"\b(?:malloc|free|strcpy|printf|memcpy|strlen|fgets|sizeof)\s*\(",
        r"->\w+", r"\bint main\s*\(", r"\bNULL\b", r"^\s*#\s*define\b", r"\btypedef struct\b",
    ),
    "cpp": (
        r"\bstd::\w+", r"^\s*#\s*include\s*<(?:iostream|string|vector|memory|map|cstring|cstdio|cstdlib|fstream|algorithm|thread|mutex|sstream|array|random|unordered_map|optional|string_view|filesystem)>",
        r"\b(?:using namespace|namespace \w+|template\s*<)", r"\bclass \w+[^;]{0,400}\{", r"\b(?:public|private|protected):", r"\b(?:cout|cin|cerr)\s*(?:<<|>>)", r"\bnew \w+[\[(]|\bdelete(?:\[\])? \w", r"\b\w+::\w+",
    ),
    "shell": (
        r"^#!.*\b(?:ba|z|k|da)?sh\b", r"^\s*(?:sudo|apt-get|apt|curl|wget|echo|export|chmod|chown|mkdir|rm|cp|mv|cd|source|docker|git|pip|npm|tar|ssh|scp|grep|sed|awk)\s+[-\w\"'$/.]",
        r"\$\{?\w+\}?", r"^\s*(?:if|while|until) (?:\[|\[\[|!|test)", r"^\s*(?:fi|done|esac)\s*$", r"^\s*\w+\(\)\s*\{", r"^\s*set -[a-z]+", r"\| ?(?:grep|awk|sed|sh|bash|xargs|sort|tee)\b", r"^\$ \w",
    ),
    "sql": (
        r"(?i)^\s*(?:select|insert\s+into|update|delete\s+from|create\s+(?:or\s+replace\s+)?(?:table|view|function|procedure|user|role|index|trigger|database|policy|login)|alter|drop|grant|revoke|with|exec(?:ute)?|declare|copy|truncate|merge)\b",
        r"(?i)\b(?:from|into|table|join|where|values|returns|as \$\$|language plpgsql)\b", r"(?i)\b(?:varchar|nvarchar|integer|primary key|not null|timestamp|serial|boolean)\b", r";\s*$", r"^\s*--", r"(?i)^\s*(?:begin|end|commit|go)\b;?\s*$",
    ),
    "dockerfile": (
        r"^FROM\s+[\w./:@${}-]+", r"^(?:RUN|CMD|ENTRYPOINT)\s", r"^(?:COPY|ADD|WORKDIR)\s", r"^(?:ENV|ARG|LABEL)\s", r"^(?:EXPOSE|USER|HEALTHCHECK|VOLUME)\s",
    ),
    "terraform": (
        r"^\s*(?:resource|data)\s+\"\w+\"\s+\"[\w-]+\"\s*\{", r"^\s*(?:provider|variable|module|output)\s+\"[\w-]+\"\s*\{", r"^\s*(?:terraform|locals)\s*\{", r"^\s*\w+\s*=\s*(?:var|local|aws|google|azurerm)\w*\.", r"^\s*(?:ingress|egress|tags|versioning|lifecycle)\s*+(?:=\s*+)?\{",
    ),
}  # fmt: skip
# A sign is looked for at the start of each line, so what stands before it need not run over blank lines; and it takes in
# a bounded piece of what follows. Without that, a text of line breaks alone would cost its length squared.
_COMPILED = {
    language: [re.compile(sign.replace(r"^\s*", r"^[^\S\n]*+"), re.MULTILINE) for sign in signs]
    for language, signs in _SIGNS.items()
}


def by_label(label: str | None) -> str | None:
    """Return the language a fence's info string or a client's field names, one without rules included, or None."""
    if not label:
        return None
    word = re.split(r"[\s{,:]", label.strip().strip("{}.").lower(), maxsplit=1)[0].lstrip(".")
    word = word.removeprefix("language-")
    if word in LANGUAGES or word in UNSUPPORTED:
        return word
    return _LABELS.get(word) or _UNSUPPORTED_LABELS.get(word)


def by_path(path: str | None) -> str | None:
    """Return the language that a file's name promises, or None."""
    if not path:
        return None
    pure = PurePath(path)
    name = pure.name.lower()
    if name.startswith(("dockerfile", "containerfile")):
        return "dockerfile"
    suffix = pure.suffix.lower()
    return _SUFFIXES.get(suffix) or _UNSUPPORTED_SUFFIXES.get(suffix)


def is_prose_path(path: str) -> bool:
    """Whether a file of this name holds prose with fences rather than one language."""
    return PurePath(path).suffix.lower() in _PROSE_SUFFIXES


def guess(code: str) -> str | None:
    """Return the language that `code` has most signs of, or None where none has two (or one, on a short text)."""
    head = code[:20_000]
    scores = {language: sum(1 for sign in signs if sign.search(head)) for language, signs in _COMPILED.items()}
    if scores["typescript"] >= 1 and scores["javascript"] >= 1:
        scores["typescript"] += scores["javascript"]
    if scores["cpp"] >= 1:
        scores["cpp"] += scores["c"]
    language, best = max(scores.items(), key=lambda item: item[1])
    needed = 1 if head.count("\n") < 4 else 2
    return language if best >= needed else None
