# ruff: noqa: E501  # a pattern is read whole
r"""Credentials in text: which spans are one, and how far back an unfinished one may reach.

Two kinds of rule. A *token* rule knows a provider's format, which begins with a literal at a word boundary. A *context*
rule knows what stands before a value (`password = "`, `https://user:`, `Authorization: Basic `); its finding is the value
alone, so that text before it may leave a stream at once. Both are bounded, so no input makes them slow.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import hyperscan

from server.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_VALUE_CHARS = 512
MAX_KEY_CHARS = 16_384
MAX_CANDIDATES = 4_000


class TooManyCandidatesError(ValueError):
    """A text names credentials so often that judging them all would take too long; the scan is not finished."""


_EDGE = r"(?<![A-Za-z0-9_])"

# (rule, literals it begins with, rest of the format, entropy floor of the rest in bits a character)
_TOKENS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("aws-access-key-id", ("AKIA", "ASIA", "ABIA", "ACCA"), r"[A-Z2-7]{16}\b", 2.5),
    ("github-token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[A-Za-z0-9]{36,251}", 3.0),
    ("github-fine-grained-token", ("github_pat_",), r"[A-Za-z0-9_]{50,100}", 3.0),
    (
        "gitlab-token",
        ("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glsoat-", "glimt-", "glagent-", "gloas-", "glft-", "glffct-"),
        r"[A-Za-z0-9_.-]{20,64}",
        3.0,
    ),
    ("slack-token", ("xoxb-", "xoxa-", "xoxp-", "xoxr-", "xoxs-", "xoxe-", "xoxe."), r"[A-Za-z0-9.-]{10,250}", 2.5),
    ("slack-app-token", ("xapp-",), r"\d-[A-Z0-9]{8,20}-\d{8,20}-[a-z0-9]{32,128}", 3.0),
    (
        "stripe-key",
        ("sk_live_", "rk_live_", "sk_test_", "rk_test_", "sk_prod_", "rk_prod_"),
        r"[A-Za-z0-9]{16,247}",
        3.0,
    ),
    ("webhook-secret", ("whsec_",), r"[A-Za-z0-9+/=]{24,80}", 3.0),
    ("google-api-key", ("AIza",), r"[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", 3.0),
    ("google-oauth-secret", ("GOCSPX-",), r"[A-Za-z0-9_-]{28}", 3.0),
    ("google-oauth-token", ("ya29.",), r"[A-Za-z0-9_-]{20,300}", 3.0),
    ("anthropic-key", ("sk-ant-",), r"[a-z0-9]{3,10}-[A-Za-z0-9_-]{32,140}", 3.0),
    ("openai-key", ("sk-proj-", "sk-svcacct-", "sk-admin-"), r"[A-Za-z0-9_-]{20,200}", 3.0),
    ("openrouter-key", ("sk-or-v1-",), r"[a-f0-9]{40,64}", 3.0),
    ("openai-style-key", ("sk-",), r"[A-Za-z0-9]{20,64}(?![A-Za-z0-9_-])", 3.4),
    ("huggingface-token", ("hf_", "api_org_"), r"[A-Za-z0-9]{34,40}(?![A-Za-z0-9])", 3.0),
    ("groq-key", ("gsk_",), r"[A-Za-z0-9]{48,60}", 3.0),
    ("replicate-token", ("r8_",), r"[A-Za-z0-9]{37,40}", 3.0),
    ("perplexity-key", ("pplx-",), r"[A-Za-z0-9]{40,60}", 3.0),
    ("xai-key", ("xai-",), r"[A-Za-z0-9]{60,90}", 3.0),
    ("langsmith-key", ("lsv2_pt_", "lsv2_sk_"), r"[a-f0-9]{32}_[a-f0-9]{10}", 3.0),
    ("sendgrid-key", ("SG.",), r"[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}", 3.0),
    ("mailgun-key", ("key-",), r"[a-f0-9]{32}(?![A-Za-z0-9])", 3.0),
    ("twilio-key", ("SK",), r"[a-f0-9]{32}(?![A-Za-z0-9])", 3.0),
    ("npm-token", ("npm_",), r"[A-Za-z0-9]{36}(?![A-Za-z0-9])", 3.0),
    ("pypi-token", ("pypi-",), r"AgE[A-Za-z0-9_-]{40,250}", 3.0),
    ("rubygems-key", ("rubygems_",), r"[a-f0-9]{48}", 3.0),
    ("nuget-key", ("oy2",), r"[a-z0-9]{43}(?![A-Za-z0-9])", 3.0),
    ("crates-token", ("cio",), r"[A-Za-z0-9]{32}(?![A-Za-z0-9])", 3.5),
    ("docker-token", ("dckr_pat_", "dckr_oat_"), r"[A-Za-z0-9_-]{24,40}", 3.0),
    ("digitalocean-token", ("dop_v1_", "doo_v1_", "dor_v1_"), r"[a-f0-9]{64}", 3.0),
    ("databricks-token", ("dapi",), r"[a-f0-9]{32}(?:-\d)?(?![A-Za-z0-9])", 3.0),
    ("shopify-token", ("shpat_", "shpss_", "shpca_", "shppa_"), r"[a-fA-F0-9]{32}", 3.0),
    ("square-token", ("sq0atp-", "sq0csp-", "sq0idp-"), r"[A-Za-z0-9_-]{22,60}", 3.0),
    ("linear-key", ("lin_api_",), r"[A-Za-z0-9]{32,48}", 3.0),
    ("notion-token", ("ntn_",), r"[A-Za-z0-9]{40,50}", 3.0),
    ("notion-secret", ("secret_",), r"[A-Za-z0-9]{43}(?![A-Za-z0-9])", 3.5),
    ("figma-token", ("figd_",), r"[A-Za-z0-9_-]{38,50}", 3.0),
    ("postman-key", ("PMAK-",), r"[a-f0-9]{24}-[a-f0-9]{34}", 3.0),
    ("grafana-token", ("glsa_", "glc_"), r"[A-Za-z0-9_+/=]{32,400}", 3.0),
    ("newrelic-key", ("NRAK-", "NRJS-", "NRII-", "NRAL-"), r"[A-Za-z0-9_-]{19,42}", 3.0),
    ("sentry-token", ("sntrys_", "sntryu_"), r"[A-Za-z0-9_+/=]{40,300}", 3.0),
    ("vault-token", ("hvs.", "hvb.", "hvr."), r"[A-Za-z0-9_-]{24,300}", 3.0),
    ("doppler-token", ("dp.pt.", "dp.st.", "dp.ct.", "dp.sa."), r"[A-Za-z0-9._]{40,64}", 3.0),
    ("pulumi-token", ("pul-",), r"[a-f0-9]{40}", 3.0),
    ("fly-token", ("fo1_",), r"[A-Za-z0-9_-]{43}", 3.0),
    ("supabase-token", ("sbp_", "sb_secret_"), r"[A-Za-z0-9_-]{30,44}", 3.0),
    ("planetscale-token", ("pscale_tkn_", "pscale_pw_", "pscale_oauth_"), r"[A-Za-z0-9=._-]{32,64}", 3.0),
    ("atlassian-token", ("ATATT3", "ATCTT3", "ATBB"), r"[A-Za-z0-9_=-]{24,250}", 3.0),
    ("age-secret-key", ("AGE-SECRET-KEY-1",), r"[QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L]{58}", 3.0),
    ("tailscale-key", ("tskey-",), r"[a-z]{3,12}-[A-Za-z0-9]{8,32}-[A-Za-z0-9]{16,64}", 3.0),
    ("artifactory-key", ("AKCp", "cmVmdGtu"), r"[A-Za-z0-9]{59,73}", 3.0),
    ("dropbox-token", ("sl.",), r"[A-Za-z0-9_-]{60,200}", 3.5),
    ("facebook-token", ("EAACEdEose0cBA", "EAAG", "EAAC"), r"[A-Za-z0-9]{40,250}", 3.5),
    ("square-access-token", ("EAAA",), r"[A-Za-z0-9_-]{60}(?![A-Za-z0-9_-])", 3.5),
    ("typeform-token", ("tfp_",), r"[A-Za-z0-9_.=-]{40,70}", 3.0),
    ("mapbox-secret-token", ("sk.eyJ",), r"[A-Za-z0-9_-]{40,120}\.[A-Za-z0-9_-]{20,40}", 3.0),
    ("buildkite-token", ("bkua_",), r"[a-z0-9]{40}", 3.0),
    ("contentful-token", ("CFPAT-",), r"[A-Za-z0-9_-]{43}", 3.0),
    ("flyio-token", ("FlyV1 fm2_",), r"[A-Za-z0-9+/=]{60,500}", 3.0),
    ("prefect-key", ("pnu_",), r"[a-z0-9]{36}", 3.0),
    ("readme-key", ("rdme_",), r"[a-z0-9]{70}", 3.0),
    ("sonar-token", ("squ_", "sqp_", "sqa_"), r"[a-f0-9]{40}", 3.0),
    ("clickhouse-key", ("4b1d",), r"[A-Za-z0-9]{38}(?![A-Za-z0-9])", 3.5),
    ("alibaba-key-id", ("LTAI",), r"[A-Za-z0-9]{16,24}(?![A-Za-z0-9])", 3.5),
    ("tencent-key-id", ("AKID",), r"[A-Za-z0-9]{32}(?![A-Za-z0-9])", 3.5),
    ("yandex-token", ("t1.9eu", "AQVN"), r"[A-Za-z0-9_-]{35,250}", 3.5),
    ("easypost-key", ("EZAK", "EZTK"), r"[A-Za-z0-9]{54}", 3.0),
    ("adafruit-key", ("aio_",), r"[A-Za-z0-9]{28}", 3.0),
    ("duffel-token", ("duffel_live_", "duffel_test_"), r"[A-Za-z0-9_=-]{43}", 3.0),
    ("frameio-token", ("fio-u-",), r"[A-Za-z0-9_=-]{64}", 3.0),
    ("jwt", ("eyJ",), r"[A-Za-z0-9_-]{8,1024}\.eyJ[A-Za-z0-9_-]{8,4096}\.[A-Za-z0-9_-]{16,1024}", 3.0),
)

# Formats with no literal of their own at the start; the anchor is inside.
_ANCHORED: tuple[tuple[str, str, str], ...] = (
    (
        "slack-webhook",
        "hooks.slack.com",
        r"hooks\.slack\.com/(?:services|workflows|triggers)/(?P<v>[A-Za-z0-9/_-]{30,100})",
    ),
    ("discord-webhook", "/api/webhooks/", r"discord(?:app)?\.com/api/webhooks/\d{5,25}/(?P<v>[A-Za-z0-9_-]{50,90})"),
    ("teams-webhook", "webhook.office.com", r"webhook\.office\.com/webhookb2/(?P<v>[A-Za-z0-9@/-]{60,300})"),
    ("telegram-bot-token", ":AA", r"(?<![0-9A-Za-z])(?P<v>\d{8,10}:AA[A-Za-z0-9_-]{32,34})(?![A-Za-z0-9_-])"),
    (
        "azure-client-secret",
        "8Q~",
        r"(?<![A-Za-z0-9_~.-])(?P<v>[A-Za-z0-9_~.-]{3}[78]Q~[A-Za-z0-9_~.-]{31,34})(?![A-Za-z0-9_~.-])",
    ),
    ("terraform-cloud-token", ".atlasv1.", r"(?<![A-Za-z0-9])(?P<v>[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,80})"),
    ("mailchimp-key", "-us", r"(?<![A-Za-z0-9])(?P<v>[a-f0-9]{32}-us\d{1,2})(?![A-Za-z0-9])"),
    (
        "discord-bot-token",
        ".",
        r"(?<![A-Za-z0-9_.-])(?P<v>[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38})(?![A-Za-z0-9_-])",
    ),
    ("airtable-token", "pat", r"(?<![A-Za-z0-9])(?P<v>pat[A-Za-z0-9]{14}\.[a-f0-9]{64})"),
    ("braintree-token", "access_token$", r"(?P<v>access_token\$(?:production|sandbox)\$[a-z0-9]{16}\$[a-f0-9]{32})"),
    ("azure-sas", "sig=", r"[?&;]sig=(?P<v>[A-Za-z0-9%+/=]{40,80})"),
)

_NAME = re.compile(
    r"(?i)passw(?:or)?d|passwd|passphrase|passcode|pass_?wd|pwd|secret|token|api[_.-]?key|access[_.-]?key|auth[_.-]?key|"
    r"(?:private|encryption|signing|secret|master|account|shared|service|client|license|storage|webhook|app|hmac|aes|jwt|crypto?|"
    r"session|subscription|deploy|database|db|cipher|admin|integration|ingest)[_.-]?key|"
    r"credentials?|auth[_.-]?code|_pass|pass_|bearer|_pw|pin_?code|seed_?phrase|mnemonic|auth|"
    r"(?<![a-z])(?:pass|pw|pin|key)(?![a-z])"
)
_NAME_WORDS = (
    "pass",
    "pwd",
    "secret",
    "token",
    "key",
    "credential",
    "auth",
    "bearer",
    "_pw",
    "pin",
    "seed",
    "mnemonic",
    "pw",
)
_KEY_TAIL = re.compile(r"[A-Za-z0-9_-]{0,24}")
_KEY_HEAD = re.compile(r"[A-Za-z0-9_.$-]{0,48}\Z")


@dataclass(frozen=True, slots=True)
class _Context:
    """What stands before a value, and which characters the value has; a value is live until a character outside.

    `needs` are lower-case words of which a line must hold one for the rule to be tried at all.
    """

    rule: str
    needs: tuple[str, ...]
    before: str
    chars: str
    min_chars: int
    kind: str


_TYPE = r"(?::\s{0,4}(?:&'?\w{0,8}\s?)?(?:str|string|String|SecretStr|Final)(?:\[str\])?\s{0,4})?"
_SEP = r"[\"'`]?\]?\s{0,8}" + _TYPE + r"(?:=>|:=|\|\|=|\?\?=|[:=])\s{0,8}"
# What stands between the end of a key's name and its value; (needed before the key, separator, value characters, minimum, kind).
_AFTER_NAME: tuple[tuple[str | None, str, str, int, str], ...] = (
    (None, _SEP + r"(?:[A-Za-z]{0,3}|[A-Za-z_.]{0,24}\()\"", r"[^\"\n\r]", 4, "named"),
    (None, _SEP + r"(?:[A-Za-z]{0,3}|[A-Za-z_.]{0,24}\()'", r"[^'\n\r]", 4, "named"),
    (None, _SEP + r"(?:\[\]byte\(|String\.raw)?`", r"[^`\n\r]", 4, "named"),
    (None, r"(?:\[\w{0,8}\]|\[\])\s{0,4}=\s{0,4}\"", r"[^\"\n\r]", 4, "named"),  # C: char password[] = "..."
    (None, r"[\"']\s{0,2},\s{0,4}[\"']", r"[^\"'\n\r]", 6, "named"),  # getenv("X_TOKEN", "...")
    (None, r"[\"']\s{0,2}\)?\s{0,3}(?:\|\||\?\?|or)\s{0,3}[\"']", r"[^\"'\n\r]", 6, "named"),
    (None, r"[\"']?\]?\)?\s{0,3}(?:\|\||\?\?|===?|!==?)\s{0,3}[\"']", r"[^\"'\n\r]", 6, "named"),
    (None, r"\)?\.equals\(\s{0,2}\"", r"[^\"\n\r]", 6, "named"),
    (
        r"(?:#define|\bset|\bsetx|\bENV|\bARG|define\([\"'])\s{0,6}\Z",
        r"[\"']?[ \t]{0,4},?[ \t]{1,8}[\"']?",
        r"[^\"'\s);]",
        6,
        "named",
    ),
    (None, r"\s{0,4}(?:[=:]|\?=|\+=)[ \t]{0,4}", r"[^\s\"'`,;<>{}()\[\]&]", 6, "bare"),
)

_CONTEXTS: tuple[_Context, ...] = (
    _Context(
        "url-credential", ("://",), r"[A-Za-z][A-Za-z0-9+.-]{1,24}://[^\s:@/\"'<>]{0,64}:", r"[^\s@\"'<>/]", 3, "url"
    ),
    _Context(
        "url-credential", ("jdbc:",), r"(?i:jdbc:[a-z0-9:]{2,30}:thin:)[^\s:@/\"'<>]{1,64}/", r"[^\s@\"'<>/]", 3, "url"
    ),
    _Context(
        "basic-auth-header",
        ("basic",),
        r"(?i:(?:authorization[\"']?\s{0,3}[:=,]\s{0,3}[\"'`]?|[\"'`])basic\s{1,3})",
        r"[A-Za-z0-9+/=]",
        12,
        "opaque",
    ),
    _Context(
        "bearer-header",
        ("authorization", "bearer", "x-api-key", "x-auth"),
        r"(?i:authorization[\"']?\s{0,3}[:=,]\s{0,3}[\"'`]?(?:bearer|token|apikey)\s{1,3}|[\"'`]bearer\s{1,2}|x-(?:api-key|auth-token)\s{0,2}:\s{0,3})",
        r"[A-Za-z0-9._~+/=-]",
        16,
        "opaque",
    ),
    _Context(
        "command-line-password",
        ("mysql", "mariadb"),
        r"\b(?:mysql|mysqldump|mysqladmin|mariadb)\b[^\n|;]{0,120}\s-p",
        r"[^\s\"'$|;<>]",
        4,
        "password",
    ),
    _Context(
        "command-line-password",
        ("sshpass", "smbclient", "7z", "zip", "ldap", "redis-cli", "sqlcmd", "htpasswd"),
        r"\b(?:sshpass|smbclient|7z|zip|ldapsearch|ldapadd|redis-cli|sqlcmd)\b[^\n|;]{0,120}\s-[pPwWa]\s?[\"']?",
        r"[^\s\"'$|;<>]",
        4,
        "password",
    ),
    _Context(
        "command-line-password",
        ("-pass", "-token", "-secret", "-api-key", "-client-secret"),
        r"\s--?(?:password|passwd|pass|token|secret|api-key|passphrase|client-secret)[ =][\"']?",
        r"[^\s\"'`$|;<>{(]",
        6,
        "password",
    ),
    _Context(
        "command-line-password",
        ("curl", "wget", "http"),
        r"\b(?:curl|wget|https?)\b[^\n|;]{0,200}\s(?:-u|--user|-a)[ =]?[\"']?[^\s:\"'$]{1,64}:",
        r"[^\s\"'$|;<>@]",
        4,
        "password",
    ),
    _Context(
        "sql-password",
        ("identified",),
        r"(?i:identified\s{1,3}(?:with\s\S{1,40}\s)?by\s{1,3}(?:password\s{1,3})?[\"'])",
        r"[^\"'\n\r]",
        4,
        "password",
    ),
    _Context("sql-password", ("password",), r"(?i:\bpassword\s{0,3}=?\s{1,3}N?')", r"[^'\n\r]", 4, "password"),
    _Context(
        "netrc-password",
        ("machine", "login"),
        r"\b(?:machine\s{1,3}\S{1,100}\s{1,8})?login\s{1,3}\S{1,64}\s{1,8}password\s{1,3}",
        r"[^\s]",
        4,
        "password",
    ),
    _Context(
        "connection-string",
        ("password", "pwd", "accountkey", "sharedaccess", "sharedsecret"),
        r"(?i:(?:^|[;\"'\s?&])(?:password|pwd|accountkey|sharedaccesskey|sharedsecretvalue)\s{0,2}=\s{0,2})",
        r"[^;\"'\n\r\s<>{}&]",
        4,
        "connection",
    ),
    _Context(
        "npm-auth-token",
        ("_auth", "_password"),
        r"(?:^|[\s:/])_(?:authToken|auth|password)\s{0,2}=\s{0,2}[\"']?",
        r"[^\s\"'$]",
        8,
        "opaque",
    ),
    _Context("docker-auth", ('"auth"',), r"\"auth\"\s{0,3}:\s{0,3}\"", r"[A-Za-z0-9+/=]", 12, "opaque"),
    _Context(
        "wireguard-key",
        ("privatekey", "presharedkey"),
        r"(?i:\bP(?:rivate|reshared)Key\s{0,3}=\s{0,3})",
        r"[A-Za-z0-9+/=]",
        43,
        "opaque",
    ),
    _Context(
        "login-call",
        (
            "login(",
            "authenticate(",
            "connect(",
            "basicauth(",
            "basic_auth(",
            "credentials(",
            "authentication(",
            "getconnection(",
            "auth=(",
        ),
        r"(?:\.login|\.authenticate|\.connect|auth=|HTTPBasicAuth|BasicAuth|basic_auth|SetBasicAuth|UsernamePasswordCredentials|"
        r"PasswordAuthentication|getConnection|Credentials)\s{0,2}\(\s{0,4}[^()\n]{0,120}?[\"'][^\"'\n]{0,80}[\"']\s{0,2},\s{0,4}[\"']",
        r"[^\"'\n\r]",
        6,
        "login",
    ),
)

_PEM_BEGIN = "-----BEGIN "
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:\s{0,4}(?:Proc-Type|DEK-Info|Version|Comment|Hash):[^\r\n]{0,100}){0,4}"
    r"(?P<b>[^-`]{32,16384})(?:-----END [A-Z0-9 ]{0,40}-----)?"
)

_PLACEHOLDER = re.compile(
    r"(?i)example|changeme|change[-_ ]me|your[-_ a-z]|yours?$|x{4,}|<[^>]*>|^\$|\$\{|\$\(|\{\{|%\(|%[sd]\b|placeholder|dummy|"
    r"\bfake|sample|redact|\*{3,}|\.{3,}|…|\btodo\b|insert[-_ ]|replace[-_ ]|^none$|^null$|^nil$|^undefined$|^true$|^false$|"
    r"^(?:my|the|a|some|test|demo|new|old|user|db|app|default|root)?[-_ ]?(?:pass(?:word|wd|phrase)?|secret|token|api[-_ ]?key|key|credentials?)$|"
    r"^env[.:(]|process\.env|os\.(?:environ|getenv)|getenv|^vault:|^secret(?:s|manager)?[:/]|^arn:|^ref\+|^op://|^file:|^/run/secrets|^@|"
    r"0123456789|1234567890|abcdefghij|deadbeef|not[-_ ]?(?:a[-_ ])?(?:real|secret|set)|"
    r"^#\{|^\{[a-z_.()]+\}$|\$\{\{|^var\.|^local\.|^data\.|^module\.|^!|^&|^\(|^\[|notasecret|no[-_]?password|\bmock"
)
_KNOWN_PUBLIC = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkw",  # the example on every JWT page
    "4eC39HqLyjWDarjtT1zdp7dc",  # Stripe's documented test key
)
_KEY_NOT_SECRET = re.compile(
    r"(?i)(?:name|field|header|url|uri|path|file|filename|dir|_id|Id|env|_?var|type|len|length|size|ttl|expiry|expires?|"
    r"expiration|hash|hashed|digest|regex|pattern|label|placeholder|prompt|msg|message|hint|policy|arn|ref|version|count|limit|"
    r"endpoint|column|class|format|prefix|suffix|algorithm|alg|mode|provider|manager|store|scope|scopes|issuer|audience|method|"
    r"strategy|title|description|text|error|status|state|rule|rules|min|max|public|enabled|required|index|parameter|param|"
    r"location|config|source|lifetime|age|template|view|form|input|element|selector|icon|button|link|_at|At|kind|role|"
    r"encoder|hasher|service|helper|handler|validator|callback|bucket|topic|table|tokens|tokenizer|ization)$|"
    r"^(?:pad|eos|bos|unk|mask|sep|cls|csrf|next|page|continuation|cancel(?:lation)?|num|max|min|total|public|is|has|no|"
    r"require|require[sd]|forgot|reset|change|show|toggle|hide|update|validate|verify|invalid|missing|wrong|bad)[_-]?"
    r"(?:.*)?(?:token|password|key|secret|credentials?)s?$|public[_.-]?key|author|authority|authenticated|authentication$"
)
_PASSWORD_NAME = re.compile(r"(?i)pass|pwd|_pw$|^pw|pin_?code|mnemonic|seed")
_WORDY = re.compile(
    r"^[a-z]+(?:[_.\-/ :][a-z]+)*$|^[A-Z][a-z]+(?: [A-Za-z][a-z]*)*[.!?:]?$|^[A-Z]+(?:[_\-][A-Z]+)*$|^(?:[A-Z][a-z]+-)*[A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]+)*$"
)
_IDENTIFIER = re.compile(r"^[A-Za-z_$][\w$]*(?:(?:\.|->|::)[A-Za-z_$][\w$]*)*(?:\(|\[|;|,|$)")
_HASHES = re.compile(
    r"^\$(?:2[abxy]?|1|5|6|argon2\w*|apr1|pbkdf2[\w-]*|scrypt|y)\$|^\{(?:SSHA|SHA|bcrypt|noop)\}|^pbkdf2_sha256\$|^pbkdf2:|^scrypt:|^sha(?:256|512)[:-]"
)
_URLISH = re.compile(r"^(?:[a-z][a-z0-9+.-]*://|/|\./|\.\./|~/|[A-Z]:\\)")


def entropy_bits(value: str) -> float:
    """Return Shannon's entropy of the characters of `value`, in bits a character."""
    total = len(value)
    return -sum(n / total * math.log2(n / total) for n in Counter(value).values()) if total else 0.0


