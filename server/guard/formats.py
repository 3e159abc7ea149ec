# ruff: noqa: E501  # a pattern is read whole
"""What credentials look like: the formats of providers, and what stands before a value that is one. Data only."""

from __future__ import annotations

import re
from dataclasses import dataclass

EDGE = r"(?<![A-Za-z0-9_])"

# (rule, literals it begins with, rest of the format, entropy floor of the rest in bits a character)
TOKENS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("aws-access-key-id", ("AKIA", "ASIA", "ABIA", "ACCA"), r"[A-Z2-7]{16}\b", 2.5),
    ("github-token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[A-Za-z0-9]{36,251}", 3.0),
    ("github-fine-grained-token", ("github_pat_",), r"[A-Za-z0-9_]{50,100}", 3.0),
    (
        "gitlab-token",
        ("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glsoat-", "glimt-", "glagent-", "gloas-", "glft-", "glffct-"),
        r"[A-Za-z0-9_.-]{20,64}",
        3.0,
    ),
    ("gitlab-runner-token", ("GR1348941",), r"[A-Za-z0-9_-]{20}", 3.0),
    ("dynatrace-token", ("dt0c01.", "dt0s01.", "dt0s16."), r"[A-Z0-9]{24}\.[A-Z0-9]{64}", 3.0),
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
    ("flyio-token", ("fm2_",), r"[A-Za-z0-9+/=]{60,500}", 3.0),
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
    ("jwt", ("eyJ",), r"[A-Za-z0-9_-]{8,1024}\.[A-Za-z0-9_-]{16,4096}\.[A-Za-z0-9_-]{16,1024}", 3.0),
)

# Formats with no literal of their own at the start; the anchor is inside.
ANCHORED: tuple[tuple[str, str, str], ...] = (
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
        r"(?<![A-Za-z0-9_~.-])[A-Za-z0-9_~.-]{3}(?P<v>[78]Q~[A-Za-z0-9_~.-]{31,34})(?![A-Za-z0-9_~.-])",
    ),
    ("terraform-cloud-token", ".atlasv1.", r"(?<![A-Za-z0-9])[A-Za-z0-9]{14}(?P<v>\.atlasv1\.[A-Za-z0-9_=-]{60,80})"),
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

