# ruff: noqa: E501  # a pattern is read whole
"""SQL that is put together as text and run: whether a piece of it is what a caller says.

A rule finds where a text is run; from there this goes back over what the text was made of. A number, a date, a name of the
catalogue, what was quoted, chosen by a CASE or held against a list is harmless; a parameter that holds any text is not. What
this does not know (a column, a record's field, a function of the project's own) it takes to be harmless.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

MAX_EXPRESSION_CHARS = 6000
MAX_DEPTH = 6
MAX_ASSIGNMENTS = 40
MAX_VARIABLES = 60
MAX_NESTED = 20
MAX_STEPS = 20_000  # pieces that are read of one routine
MAX_SELECT_CHARS = 3000

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
_HARMLESS_CALL = re.compile(
    r"(?i)quote|dbms_assert|safe|valid|check|assert|allow|known|escape|sanit|ident|literal|permit|ensure|resolve|lookup|^(?:to_char|least|greatest|abs|count|sum|length|char_length|len|datalength"
    r"|floor|ceil\w*|round|str|trunc|sign|extract|date\w*|now|getdate|sysdate\w*|row_number|col_name|object_name|schema_name|db_name|object_schema_name|parsename|original_login|suser_\w+"
    r"|current_\w+|session_user|newid|gen_random_uuid|chr|n?char|space|ascii|to_number|to_date|to_timestamp|hashbytes|md5|sha\w*|digest|encode|to_hex|position|instr|charindex|generate_series|make_date|elt|choose|field|iif)$"
)
_HANDS_ON = re.compile(
    r"(?i)^(?:lower|upper|[lrb]?trim|coalesce|isnull|nvl2?|ifnull|concat|concat_ws|substr\w*|left|right|array_to_string|string_agg|group_concat|listagg|replace|[lr]pad|initcap|nullif"
    r"|to_n?clob|to_nchar|translate|array_agg|unnest|string_to_array|regexp_split_to_table|stuff|convert|try_convert|cast|try_cast|format|reverse|repeat|text|varchar|formatmessage)$"
)
_CATALOGUE = r"(?:information_schema\s*\.|pg_catalog\s*\.|\bpg_(?:class|tables|attribute|namespace|proc|roles|database|indexes|views|user)\b|\bsys\s*\.|\bsys(?:objects|columns|databases)\b|\b(?:all|user|dba)_(?:tab\w*|objects|views|users|indexes|sequences|constraints)\b)"
_CAST, _BRACKET = re.compile(r"\s*::\s*\"?(\w+)"), re.compile(r"\s*\(")
_QUERY = re.compile(r"\s*SELECT\b(?:\s+DISTINCT\b)?", re.IGNORECASE)
_NAMED = re.compile(r"\s*@(?:stmt|statement)\s*=\s*", re.IGNORECASE)
_SELECT = re.compile(r"\bSELECT\b", re.IGNORECASE)
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


def _read(routine: _Routine, at: int, depth: int) -> tuple[Span | None, int]:
    """Return the same, with `_HERE` for the expression at `at` itself."""
    code, limit = routine.code, min(routine.end, at + MAX_EXPRESSION_CHARS)
    found: Span | None = None
    skips = False  # between a CASE or WHEN and its THEN: what is asked, not what is given
    cases = 0
    while True:
        match = _TOKEN.search(code, at, limit)
        routine.steps += 1
        if match is None or routine.steps > MAX_STEPS:
            return found, limit
        piece, at = match[0], match.end()
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
        return None, min(routine.end, at + MAX_EXPRESSION_CHARS)
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
    return found, _after_bracket(code, position, routine.end)


def _after_bracket(code: str, at: int, end: int) -> int:
    open_ones, end = 1, min(end, at + MAX_EXPRESSION_CHARS)
    for match in _TOKEN.finditer(code, at, end):
        open_ones += (match[0] == "(") - (match[0] == ")")
        if open_ones == 0:
            return match.end()
    return end


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
    arguments = code[inside : after - 1]
    if (
        _HARMLESS_CALL.search(name)
        or _HARMLESS_CALL.search(called)
        or not _HANDS_ON.search(called)
        or _is_cast(code, after)
    ):
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
    if "." in given and not re.search(
        rf"(?i)(?<![\w@.]){re.escape(name)}\s", routine.masked[routine.start : routine.body]
    ):
        return None  # a column, or a record's field
    if name in routine.known:
        return routine.known[name]
    if depth >= MAX_DEPTH or len(routine.known) >= MAX_VARIABLES or not re.fullmatch(r"@{0,2}[\w$#]+|:\w+", name):
        return None
    routine.known[name] = None  # an assignment to itself adds nothing
    routine.known[name] = found = _find_variable(routine, name, depth)
    return found


def _find_variable(routine: _Routine, name: str, depth: int) -> Span | None:
    words = _words_of(name)
    if name.startswith("@@") or words.checked.search(routine.code, routine.body, routine.end):
        return None
    if words.looked_up.search(routine.masked, routine.body, routine.end):
        return None
    declared = words.declared.search(routine.masked, routine.start, routine.body)
    if declared is None and re.fullmatch(r"\$\d+", name):
        return _HERE
    if declared is not None:  # a parameter
        return _HERE if _is_text(declared[1], declared[2] or "") else None
    declared = words.declared.search(routine.masked, routine.body, routine.end)
    if declared is not None and not _is_text(declared[1], declared[2] or "") and _SAFE_TYPE.fullmatch(declared[1]):
        return None
    spans = [
        match.end()
        for match in islice(words.assigned.finditer(routine.masked, routine.body, routine.end), MAX_ASSIGNMENTS)
    ]
    for at in spans:
        found, _ = _of_expression(routine, at, depth + 1)
        if found:
            return found
    for match in islice(words.into.finditer(routine.masked, routine.body, routine.end), MAX_ASSIGNMENTS):
        since = max(routine.body, match.start() - MAX_SELECT_CHARS)
        begins = [begin.end() for begin in _SELECT.finditer(routine.masked, since, match.start())]
        position = begins[-1] if begins else match.start()
        if ";" in routine.masked[position : match.start()]:
            continue
        while position < match.start():
            found, position = _of_expression(routine, position, depth + 1)
            if found:
                return found
            if routine.code[position : position + 1] != ",":
                break
            position += 1
    # not said to be anything: a piece of a routine whose head was left out
    is_told = spans or declared is not None or routine.start > 0
    return _HERE if not is_told and re.match(r"(?:p|in|par|param)_", name) else None


def _is_text(kind: str, rest: str) -> bool:
    """Whether a variable of this type holds any text; a type of the project's own is most likely a list of names."""
    if "%" in rest:
        return not re.search(r"(?i)(?:_id|_?no|_?num\w*|_?date|amount|count|_at)\s*%", rest)
    return _TEXT_TYPE.fullmatch(kind) is not None and _SAFE_TYPE.fullmatch(kind) is None


