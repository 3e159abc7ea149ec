# ruff: noqa: E501  # a pattern is read whole
"""Where the value of a variable of a shell script or of Terraform comes from: its author and operator, or somebody else."""

from __future__ import annotations

import re
from bisect import bisect_right

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
_MAX_CODE_CHARS = 100_000
_MAX_SETTINGS = 20
_MAX_LOOKUPS = 400


# What holds a variable against something: a pattern, a list, another value, or a function that is called a check.
_CHECKS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\$\{?(\w+)(?:,,|\^\^)?\}?\"?\s*=~",
        r"\$\{?(\w+)(?:,,|\^\^)?\}?\"?\s+(?:==|!=|=)\s+(?!\"?-)[^\s&|]{0,120}[*\[?]",
        r"\[{1,2}\s[^\n]{0,120}?\$\{?(\w+)\}?\"?\s+==?\s+\"?\$\{?\w",
        r"\bcase\s+\"?\$\{?(\w+)(?:,,|\^\^)?\}?\"?\s+in\b(?!\s*[\"']?[\w-]+=)",  # `name=*)` takes a pair apart
        r"\$\{?(\w+)\}?\"?\s*\|\s*(?:LC_ALL=C\s+)?grep\s+-\w*q",
        r"\bgrep\s+-\w*q[^\n;|&]{0,120}<<<\s*\"?\$\{?(\w+)",
        r"\$\{\w+\[[\"']?\$\{?(\w+)\}?[\"']?\]|-v\s+[\"']?\w+\[[\"']?\$\{?(\w+)",
        r"10#\$?\{?(\w+)",
        r"\bprintf\s+-v\s+(\w+)\s+[\"']?[^\n%]{0,40}%[-0-9]{0,4}[qd]",
        r"\(\(\s*(\w+)\s*=(?!=)|\b(?:local|declare|typeset)\s+-\w*i\w*\s+(\w+)",
    )
)
_CHECKED_BY = re.compile(
    r"(?:^|[;&|!({]|\bif|\bthen|\bdo|\belse)\s*(?:\w+_)?(?:valid|check|require|assert|verif|sanit|is_|safe|allowed|known)\w*"
    r"((?:[ \t]+[^\s;|&]{1,60}){1,4})|\bcheck-ref-format\b([^\n;|&]{0,80})",
    re.MULTILINE,
)
# `$1` within a function is another one than outside: what stands at the beginning of a line is outside, most likely.
_ARGUMENT_CHECK = re.compile(
    r"^(?:if\s+!?\s*)?(?:\[\[[^\n]{0,120}?\$\{?(\d)\}?\"?\s*(?:=~|(?:==|!=|=)\s+(?!\"?-)[^\s&|]{0,120}[*\[?])|"
    r"case\s+\"?\$\{?(\d)\}?\"?\s+in\b[^;]{0,120}\*(?:\[[!^]|/|\.\.))",
    re.MULTILINE,
)
_SETTING = re.compile(
    r"(?<![\w$.{-])([A-Za-z_]\w*)\+?=(?!=)(?=(\"(?:[^\"\\\n]|\\.){0,300}\"?|'[^'\n]{0,300}'|\([^)]{0,600}\)?|(?:\$\(|`)[^\n]{0,300}|[^\s;]{0,300}))|"
    r"\bfor\s+(\w+)\s+in\s([^\n;]{0,300})|\bread\s([^\n;|<]{0,120})"
)


