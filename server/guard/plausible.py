# ruff: noqa: E501  # a pattern is read whole
"""Whether a value that stands where a credential would is one: not a placeholder, a reference, a hash or a word."""

from __future__ import annotations

import math
import re
from collections import Counter

from server.guard.formats import NAME

_PLACEHOLDER = re.compile(
    r"(?i)example|changeme|change[-_ ]me|your[-_ a-z]|yours?$|x{4,}|<[^>]*>|^\$|\$\{|\$\(|\{\{|%\(|%[sd]\b|placeholder|dummy|"
    r"\bfake|sample|redact|\*{3,}|\.{3,}|…|\btodo\b|insert[-_ ]|replace[-_ ]|^none$|^null$|^nil$|^undefined$|^true$|^false$|"
    r"^(?:my|the|a|some|test|demo|new|old|user|db|app|default|root)?[-_ ]?(?:pass(?:word|wd|phrase)?|secret|token|api[-_ ]?key|key|credentials?)$|"
    r"^env[.:(]|process\.env|os\.(?:environ|getenv)|getenv|^vault:|^secret(?:s|manager)?[:/]|^arn:|^ref\+|^op://|^file:|^/run/secrets|^@|"
    r"0123456789|1234567890|abcdefghij|deadbeef|not[-_ ]?(?:a[-_ ])?(?:real|secret|set)|"
    r"^#\{|^\{[a-z_.()]+\}$|\$\{\{|^var\.|^local\.|^data\.|^module\.|^!|^&|^\(|^\[|notasecret|^(?:wrong|bad|invalid|incorrect)(?:[-_ ][a-z]{1,20}){1,6}$|no[-_]?password|\bmock"
)
# What a plain `password = "test1234"` holds in a fixture; under a name that says whose it is, it is a weak password.
_WEAK = re.compile(r"(?i)^(?:test|pass(?:word|wd)?|secret|token|key)[-_]?\d{1,4}!?$")
_PLAIN_NAME = re.compile(r"(?i)(?:\w{1,20}\.)?(?:pass(?:word|wd)?|pwd|secret|token|key)[12]?")
_KNOWN_PUBLIC = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkw",  # the example on every JWT page
    "4eC39HqLyjWDarjtT1zdp7dc",  # Stripe's documented test key
    "QWxhZGRpbjpvcGVuIHNlc2FtZQ",  # Aladdin:open sesame, of the standard for it
)
_KEY_NOT_SECRET = re.compile(
    r"(?i)(?:name|field|header|url|uri|path|file|filename|dir|_id|Id|env|_?var|type|len|length|size|ttl|expiry|expires?|"
    r"expiration|hash|hashed|digest|regex|pattern|label|placeholder|prompt|msg|message|hint|policy|arn|ref|version|count|limit|"
    r"endpoint|column|class|format|prefix|suffix|algorithm|alg|mode|provider|manager|store|scope|scopes|issuer|audience|method|"
    r"strategy|title|description|text|error|status|state|rule|rules|min|max|public|enabled|required|index|parameter|param|"
    r"fingerprint|thumbprint|address|location|config|source|lifetime|age|template|view|form|input|element|selector|icon|button|link|_at|At|kind|role|"
    r"encoder|hasher|service|helper|handler|validator|callback|bucket|topic|table|tokens|tokenizer|ization)$|"
    # The place in a list, or what a flag asks for: whole words, so that MINIO_SECRET_KEY is no minimum.
    r"^(?:(?:pad|eos|bos|unk|mask|sep|cls|csrf|next|page|pagination|continuation|cursor|sync|delta|resume|stop|creation|design|cancel(?:lation)?)"
    r"(?:[_.-]?|(?-i:(?<=[a-z])(?=[A-Z])))){1,4}(?:token|key)s?$|"
    r"^(?:num|max|min|total|public|is|has|no|require|require[sd]|forgot|reset|change|show|toggle|hide|update|validate|verify|invalid|missing|wrong|bad)"
    r"(?:[_-]|(?-i:(?<=[a-z])(?=[A-Z]))|(?=token|password|key|secret|credential))(?:.*)?(?:token|password|key|secret|credentials?)s?$|"
    r"public[_.-]?key|^pass_(?:rate|count|ratio|mark|score)s?$|author|authority|authenticated|authentication$"
)
# A key that opens nothing: it finds a row, a text, a cached thing, or is shown to every visitor.
_KEY_OF_A_THING = re.compile(
    r"(?i)(?:^|[_.-]|(?-i:(?<=[a-z0-9])(?=[A-Z])))(?:partition|sort|range|cache|object|blob|row|foreign|unique|composite|idempotency|"
    r"dedup[a-z]{0,12}|routing|ordering|grouping?|translation|i18n|hot|shortcut|lookup|shard|websocket|"
    r"publishable|site|metric|file|folder|issue|query|item|record|feature|flag|message)[_.-]?key$"
)
_SAYS_SECRET = re.compile(r"(?i)passw|passphrase|secret|private|api[_.-]?key")
# Words that hold a credential's word and are none: what is left of the name has to promise one.
_NO_PASS = re.compile(r"(?i)(?:en)?compass|bypass|passenger|passport")
_NAMED_KEY = re.compile(
    r"(?i)pass|pwd|secret|token|credential|bearer|mnemonic|seed|auth|_pw|pin|"
    r"(?:api|access|private|encryption|signing|master|account|shared|service|client|license|webhook|app|hmac|aes|jwt|crypto?|"
    r"session|subscription|deploy|database|db|cipher|admin|integration|ingest)[_.-]?key"
)
_TEST_NAME = re.compile(r"(?i)(?:test|fake|mock|dummy|sample|example)[_-]")
_PASSWORD_NAME = re.compile(r"(?i)pass|pwd|_pw$|^pw|pin_?code|mnemonic|seed")
WORDY = re.compile(
    r"^[a-z]+(?:[_.\-/ :][a-z]+)*$|^[A-Z][a-z]+(?: [A-Za-z][a-z]*)*[.!?:]?$|^[A-Z]+(?:[_\-][A-Z]+)*$|^(?:[A-Z][a-z]+-)*[A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]+)*$"
)
# Words with a number at the end of some: `user:profile:v2`, `x-aws-ec2-metadata-token`, `ffi.Module.load_from_bytes.`
_WORDS = re.compile(r"^(?:[A-Z]?[a-z]+|[A-Z]+)\d?(?:[_.\-/ :]+(?:(?:[A-Z]?[a-z]+|[A-Z]+)\d?)?)+$")
# The same with numbers and short hashes among them: `alert-disk-web01`, `exports/2024/report-4821.csv`, `tenant#4821`.
_PARTS = re.compile(
    r"^[A-Za-z][a-z]*\d{0,2}(?:[-_.:/#+@](?:[A-Z]?[a-z]+\d{0,2}|[A-Z]+\d{0,2}|v?\d{1,8}|[0-9a-f]{8,40}))+$"
)
_WITHIN_ARN = re.compile(r"\barn:aws[\w:/.-]{0,200}\Z")
_PROPERTY_LINE = re.compile(r"\s{0,40}(?:export\s{1,4})?[A-Za-z][\w.-]{0,120}(?:=|:\s(?=\D*\d\D*\d))\S{8,512}\s{0,40}")
_PATH_OF_NAMES = re.compile(r"^[A-Za-z_]\w*(?:(?:\.|::|->)~?[A-Za-z_]\w*)+$")
# What a plain `key:` names far more often than a secret: the sum of what is cached, fetched or looked up under it.
_SUM = re.compile(r"^(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})$")
_NUMBER = re.compile(r"^(?:0x[0-9a-fA-F_]{1,16}|\d[\d_.]*)[uUlLnf]{0,3}$")
# What names a thing and is none: a version, a date, a URN, an algorithm, the path of a resource with words in it.
_NAMES_A_THING = re.compile(
    r"^(?:pk_(?:live|test)|sb_publishable)_|^(?:SHA256:|sha256/)[A-Za-z0-9+/]{43}=?$|^MD5:(?:[0-9a-f]{2}:){15}[0-9a-f]{2}$|"  # shown to everybody
    r"^_?[A-Za-z]{3,40}(?:Password|Key|Token|Secret)$|^_?(?:(?:Ed|X)(?:25519|448)|OAuth[12]|V[1-9]|S3|K8s)[A-Za-z]{0,30}(?:Password|Key|Token|Secret)$|"
    r"^(?i:utf|latin|iso|cp|ascii|us|windows)-?_?(?:ascii|\d{1,5}(?:[-_]\d{1,2})?)(?:-sig)?$|^[~^]?\d+(?:\.\d+){1,12}(?:-[\w.]+)?$|^\d{4}-\d\d-\d\d(?:T[\d:.]+Z?)?$|^urn:|"
    r"(?i:^(?:scram-)?(?:sha|aes|hs|rs|es|md)-?\d{1,3}(?:-[a-z]+)*$)|^(?:[\w*.-]*/)*[a-z]{3,20}/(?:[\w*.-]+/)*[a-z]{3,20}/"
)
# Shown to everybody, but of the form of the secret that belongs to it.
_SITE_KEY = re.compile(r"^6L[a-zA-Z0-9][\w-]{37}$")
_IDENTIFIER = re.compile(r"^[A-Za-z_$][\w$]*(?:(?:!?\.|\?\.|->|::)[A-Za-z_$][\w$]*)*(?:\(|\[|;|,|$)")
_ITEM = re.compile(r"^[A-Za-z_][\w.]*\[(?:\w{1,20})?\]?")
_HASHES = re.compile(
    r"^\$(?:2[abxy]?|1|5|6|argon2\w*|apr1|pbkdf2[\w-]*|scrypt|y)\$|^\{(?:SSHA|SHA|bcrypt|noop)\}|^pbkdf2_sha256\$|^pbkdf2:|^scrypt:|^sha(?:256|512)[:-]"
)
_CONNECTION = re.compile(r"(?i)(?:server|data source|host|user id|uid|initial catalog|database)\s{0,2}=[^;\n]{1,80};")
_URLISH = re.compile(r"^(?:[a-z][a-z0-9+.-]*://|/|\./|\.\./|~/|[A-Z]:\\)")