@lru_cache(maxsize=1)
def _compiled() -> tuple[
    list[tuple[str, tuple[str, ...], re.Pattern[str], float]], list[tuple[str, str, re.Pattern[str]]]
]:
    tokens = [
        (rule, literals, re.compile(_EDGE + "(?:" + "|".join(map(re.escape, literals)) + ")(?P<v>" + rest + ")"), floor)
        for rule, literals, rest, floor in _TOKENS
    ]
    anchored = [(rule, literal, re.compile(pattern)) for rule, literal, pattern in _ANCHORED]
    return tokens, anchored


@lru_cache(maxsize=1024)
def _rules_of(word: str) -> tuple[int, ...]:
    """Which token rules a literal may begin."""
    return tuple(number for number, (_, literals, _, _) in enumerate(_compiled()[0]) if word in literals)


def _pattern(before: str, chars: str, minimum: int, *, live: bool) -> re.Pattern[str]:
    quantity = f"{{1,{MAX_VALUE_CHARS}}}\\Z" if live else f"{{{minimum},{MAX_VALUE_CHARS}}}"
    return re.compile(f"(?:{before})(?P<v>{chars}{quantity})")


_CONTEXT_RULES = [
    (c, _pattern(c.before, c.chars, c.min_chars, live=False), _pattern(c.before, c.chars, 1, live=True))
    for c in _CONTEXTS
]
_NAMED_RULES = [
    (
        re.compile(head) if head else None,
        _pattern(sep, chars, minimum, live=False),
        _pattern(sep, chars, 1, live=True),
        kind,
    )
    for head, sep, chars, minimum, kind in _AFTER_NAME
]
_LINE_WORDS = tuple(sorted({w for c in _CONTEXTS for w in c.needs} | set(_NAME_WORDS)))


