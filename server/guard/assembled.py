# ruff: noqa: E501  # a pattern is read whole
"""SQL that is put together as text and run: whether a piece of it is what a caller says.

A rule finds where a text is run; from there this goes back over what the text was made of. A number, a date, a name of the
catalogue, what was quoted, chosen by a CASE or held against a list is harmless; a parameter that holds any text is not. What
this does not know (a column, a record's field) it takes to be harmless; a function that it does not know hands on what it is
given, and what lies beyond a bound counts as a caller's. What is said of names (their types, what they are set to, what checks
them) is read once a routine.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_EXPRESSION_CHARS = 6000
MAX_DEPTH = 16
MAX_ASSIGNMENTS = 400
MAX_VARIABLES = 1000
MAX_NESTED = 20
MAX_STEPS = 20_000  # pieces that are read of one routine

Span = tuple[int, int]

_TOKEN = re.compile(
    r"(?P<text>(?:\b[NEB])?'(?:[^']|'')*'?|\$(?P<tag>[A-Za-z_]\w*)?\$.*?\$(?P=tag)\$|\$\$.*?\$\$)|(?P<cast>::)|(?P<join>\|\|)"
    r"|(?P<name>@{0,2}[A-Za-z_$#][\w$#]*(?:\s*\.\s*[\w$#@]+|\.\[\w+\])*|\$\d+|:\w+|\"[^\"\n]*\"|\[\w+\]|`[^`\n]*`)"
    r"|(?P<number>\d[\d.]*)|(?P<mark>[^\s\w])",
    re.DOTALL | re.IGNORECASE,
)
_HEAD = re.compile(
    r"(?im)(?:\b(?:CREATE|REPLACE|ALTER)\s+(?:DEFINER\s*=\s*\S{1,60}\s+)?|^[ \t]*)(?:PROC|PROCEDURE|FUNCTION|TRIGGER)\s+[\w.\"\[\]`]+"
)
_HEAD_END = re.compile(
    r"(?i)\b(?:AS|IS|BEGIN|RETURNS?|LANGUAGE|READS|MODIFIES|DETERMINISTIC|SQL\s+SECURITY|WITH\s+EXECUTE)\b|\$\w*\$"
)
# Where an expression ends, at the same depth of brackets: much of SQL Server's code has no semicolons.
_ENDS = frozenset({
    "from", "where", "using", "into", "loop", "begin", "declare", "set", "exec", "execute", "if", "return", "print", "insert", "update",
    "delete", "go", "end", "while", "fetch", "open", "prepare", "deallocate", "order", "group", "create", "then", "elsif", "elseif", "else",
    "when", "limit", "union", "for", "raise", "raiserror", "throw", "select",
})  # fmt: skip
_SAFE_TYPE = re.compile(
    r"(?i)(?:small|big|tiny|medium)?int(?:eger)?\d?|(?:small|big)?serial|numeric|number|dec(?:imal)?|float\d?|real|double|(?:small)?money|bit|bool(?:ean)?"
    r"|(?:small)?date(?:time)?(?:2|offset)?|timestamp\w*|time\w*|interval|year|uuid|uniqueidentifier|reg\w+|oid|pls_integer|binary_integer|simple_integer"
    r"|natural\w*|positive\w*|rowid|inet|cidr|unsigned|signed|hierarchyid|xid|bytea"
)
_TEXT_TYPE = re.compile(
    r"(?i)n?(?:var)?char2?|n?text|(?:tiny|medium|long)text|character|n?clob|string|citext|name|sysname|jsonb?|xml|varying|sql_variant|long|record|refcursor|variadic|array|setof|enum|anyelement|anyarray"
)
_WORD_START = r"(?i)(?:^|[_.$\[\]\"]|(?-i:(?<=[a-z])(?=[A-Z])))(?:is|has)?"
_CHECK_WORD = r"check(?!out|sum|box|point|ing)|assert|valid|ensure|allow|verif|safe(?!ty)|guard|permit|known"
_CHECKS = re.compile(rf"{_WORD_START}(?:{_CHECK_WORD})")
_HARMLESS_CALL = re.compile(
    rf"{_WORD_START}(?:{_CHECK_WORD}|quot|escap|sanit|ident(?:ifier)?(?![a-z])|literal|resolve|lookup)"
)
_HARMLESS_FUNCTION = re.compile(
    r"(?i)(?:to_char|least|greatest|abs|count|sum|length|char_length|len|datalength"
    r"|floor|ceil\w*|round|str|trunc|sign|extract|date\w*|now|getdate|sysdate\w*|row_number|col_name|object_name|schema_name|db_name|object_schema_name|parsename|original_login|suser_\w+"
    r"|current_\w+|session_user|newid|gen_random_uuid|chr|n?char|space|ascii|to_number|to_date|to_timestamp|hashbytes|md5|sha\w*|digest|encode|to_hex|position|instr|charindex|generate_series|make_date|elt|choose|field|iif)"
)
_CATALOGUE = r"(?:information_schema\s*\.|pg_catalog\s*\.|\bpg_(?:class|tables|attribute|namespace|proc|roles|database|indexes|views|user)\b|\bsys\s*\.|\bsys(?:objects|columns|databases)\b|\b(?:all|user|dba)_(?:tab\w*|objects|views|users|indexes|sequences|constraints)\b)"
_CAST, _BRACKET = re.compile(r"\s*::\s*\"?(\w+)"), re.compile(r"\s*\(")
_QUERY = re.compile(r"\s*SELECT\b(?:\s+DISTINCT\b)?", re.IGNORECASE)
_NAMED = re.compile(r"\s*@(?:stmt|statement)\s*=\s*", re.IGNORECASE)
_SELECT = re.compile(r"\bSELECT\b", re.IGNORECASE)
_TAG = re.compile(r"\$(?:[A-Za-z_]\w*)?\$")
_HERE: Span = (-1, -1)  # the expression that is being read
_PLACE = re.compile(r"%(?:%|(?:(\d+)\$)?-?\d*([sILdi]))")


@dataclass(slots=True)
class _Routine:
    """One routine (or the script around it): its text, its parameters, and what is known of names already."""

    code: str
    masked: str
    start: int
    body: int
    end: int
    known: dict[str, Span | None] = field(default_factory=dict)
    nested: int = 0
    steps: int = 0
    names: _Names | None = None


class Statements:
    """The statements that a text puts together; its routines are read once, however many statements they run."""

    def __init__(self, code: str, masked: str) -> None:
        self._code, self._masked = code, masked
        self._heads = [match.span() for match in _HEAD.finditer(masked)]
        self._starts = [start for start, _ in self._heads]
        self._routines: dict[int, _Routine] = {}

    def foreign_part(self, at: int) -> Span | None:
        """Return where a caller's text is put into the statement that is run at `at`, or None."""
        index = bisect_left(self._starts, at)
        routine = self._routines.get(index) or self._read_routine(index)
        named = _NAMED.match(self._code, at)
        found, _ = _of_expression(routine, named.end() if named else at, 0)
        return found

    def _read_routine(self, index: int) -> _Routine:
        start = self._heads[index - 1][1] if index else 0
        end = self._starts[index] if index < len(self._starts) else len(self._code)
        head_end = _HEAD_END.search(self._masked, start, end) if index else None
        made = _Routine(self._code, self._masked, start, head_end.end() if head_end else start, end)
        self._routines[index] = made
        return made