def entropy_bits(value: str) -> float:
    """Return Shannon's entropy of the characters of `value`, in bits a character."""
    total = len(value)
    return -sum(n / total * math.log2(n / total) for n in Counter(value).values()) if total else 0.0


def is_public(value: str) -> bool:
    """Whether a value is one that documentation shows to everybody."""
    return any(known in value for known in _KNOWN_PUBLIC)


def is_monotone(value: str) -> bool:
    """Whether few characters make up the whole (`aaaa`, `ababab`, `000000`)."""
    return len(set(value)) <= max(3, len(value) // 12)


def _is_code(match: re.Match[str]) -> bool:
    """Whether an unquoted value is a call, a member or a number: code takes the secret from somewhere."""
    value, end = match["v"], match.end("v")
    return (
        match.string[end : end + 1] in ("(", "[")
        or value[0] in ":?~=>"
        or _PATH_OF_NAMES.match(value) is not None
        or _NUMBER.match(value) is not None
    )


def _is_property(match: re.Match[str]) -> bool:
    """Whether the line is `name=value` and nothing else, as in a file of properties (or `name: value` with two digits), and the value mixes its characters."""
    value = match["v"]
    mixed = any(c.islower() for c in value) and any(c.isupper() for c in value) and any(c.isdigit() for c in value)
    return mixed and _PROPERTY_LINE.fullmatch(match.string) is not None


def _is_named_secret(key: str, value: str, *, quoted: bool, alone: bool = False) -> bool:
    """Judge `key = value`: the name promises a secret, the value must look like one and not like a reference.

    `alone`: the line holds nothing else, so that an unquoted value is no name of a variable.
    """
    value = value.strip()
    if len(value) < (4 if quoted else 6) or _KEY_NOT_SECRET.search(key) or _PLACEHOLDER.search(value):
        return False
    if not quoted and key.strip(" \"'").lower() == "key" and _SUM.match(value):
        return False
    if _NO_PASS.search(key) and not NAME.search(_NO_PASS.sub("", key)):
        return False
    if not _SAYS_SECRET.search(key) and (_KEY_OF_A_THING.search(key) or _SITE_KEY.match(value)):
        return False
    if (_PARTS.match(value) and not _NAMED_KEY.search(key)) or (_WEAK.match(value) and _PLAIN_NAME.fullmatch(key)):
        return False
    if _TEST_NAME.match(key) and len(value) < 12:
        return False  # the fixture of a test
    if (
        _HASHES.match(value)
        or _URLISH.match(value)
        or _NAMES_A_THING.match(value)
        or is_public(value)
        or (is_monotone(value) and len(value) > 5)
    ):
        return False
    last = key.rpartition(".")[2].lower()
    if not quoted and len(key) > 4 and value.lower().startswith(last) and _WORDS_AFTER.fullmatch(value, len(last)):
        return False  # `authToken: authTokenOfHeader2`
    has_digit = any(c.isdigit() for c in value)
    shell = not quoted and key.isupper() and has_digit and len(value) >= 8 and _PASSWORD_NAME.search(key)
    if (
        not quoted
        and not (shell or alone)  # DB_PASSWORD=m4kx9qlz: a line of an environment file, where no name can stand
        and _IDENTIFIER.match(value)
        and not (has_digit and len(value) >= 12 and entropy_bits(value) >= 3.0)
    ):
        return False  # an unquoted name or a call: code reads the secret from somewhere
    if not quoted and ("$" in value[:2] or "(" in value or value.endswith((":", "\\n"))):
        return False
    if _PASSWORD_NAME.search(key):
        if " " in value:
            words = value.split()
            named = "phrase" in key.lower() or "mnemonic" in key.lower() or "seed" in key.lower()
            return named and len(set(words)) > len(words) // 2
        if "{" in value or "%" in value[:1]:
            return False
        if WORDY.match(value.lstrip("_")) or value.isdigit():
            return value.count("-") >= 3 and len(value) >= 16
        return len(value) >= 6 or has_digit
    if " " in value or WORDY.match(value) or _WORDS.match(value) or "{" in value:
        return False
    if re.fullmatch(r"[A-Z][A-Z0-9_]+", value) and "_" in value:
        return False  # the name of an environment variable
    if re.fullmatch(r"[A-Za-z]+", value) and len(value) < 24:
        return False
    if (
        re.search(r"(?i)\bauth$|^auth", key)
        and not re.search(r"(?i)token|key|code|secret|pass", key)
        and len(value) < 20
    ):
        return False
    return (len(value) >= 10 and has_digit and entropy_bits(value) >= 2.8) or (
        len(value) >= 20 and entropy_bits(value) >= 3.5
    )


_WORDS_AFTER = re.compile(r"[A-Za-z_.]*\d?")
_MARKS = re.compile(r"[^A-Za-z0-9_./:-]")
_TERM = re.compile(r"(?i)^(?:base|sha|utf|aes|rsa|oauth|x\.?509|scram|hmac|pbkdf|bcrypt|argon)-?\d|-[a-z]{4,}$")


def _is_said(value: str) -> bool:
    """Judge what a sentence says a password is: most go on with a word, so that it takes a mix that no word has."""
    value = value.rstrip(".,;:!?)*")
    digits = sum(c.isdigit() for c in value)
    if len(value) < 8 or not digits or _PARTS.match(value) or _TERM.search(value) or _NAMES_A_THING.match(value):
        return False
    if _URLISH.match(value) or ("@" in value[1:-4] and "." in value.rpartition("@")[2]):
        return False  # where it is, or whose
    lower, upper = any(c.islower() for c in value), any(c.isupper() for c in value)
    mark = _MARKS.search(value) is not None
    return (lower and upper and (mark or digits > 1)) or ((lower or upper) and mark and digits > 1)


def is_context_secret(kind: str, match: re.Match[str], key: str) -> bool:
    """Judge the value that a context of `kind` has found after `key`."""
    value = match["v"]
    if kind == "named":
        return _is_named_secret(key, value, quoted=True)
    if kind == "bare":
        if _WITHIN_ARN.search(match.string, max(0, match.start() - 240), match.start()):
            return False
        return not _is_code(match) and _is_named_secret(key, value, quoted=False, alone=_is_property(match))
    if _PLACEHOLDER.search(value) or _HASHES.match(value):
        return False
    if kind == "url":
        end = match.end("v")
        if match.string[end : end + 1] != "@" or "{" in value or "$" in value[:1] or value.isupper():
            return False
        return not re.fullmatch(
            r"(?i)pass(?:word|wd)?|pw|secret|token|x+|user|root|postgres|guest|x-oauth-basic|\d{1,5}", value
        )
    if kind == "dsn":
        after = match.string[match.end("v") : match.end("v") + 6]
        return after.startswith(("@tcp(", "@unix(", "@udp(")) and "%" not in value[:1] and not WORDY.match(value)
    if kind == "said":
        return _is_said(value)
    if kind in ("opaque", "basic"):
        return (
            not is_monotone(value)
            and entropy_bits(value) >= (2.5 if len(value) < 24 else 3.0)
            and not is_public(value)
            # `"Basic infrastructure`: a word, no base64
            and not (kind == "basic" and value.isalpha() and value.islower())
        )
    if kind == "login":
        return (
            not WORDY.match(value) and " " not in value and not _URLISH.match(value) and any(c.isdigit() for c in value)
        )
    if value.startswith(("$", "%", "{", "(", "@", ":", "`")) or is_monotone(value):
        return False
    if kind == "connection":
        within = _CONNECTION.search(match.string, 0, match.start("v")) is not None
        if any(c.isdigit() for c in value):
            return "(" not in value and (within or not _ITEM.match(value))
        if within:
            return not WORDY.match(value) and entropy_bits(value) >= 2.8
        bare = value.rstrip("):,]")  # `def read(name, pwd=None):`
        return not WORDY.match(bare) and not _IDENTIFIER.match(bare + ";")
    return not WORDY.match(value) and value.count(" ") < 2  # a sentence to the reader is none


_EXAMPLE = re.compile(
    r"(?i)example|x{5,}|\.{3}|your|0123456789|1234567890|abcdefghij|placeholder|dummy|fake|sample|redacted|changeme|test[-_]?token|00000000"
)


def is_example(value: str) -> bool:
    """Whether a value says of itself that it is none."""
    return _EXAMPLE.search(value) is not None