def has_context(line: str) -> bool:
    """Whether `line` holds a word without which no context rule matches; a cheap first look."""
    return not _words().found(line).isdisjoint(_LINE_WORDS)


class _Words:
    """Finds which of many words a text holds in one pass: Hyperscan, for a search each costs a rule's time or more."""

    def __init__(self, exact: tuple[str, ...], caseless: tuple[str, ...]) -> None:
        self._words = (*exact, *caseless)
        flags = [hyperscan.HS_FLAG_SINGLEMATCH] * len(exact)
        flags += [hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_CASELESS] * len(caseless)
        self._database = hyperscan.Database()
        self._database.compile(
            expressions=[re.escape(word).encode() for word in self._words],
            ids=list(range(len(self._words))),
            flags=flags,
        )
        self._scratch = threading.local()  # one scan at a time may use a scratch space

    def found(self, text: str) -> set[str]:
        """Return the words that stand in `text`."""
        scratch = getattr(self._scratch, "value", None)
        if scratch is None:
            scratch = self._scratch.value = hyperscan.Scratch(self._database)
        found: set[str] = set()
        words = self._words

        def on_match(index: int, _start: int, _end: int, _flags: int, _context: object) -> None:
            found.add(words[index])

        self._database.scan(text.encode("utf-8", "surrogatepass"), match_event_handler=on_match, scratch=scratch)
        return found