@dataclass(slots=True)
class _Words:
    declared: re.Pattern[str]
    assigned: re.Pattern[str]
    into: re.Pattern[str]
    checked: re.Pattern[str]
    looked_up: re.Pattern[str]


@lru_cache(maxsize=512)
def _words_of(name: str) -> _Words:
    """Return what finds a variable's declaration, its assignments, a check of it, and a look for it in the catalogue."""
    word = rf"(?<![\w@$.]){re.escape(name)}(?![\w$])"
    wrapped = rf"(?:\b(?:lower|upper|[lrb]?trim|coalesce|isnull|nvl|ifnull|cast)\s*\(\s*){{0,3}}{word}(?:\s*,\s*N?'[^']{{0,40}}')?[\s)]{{0,8}}"
    return _Words(
        re.compile(
            rf"(?i){word}\s+(?:constant\s+|as\s+|in\s+out\s+|inout\s+|in\s+|out\s+|nocopy\s+)*(?!(?:not|in|is|like|between|and|or|then|from|where|using|into|loop|order|as)\b)\"?(\w+)((?:\.\w+)*%\w+)?"
        ),
        re.compile(
            rf"(?i){word}\s*:=|(?:\b(?:SET|SELECT|DECLARE|THEN|ELSE|BEGIN|LOOP)\s|[;,]\s{{0,40}}|\n\s{{0,40}}){word}\s*[+|]{{0,2}}=(?!=)"
            rf"|{word}\s+(?:constant\s+|as\s+)?\w+(?:\.\w+)*(?:%\w+)?(?:\s*\([\w\s,]{{0,30}}\))?(?:\s+not\s+null)?\s*(?::?=|\bDEFAULT\b)"
            rf"|\bFOREACH\s+{word}\s+IN\s+ARRAY\b"
        ),
        re.compile(rf"(?i)\bINTO\s+(?:STRICT\s+)?(?:[\w@.]+\s*,\s*){{0,8}}{word}"),
        re.compile(
            rf"(?is){wrapped}\s*(?:(?:NOT\s+)?IN\s*\(|!?~\*?|(?:NOT\s+)?(?:REGEXP|RLIKE|SIMILAR)\b|(?:NOT\s+)?LIKE\s+N?'%?\[|(?:NOT\s+)?MEMBER\s+OF|(?:<>|!=)\s*N?'[^'])"
            rf"|{wrapped}\s*(?:<>|!=|=)\s*(?:ALL|ANY|SOME)\s*\(|\bCASE\s+{wrapped}\s*WHEN\b"
            rf"|\b(?:REGEXP_LIKE|REGEXP_INSTR|FIND_IN_SET|FIELD|TRANSLATE|array_position|EXISTS|OBJECT_ID|COL_LENGTH|to_regclass|TYPE_ID|SCHEMA_ID|DB_ID|has_\w+_privilege)\s*\([^;()]{{0,160}}?{word}"
            rf"|\bPATINDEX\s*\(\s*N?'%\[\^[^']*'\s*,\s*{wrapped}"
            rf"|\b(?:PERFORM\b|COUNT\s*\(\s*[*1]\s*\)\s*INTO\b)[^;]{{0,300}}?=\s*(?:\w+\(\s*){{0,2}}{word}[^;]{{0,100}};\s*IF\b"
            rf"|\bEXISTS\s*\(\s*SELECT\b[^;]{{0,400}}?=\s*(?:\w+\(\s*){{0,2}}{word}"
            rf"|\b[\w.]*(?:check|assert|valid|ensure|allow|verify|_safe|safe_|guard|permit|known)\w*\]?(?:\s*\(|\s+@?\w*\s*=?)[^;()\n]{{0,80}}?{word}"
        ),
        re.compile(
            rf"(?is){_CATALOGUE}[^;]{{0,500}}?[=(]\s*(?:\w+\(\s*){{0,2}}{word}|{word}[^;]{{0,300}}?\b(?:FROM|JOIN)\s+{_CATALOGUE}"
        ),
    )
