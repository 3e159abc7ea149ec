"""Fill in the middle: each model family's markers, and raw prompts parsed by them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

INSTRUCTION = (
    "Complete the code at the cursor. Reply with the code that belongs between the two parts below and nothing else: "
    "no explanation, no fence, no repetition of either part."
)


@dataclass(frozen=True, slots=True)
class FimFamily:
    """How one model family marks the parts of a file around the cursor.

    `order` names the parts as they come: `psm` is prefix, suffix, middle; `spm` is suffix, prefix. `context` are the
    family's markers of other files, which may stand before the first part of a raw prompt. `spellings` are what clients
    write in raw prompts where that differs from the vocabulary's own spelling.
    """

    name: str
    prefix: str
    suffix: str
    middle: str = ""
    order: str = "psm"
    context: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """The tokens that a prompt of this family can't do without."""
        return tuple(token for token in (self.prefix, self.suffix, self.middle) if token)


# CodeGemma before Qwen: both have the same three markers and differ in the file separator.
FAMILIES = (
    FimFamily("codegemma", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", context=("<|file_separator|>",)),
    FimFamily(
        "qwen-coder", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", context=("<|repo_name|>", "<|file_sep|>")
    ),
    FimFamily("starcoder", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", context=("<repo_name>", "<file_sep>")),
    FimFamily("granite-code", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", context=("<filename>", "<reponame>")),
    FimFamily("deepseek-coder", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    FimFamily(
        "codellama",
        "▁<PRE>",
        "▁<SUF>",
        "▁<MID>",
        spellings=(("▁<PRE>", "<PRE> "), ("▁<SUF>", " <SUF>"), ("▁<MID>", " <MID>")),
    ),
    FimFamily("codestral", "[PREFIX]", "[SUFFIX]", order="spm"),
)
MARKERS = tuple(dict.fromkeys(token for family in FAMILIES for token in (*family.markers, *family.context)))


@dataclass(frozen=True, slots=True)
class FimPrompt:
    """A prompt's parts. `context` alternates marker and text, as (marker, text) pairs."""

    prefix: str
    suffix: str
    context: tuple[tuple[str, str], ...] = ()


LINE_CHARS = 200
"""A cut that falls into a line moves to the line's end, where that is no farther than this."""


def trim(parts: FimPrompt, num_chars: int) -> FimPrompt:
    """Return the parts cut to `num_chars` around the cursor: other files go first, then what is farthest from it.

    What stands before the cursor gets three quarters, and what either side does not need goes to the other.
    """
    before = min(len(parts.prefix), max(num_chars - num_chars // 4, num_chars - len(parts.suffix)))
    after = min(len(parts.suffix), num_chars - before)
    prefix = parts.prefix[len(parts.prefix) - before :]
    if before < len(parts.prefix):
        prefix = prefix[prefix.find("\n", 0, LINE_CHARS) + 1 :]
    suffix = parts.suffix[:after]
    if after < len(parts.suffix):
        end = suffix.rfind("\n", max(0, after - LINE_CHARS))
        suffix = suffix[: end + 1] if end >= 0 else suffix
    return FimPrompt(prefix, suffix)


def find_family(tokens: Collection[str]) -> FimFamily | None:
    """Return the family whose markers are all control tokens of the vocabulary.

    Where two families share their markers, the one whose file markers the vocabulary has comes first.
    """
    fitting = [family for family in FAMILIES if all(marker in tokens for marker in family.markers)]
    for family in fitting:
        if family.context and all(marker in tokens for marker in family.context):
            return family
    return fitting[0] if fitting else None


def choose_family(name: str | None, tokens: Collection[str]) -> FimFamily | None:
    """Return the family of this name, or what the vocabulary says where there is no name; `none` is no family.

    Raises:
        ConfigError: No such family, or the vocabulary lacks its markers.
    """
    if name is None:
        return find_family(tokens)
    if name == "none":
        return None
    for family in FAMILIES:
        if family.name == name:
            if missing := [marker for marker in family.markers if marker not in tokens]:
                raise ConfigError(f"The model's vocabulary lacks {missing[0]!r}, so its FIM family is not {name!r}.")
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ConfigError(f"There is no FIM family {name!r}. Known: {known}, none.")


def parse_raw(prompt: str, family: FimFamily) -> FimPrompt | None:
    """Return the parts of a raw prompt that a client wrote by the family's grammar, or None where it is none.

    The grammar's markers are the outermost ones: the first of the leading marker, the first of the dividing marker
    after it, and the closing marker where it ends the prompt. Any other spelling of a marker in the prompt is text.
    """
    spelling = dict(family.spellings)
    first, second = (family.prefix, family.suffix) if family.order == "psm" else (family.suffix, family.prefix)
    head, divider, end = (spelling.get(m, m) for m in (first, second, family.middle))
    before, found_head, rest = prompt.partition(head)
    if not found_head:
        return None
    part, found_divider, other = rest.partition(divider)
    if not found_divider:
        return None
    other = other.rstrip("\r\n") if end and other.rstrip("\r\n").endswith(end) else other
    if end:
        if not other.endswith(end):
            return None
        other = other.removesuffix(end)
    context = _parse_context(before, family)
    if context is None:
        return None
    prefix, suffix = (part, other) if family.order == "psm" else (other, part)
    return FimPrompt(prefix, suffix, context)


def _parse_context(before: str, family: FimFamily) -> tuple[tuple[str, str], ...] | None:
    if not family.context:
        return None if before.strip() else ()
    pieces = re.split("(" + "|".join(map(re.escape, family.context)) + ")", before)
    if pieces[0].strip():
        return None
    return tuple(zip(pieces[1::2], pieces[2::2], strict=True))


def comment(text: str, code: str) -> str:
    """Return `text` as one comment line in the language that `code` looks like."""
    lines = [line.strip() for line in code.splitlines()[:200]]
    slashes = sum(line.startswith(("//", "/*")) or line.endswith((";", "{", "}")) for line in lines)
    dashes = sum(line.startswith("--") or line.upper().startswith(("SELECT ", "INSERT ", "CREATE ")) for line in lines)
    hashes = sum(line.startswith("#") or line.endswith(":") for line in lines)
    leader = "--" if dashes > max(slashes, hashes) else "//" if slashes > hashes else "#"
    return "".join(f"{leader} {line}\n" for line in text.splitlines() if line.strip())


def instruct(prompt: FimPrompt) -> str:
    """Return the user message that asks a chat model without FIM markers to fill in the middle."""
    return f"{INSTRUCTION}\n\nBefore the cursor:\n{prompt.prefix}\n\nAfter the cursor:\n{prompt.suffix}"