@lru_cache(maxsize=1)
def _words() -> _Words:
    exact = {*_LITERALS, *(literal for _, literal, _ in _compiled()[1]), _PEM_BEGIN}
    return _Words(tuple(sorted(exact)), _LINE_WORDS)


def _contexts(line: str, *, live: bool) -> Iterator[tuple[str, str, re.Match[str], str]]:
    """Yield (rule, kind, match, key) of every context in one line; `live` asks for values that touch its end."""
    low = line.lower()
    for context, full, open_ended in _CONTEXT_RULES:
        if any(word in low for word in context.needs):
            for match in (open_ended if live else full).finditer(line):
                yield context.rule, context.kind, match, ""
    if not any(word in low for word in _NAME_WORDS):
        return
    seen = -1
    for number, name in enumerate(_NAME.finditer(line)):
        if number > MAX_CANDIDATES:
            raise TooManyCandidatesError
        key_end = _KEY_TAIL.match(line, name.end()).end()  # type: ignore[union-attr]  # matches the empty string
        if key_end == seen:
            continue
        seen = key_end
        key_start = _KEY_HEAD.search(line[max(0, name.start() - 48) : name.start()])  # the whole word before
        head_chars = len(key_start[0]) if key_start else 0
        start = name.start() - head_chars
        for head, full, open_ended, kind in _NAMED_RULES:
            if head is None or head.search(line[max(0, start - 24) : start]):
                found = (open_ended if live else full).match(line, key_end)
                if found:
                    yield "hardcoded-credential", kind, found, line[start:key_end]


