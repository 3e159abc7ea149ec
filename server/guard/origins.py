# ruff: noqa: E501  # a pattern is read whole
"""Where the value of a variable of a shell script or of Terraform comes from: its author and operator, or somebody else."""

from __future__ import annotations

import re
from functools import lru_cache

_OWN_VARIABLES = re.compile(
    r"HOME|PWD|OLDPWD|USER|LOGNAME|TMPDIR|HOSTNAME|UID|EUID|RANDOM|SECONDS|BASHPID|PPID|XDG_\w+"
)
# The environment is the operator's, but for what a web server, a pipeline or the shell puts into it from outside.
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_?")
_GIVEN_BY_OTHERS = re.compile(
    r"QUERY|HTTP_|REQUEST|PATH_INFO|INPUT|ARG|PARAM|USER_|_USER|FORM|BODY|PAYLOAD|REPLY|MESSAGE|MSG|COMMENT|TITLE|"
    r"BRANCH|HEAD_REF|REF_NAME|FILENAME|UPLOAD|CMD|COMMAND|SSH_ORIGINAL|REMOTE_|COOKIE|NAME$|SEARCH|FILTER|SUBJECT"
)
_NUMBERS_AND_FACTS = re.compile(
    r"[\"']?(?:\$\(|`)\s*(?:date|hostname|uname|id|whoami|wc|stat|nproc|mktemp|pwd|git rev-parse|git describe|openssl rand|uuidgen|seq|"
    r"sha\d+sum|md5sum|cksum|od|getconf|df|du|tty|lsb_release|dpkg --print-architecture|readlink -f [\"']?\$0|dirname [\"']?\$0)\b"
)
_CLEANED = re.compile(
    r"\$\(\(|%q|%d|@Q\}|\$\{\w+//\[[!^]|\btr\s+-(?:cd|dc)\b|quote_(?:literal|ident)|\w*(?:escape|quote|sanit)\w*\s+[\"']?\$"
)
_FOR_ALL_TO_WRITE = re.compile(r"[\"']?/(?:var/)?tmp/")
_COUNT = re.compile(r"\$\{#[^}\n]{0,80}\}|\$#")
_OPEN_ENDED = re.compile(r"\$\{?[@*!]|\$\{\w+\[[@*]\][#%/]|\*|`|<")
_VARIABLE = re.compile(r"(?<!\\)\$\{?(\w+)(\[[\"']?\$?\{?\w+)?")
_INPUT = re.compile(r"\$\{(?:var\.(\w+)|each\.\w+|self\.\w+)")
_FUNCTION = re.compile(r"(?m)^[ \t]*(?:function[ \t]+)?([A-Za-z_][\w-]*)[ \t]*\([ \t]*\)[ \t]*\n?[ \t]*[{(]([^\n]*)")
_FUNCTION_END = re.compile(r"(?m)^[})]")
_WORD = re.compile(r"[ \t]+(\"(?:[^\"\\\n]|\\.){0,300}\"|'[^'\n]{0,300}'|[^\s;|&<>()\"']{1,200})")
_MAX_CODE_CHARS = 200_000
_MAX_SETTINGS = 20


def is_settled(name: str, code: str, at: int, *, environment: bool = True, depth: int = 4) -> bool:
    """Whether the variable `name` holds at `at` what the script or its operator says, or was held against a pattern.

    Without `environment` a variable that is never set counts as not settled: it may be empty.
    """
    if _OWN_VARIABLES.fullmatch(name):
        return True
    if depth == 0:
        return False
    if name.isdigit():
        return _checks_of(name).search(code) is not None or _is_argument_settled(
            int(name), code, at, environment, depth - 1
        )
    if not name.isidentifier():
        return False
    if _checks_of(name).search(code):
        return True
    given = list(_settings_of(name).finditer(code, 0, _MAX_CODE_CHARS))[:_MAX_SETTINGS]
    if not given:
        return environment and is_environment(name)
    for match in given:
        if match[2]:
            return False
        if not _is_text_settled(match[1] or match[4] or "", code, match.start(), name, environment, depth - 1):
            return False
    return True


def is_environment(name: str) -> bool:
    """Whether a variable that no line sets is one that the operator gives."""
    return _ENVIRONMENT.fullmatch(name) is not None and not _GIVEN_BY_OTHERS.search(name)


def are_settled(text: str, code: str, at: int) -> bool:
    """Whether `text` names variables, and all of them are settled."""
    inputs = _INPUT.findall(text)
    if inputs:
        return all(name and _is_input_checked(name, code) for name in inputs)
    return _VARIABLE.search(text) is not None and _is_text_settled(text, code, at, "", True, 4, listed=True)


def _is_input_checked(name: str, code: str) -> bool:
    """Whether Terraform's variable `name` is a number, or has a validation that looks at it."""
    word = re.escape(name)
    return (
        re.search(
            rf"variable\s+\"{word}\"\s*\{{(?:(?!\n\}}).){{0,1500}}?(?:type\s*=\s*(?:number|bool)\b|condition\s*=[^\n]{{0,200}}(?:regex|contains|can|alltrue)\b)",
            code,
            re.DOTALL,
        )
        is not None
    )