def _of_expression(routine: _Routine, at: int, depth: int) -> tuple[Span | None, int]:
    """Return the first expression that a caller's text is part of, from the one at `at` on, and where that one ends."""
    found, end = _read(routine, at, depth)
    if found != _HERE:
        return found, end
    text = routine.code[at:end]
    return (at + len(text) - len(text.lstrip()), at + len(text.rstrip())), end


def _token(code: str, at: int, limit: int, end: int) -> tuple[re.Match[str] | None, int, int]:
    """Return the piece from `at` on, where it ends, and the limit, which a long literal moves by its own length."""
    match = _TOKEN.search(code, at, limit)
    if match is None or limit == end:
        return match, match.end() if match else limit, limit
    if match["text"] is not None and match.end() == limit:
        match = _TOKEN.search(code, match.start(), end)
        assert match is not None  # noqa: S101  # the same place, with more to read
        return match, match.end(), min(end, limit + len(match[0]))
    if match["name"] is not None and (tag := _TAG.match(match[0])):
        closed = code.find(tag[0], match.start() + len(tag[0]), end)
        if closed >= 0:
            after = closed + len(tag[0])
            return _TOKEN.search(code, match.start(), after), after, min(end, limit + after - match.start())
    return match, match.end(), limit


def _read(routine: _Routine, at: int, depth: int) -> tuple[Span | None, int]:
    """Return the same, with `_HERE` for the expression at `at` itself."""
    code, limit = routine.code, min(routine.end, at + MAX_EXPRESSION_CHARS)
    found: Span | None = None
    skips = False  # between a CASE or WHEN and its THEN: what is asked, not what is given
    cases = 0
    while True:
        match, after, limit = _token(code, at, limit, routine.end)
        routine.steps += 1
        if routine.steps > MAX_STEPS:
            return found or _HERE, limit
        if match is None:
            return found or (_HERE if limit < routine.end else None), limit
        piece, at = match[0], after
        given: Span | None = None
        if match["name"] is None:
            if piece == "(":
                given, at = _of_brackets(routine, at, depth)
                if _is_cast(code, at):
                    given = None
            elif piece in (")", ";", ",", "]"):
                return found, match.start()
        elif (word := piece.lower()) == "case":
            cases, skips = cases + 1, True
        elif cases and word in ("when", "then", "else", "end"):
            skips = word == "when"
            cases -= word == "end"
        elif word in _ENDS:
            return found, match.start()
        else:
            given, at = _of_name(routine, match, depth)
        if given is not None and not skips:
            found = found or given