_NEWLINE = re.compile(r"[\r\n]")
_LITERALS = tuple(sorted({literal for _, literals, _, _ in _TOKENS for literal in literals}))
TOKEN_PREFIXES = frozenset(literal[:n] for literal in _LITERALS for n in range(1, len(literal) + 1))
_LITERAL_AT_EDGE = re.compile(_EDGE + "(?:" + "|".join(map(re.escape, _LITERALS)) + ")")
_PEM_HEAD = re.compile(r"-{5}[A-Z0-9 ]{0,60}-{0,5}")
_PEM_HEADER = re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
# A run is tried where it can begin and nowhere inside, or a long one would cost its length squared.
_RUN = re.compile(r"(?<![^\s\"'`<>()\[\]{},])[^\s\"'`<>()\[\]{},]*+\Z")
_LAST_PIECE = re.compile(r"(?<![A-Za-z0-9_.\-])[A-Za-z0-9_.\-]*+\Z")
_ODD_RUN = re.compile(r"\d{8,10}:|[A-Za-z0-9_~.-]{12}|hooks|discord|webhook|office|sig|access|pat|8Q|7Q|\$")


def _is_public(value: str) -> bool:
    return any(known in value for known in _KNOWN_PUBLIC)


def _is_monotone(value: str) -> bool:
    """Whether few characters make up the whole (`aaaa`, `ababab`, `000000`)."""
    return len(set(value)) <= max(3, len(value) // 12)


def _is_named_secret(key: str, value: str, *, quoted: bool) -> bool:
    """Judge `key = value`: the name promises a secret, the value must look like one and not like a reference."""
    value = value.strip()
    if len(value) < (4 if quoted else 6) or _KEY_NOT_SECRET.search(key) or _PLACEHOLDER.search(value):
        return False
    if _HASHES.match(value) or _URLISH.match(value) or _is_public(value) or (_is_monotone(value) and len(value) > 5):
        return False
    has_digit = any(c.isdigit() for c in value)
    if not quoted and _IDENTIFIER.match(value) and not (has_digit and len(value) >= 12 and entropy_bits(value) >= 3.0):
        return False  # an unquoted name or a call: code reads the secret from somewhere
    if not quoted and ("$" in value[:2] or "(" in value or value.endswith((":", "\\n"))):
        return False
    if _PASSWORD_NAME.search(key):
        if " " in value:
            return "phrase" in key.lower() or "mnemonic" in key.lower() or "seed" in key.lower()
        if "{" in value or "%" in value[:1]:
            return False
        if _WORDY.match(value) or value.isdigit():
            return value.count("-") >= 3 and len(value) >= 16
        return len(value) >= 6 or has_digit
    if " " in value or _WORDY.match(value) or "{" in value:
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


def _is_context_secret(kind: str, match: re.Match[str], key: str) -> bool:
    value = match["v"]
    if kind == "named":
        return _is_named_secret(key, value, quoted=True)
    if kind == "bare":
        return _is_named_secret(key, value, quoted=False)
    if _PLACEHOLDER.search(value) or _HASHES.match(value):
        return False
    if kind == "url":
        end = match.end("v")
        if match.string[end : end + 1] != "@" or "{" in value or "$" in value[:1] or value.isupper():
            return False
        return not re.fullmatch(r"(?i)pass(?:word|wd)?|pw|secret|token|x+|user|\d{1,5}", value)
    if kind == "opaque":
        return (
            not _is_monotone(value)
            and entropy_bits(value) >= (2.5 if len(value) < 24 else 3.0)
            and not _is_public(value)
        )
    if kind == "login":
        return (
            not _WORDY.match(value)
            and " " not in value
            and not _URLISH.match(value)
            and any(c.isdigit() for c in value)
        )
    if value.startswith(("$", "%", "{", "(", "@", ":")) or _is_monotone(value):
        return False
    if kind == "connection":
        if any(c.isdigit() for c in value):
            return "(" not in value
        return not _WORDY.match(value) and not _IDENTIFIER.match(value + ";")
    return not _WORDY.match(value)


def _finding(rule: str, start: int, end: int, message: str) -> Finding:
    return Finding(
        rule=rule,
        category="secret",
        severity="high",
        message=message,
        start=start,
        end=end,
        cwe="CWE-798",
        fix="Read the value from the environment or a secret store at run time, and rotate the one that was noted.",
    )


def _spans(text: str) -> Iterator[Finding]:
    tokens, anchored = _compiled()
    words = _words().found(text)
    if not words:
        return
    for number in sorted({number for word in words for number in _rules_of(word)}):
        rule, _, pattern, floor = tokens[number]
        for match in pattern.finditer(text):
            value = match["v"]
            if (
                entropy_bits(value) >= floor
                and not _is_monotone(value)
                and not _is_public(match[0])
                and not _is_example(match[0])
            ):
                yield _finding(
                    rule, match.start(), match.end(), f"A credential in the format of {rule} is written in the text."
                )
    for rule, literal, pattern in anchored:
        if literal not in words:
            continue
        for match in pattern.finditer(text):
            if not _is_example(match["v"]) and entropy_bits(match["v"]) >= 3.0:
                yield _finding(
                    rule,
                    match.start("v"),
                    match.end("v"),
                    f"A credential in the format of {rule} is written in the text.",
                )
    if _PEM_BEGIN in words:
        for match in _PEM.finditer(text):
            compact = "".join(match["b"].split())
            if len(compact) >= 32 and not _is_monotone(compact) and not _KEY_ELIDED.search(match["b"]):
                yield _finding("private-key", match.start(), match.end(), "A private key is written in the text.")
    if not words.isdisjoint(_LINE_WORDS):
        for start, line in _lines(text):
            if has_context(line):
                for rule, kind, match, key in _contexts(line, live=False):
                    if _is_context_secret(kind, match, key):
                        yield _finding(
                            rule,
                            start + match.start("v"),
                            start + match.end("v"),
                            "A credential is written in the text.",
                        )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for end in _NEWLINE.finditer(text):
        yield start, text[start : end.start()]
        start = end.end()
    yield start, text[start:]


_KEY_ELIDED = re.compile(r"\.\.\.|<|…|\{|(?i:your|redacted|example)")
_EXAMPLE = re.compile(
    r"(?i)example|x{5,}|\.{3}|your|0123456789|1234567890|abcdefghij|placeholder|dummy|fake|sample|redacted|changeme|test[-_]?token|00000000"
)


def _is_example(value: str) -> bool:
    return _EXAMPLE.search(value) is not None


def find_secrets(text: str) -> list[Finding]:
    """Return the credentials in `text`, first to last, without overlaps (the earliest, then the longest, wins)."""
    found: list[Finding] = []
    for finding in sorted(_spans(text), key=lambda f: (f.start, -f.end)):
        if not found or finding.start >= found[-1].end:
            found.append(finding)
    return found


def without_secrets(text: str) -> str:
    """Return `text` with a note in place of each credential; what the audit room keeps of a text."""
    pieces, at = [], 0
    for finding in find_secrets(text):
        pieces += [text[at : finding.start], f"[removed: {finding.rule}]"]
        at = finding.end
    return "".join([*pieces, text[at:]])


def live_from(line: str) -> int:
    """Return where in `line` (the unfinished end of a text, without a newline) a secret may be under way.

    Whatever follows, no finding of `find_secrets` that reaches past the end of `line` begins before this place; it is
    `len(line)` where none can be under way. A private key spans lines: its caller holds it from `private_key_start` on.
    """
    live = _run_start(line)
    dashes = len(line.rstrip("-"))
    if dashes < len(line):
        live = min(live, dashes)
    begin = line.rfind("-----")
    if begin >= 0 and _PEM_HEAD.fullmatch(line, begin):
        live = min(live, begin)
    if has_context(line):
        for _, _, match, _ in _contexts(line, live=True):
            live = min(live, match.start("v"))
    return live


def _run_start(line: str) -> int:
    match = _RUN.search(line)
    run = match[0] if match else ""
    if match is None or not run:
        return len(line)
    piece = _LAST_PIECE.search(run)
    partial = piece is not None and piece[0] != "" and piece[0].lstrip("-.") in TOKEN_PREFIXES
    return match.start() if partial or _LITERAL_AT_EDGE.search(run) or _ODD_RUN.search(run) else len(line)


def private_key_start(text: str) -> int | None:
    """Return where a private key begins in `text` that has not ended yet, or None."""
    start = text.rfind(_PEM_BEGIN)
    if start < 0 or len(text) - start > MAX_KEY_CHARS + 512:
        return None
    head = _PEM_HEADER.match(text, start)
    if head is None:
        return None
    rest = text[head.end() :]
    return (
        None
        if ("-----END" in rest and rest.rstrip().endswith("-") and rest.count("-----") >= 2) or "`" in rest
        else start
    )
