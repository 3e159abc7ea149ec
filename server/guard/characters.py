# ruff: noqa: E501  # a pattern is read whole
"""Characters and phrases that work on a terminal, a reviewer's eye or a model instead of saying something."""

from __future__ import annotations

import re

from server.types import Finding

# CWE-1007 covers text that looks like other text; CWE-150 covers escapes that a terminal obeys.
_BIDI = "\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c"
_INVISIBLE = "\u200b\u2060-\u2064\u00ad\ufeff\u180e\u115f\u1160\u3164"
_TAGS = "\U000e0000-\U000e007f"
_VARIATION = "\U000e0100-\U000e01ef"
_CONTROL = re.compile(
    rf"(?P<escape>\x1b(?:\[[0-?]{{0,16}}[ -/]{{0,4}}[@-~]?|\][^\x07\x1b]{{0,64}}(?:\x07|\x1b\\)?|.)?|\x9b|\x90|\x9d)|"
    rf"(?P<bidi>[{_BIDI}]+)|(?P<tag>[{_TAGS}{_VARIATION}]+)|(?P<invisible>[{_INVISIBLE}]+)|(?P<nul>\x00+)|(?P<backspace>\x08+)"
)
# The first character decides, so a stream needs this one look at a piece of text.
SUSPECT = re.compile(rf"[\x00\x08\x1b\x90\x9b\x9d{_BIDI}{_INVISIBLE}{_TAGS}{_VARIATION}]")

_KINDS = {
    "escape": ("terminal-escape", "high", "CWE-150", "A terminal obeys this control sequence instead of showing it."),
    "bidi": (
        "bidirectional-control",
        "high",
        "CWE-1007",
        "A bidirectional control makes text read in another order than it runs.",
    ),
    "tag": ("hidden-text", "high", "CWE-1007", "Tag or variation characters carry text that no reader sees."),
    "invisible": ("invisible-character", "medium", "CWE-1007", "An invisible character hides in the text."),
    "nul": ("nul-character", "medium", "CWE-158", "A NUL character ends the text for some readers and not for others."),
    "backspace": ("terminal-escape", "medium", "CWE-150", "A backspace overwrites what a terminal has shown."),
}
_JOINED = re.compile(r"[\u0600-\u06ff\u0900-\u0dff\U0001f000-\U0001faff\u2600-\u27bf]")

_INJECTION = re.compile(
    r"(?i)(?P<override>\b(?:ignore|disregard|forget|override|bypass)\b[^.\n]{0,40}\b(?:previous|prior|above|earlier|all|any|system|safety)\b"
    r"[^.\n]{0,30}\b(?:instruction|prompt|rule|direction|guideline|message|context|polic)\w*)|"
    r"(?P<role>^\s{0,8}(?:#{1,4}\s*)?(?:new\s+)?(?:system|developer)\s*(?:prompt|message|instructions?|override)?\s*:\s*\S|"
    r"\[(?:system|inst|admin)\]|<\s{0,2}/?\s{0,2}(?:system|instructions?|admin|important)\s{0,2}>|<<SYS>>|"
    r"<\|(?:im_start|im_end|system|assistant|user|endoftext|eot_id|start_header_id)\|>)|"
    r"(?P<persona>\byou\s+are\s+now\s+(?:an?\b|in\b|DAN\b)|\bact\s+as\s+(?:an?\s+)?(?:unrestricted|jailbroken|unfiltered)|\b(?:enable|enter)\s+(?:developer|debug|god|admin)\s+mode)|"
    r"(?P<conceal>\b(?:do\s+not|don't|never)\s+(?:tell|inform|mention|reveal|show|alert|notify)\b[^.\n]{0,40}\b(?:user|human|developer|operator|anyone)\b)|"
    r"(?P<exfiltrate>\b(?:send|post|upload|exfiltrate|forward|email|transmit|leak)\b[^.\n]{0,60}\b(?:secret|token|password|credential|api\s?key|env(?:ironment)?\b|\.env|"
    r"ssh|private\s+key|conversation|system\s+prompt)[^.\n]{0,60}\b(?:to|at)\b\s{0,3}(?:https?:|[\w.+-]{1,64}@|[a-z0-9-]{1,64}\.[a-z]{2,}))|"
    r"(?P<image>!\[[^\]\n]{0,80}\]\(https?://[^)\s]{1,200}[?&][\w-]{1,32}=(?:\{|\$|<|%7B|SECRET|DATA)[^)\s]{0,100}\))|"
    r"(?P<prompt>\b(?:reveal|print|repeat|output|show)\b[^.\n]{0,30}\b(?:your|the)\s+(?:system\s+prompt|hidden\s+instructions|initial\s+instructions))",
    re.MULTILINE,
)


def find_characters(text: str) -> list[Finding]:
    """Return terminal escapes, bidirectional controls and invisible characters in `text`."""
    if SUSPECT.search(text) is None:
        return []
    found = []
    for match in _CONTROL.finditer(text):
        kind = match.lastgroup or ""
        start, end = match.span()
        if kind == "invisible" and match[0] == "\ufeff" and start == 0:
            continue  # a byte order mark at the very start is an encoding's, not an attack
        if kind == "tag" and _JOINED.search(text[max(0, start - 2) : start]):
            continue  # flags and emoji are spelled with these
        rule, severity, cwe, message = _KINDS[kind]
        found.append(Finding(rule, "characters", severity, message, start, end, cwe))
    return found


def find_injection(text: str) -> list[Finding]:
    """Return phrases in `text` that speak to the model rather than about the subject; for tool results and documents."""
    return [
        Finding(
            f"injection-{match.lastgroup}",
            "injection",
            "medium",
            "The text addresses the model: it tries to change its instructions, its role or what it reveals.",
            match.start(),
            match.end(),
            "CWE-1427",
        )
        for match in _INJECTION.finditer(text)
    ]