def _of_brackets(routine: _Routine, at: int, depth: int) -> tuple[Span | None, int]:
    """Return what `_read` does of a list in brackets, and the place after it; of a query, of its columns."""
    code = routine.code
    found: Span | None = None
    if routine.nested >= MAX_NESTED:
        return _HERE, min(routine.end, at + MAX_EXPRESSION_CHARS)
    routine.nested += 1
    query = _QUERY.match(code, at)
    position = query.end() if query else at
    while True:
        given, position = _read(routine, position, depth)
        found = found or given
        if code[position : position + 1] != ",":
            break
        position += 1
    routine.nested -= 1
    after = _after_bracket(code, position, routine.end)
    return (found, after) if after >= 0 else (found or _HERE, min(routine.end, position + MAX_EXPRESSION_CHARS))


def _after_bracket(code: str, at: int, end: int) -> int:
    """Return the place after the bracket that closes, the end where none does, and -1 where it is too far away."""
    open_ones, limit = 1, min(end, at + MAX_EXPRESSION_CHARS)
    while True:
        match, at, limit = _token(code, at, limit, end)
        if match is None:
            return end if limit == end else -1
        open_ones += (match[0] == "(") - (match[0] == ")")
        if open_ones == 0:
            return at


def _is_cast(code: str, at: int) -> bool:
    """Whether a cast to what is no text follows."""
    cast = _CAST.match(code, at)
    return cast is not None and _TEXT_TYPE.fullmatch(cast[1]) is None


def _of_name(routine: _Routine, match: re.Match[str], depth: int) -> tuple[Span | None, int]:
    code, name, at = routine.code, match[0], match.end()
    bracket = _BRACKET.match(code, at)
    if bracket is None:
        return (None if _is_cast(code, at) else _of_variable(routine, name, depth)), at
    called, inside = name.lower().replace(" ", "").rsplit(".", 1)[-1].strip('"[]`'), bracket.end()
    after = _after_bracket(code, inside, routine.end)
    if _HARMLESS_CALL.search(name) or _HARMLESS_FUNCTION.fullmatch(called):
        return None, after if after >= 0 else min(routine.end, inside + MAX_EXPRESSION_CHARS)
    if after < 0:
        return _HERE, min(routine.end, inside + MAX_EXPRESSION_CHARS)
    arguments = code[inside : after - 1]
    if _is_cast(code, after):
        return None, after
    if called in ("cast", "try_cast"):
        kind = re.search(r"(?i)\bas\s+\"?(\w+)[^)]*(?:\([^)]*\)\s*)?$", arguments)
    elif called in ("convert", "try_convert"):
        kind = re.match(r"\s*(\w+)", arguments)
    else:
        kind = None
    if kind is not None and _SAFE_TYPE.fullmatch(kind[1]):
        return None, after
    if called == "replace" and re.search(r"'''''|'``'|N?'\]\]'", arguments):  # the quote is doubled
        return None, after
    if called == "format":
        return _of_format(routine, inside, depth), after
    found, _ = _of_brackets(routine, inside, depth)
    return found, after