def _is_text_settled(
    text: str, code: str, at: int, name: str, environment: bool, depth: int, *, listed: bool = False
) -> bool:
    if not listed and (_NUMBERS_AND_FACTS.match(text) or _CLEANED.search(text)):
        return True
    if _FOR_ALL_TO_WRITE.match(text):
        return False
    text = _COUNT.sub("", text)
    if re.search(r"\$\{?[@*]", text) if listed else _OPEN_ENDED.search(text):
        return False
    for other in _VARIABLE.finditer(text):
        if other[1] == name:  # `API=${API:-https://…}`
            if f"{{{name}:" in text and _GIVEN_BY_OTHERS.search(name):
                return False
            continue
        if not is_settled(other[1], code, at, environment=environment, depth=depth):
            return False
    return True


def _is_argument_settled(number: int, code: str, at: int, environment: bool, depth: int) -> bool:
    """Whether every call of the function around `at` gives its argument `number` a settled text."""
    around = None
    for match in _FUNCTION.finditer(code, 0, at):
        around = match
    if around is None or depth <= 0:
        return False
    if around[2].rstrip().endswith(("}", ")")):
        if code.find("\n", around.end()) < at and "\n" in code[around.end() : at]:
            return False  # a function of one line, before
    elif _FUNCTION_END.search(code, around.end(), at):
        return False
    calls = list(_calls_of(around[1]).finditer(code, 0, _MAX_CODE_CHARS))[:_MAX_SETTINGS]
    seen = False
    for call in calls:
        words: list[str] = []
        position = call.end()
        while len(words) < number and (word := _WORD.match(code, position)):
            words.append(word[1])
            position = word.end()
        if code[call.end() : call.end() + 3].lstrip().startswith("("):
            continue  # where it is defined
        seen = True
        if len(words) >= number:
            text = words[number - 1]
            if not text.startswith("'") and not _is_text_settled(text, code, call.start(), "", environment, depth):
                return False
        elif any("@" in word or "*" in word for word in words):
            return False
    return seen


@lru_cache(maxsize=512)
def _calls_of(function: str) -> re.Pattern[str]:
    return re.compile(rf"(?m)(?:^|[;&|({{!]|\bif|\bthen|\bdo|\belse|\bwhile|`)[ \t]*{re.escape(function)}(?![\w=-])")


@lru_cache(maxsize=512)
def _checks_of(name: str) -> re.Pattern[str]:
    """Return what finds a check of a variable against a pattern, in a list or by a function that is called a check."""
    word = rf"\$\{{?{re.escape(name)}(?:,,|\^\^)?\}}?"
    start = r"(?m)^(?:if\s+!?\s*)?" if name.isdigit() else ""  # `$1` within a function is another one
    reject = r"[^;]{0,120}\*(?:\[[!^]|/|\.\.)" if name.isdigit() else ""
    plain = re.escape(name)
    checks = [
        rf"{start}\[\[[^\n]{{0,200}}?{word}\"?\s*=~",
        rf"{start}\[\[[^\n]{{0,200}}?{word}\"?\s*(?:==|!=|=)\s*(?!\"?-)[^\s&|]{{0,120}}[*\[?]",
        rf"{start}\[{{1,2}}\s[^\n]{{0,120}}?{word}\"?\s*==?\s*\"?\$\{{?\w",
        rf"{start}\bcase\s+\"?{word}\"?\s+in\b(?!\s*[\"']?[\w-]+=){reject}",  # `name=*)` takes a pair apart
        rf"(?m)(?:^|[;&|!({{]|\bif|\bthen|\bdo|\belse)\s*(?:\w+_)?(?:valid|check|require|assert|verif|sanit|is_|safe|allowed|known)\w*(?:[ \t]+[^\s;|&]{{1,60}}){{0,3}}?[ \t]+\"?{word}(?!\w)",
        rf"check-ref-format\b[^\n;|&]{{0,80}}{word}(?!\w)",
        rf"{word}\"?\s*\|\s*(?:LC_ALL=C\s+)?grep\s+-\w*q|\bgrep\s+-\w*q[^\n;|&]{{0,120}}<<<\s*\"?{word}",
        rf"\$\{{\w+\[[\"']?{word}[\"']?\]|-v\s+[\"']?\w+\[[\"']?{word}",
    ]
    if not name.isdigit():
        checks += [
            rf"10#\$?\{{?{plain}\b",
            rf"\bprintf\s+-v\s+{plain}\s+[\"']?[^\n%]{{0,40}}%[-0-9]{{0,4}}[qd]",
            rf"\(\(\s*{plain}\s*=|\b(?:local|declare|typeset)\s+-\w*i\w*\s+(?:\w+(?:=\S{{0,80}})?\s+){{0,4}}{plain}\b",
        ]
    return re.compile("|".join(f"(?:{check.replace('(?m)', '')})" for check in checks), re.MULTILINE)


@lru_cache(maxsize=512)
def _settings_of(name: str) -> re.Pattern[str]:
    """Return what finds what a variable is set to: its text, or the words of a loop; group 2 where it is read."""
    word = re.escape(name)
    return re.compile(
        rf"(?<![\w$.{{-]){word}\+?=(\"(?:[^\"\\\n]|\\.){{0,300}}\"?|'[^'\n]{{0,300}}'|\([^)]{{0,600}}\)?|(?:\$\(|`)[^\n]{{0,300}}|[^\s;]{{0,300}})|"
        rf"\bread\s[^\n;|]{{0,120}}\b({word})\b|"
        rf"\bfor\s+({word})\s+in\s([^\n;]{{0,300}})"
    )
