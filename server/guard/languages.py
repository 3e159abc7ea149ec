# ruff: noqa: E501  # a pattern is read whole
"""Which language a piece of code is written in: by its label, by its file's name, or by what it says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from server.guard import manifests

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

# Each sign counts once; the language with most signs wins, and at least two are needed where no label was given. After
# the pattern stand strings of which every match has one: a text without any of them, as prose mostly is, need not be
# searched, and looking for a string is a hundred times cheaper.
_SIGNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "python": (
        (r"^\s*def \w+\(.{0,400}\).{0,100}:\s*$", "def "),
        (r"^\s*(?:from [\w.]+ )?import [\w., ]++\s*$", "import "),
        (r"^\s*class \w+(?:\(.{0,400}\))?:\s*$", "class "),
        (r"^\s*(?:if|for|while|with|elif|try|except|else)\b[^{};]{0,200}:\s*$", ":"),
        (r"\bself\.\w+|\bprint\(|\bNone\b|__\w+__", "self.", "print(", "None", "__"),
        (r"^\s*@\w[\w.]*+(?:\(.{0,400}\))?\s*$", "@"),
        (r"""\bf["'].{0,200}\{""", 'f"', "f'"),
        (r"\b(?:os|sys|subprocess|requests|json|re)\.\w+\(", "os.", "sys.", "subprocess.", "requests.", "json.", "re."),
    ),
    "javascript": (
        (r"\b(?:const|let) [\w{[]", "const ", "let "),
        (r"=>", "=>"),
        (r"\brequire\(['\"]", "require("),
        (r"^\s*import .* from ['\"]", "import "),
        (r"\bfunction\b\s*\w*\(", "function"),
        (r"===|!==", "===", "!=="),
        (r"\bconsole\.\w+\(|\bdocument\.|\bwindow\.", "console.", "document.", "window."),
        (r"\bmodule\.exports|^\s*export (?:default|const|function|async)", "module.exports", "export "),
        (r"`[^`]*\$\{", "${"),
        (r"\basync \(|\bawait \w", "async (", "await "),
    ),
    "typescript": (
        (r"\b(?:const|let|function) [^=\n]{0,200}: ?(?:string|number|boolean|any|unknown|void|Promise<|Record<|\w+\[\])", "const ", "let ", "function "),
        (r"^\s*(?:export )?(?:interface|type) \w+", "interface ", "type "),
        (r"\bas (?:any|string|unknown|const)\b", "as any", "as string", "as unknown", "as const"),
        (r"\(\w+\??: ?(?:string|number|boolean|any|unknown|Request|Response)\b", "("),
        (r"^\s*import type|\bprivate readonly\b|\bimplements\b", "import type", "private readonly", "implements"),
        (r": (?:Promise<\w+|string|number|void)[>\[\]]* ?[{=]", ": Promise<", ": string", ": number", ": void"),
    ),
    "java": (
        (r"\bpublic (?:static |final |abstract )*(?:class|interface|enum|void|\w+(?:<.{0,200}>)? \w+\()", "public "),
        (r"^\s*import (?:static )?(?:java|javax|jakarta|org|com)\.[\w.*]+;", "import "),
        (r"^\s*package [\w.]+;", "package "),
        (r"\b(?:private|protected) (?:static )?(?:final )?\w+", "private ", "protected "),
        (r"\bnew \w+(?:<.{0,200}>)?\(", "new "),
        (r"^\s*@(?:Override|GetMapping|PostMapping|RestController|RequestMapping|Autowired)", "@"),
        (r"\bString \w+\s*[=;,)]", "String "),
        (r"\bthrows \w+", "throws "),
    ),
    "go": (
        (r"^\s*package \w+\s*$", "package "),
        (r"^\s*func (?:\(\w+ \*?\w+\) )?\w+\(", "func "),
        (r":=", ":="),
        (r"^\s*import \(|^\s*import \"", "import (", 'import "'),
        (r"\bif err != nil\b", "if err != nil"),
        (r"\bfmt\.\w+\(", "fmt."),
        (r"\bnil\b", "nil"),
        (r"\bhttp\.(?:ResponseWriter|Request|HandleFunc)\b", "http."),
        (r"\bdefer \w|\bchan \w|\bgo func", "defer ", "chan ", "go func"),
    ),
    "c": (
        (r"^\s*#\s*include\s*[<\"]\w+(?:/\w+)*\.h[>\"]", "include"),
        (r"\b(?:char|int|void|size_t|unsigned|struct \w+|FILE) \*?\w+\s*[\[(=;,]", "char ", "int ", "void ", "size_t ", "unsigned ", "struct ", "FILE "),
        (r"\b(?:malloc|free|strcpy|printf|memcpy|strlen|fgets|sizeof)\s*\(", "malloc", "free", "strcpy", "printf", "memcpy", "strlen", "fgets", "sizeof"),
        (r"->\w+", "->"),
        (r"\bint main\s*\(", "int main"),
        (r"\bNULL\b", "NULL"),
        (r"^\s*#\s*define\b", "define"),
        (r"\btypedef struct\b", "typedef struct"),
    ),
    "cpp": (
        (r"\bstd::\w+", "std::"),
        (r"^\s*#\s*include\s*<(?:iostream|string|vector|memory|map|cstring|cstdio|cstdlib|fstream|algorithm|thread|mutex|sstream|array|random|unordered_map|optional|string_view|filesystem)>", "include"),
        (r"\b(?:using namespace|namespace \w+|template\s*<)", "namespace", "template"),
        (r"\bclass \w+[^;]{0,400}\{", "class "),
        (r"\b(?:public|private|protected):", "public:", "private:", "protected:"),
        (r"\b(?:cout|cin|cerr)\s*(?:<<|>>)", "cout", "cin", "cerr"),
        (r"\bnew \w+[\[(]|\bdelete(?:\[\])? \w", "new ", "delete"),
        (r"\b\w+::\w+", "::"),
    ),
    "shell": (
        (r"^#!.*\b(?:ba|z|k|da)?sh\b", "#!"),
        (r"^\s*(?:sudo|apt-get|apt|curl|wget|echo|export|chmod|chown|mkdir|rm|cp|mv|cd|source|docker|git|pip|npm|tar|ssh|scp|grep|sed|awk)\s+[-\w\"'$/.]",),
        (r"\$\{?\w+\}?", "$"),
        (r"^\s*(?:if|while|until) (?:\[|\[\[|!|test)", "if ", "while ", "until "),
        (r"^\s*(?:fi|done|esac)\s*$", "fi", "done", "esac"),
        (r"^\s*\w+\(\)\s*\{", "()"),
        (r"^\s*set -[a-z]+", "set -"),
        (r"\| ?(?:grep|awk|sed|sh|bash|xargs|sort|tee)\b", "|"),
        (r"^\$ \w", "$ "),
    ),
    "sql": (
        (r"(?i)^\s*(?:select|insert\s+into|update|delete\s+from|create\s+(?:or\s+replace\s+)?(?:table|view|function|procedure|user|role|index|trigger|database|policy|login)|alter|drop|grant|revoke|with|exec(?:ute)?|declare|copy|truncate|merge)\b",),
        (r"(?i)\b(?:from|into|table|join|where|values|returns|as \$\$|language plpgsql)\b", "from", "into", "table", "join", "where", "values", "returns", "as $$", "language plpgsql"),
        (r"(?i)\b(?:varchar|nvarchar|integer|primary key|not null|timestamp|serial|boolean)\b", "varchar", "integer", "primary key", "not null", "timestamp", "serial", "boolean"),
        (r";\s*$", ";"),
        (r"^\s*--", "--"),
        (r"(?i)^\s*(?:begin|end|commit|go)\b;?\s*$", "begin", "end", "commit", "go"),
    ),
    "dockerfile": (
        (r"^FROM\s+[\w./:@${}-]+", "FROM"),
        (r"^(?:RUN|CMD|ENTRYPOINT)\s", "RUN", "CMD", "ENTRYPOINT"),
        (r"^(?:COPY|ADD|WORKDIR)\s", "COPY", "ADD", "WORKDIR"),
        (r"^(?:ENV|ARG|LABEL)\s", "ENV", "ARG", "LABEL"),
        (r"^(?:EXPOSE|USER|HEALTHCHECK|VOLUME)\s", "EXPOSE", "USER", "HEALTHCHECK", "VOLUME"),
    ),
    "terraform": (
        (r"^\s*(?:resource|data)\s+\"\w+\"\s+\"[\w-]+\"\s*\{", "resource", "data"),
        (r"^\s*(?:provider|variable|module|output)\s+\"[\w-]+\"\s*\{", "provider", "variable", "module", "output"),
        (r"^\s*(?:terraform|locals)\s*\{", "terraform", "locals"),
        (r"^\s*\w+\s*=\s*(?:var|local|aws|google|azurerm)\w*\.", "="),
        (r"^\s*(?:ingress|egress|tags|versioning|lifecycle)\s*+(?:=\s*+)?\{", "ingress", "egress", "tags", "versioning", "lifecycle"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of a language. Every match of `pattern` has one of `strings`, in small letters if `any_case`."""

    pattern: re.Pattern[str]
    strings: tuple[str, ...]
    any_case: bool

    def stands_in(self, text: str, lowered: str) -> bool:
        """Whether `text` has the sign; `lowered` is the same text in small letters."""
        # Beyond ASCII a letter has more forms of either case than `lower` knows of.
        if self.strings and (not self.any_case or text.isascii()):
            looked_at = lowered if self.any_case else text
            for string in self.strings:
                if string in looked_at:
                    break
            else:
                return False
        return self.pattern.search(text) is not None


# A sign is looked for at the start of each line, so what stands before it need not run over blank lines; and it takes in
# a bounded piece of what follows. Without that, a text of line breaks alone would cost its length squared.
SIGNS = {
    language: [
        Sign(re.compile(sign.replace(r"^\s*", r"^[^\S\n]*+"), re.MULTILINE), tuple(strings), sign.startswith("(?i)"))
        for sign, *strings in signs
    ]
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
    return _LABELS.get(word) or _UNSUPPORTED_LABELS.get(word) or manifests.LABELS.get(word)


def by_path(path: str | None) -> str | None:
    """Return the language that a file's name promises, or None."""
    if not path:
        return None
    pure = PurePath(path)
    name = pure.name.lower()
    if name.startswith(("dockerfile", "containerfile")):
        return "dockerfile"
    suffix = pure.suffix.lower()
    kind = manifests.by_path(name)
    if kind is not None:
        return kind
    return _SUFFIXES.get(suffix) or _UNSUPPORTED_SUFFIXES.get(suffix)


def is_prose_path(path: str) -> bool:
    """Whether a file of this name holds prose with fences rather than one language."""
    return PurePath(path).suffix.lower() in _PROSE_SUFFIXES


def guess(code: str) -> str | None:
    """Return the language that `code` has most signs of, or None where none has two (or one, on a short text)."""
    head = code[:20_000]
    lowered = head.lower()
    scores = {language: sum([sign.stands_in(head, lowered) for sign in signs]) for language, signs in SIGNS.items()}
    if scores["typescript"] >= 1 and scores["javascript"] >= 1:
        scores["typescript"] += scores["javascript"]
    if scores["cpp"] >= 1:
        scores["cpp"] += scores["c"]
    language, best = max(scores.items(), key=lambda item: item[1])
    needed = 1 if head.count("\n") < 4 else 2
    return language if best >= needed else None