def _of_format(routine: _Routine, at: int, depth: int) -> Span | None:
    """Return what `%s` takes of a caller's text; `%I` and `%L` quote."""
    code = routine.code
    found, position = _read(routine, at, depth)
    if found:  # the pattern itself is put together, or given
        return found
    pattern = code[at:position]
    values: list[Span | None] = []
    while code[position : position + 1] == ",":
        given, position = _read(routine, position + 1, depth)
        values.append(given)
    turn = 0
    for place in _PLACE.finditer(pattern):
        if place[2] is None:
            continue
        index = int(place[1]) - 1 if place[1] else turn
        turn = index + 1
        if place[2] == "s" and 0 <= index < len(values) and values[index]:
            return values[index]
    return None


def _of_variable(routine: _Routine, given: str, depth: int) -> Span | None:
    """Return where the variable gets a caller's text; `_HERE` where it is such a text itself."""
    name = re.sub(r"\s", "", given).rsplit(".", 1)[-1].strip('"[]`').lower()
    names = _names_of(routine)
    if "." in given and name not in names.parameters:
        return None  # a column, or a record's field
    if name in routine.known:
        return routine.known[name]
    if not re.fullmatch(r"@{0,2}[\w$#]+|:\w+", name):
        return None
    if depth >= MAX_DEPTH or len(routine.known) >= MAX_VARIABLES:
        return _HERE
    routine.known[name] = None  # an assignment to itself adds nothing
    routine.known[name] = found = _find_variable(routine, names, name, depth)
    return found


def _find_variable(routine: _Routine, names: _Names, name: str, depth: int) -> Span | None:
    if name.startswith("@@") or name in names.checked:
        return None
    declared = names.parameters.get(name)
    if declared is None and re.fullmatch(r"\$\d+", name):
        return _HERE
    if declared is not None:
        return _HERE if _is_text(*declared) else None
    declared = names.declared.get(name)
    if declared is not None and not _is_text(*declared) and _SAFE_TYPE.fullmatch(declared[0]):
        return None
    assigned, into = names.assigned.get(name, []), names.into.get(name, [])
    for at in assigned[:MAX_ASSIGNMENTS]:
        found, _ = _of_expression(routine, at, depth + 1)
        if found:
            return found
    for at in into[:MAX_ASSIGNMENTS]:
        found = _of_columns(routine, names, at, depth + 1)
        if found:
            return found
    if max(len(assigned), len(into)) > MAX_ASSIGNMENTS:
        return _HERE
    # not said to be anything: a piece of a routine whose head was left out
    is_told = assigned or declared is not None or routine.start > 0
    return _HERE if not is_told and re.match(r"(?:p|in|par|param)_", name) else None


def _of_columns(routine: _Routine, names: _Names, end: int, depth: int) -> Span | None:
    """Return what is a caller's of the columns that are selected INTO the variables that follow at `end`."""
    index = bisect_left(names.selects, end)
    if not index or routine.masked.find(";", names.selects[index - 1], end) >= 0:
        return None
    position = names.selects[index - 1]
    while position < end:
        found, position = _of_expression(routine, position, depth)
        if found:
            return found
        if routine.code[position : position + 1] != ",":
            break
        position += 1
    return None


def _is_text(kind: str, rest: str) -> bool:
    """Whether a variable of this type holds any text; a type of the project's own is most likely a list of names."""
    if "%" in rest:
        return not re.search(r"(?i)(?:_id|_?no|_?num\w*|_?date|amount|count|_at)\s*%", rest)
    return _TEXT_TYPE.fullmatch(kind) is not None and _SAFE_TYPE.fullmatch(kind) is None