class Script:
    """One text, and what was found out about its variables; each pass over it is made once, when it is first asked."""

    def __init__(self, code: str) -> None:
        self._code = code[:_MAX_CODE_CHARS]
        self._known: dict[tuple[str, int, bool], bool] = {}
        self._checked: set[str] | None = None
        self._settings: dict[str, list[tuple[int, str | None]]] = {}
        self._functions: list[tuple[int, int, str]] = []

    def _look(self) -> None:
        code = self._code
        checked = {name for check in _CHECKS for m in check.finditer(code) for name in m.groups() if name}
        checked = {name for name in checked if not name.isdigit()}
        for match in _CHECKED_BY.finditer(code):
            checked.update(found[1] for found in _VARIABLE.finditer(match[1] or match[2] or ""))
        checked.update(name for m in _ARGUMENT_CHECK.finditer(code) for name in m.groups() if name)
        self._checked = checked
        for match in _SETTING.finditer(code):
            if match[5] is not None:
                for name in re.findall(r"[A-Za-z_]\w*", match[5]):
                    self._settings.setdefault(name, []).append((match.start(), None))
            else:
                self._settings.setdefault(match[1] or match[3], []).append((match.start(), match[2] or match[4] or ""))
        ends = [match.start() for match in _FUNCTION_END.finditer(code)]
        for match in _FUNCTION.finditer(code):
            if match[2].rstrip().endswith(("}", ")")):
                end = match.end()
            else:
                after = bisect_right(ends, match.end())
                end = ends[after] if after < len(ends) else len(code)
            self._functions.append((match.start(), end, match[1]))

    def is_settled(self, name: str, at: int, *, environment: bool = True, depth: int = 4) -> bool:
        """Whether the variable `name` holds at `at` what the script or its operator says, or was held against a pattern.

        Without `environment` a variable that is never set counts as not settled: it may be empty.
        """
        if _OWN_VARIABLES.fullmatch(name):
            return True
        if depth == 0 or not (name.isdigit() or name.isidentifier()):
            return False
        if self._checked is None:
            self._look()
        if name in (self._checked or ()):
            return True
        around = bisect_right(self._functions, at, key=lambda function: function[0]) - 1 if name.isdigit() else -1
        key = (name, around, environment)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_LOOKUPS:
                return False
            self._known[key] = False  # what is set to itself by way of others is not
            known = self._known[key] = self._find(name, at, around, environment, depth)
        return known

    def _find(self, name: str, at: int, around: int, environment: bool, depth: int) -> bool:
        if name.isdigit():
            if around < 0 or at > self._functions[around][1]:
                return False
            return self._is_argument_settled(int(name), self._functions[around][2], environment, depth - 1)
        given = self._settings.get(name)
        if not given:
            return environment and is_environment(name)
        return all(
            text is not None and self._is_text_settled(text, start, name, environment, depth - 1)
            for start, text in given[:_MAX_SETTINGS]
        )

    def are_settled(self, text: str, at: int) -> bool:
        """Whether `text` names variables, and all of them are settled."""
        inputs = _INPUT.findall(text)
        if inputs:
            return all(name and _is_input_checked(name, self._code) for name in set(inputs))
        if _VARIABLE.search(text) is None or re.search(r"\$\{?[@*]", text):
            return False
        return all(self.is_settled(other[1], at) for other in _VARIABLE.finditer(text))

    def _is_text_settled(self, text: str, at: int, name: str, environment: bool, depth: int) -> bool:
        if _NUMBERS_AND_FACTS.match(text) or _CLEANED.search(text):
            return True
        text = _COUNT.sub("", text)
        if _FOR_ALL_TO_WRITE.match(text) or _OPEN_ENDED.search(text):
            return False
        for other in _VARIABLE.finditer(text):
            if other[1] == name:  # `API=${API:-https://…}`
                if f"{{{name}:" in text and _GIVEN_BY_OTHERS.search(name):
                    return False
                continue
            if not self.is_settled(other[1], at, environment=environment, depth=depth):
                return False
        return True

    def _is_argument_settled(self, number: int, function: str, environment: bool, depth: int) -> bool:
        """Whether every call of `function` gives its argument `number` a settled text."""
        seen = False
        for count, call in enumerate(_calls_of(function).finditer(self._code)):
            if count >= _MAX_SETTINGS:
                return False
            words: list[str] = []
            position = call.end()
            if self._code[position : position + 3].lstrip().startswith("("):
                continue  # where it is defined
            while len(words) < number and (word := _WORD.match(self._code, position)):
                words.append(word[1])
                position = word.end()
            seen = True
            if len(words) >= number:
                text = words[number - 1]
                if not text.startswith("'") and not self._is_text_settled(text, call.start(), "", environment, depth):
                    return False
            elif any("@" in word or "*" in word for word in words):
                return False
        return seen


def is_environment(name: str) -> bool:
    """Whether a variable that no line sets is one that the operator gives."""
    return _ENVIRONMENT.fullmatch(name) is not None and not _GIVEN_BY_OTHERS.search(name)


def _calls_of(function: str) -> re.Pattern[str]:
    return re.compile(rf"(?m)(?:^|[;&|({{!]|\bif|\bthen|\bdo|\belse|\bwhile|`)[ \t]*{re.escape(function)}(?![\w=-])")


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
