# ruff: noqa: E501  # a pattern is read whole
"""Where the value of a variable of a shell script or of Terraform comes from: its author and operator, or somebody else."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING

from server.guard import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN_VARIABLES = re.compile(
    r"HOME|PWD|OLDPWD|USER|LOGNAME|TMPDIR|HOSTNAME|UID|EUID|RANDOM|SECONDS|BASHPID|PPID|XDG_\w+|BASH_SOURCE|LINENO|FUNCNAME"
)
# The environment is the operator's, but for what a web server, a pipeline or the shell puts into it from outside.
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_?")
_GIVEN_BY_OTHERS = re.compile(
    r"QUERY|HTTP_|REQUEST|PATH_INFO|INPUT|ARG|PARAM|USER_|_USER|FORM|BODY|PAYLOAD|REPLY|MESSAGE|MSG|COMMENT|TITLE|"
    r"BRANCH|HEAD_REF|REF_NAME|FILENAME|UPLOAD|CMD|COMMAND|SSH_ORIGINAL|REMOTE_|COOKIE|NAME$|SEARCH|FILTER|SUBJECT|"
    r"TEXT|WEBHOOK(?!_URL$)|PULL_|EVENT|ISSUE|LABEL|DESCRIPTION|CONTENT|OPTARG"
)
# What of it may stand in a text that is run: where the operator has put things, and how they are called.
_OPERATOR = re.compile(
    r"PG(?:DATABASE|HOST|PORT|USER)|(?:\w+_)?(?:HOME|ROOT|DIR|DIRECTORY|PATH|PREFIX|BIN|FILE|HOST|PORT|DB|DATABASE|SCHEMA|TABLE|VERSION|EDITOR|VISUAL|PAGER|SHELL|BROWSER|"
    r"REGION|ZONE|CLUSTER|NAMESPACE|STAGE|ENV|PROFILE|ARCH|JOBS|OPTS|OPTIONS|FLAGS|DAYS|LIMIT|TIMEOUT|SIZE|COUNT)"
)
_NUMBERS_AND_FACTS = re.compile(
    r"\s*(?:date|hostname|uname|id|whoami|wc|stat|nproc|mktemp|pwd|git rev-parse|git describe|openssl rand|uuidgen|seq|"
    r"sha\d+sum|md5sum|cksum|od|getconf|df|du|tty|lsb_release|dpkg --print-architecture|readlink -f [\"']?\$0|dirname [\"']?\$0)\b"
)
# What a command that is run within a text does to it: makes it harmless, or hands on what it is given and no more.
_CLEANED = re.compile(
    r"\bprintf\s(?![^\n|;]{0,300}%[-.\d]{0,6}[sbc])[^\n|;%]{0,80}%[-\d]{0,4}[qd]|@Q\}|\$\{\w+//\[[!^]|\btr\s+-(?:cd|dc)\b|quote_(?:literal|ident)|\w*(?:escape|quote|sanit)\w*\s+[\"']?\$"
)
_CLEANED_VALUE = re.compile(r"\$\{\w+//\[[!^][^}$\n]{0,200}\}|\$\{\w+@Q\}")
_HANDS_ON = re.compile(r"\s*(?:echo|printf|basename|dirname|realpath|readlink|cd|pwd|command -v|which|true)\b")
_FILTERS = re.compile(r"\s*(?:tr|cut|sed|awk|head|tail|sort|uniq|grep|base64|sha\d+sum|md5sum|wc)\b")
# Of the commands that give facts these say what they are given too, where nothing cuts it off.
_SAYS_ITS_ARGUMENTS = re.compile(
    r"\s*(?:mktemp|wc|sha\d+sum|md5sum|cksum|du|df)\b|\s*stat\b[^\n]*%[nN]|\s*date\b[^\n]*\+\S*\$"
)
_READS_FROM = re.compile(r"<[ \t]*(?:\"[^\"]*\"|\S+)")
_LITERAL = re.compile(r"'[^']*'")
_COMMAND = re.compile(r"(?<!\\)(?:\$\(|`)")
_BETWEEN_COMMANDS = re.compile(r"(\|\|?|&&|[;&\n])")
_FOR_ALL_TO_WRITE = re.compile(r"[\"']?/(?:var/)?tmp/")
_COUNT = re.compile(r"\$\{#[^}\n]{0,80}\}|\$#")
_OPEN_ENDED = re.compile(r"\$\{?[@*!]|\$\{\w+\[[@*]\][#%/]|\*|`|<")
_VARIABLE = re.compile(r"(?<!\\)\$\{?(\w+)(\[[\"']?\$?\{?\w+)?")
_FUNCTION = re.compile(r"(?m)^[ \t]*(?:function[ \t]+)?([A-Za-z_][\w-]*)[ \t]*\([ \t]*\)[ \t]*\n?[ \t]*[{(]([^\n]*)")
_FUNCTION_END = re.compile(r"(?m)^[})]")
_STEP = re.compile(r"\\.|\$[({]|\$'(?:[^'\\]|\\.){0,2000}'|[<>]\(|[^\\$`\"'(){}\s;|&<>]+|.", re.DOTALL)
_HEREDOC = re.compile(r"<<-?[ \t]*[\"']?(\w+)[^\n]*\n")
_UNREADABLE = re.compile(r"(?<!\\)(?:\$(?:[@*\[]|\{[^\w#]|\{\w+\[[@*]\][#%/])|[<>]\()")
_MAX_CODE_CHARS = 200_000
_MAX_SETTINGS = 60
_MAX_LOOKUPS = 400
_MAX_TEXT_CHARS = 6000
_MAX_STEPS = 200_000
_MAX_NESTED = 6
_MAX_LINE_CHARS = 600


# What holds a variable against something: a pattern, a list, another value, or a function that is called a check.
# `how` is the word that does it: where it stands within a text, it is talked about and nothing is checked.
_CHECKS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\$\{?(\w+)(?:,,|\^\^)?\}?\"?\s*(?P<how>=~)(?!\s*\S{0,20}#)",  # not what skips comments
        r"\$\{?(\w+)(?:,,|\^\^)?\}?\"?\s+(?P<how>==|!=|=)\s+(?!\"?-|[\\\"']*#)[^\s&|]{0,120}[*\[?]",
        r"\[{1,2}\s[^\n]{0,120}?\$\{?(\w+)\}?\"?\s+(?P<how>==?)\s+\"?\$\{?\w",
        r"\b(?P<how>case)\s+\"?\$\{?(\w+)(?:,,|\^\^)?\}?\"?\s+in\b(?!\s*[\"']?[\w-]+=)",  # `name=*)` takes a pair apart
        r"\$\{?(\w+)\}?\"?\s*\|\s*(?:LC_ALL=C\s+)?(?P<how>grep)\s+-\w{0,12}q",
        r"\b(?P<how>grep)\s+-\w{0,12}q[^\n;|&]{0,120}<<<\s*\"?\$\{?(\w+)",
        r"(?P<how>\$)\{\w+\[[\"']?\$\{?(\w+)\}?[\"']?\]|(?P<how2>-v)\s+[\"']?\w+\[[\"']?\$\{?(\w+)",
        r"(?P<how>10)#\$?\{?(\w+)",
        r"\b(?P<how>printf)\s+-v\s+(\w+)\s+[\"']?[^\n%]{0,40}%[-0-9]{0,4}[qd]",
        r"(?P<how>\()\(\s*(\w+)\s*=(?!=)|\b(?P<how2>local|declare|typeset)\s+-[a-zA-Z]{0,8}i[a-zA-Z]{0,8}\s+(\w+)",
    )
)
_CHECKED_BY = re.compile(
    r"(?:^|[;&|!({]|\bif|\bthen|\bdo|\belse)[ \t]*(?P<how>\w{0,60}?(?<![a-zA-Z0-9])(?:valid|check|require|assert|verif|sanit|is_|safe|allowed|known))\w*"
    r"((?:[ \t]+[^\s;|&]{1,60}){1,4})|\b(?P<how2>check-ref-format)\b([^\n;|&]{0,80})",
    re.MULTILINE,
)
# `$1` within a function is another one than outside: what stands at the beginning of a line is outside, most likely.
_ARGUMENT_CHECK = re.compile(
    r"^(?:if[ \t]+(?:![ \t]*)?)?(?:(?P<how>\[\[)[^\n]{0,120}?\$\{?(\d)\}?\"?\s*(?:=~|(?:==|!=|=)\s+(?!\"?-)[^\s&|]{0,120}[*\[?])|"
    r"(?P<how2>case)\s+\"?\$\{?(\d)\}?\"?\s+in\b[^;]{0,120}\*(?:\[[!^]|/|\.\.))",
    re.MULTILINE,
)
# A name that is set: to a word, to each of some words, or by a command to what it reads.
_ARGUMENTS = rf"(?:\"[^\"\n]{{0,300}}\"|'[^'\n]{{0,300}}'|[^\n;|<\"']){{0,{_MAX_LINE_CHARS}}}"
_SETTING = re.compile(
    r"(?<![\w$.{-])([A-Za-z_]\w*+)(?:\[[^\]\n]{0,80}\])?\+?=(?!=)|\$\{([A-Za-z_]\w*+)(?:\[[^\]\n]{0,80}\])?:?=|"
    rf"\b(?:for|select)\s+(\w+)(?:\s+in\s([^\n;]{{0,{_MAX_LINE_CHARS}}})|[ \t]*(?:[;\n]|do\b))|"
    rf"\bprintf\s+-v\s*[\"']?(\w+)[\"']?([^\n]{{0,{_MAX_LINE_CHARS}}})|\b(?:read|mapfile|readarray|getopts)\s({_ARGUMENTS})"
)
_LOCAL = re.compile(rf"\b(?:local|declare|typeset)\b([^\n;]{{0,{_MAX_LINE_CHARS}}})")
_CALL = re.compile(
    r"(?:^|[;&|({!`]|\b(?:if|then|do|else|elif|while|until|time|command))[ \t]*(?=([A-Za-z_][\w-]*))", re.MULTILINE
)
_INPUT = re.compile(r"\s*var\.(\w+)\s*")
_OWN_OF_TERRAFORM = re.compile(r"\s*(?:path\.\w+|[a-z]\w*\.\w+(?:\[\d+\])?\.(?:id|arn|endpoint|\w*_ip|address))\s*")
_NOT_OWN = re.compile(r"\s*(?:data|local|module|each|self|var|count)\.")
_INTERPOLATION = re.compile(r"(?<![$%])([$%])\{([^{}]{0,300})(\}?)")
_DECLARED = re.compile(r"(?m)^[ \t]*variable\s+\"?([\w-]+)\"?\s*\{")
_IS_NUMBER = re.compile(r"(?m)(?:^|\{)[ \t]*type[ \t]*=[ \t]*\"?(?:number|bool)\b\"?[ \t]*(?:$|\})")
_VALIDATED = re.compile(r"\bcondition\s*=[^\n]{0,200}(?:regex|contains|can|alltrue)\b")
_END_OF_LIST, _END_OF_LINE = re.compile(r"(?m)\][ \t]*$"), re.compile(r"(?m)$")
_INNER_BLOCK = re.compile(r"\{[^{}]*\}")


class Script:
    """One text, and what was found out about its variables; each pass over it is made once, when it is first asked.

    What lies beyond a bound is not known, and what is not known is not settled.
    """

    def __init__(self, code: str, masked: str | None = None) -> None:
        self._code = code
        self._masked = code if masked is None else masked
        self._looked = False
        self._too_much = len(code) > _MAX_CODE_CHARS
        self._steps = 0
        self._known: dict[tuple[str, int, int], bool] = {}
        self._checked: set[str] = set()
        self._settings: dict[str, list[tuple[int, str | None]]] = {}  # where, and to what: None for what is read
        self._functions: list[tuple[int, int, str]] = []
        self._locals: dict[str, set[int]] = {}
        self._calls: dict[str, list[int]] = {}
        self._declared: dict[str, bool] | None = None

    def is_settled(self, name: str, at: int, *, environment: bool = True) -> bool:
        """Whether the variable `name` holds at `at` what the script or its operator says, or was held against a pattern.

        Without `environment` a variable that is never set counts as not settled: it may be empty.
        """
        return self._is_settled(name, at, _ANY if environment else _NONE, 4)

    def are_settled(self, start: int, end: int) -> bool:
        """Whether the statement that a match from `start` to `end` begins names variables, and all of them are settled."""
        if self._too_much:
            return False
        text = self._statement(start, end)
        if text is None:
            return False
        text = self._without_commands(text, _MAX_NESTED)
        if text is None or _VARIABLE.search(text) is None or _UNREADABLE.search(text):
            return False
        return all(self._is_settled(other[1], start, _OPERATORS, 4) for other in _VARIABLE.finditer(text))

    def are_inputs_settled(self, start: int, end: int) -> bool:
        """Whether all that Terraform puts into the text that a match from `start` to `end` begins is checked, or its own."""
        text = None if self._too_much else self._terraform_text(start, end)
        found = list(_INTERPOLATION.finditer(text or ""))
        return bool(found) and all(self._is_own_interpolation(*one.groups()) for one in found)

    def _look(self) -> None:
        code, masked = self._code, self._masked
        self._looked = True
        found = [match for check in _CHECKS for match in self._done(check)]
        self._checked = {name for m in found for name in _names_in(m) if not name.isdigit()}
        for match in self._done(_CHECKED_BY):
            self._checked.update(found[1] for names in _names_in(match) for found in _VARIABLE.finditer(names))
        self._checked.update(name for match in self._done(_ARGUMENT_CHECK) for name in _names_in(match))
        for match in _SETTING.finditer(code):
            self._set(match)
        ends = [match.start() for match in _FUNCTION_END.finditer(code)]
        for match in _FUNCTION.finditer(code):
            if match[2].rstrip().endswith(("}", ")")):
                end = match.end()
            else:
                after = bisect_right(ends, match.end())
                end = ends[after] if after < len(ends) else len(code)
            self._functions.append((match.start(), end, match[1]))
        for match in _LOCAL.finditer(masked):
            around = self._function_at(match.start())
            if around >= 0:
                for name in re.findall(r"(?<![\w${=/.-])[A-Za-z_]\w*", match[1]):
                    self._locals.setdefault(name, set()).add(around)
        names = {name for _, _, name in self._functions}
        for match in _CALL.finditer(code):
            if match[1] in names and code[match.end(1) : match.end(1) + 1] != "=":
                self._calls.setdefault(match[1], []).append(match.end(1))

    def _done(self, check: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Yield the matches of `check` that are code: one within a text does nothing."""
        two = "how2" in check.groupindex
        for match in check.finditer(self._code):
            at = match.start("how")
            if at < 0 and two:
                at = match.start("how2")
            if not self._masked[at].isspace():
                yield match

    def _set(self, match: re.Match[str]) -> None:
        word, default, each, among, printed, text, read = match.groups()
        at = match.start()
        if word:
            end = self._end(match.end())
            self._settings.setdefault(word, []).append((at, None if end is None else self._code[match.end() : end]))
        elif default:
            end = self._end(at, _ONE_PIECE, "")
            self._settings.setdefault(default, []).append((at, None if end is None else self._code[at:end]))
        elif each or printed:
            text = among if each else text
            self._settings.setdefault(each or printed, []).append(
                (at, None if text is None or len(text) >= _MAX_LINE_CHARS else text)
            )
        elif read is not None:
            if not self._masked[at].isspace():
                self._too_much |= len(read) >= _MAX_LINE_CHARS or self._code.startswith(_QUOTES, match.end())
            for name in re.findall(r"[A-Za-z_]\w*", read):
                self._settings.setdefault(name, []).append((at, None))

    def _function_at(self, at: int) -> int:
        around = bisect_right(self._functions, at, key=lambda function: function[0]) - 1
        return around if around >= 0 and at <= self._functions[around][1] else -1

    def _is_settled(self, name: str, at: int, trust: int, depth: int) -> bool:
        if _OWN_VARIABLES.fullmatch(name):
            return True
        if depth == 0 or not (name.isdigit() or name.isidentifier()):
            return False
        if not self._looked and not self._too_much:
            self._look()
        if self._too_much:
            return False
        if name in self._checked:
            return True
        around = self._function_at(at) if name.isdigit() or name in self._locals else -1
        key = (name, around, trust)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_LOOKUPS:
                return False
            self._known[key] = False  # what is set to itself by way of others is not
            known = self._known[key] = self._find(name, around, trust, depth)
        return known

    def _find(self, name: str, around: int, trust: int, depth: int) -> bool:
        if name.isdigit():
            return around >= 0 and self._is_argument_settled(int(name), self._functions[around][2], trust, depth - 1)
        given = self._settings.get(name, [])
        elsewhere = self._locals.get(name, set())
        if not given and not elsewhere:
            return trust != _NONE and _is_environment(name) and (trust == _ANY or _OPERATOR.fullmatch(name) is not None)
        if len(given) > _MAX_SETTINGS or not any(self._is_seen(start, around, elsewhere) for start, _ in given):
            return False
        return all(
            text is not None and self._is_text_settled(text, start, name, trust, depth - 1) for start, text in given
        )

    def _is_seen(self, start: int, around: int, local: set[int]) -> bool:
        """Whether what is set at `start` is set in code, and not in another function than `around` that keeps it to itself."""
        if self._masked[start].isspace() and not self._code[start].isspace():
            return False
        own = self._function_at(start) if local else -1
        return own not in local or own == around or (around >= 0 and self._is_called_in(local, around))

    def _is_called_in(self, local: set[int], around: int) -> bool:
        """Whether all calls of the function `around` stand in functions that keep the name: it sees what they set."""
        calls = [at for at in self._calls.get(self._functions[around][2], []) if self._function_at(at) != around]
        return 0 < len(calls) <= _MAX_SETTINGS and all(self._function_at(at) in local for at in calls)

    def _is_text_settled(self, text: str, at: int, name: str, trust: int, depth: int) -> bool:
        read = self._without_commands(text, _MAX_NESTED)
        if read is None:
            return False
        text = _COUNT.sub("", read)
        if _FOR_ALL_TO_WRITE.match(text) or _OPEN_ENDED.search(text) or _UNREADABLE.search(text):
            return False
        for other in _VARIABLE.finditer(text):
            if other[1] == name:  # `API=${API:-https://…}`
                if f"{{{name}:" in text and _GIVEN_BY_OTHERS.search(name):
                    return False
                continue
            if not self._is_settled(other[1], at, trust, depth):
                return False
        return True

    def _is_argument_settled(self, number: int, function: str, trust: int, depth: int) -> bool:
        """Whether every call of `function` gives its argument `number` a settled text."""
        seen = False
        calls = self._calls.get(function, [])
        if len(calls) > _MAX_SETTINGS:
            return False
        for position in calls:
            if self._code[position : position + 3].lstrip().startswith("("):
                continue  # where it is defined
            words = self._words(position, number)
            if words is None:
                return False
            seen = seen or not self._masked[position - 1].isspace()
            if len(words) >= number:
                text = words[number - 1]
                if not text.startswith("'") and not self._is_text_settled(text, position, "", trust, depth):
                    return False
            elif any("@" in word or "*" in word for word in words):
                return False
        return seen

    def _words(self, position: int, count: int) -> list[str] | None:
        """Return up to `count` words that follow `position` in its statement, or None where they cannot be read."""
        words: list[str] = []
        while len(words) < count:
            begin = position
            while self._code[begin : begin + 1] in (" ", "\t"):
                begin += 1
            if begin == position or self._code[begin : begin + 1] in ("", "\n", ";", "|", "&", "<", ">", ")"):
                break
            end = self._end(begin)
            if end is None:
                return None
            if end == begin:
                break
            words.append(self._code[begin:end])
            position = end
        return words

    def _end(self, position: int, least: int = -1, stops: str = " \t\n;|&<>)") -> int | None:
        """Return where the word at `position` ends, or None where that is too far off.

        With `least` it is the first of `stops` from there on, outside of quotes and brackets.
        """
        return self._end_in(self._code, position, least, stops)

    def _end_in(self, code: str, position: int, least: int = -1, stops: str = " \t\n;|&<>)") -> int | None:
        stack: list[str] = []
        last = min(len(code), max(position, least) + _MAX_TEXT_CHARS)
        while position < last:
            self._steps += 1
            step = _STEP.match(code, position)
            if step is None or self._steps > _MAX_STEPS:
                return None
            mark, top = step[0], stack[-1] if stack else ""
            if not stack and mark in stops and position >= least:
                return position
            position = step.end()
            if top == '"' and mark.startswith("$'"):
                position = step.start() + 1
            elif mark == top:
                stack.pop()
                if not stack and least == _ONE_PIECE:
                    return position
            elif mark == "'" and top != '"':
                closing = code.find("'", position, last)
                if closing < 0:
                    return None
                position = closing + 1
            elif mark in _CLOSERS and (top != '"' or mark in ("$(", "${", "`")):
                stack.append(_CLOSERS[mark])
        return position if position >= len(code) and not stack else None

    def _statement(self, start: int, end: int) -> str | None:
        """Return the whole lines of what a match from `start` to `end` is in: its quotes closed, its here-document ended."""
        document = _HEREDOC.search(self._code, start, end)
        if document:
            last = _end_of(document[1]).search(self._code, end, end + _MAX_TEXT_CHARS)
            return self._code[start : last.start()] if last else None
        if end - start > _MAX_TEXT_CHARS:
            return None
        last_at = self._end(start, end, "\n")
        return None if last_at is None else self._code[start:last_at]

    def _without_commands(self, text: str, depth: int) -> str | None:
        """Return `text` without the commands in it that give numbers and facts, or None where another is run in it."""
        out: list[str] = []
        position = 0
        while True:
            begin = _COMMAND.search(text, position)
            if begin is None:
                return _CLEANED_VALUE.sub("", "".join([*out, text[position:]]))
            end = self._end_in(text, begin.start(), _ONE_PIECE, "") if depth else None
            if end is None:
                return None
            out.append(text[position : begin.start()])
            inner = text[begin.end() : end - 1]
            if not (inner.startswith("(") and begin[0] == "$("):  # arithmetic gives a number
                kept = self._handed_on(inner, depth - 1)
                if kept is None:
                    return None
                out.append(kept)
            position = end

    def _handed_on(self, inner: str, depth: int) -> str | None:
        """Return what of the text of the command `inner` comes out of it, or None where that is more than it is given."""
        if _CLEANED.search(inner):
            return ""
        parts = _BETWEEN_COMMANDS.split(inner)
        kept: list[str] = []
        for count, part in enumerate(parts[::2]):
            is_filter = count > 0 and parts[2 * count - 1] == "|" and _FILTERS.match(part) is not None
            is_fact = _NUMBERS_AND_FACTS.match(part) is not None
            if part.strip() and not (is_filter or is_fact or _HANDS_ON.match(part)):
                return None
            said = part if '"' in part else _LITERAL.sub("", part)  # `awk '{print $1}'`
            if is_fact and (len(parts) > 1 or not _SAYS_ITS_ARGUMENTS.match(part)):
                said = ""
            kept.append(_READS_FROM.sub("", said) if is_fact else said)
        return self._without_commands("\n".join(kept), depth)

    def _terraform_text(self, start: int, end: int) -> str | None:
        code = self._code
        document = _HEREDOC.search(code, start, end)
        if document:
            last = _end_of(document[1]).search(code, end, end + _MAX_TEXT_CHARS)
        elif code.startswith("inline", start):
            last = _END_OF_LIST.search(self._masked, end, end + _MAX_TEXT_CHARS)
        else:
            last = _END_OF_LINE.search(code, end, end + _MAX_TEXT_CHARS)
        return code[start : last.start()] if last else None

    def _is_own_interpolation(self, mark: str, inside: str, closed: str) -> bool:
        if mark != "$" or not closed:
            return False
        name = _INPUT.fullmatch(inside)
        if name:
            return self._is_input_checked(name[1])
        return _OWN_OF_TERRAFORM.fullmatch(inside) is not None and _NOT_OWN.match(inside) is None

    def _is_input_checked(self, name: str) -> bool:
        """Whether Terraform's variable `name` is a number, or has a validation that looks at it."""
        if self._declared is None:
            self._declared = {}
            spans = plain.blocks(self._masked)
            ends = [end for _, end in spans]
            for match in _DECLARED.finditer(self._code):
                at = bisect_right(ends, match.end() - 1)
                begin, end = spans[at] if at < len(ends) else (0, 0)  # one that is not closed has no end
                fits = self._masked.find("{", begin) == match.end() - 1 and end <= match.end() + _MAX_TEXT_CHARS
                fits = fits and self._is_checked_in(match.end(), end)
                self._declared[match[1]] = fits and self._declared.get(match[1], True)
        return self._declared.get(name, False)

    def _is_checked_in(self, start: int, end: int) -> bool:
        block = self._masked[start : end - 1]
        if _VALIDATED.search(block):
            return True
        for _ in range(_MAX_NESTED):
            block = _INNER_BLOCK.sub("", block)
        return "{" not in block and _IS_NUMBER.search(block) is not None


def _end_of(document: str) -> re.Pattern[str]:
    return re.compile(rf"(?m)^[ \t]*{re.escape(document)}[ \t]*$")


_NONE, _OPERATORS, _ANY = range(3)  # whom the environment is trusted to come from
_ONE_PIECE = -2
_QUOTES = ('"', "'")
_CLOSERS = {'"': '"', "`": "`", "(": ")", "$(": ")", "<(": ")", ">(": ")", "${": "}"}


def _names_in(match: re.Match[str]) -> list[str]:
    """Return what the groups of `match` hold that have no name of their own."""
    named = set(match.re.groupindex.values())
    return [text for number, text in enumerate(match.groups(), 1) if text and number not in named]


def _is_environment(name: str) -> bool:
    """Whether a variable that no line sets is one that the operator gives."""
    return _ENVIRONMENT.fullmatch(name) is not None and not _GIVEN_BY_OTHERS.search(name)