_NAME = r"(?P<n>(?<![\w@$.])@{0,2}[A-Za-z_$#][\w$#]*+|(?<![\w@$.:]):\w++)"
_WRAP = r"(?:\b(?:lower|upper|[lrb]?trim|coalesce|isnull|nvl|ifnull|cast)\s*\(\s*){0,3}"
_REST = r"(?:\s*,\s*N?'[^']{0,40}')?[\s)]{0,8}\s*"
_ANY_NAME = re.compile(_NAME)
_DECLARED = re.compile(
    rf"(?i){_NAME}(?=\s+(?:(?:constant|as|inout|in|out|nocopy)\s+){{0,4}}(?!(?:not|in|is|like|between|and|or|then|from|where|using|into|loop|order|as)\b)\"?(?P<t>\w+)(?P<r>(?:\.\w+)*%\w+)?)"
)
_SET = re.compile(
    rf"(?i){_NAME}(?=\s*(?P<c>:=)|\s*(?P<e>[+|]{{0,2}}=)(?!=)"
    r"|\s+(?:constant\s+|as\s+)?\w+(?:\.\w+)*(?:%\w+)?(?:\s*\([\w\s,]{0,30}\))?(?:\s+not\s+null)?\s*(?P<d>:?=|\bDEFAULT\b)|\s+(?P<a>IN\s+ARRAY\b))"
)
# What stands before a name that is set by `=`, where it is not held against something.
_BEFORE_SET = re.compile(r"(?i)(?:\b(?:SET|SELECT|DECLARE|THEN|ELSE|BEGIN|LOOP)\s+|[;,]\s*|\n\s*|\A\s*)\Z")
_INTO = re.compile(r"(?i)\bINTO\s+(?:STRICT\s+)?(?P<l>[\w@.$#]+(?:\s*,\s*[\w@.$#]+)*+)")
# A name that is held against a list, a pattern or a text; the texts are looked at, so the name must not stand in one itself.
_HELD = (
    re.compile(
        rf"(?is){_NAME}(?={_REST}(?:(?:NOT\s+)?IN\s*\(|!?~\*?|(?:NOT\s+)?(?:REGEXP|RLIKE|SIMILAR)\b|(?:NOT\s+)?LIKE\s+N?'%?\[|(?:NOT\s+)?MEMBER\s+OF"
        r"|(?:<>|!=)\s*N?'[^']|(?:<>|!=|=)\s*(?:ALL|ANY|SOME)\s*\())"
    ),
    re.compile(rf"(?is)\bCASE\s+{_WRAP}{_NAME}{_REST}WHEN\b"),
    re.compile(rf"(?is)\bPATINDEX\s*\(\s*N?'%\[\^[^']{{0,200}}'\s*,\s*{_WRAP}{_NAME}"),
)
# Calls that ask about what they are given.
_ASKS = re.compile(
    r"(?i)\b(?:REGEXP_LIKE|REGEXP_INSTR|FIND_IN_SET|FIELD|TRANSLATE|array_position|EXISTS|OBJECT_ID|COL_LENGTH|to_regclass|TYPE_ID|SCHEMA_ID|DB_ID|has_\w+_privilege)\s*\((?=(?P<w>[^;()]{0,160}[\w$#@]*))"
)
_CALLED = re.compile(r"(?<![\w.$@])(?P<f>[A-Za-z_][\w.$]*+)\]?\s*\((?=(?P<w>[^;()\n]{0,80}[\w$#@]*))")
_EXECUTED = re.compile(
    r"(?i)\b(?:EXEC|EXECUTE|CALL)\s+(?:@\w+\s*=\s*)?(?P<f>[\w.\[\]$\"]{1,200}+)[ \t]+(?=(?P<w>[^;()\n]{0,80}[\w$#@]*))"
)
_MAX_CHECK_NAME = 120
_FOUND_ROW = re.compile(
    r"(?is)\b(?:PERFORM\b|COUNT\s*\(\s*[*1]\s*\)\s*INTO\b)(?=(?P<w>[^;]{0,400});\s*IF\b(?P<if>[^;]{0,120}?)\bTHEN\b(?P<then>.{0,600}))"
)
_NO_ROW = re.compile(r"(?i)\bNOT\s+FOUND\b|(?<![<>!])=\s*0|<\s*1|(?:<>|!=)\s*1|\bIS\s+NULL\b")
_STOPS = re.compile(
    r"(?i)\b(?:RAISE(?!\s+(?:NOTICE|INFO|WARNING|LOG|DEBUG)\b)|RAISERROR|RETURN|SIGNAL|THROW|EXIT|CONTINUE|LEAVE|ITERATE|raise_application_error)\b"
)
_RUNS = re.compile(r"(?i)\b(?:EXEC|EXECUTE|PREPARE)\b")
_END_IF, _ELSE = re.compile(r"(?i)\bEND\s*IF\b"), re.compile(r"(?i)\bELS")
_COMPARED = re.compile(rf"=\s*(?:\w+\(\s*){{0,2}}{_NAME}")
_COMPARED_OR_GIVEN = re.compile(rf"[=(]\s*{_NAME}")
_EXISTS = re.compile(r"(?i)\bEXISTS\s*\(\s*SELECT\b")
_OF_CATALOGUE = re.compile(rf"(?i){_CATALOGUE}")
_FROM_CATALOGUE = re.compile(rf"(?i)\b(?:FROM|JOIN)\s+{_CATALOGUE}")