NAME = re.compile(
    r"(?i)passw(?:or)?d|passwd|passphrase|passcode|pass_?wd|pwd|secret|token|api[_.-]?key|access[_.-]?key|auth[_.-]?key|"
    r"(?:private|encryption|signing|secret|master|account|shared|service|client|license|storage|webhook|app|hmac|aes|jwt|crypto?|"
    r"session|subscription|deploy|database|db|cipher|admin|integration|ingest)[_.-]?key|"
    r"credentials?|auth[_.-]?code|_pass|pass_|bearer|_pw|pin_?code|seed_?phrase|mnemonic|auth|"
    r"(?<![a-z])(?:pass|pw|pin|key)(?![a-z])"
)
NAME_WORDS = (
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
KEY_TAIL = re.compile(r"[A-Za-z0-9_-]{0,24}")
KEY_HEAD = re.compile(r"[A-Za-z0-9_.$-]{0,48}\Z")


@dataclass(frozen=True, slots=True)
class Context:
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
AFTER_NAME: tuple[tuple[str | None, str, str, int, str], ...] = (
    (None, _SEP + r"(?:[A-Za-z]{0,3}|(?:\[\])?[A-Za-z_.]{0,24}\()\"", r"[^\"\n\r]", 4, "named"),
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

CONTEXTS: tuple[Context, ...] = (
    Context(
        "hardcoded-credential", ("keyspec",), r"\b(?:SecretKey|PBEKey|DESKey)Spec\(\s{0,4}\"", r"[^\"\n\r]", 4, "opaque"
    ),
    Context(
        "url-credential", ("://",), r"[A-Za-z][A-Za-z0-9+.-]{1,24}://[^\s:@/\"'<>]{0,64}:", r"[^\s@\"'<>/]", 3, "url"
    ),
    Context(
        "url-credential", ("jdbc:",), r"(?i:jdbc:[a-z0-9:]{2,30}:thin:)[^\s:@/\"'<>]{1,64}/", r"[^\s@\"'<>/]", 3, "url"
    ),
    Context(
        "basic-auth-header",
        ("basic",),
        r"(?i:(?:authorization[\"']?\s{0,3}[:=,]\s{0,3}[\"'`]?|[\"'`])basic\s{1,3})",
        r"[A-Za-z0-9+/=]",
        12,
        "basic",
    ),
    Context(
        "bearer-header",
        ("authorization", "bearer", "x-api-key", "x-auth"),
        r"(?i:authorization[\"']?\s{0,3}[:=,]\s{0,3}[\"'`]?(?:bearer|token|apikey)\s{1,3}|[\"'`]bearer\s{1,2}|x-(?:api-key|auth-token)\s{0,2}:\s{0,3})",
        r"[A-Za-z0-9._~+/=-]",
        16,
        "opaque",
    ),
    Context(
        "setter-password",
        ("password(", "secret(", "apikey(", "token(", "secretkey(", "accesskey(", "passphrase("),
        r"(?i:\.(?:set|with)?_?(?:password|secret|api_?key|access_?token|secret_?key|access_?key|passphrase)\(\s{0,2}[\"'])",
        r"[^\"'\n\r]",
        6,
        "login",
    ),
    Context(
        "jwt-secret",
        ("jwt.", "jsonwebtoken."),
        r"\b(?:jwt|jsonwebtoken|jose)\.(?:encode|decode|sign|verify)\([^()\n]{0,160}?,\s{0,3}[\"']",
        r"[^\"'\n\r]",
        10,
        "login",
    ),
    Context(
        "azure-storage-key",
        ("core.windows.net", "azure", "cosmos"),
        r"(?i:(?:core\.windows\.net|azure|cosmos)[^\n]{0,120}?[\"'=])",
        r"[A-Za-z0-9+/=]",
        86,
        "opaque",
    ),
    Context(
        "command-line-password",
        ("--from-literal", " -e ", "--env", "--build-arg", "--set"),
        r"(?i:\s(?:--from-literal|-e|--env|--build-arg|--set)[ =][\"']?[\w.-]{0,40}(?:password|passwd|secret|token|api_?key|access_?key)[\w.-]{0,8}=)",
        r"[^\s\"'`$|;<>{(]",
        6,
        "login",
    ),
    Context(
        "bearer-header",
        ("bearer", "ssws"),
        r"(?i:(?:^|[\s:,(])(?:bearer|ssws)\s{1,2})",
        r"[A-Za-z0-9._~+/=-]",
        24,
        "login",
    ),
    Context(
        "xml-password",
        ("password>", "passwd>", "pwd>", "secret>", "apikey>", "token>"),
        r"(?i:<\w{0,24}(?:password|passwd|pwd|secret|apikey|token)>)(?![\s(&*])",  # `vector<Token> all;` is a type
        r"[^<>\n\r]",
        4,
        "password",
    ),
    Context(
        "xml-password",
        ("value=",),
        r"(?i:\b(?:key|name)=\"[^\"\n]{0,40}(?:password|passwd|pwd|secret|apikey|token)\"\s{1,4}value=\")",
        r"[^\"\n\r]",
        4,
        "password",
    ),
    Context(
        "command-line-password",
        ("mysql", "mariadb"),
        r"\b(?:mysql|mysqldump|mysqladmin|mariadb)\b[^\n|;]{0,120}\s-p",
        r"[^\s\"'|;<>]",
        4,
        "password",
    ),
    Context(
        "command-line-password",
        ("sshpass", "smbclient", "7z", "zip", "ldap", "redis-cli", "sqlcmd", "htpasswd"),
        r"\b(?:sshpass|smbclient|7z|zip|ldapsearch|ldapadd|redis-cli|sqlcmd)\b[^\n|;]{0,120}\s-[pPwWa]\s?[\"']?",
        r"[^\s\"'$|;<>]",
        4,
        "password",
    ),
    Context(
        "command-line-password",
        ("-pass", "-token", "-secret", "-api-key", "-client-secret"),
        r"\s--?(?:password|passwd|pass|token|secret(?![ =][\"']?[a-z]{1,40}(?:[/-](?:[a-z]{1,40}\d{0,2}|v?\d{1,4})){1,8}(?:[\s:\"',]|$))|api-key|passphrase|client-secret)[ =][\"']?(?!(?:id|type|src|source|env|target)=)",  # a build's `--secret id=`
        r"[^\s\"'`$|;<>{(]",
        6,
        "password",
    ),
    Context(
        "command-line-password",
        ("curl", "wget", "http"),
        r"\b(?:curl|wget|https?)\b[^\n|;]{0,200}\s(?:-u|--user|-a)[ =]?[\"']?[^\s:\"'$]{1,64}:",
        r"[^\s\"'$|;<>@]",
        4,
        "password",
    ),
    Context(
        "sql-password",
        ("identified",),
        r"(?i:identified\s{1,3}(?:with\s\S{1,40}\s)?by\s{1,3}(?:password\s{1,3})?[\"'])",
        r"[^\"'\n\r]",
        4,
        "password",
    ),
    Context("sql-password", ("password",), r"(?i:\bpassword\s{0,3}=?\s{1,3}N?')", r"[^'\n\r]", 4, "password"),
    Context(
        "netrc-password",
        ("machine", "login"),
        r"\b(?:machine\s{1,3}\S{1,100}\s{1,8})?login\s{1,3}\S{1,64}\s{1,8}password\s{1,3}",
        r"[^\s]",
        4,
        "password",
    ),
    Context(
        "connection-string",
        ("password", "pwd", "accountkey", "sharedaccess", "sharedsecret"),
        r"(?i:(?:^|[;\"'\s?&])(?:password|pwd|accountkey|sharedaccesskey|sharedsecretvalue)\s{0,2}=\s{0,2})",
        r"[^;\"'\n\r\s<>{}&]",
        4,
        "connection",
    ),
    Context(
        "npm-auth-token",
        ("_auth", "_password"),
        r"(?:^|[\s:/])_(?:authToken|auth|password)\s{0,2}=\s{0,2}[\"']?",
        r"[^\s\"'$]",
        8,
        "opaque",
    ),
    Context("docker-auth", ('"auth"',), r"\"auth\"\s{0,3}:\s{0,3}\"", r"[A-Za-z0-9+/=]", 12, "opaque"),
    Context(
        "wireguard-key",
        ("privatekey", "presharedkey"),
        r"(?i:\bP(?:rivate|reshared)Key\s{0,3}=\s{0,3})",
        r"[A-Za-z0-9+/=]",
        43,
        "opaque",
    ),
    Context(
        "spoken-password",
        ("passw", "passphrase", "passcode", "pwd ", "pw "),
        r"(?i:\b(?:passwor[dt]|passwd|passphrase|passcode|pwd|pw)(?:\s{1,2}(?:for|of|on|to)(?:\s{1,2}[\w.@/-]{1,40}){1,3}?)?"
        r"\s{1,2}(?:is|was|ist|to|remains)(?:\s{1,2}(?:now|still|set to|just|currently))?:?\s{1,2}[`*]{0,2})",
        r"[^\s\"'`<>{}()\[\]$]",
        8,
        "said",
    ),
    Context(
        "connection-string",
        ("open(", "mysql", "dsn", "database_url"),
        r"(?i:\b(?:open\(|\w{0,24}mysql|\w{0,24}dsn|database_url)[^\n]{0,80}?[\"'`=])[\w.-]{1,64}:",
        r"[^\s@\"'`/():{}$]",
        4,
        "dsn",
    ),
    Context(
        "login-call",
        (
            "mysqli",
            "mysql_connect",
            "new pdo(",
            "_login(",
            "ldap_bind(",
            "imap_open(",
            "oci_connect(",
            "dbi->connect(",
            "sequelize(",
            "plainauth(",
        ),
        r"(?:\bmysqli|mysqli?_(?:real_)?connect|\bPDO|ftp_login|ldap_bind|imap_open|oci_connect|DBI->connect|Sequelize|PlainAuth)"
        r"\s{0,2}\(\s{0,4}(?:\"[^\"\n]{0,120}\"|'[^'\n]{0,120}'|[^,\n\"']{0,120}),\s{0,4}(?:\"[^\"\n]{0,120}\"|'[^'\n]{0,120}'|[^,\n\"']{0,80}),\s{0,4}[\"']",
        r"[^\"'\n\r]",
        6,
        "login",
    ),
    Context(
        "login-call",
        (
            "login(",
            "authenticate(",
            "connect(",
            "basicauth(",
            "basic_auth(",
            "credentials(",
            "networkcredential(",
            "authentication(",
            "getconnection(",
            "auth=(",
        ),
        r"(?:\.login|\.authenticate|\.connect|auth=|HTTPBasicAuth|BasicAuth|basic_auth|SetBasicAuth|UsernamePasswordCredentials|NetworkCredential|"
        r"PasswordAuthentication|getConnection|Credentials)\s{0,2}\(\s{0,4}[^()\n]{0,120}?[\"'][^\"'\n]{0,80}[\"']\s{0,2},\s{0,4}[\"']",
        r"[^\"'\n\r]",
        6,
        "login",
    ),
)