@dataclass(slots=True)
class _Names:
    """What a routine says of its names: their types, where they are set, and which are held against something."""

    parameters: dict[str, tuple[str, str]] = field(default_factory=dict)
    declared: dict[str, tuple[str, str]] = field(default_factory=dict)
    assigned: dict[str, list[int]] = field(default_factory=dict)
    into: dict[str, list[int]] = field(default_factory=dict)
    selects: list[int] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)


def _names_of(routine: _Routine) -> _Names:
    """Read the routine's names, once: to look for each of them anew costs the routine's length squared."""
    if routine.names is not None:
        return routine.names
    masked, body, end = routine.masked, routine.body, routine.end
    routine.names = names = _Names()
    for where, since, until in ((names.parameters, routine.start, body), (names.declared, body, end)):
        for match in _DECLARED.finditer(masked, since, until):
            where.setdefault(match["n"].lower(), (match["t"], match["r"] or ""))
    for match in _SET.finditer(masked, body, end):
        group = match.lastgroup or "c"
        if group == "e" and not _BEFORE_SET.search(masked[max(body, match.start() - 200) : match.start()]):
            continue
        if group == "a" and not masked[max(0, match.start() - 60) : match.start()].rstrip().lower().endswith("foreach"):
            continue
        names.assigned.setdefault(match["n"].lower(), []).append(match.end(group))
    for match in _INTO.finditer(masked, body, end):
        for target in match["l"].split(","):
            names.into.setdefault(target.strip().lower(), []).append(match.start())
    names.selects = [match.end() for match in _SELECT.finditer(masked, body, end)]
    names.checked = {name.lower() for name in _checked(routine.code, masked, body, end)}
    return names


def _checked(code: str, masked: str, start: int, end: int) -> Iterator[str]:
    """Yield the names that the routine holds against something, or hands to what is named a check."""
    for pattern in _HELD:
        for match in pattern.finditer(code, start, end):
            if masked.startswith(match["n"], match.start("n")):
                yield match["n"]
    for match in _ASKS.finditer(masked, start, end):
        yield from _ANY_NAME.findall(match["w"])
    for pattern in (_CALLED, _EXECUTED):
        for match in pattern.finditer(masked, start, end):
            if match.end("f") - match.start("f") <= _MAX_CHECK_NAME and _CHECKS.search(match["f"]):
                yield from _ANY_NAME.findall(match["w"])
    for match in _FOUND_ROW.finditer(masked, start, end):
        if _is_row_asked_for(match["if"], match["then"]):
            yield from (found["n"] for found in _COMPARED.finditer(match["w"]))
    for since, until in _windows(masked, _EXISTS.finditer(masked, start, end), 400, end):
        yield from (match["n"] for match in _COMPARED.finditer(masked, since, until))
    for since, until in _windows(masked, _OF_CATALOGUE.finditer(masked, start, end), 500, end):
        yield from (match["n"] for match in _COMPARED_OR_GIVEN.finditer(masked, since, until))
    for match in _FROM_CATALOGUE.finditer(masked, start, end):
        since = max(start, match.start() - 300)
        since = max(since, masked.rfind(";", since, match.start()))
        yield from (found["n"] for found in _ANY_NAME.finditer(masked, since, match.start()))


def _is_row_asked_for(condition: str, then: str) -> bool:
    """Whether the routine stops where no row was found, or runs a statement only where one was."""
    then = _END_IF.split(then, maxsplit=1)[0]
    first, *others = _ELSE.split(then, maxsplit=1)
    if _NO_ROW.search(condition):
        return _STOPS.search(first) is not None
    return _RUNS.search(first) is not None or any(_STOPS.search(other) for other in others)


def _windows(masked: str, places: Iterator[re.Match[str]], chars: int, end: int) -> Iterator[Span]:
    """Yield what follows each place as far as its statement goes, at most `chars`; what two share, once."""
    done = 0
    for place in places:
        until = min(end, place.end() + chars)
        closed = masked.find(";", place.end(), until)
        until = closed if closed >= 0 else until
        since = max(done, place.end())
        if until > since:
            yield since, until
            done = until
