"""A tokenizer's vocabulary, divided into control tokens, which only templates may write, and plain text.

Client text is never shown to a tokenizer that knows control tokens. `split` finds control tokens in *rendered template*
text, honouring the flags of the tokenizer's file; everything between two of them is encoded in one go by a copy of the
tokenizer that has none, which gives the ids that the unchanged tokenizer gives for text without control tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from server.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
# About 40 bytes are held for each token, so this is some 40 MB of ids where the cache is full.
MAX_CACHE_CHARS = 4 * 1024 * 1024
_FLAGS = {"special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
# What the tokenizers' `\s` strips beside a token; Python's own set holds four separators more.
_SPACE = (
    " \t\n\r\v\f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# Gemma's tokenizer lists these HTML tags as added tokens; they are text, as are runs of white space and single letters.
_HTML_TAG = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|ul|ol|li|dl|dt|dd|blockquote|h[1-6]|b|i|u|sub|sup|code|p|a|img|br|hr)>"
)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One added token with the flags that its file gives it."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Vocabulary:
    """Splits, guards and encodes text by one model's tokenizer.

    Args:
        tokenizer_json: The bytes of `tokenizer.json`.
        config: The parsed `tokenizer_config.json`, for added tokens that stand only there and the named special tokens.
        template_text: Source of the chat template and of the FIM grammar; a token that occurs there is a control token
            whatever its flags say.

    Raises:
        ConfigError: The file is not a tokenizer that can be divided exactly.
    """

    def __init__(self, tokenizer_json: bytes, config: Mapping[str, Any], *, template_text: str = "") -> None:
        if len(tokenizer_json) > MAX_TOKENIZER_BYTES:
            raise ConfigError(f"tokenizer.json has {len(tokenizer_json)} bytes; the limit is {MAX_TOKENIZER_BYTES}.")
        data, added = _load(tokenizer_json, config)
        named = set(named_tokens(config).values())
        text_tokens = {t.content for t in added if t.content not in named and _is_text(t, template_text)}
        self.controls: dict[str, AddedToken] = {t.content: t for t in added if t.content not in text_tokens}
        if short := [c for c in self.controls if len(c) < 2]:
            raise ConfigError(
                f"The tokenizer has control tokens of one character ({short!r}): client text can't be told from them."
            )
        self.control_ids: frozenset[int] = frozenset(t.id for t in self.controls.values())
        # Text outside the vocabulary becomes the unknown token by rights; its spelling is still broken like any other.
        unknown = _unknown_token(data["model"])
        self._never_ids = self.control_ids - {t.id for t in self.controls.values() if t.content == unknown}
        self._joined = "\0".join(self.controls)
        self._break = _alternation(self.controls)
        # The tokenizer looks for tokens marked `normalized` only in what the others leave over, hence two passes.
        groups = ([c for c, t in self.controls.items() if t.normalized is flag] for flag in (False, True))
        self._patterns = [pattern for g in groups if (pattern := _alternation(g, self.controls))]
        self._firsts = frozenset(c[0] for c in self.controls)
        self._lasts = frozenset(c[-1] for c in self.controls)
        self._heads = frozenset(c[:n] for c in self.controls for n in range(1, len(c)))
        self._tails = frozenset(c[n:] for c in self.controls for n in range(1, len(c)))
        self._longest = max(map(len, self.controls), default=0)
        plain = _without_controls(data, text_tokens)
        self._plain = _new_tokenizer(plain)
        self._joint = _new_tokenizer(_without_prefix(plain))
        self._full_json = data
        self._has_first_scheme = any(
            n.get("type") == "Metaspace" and n.get("prepend_scheme") == "first" for n in _steps(data, "pre_tokenizer")
        )
        self.lead_ids, self.trail_ids = _surroundings(self._plain)
        self._cache = SegmentCache(MAX_CACHE_CHARS)

    def verify_exact(self, text: str) -> None:
        """Compare what this class makes of rendered `text` with the unchanged tokenizer; done once, at start.

        Raises:
            ConfigError: The ids differ, so this tokenizer can't be served exactly.
        """
        expected = _new_tokenizer(self._full_json).encode(text, add_special_tokens=False).ids
        if self.encode_pieces(self.split(text)) != expected:
            raise ConfigError(
                "The tokenizer gives other ids for a rendered conversation than the exact renderer does; this model "
                "can't be served with exact prompts. Report its normalizer and pre_tokenizer sections."
            )

    def guard(self, text: str, mark: str) -> str:
        """Return `text` with `mark` inside each spelling of a control token, and where it could complete one.

        A string that ends with the beginning of a control token, or begins with the end of one, gets the mark there
        too: otherwise two fields, or a field and the template's own text, could be put together to one. White space
        around is looked through, since templates trim.
        """
        if self._break is None:
            return text
        guarded = text
        while self._break.search(guarded):  # a second round where breaking one spelling leaves another that overlapped
            guarded = self._break.sub(lambda m: m[0][0] + mark + m[0][1:], guarded)
        end = len(guarded.rstrip())
        tail = guarded[max(0, end - self._longest) : end]
        if not self._firsts.isdisjoint(tail) and any(tail[n:] in self._heads for n in range(len(tail))):
            guarded = guarded[:end] + mark + guarded[end:]
        start = len(guarded) - len(guarded.lstrip())
        head = guarded[start : start + self._longest]
        if not self._lasts.isdisjoint(head) and any(head[: n + 1] in self._tails for n in range(len(head))):
            guarded = guarded[:start] + mark + guarded[start:]
        return guarded

    def is_part(self, text: str) -> bool:
        """Whether `text` is found inside the spelling of a control token."""
        return text in self._joined

    def split(self, text: str) -> list[str | int]:
        """Return the text pieces and control token ids of rendered text, in order; empty pieces left out."""
        pieces: list[str | int] = [text]
        for pattern in self._patterns:
            pieces = _split_pieces(pieces, pattern, self.controls)
        return pieces

    def encode_pieces(self, pieces: list[str | int], space: str = "") -> list[int]:
        """Return the ids of what `split` gave; `space` is the cache partition."""
        ids: list[int] = []
        first = True
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids.extend(self.encode(piece, first=first, space=space))
            first = False
        return ids

    def encode(self, text: str, *, first: bool, space: str = "") -> list[int]:
        """Return the ids of plain text; nothing in it becomes a control token.

        Args:
            text: Without marks; spellings of control tokens in it are text.
            first: Whether the text stands at the very beginning of the prompt; some tokenizers put a space there only.
            space: Cache partition: one tenant's texts must not be timed by another's.

        Returns:
            A list that is shared with the cache; the caller must not change it.

        Raises:
            RequestError: The vocabulary spells a control token out of this text in every way tried.
        """
        key = (space, first, text)
        ids = self._cache.get(key)
        if ids is None:
            tokenizer = self._joint if self._has_first_scheme and not first else self._plain
            try:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
            except TypeError as err:
                raise RequestError(
                    "The text holds half a character (a lone surrogate). Send valid Unicode.", code="invalid_unicode"
                ) from err
            if not self._never_ids.isdisjoint(ids):
                ids = self._encode_apart(text, tokenizer)
            self._cache.put(key, ids)
        return ids

    def ids_of_word(self, word: str) -> frozenset[int]:
        """Return the tokens that spell `word` alone, with or without a space before it; empty where there is none."""
        if word in self.controls:
            return frozenset({self.controls[word].id})
        found: set[int] = set()
        for text in (word, f" {word}"):
            ids = self._joint.encode(text, add_special_tokens=False).ids
            # A token for unknown text stands for any: it must spell this one.
            if len(ids) == 1 and self.decode(ids).strip() == word:
                found.update(ids)
        return frozenset(found)

    def encode_alone(self, text: str, *, space: str = "") -> list[int]:
        """Return the ids of a text that is a whole input (embeddings, raw prompts), with the tokenizer's own frame."""
        return [*self.lead_ids, *self.encode(text, first=True, space=space), *self.trail_ids]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids that `encode` gave."""
        text: str = self._plain.decode(ids, skip_special_tokens=False)
        return text

    def _encode_apart(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Encode where the vocabulary itself holds control tokens as plain pieces (Unigram, `ignore_merges`)."""
        cuts = [m.start() + 1 for m in self._break.finditer(text)] if self._break else []
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = (self._joint if start else tokenizer).encode(text[start:end], add_special_tokens=False).ids
            if not self._never_ids.isdisjoint(piece):
                piece = [i for char in text[start:end] for i in self._joint.encode(char, add_special_tokens=False).ids]
            ids.extend(piece)
        if not self._never_ids.isdisjoint(ids):
            raise RequestError(
                "The text spells a control token of this model in a way that can't be written as plain text. "
                "Put a space inside the token's name.",
                code="control_token",
            )
        return ids


class SegmentCache:
    """Token ids of text segments, least recently used out first; bounded by the characters held."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._num_chars = 0
        self._entries: OrderedDict[tuple[str, bool, str], list[int]] = OrderedDict()
        # Long prompts are rendered off the event loop, so two threads may be here at once.
        self._lock = threading.Lock()

    def get(self, key: tuple[str, bool, str]) -> list[int] | None:
        """Return the ids, or None; the caller must not change the list."""
        with self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, key: tuple[str, bool, str], ids: list[int]) -> None:
        """Keep `ids`, dropping the oldest where needed; a text of over a quarter of the cache is not kept."""
        if len(key[2]) > self._max_chars // 4:
            return
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = ids
            # 64 characters stand for the entry's own weight, so that a flood of tiny texts is bounded too.
            self._num_chars += len(key[2]) + 64
            while self._num_chars > self._max_chars:
                old, _ = self._entries.popitem(last=False)
                self._num_chars -= len(old[2]) + 64


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token`, `eos_token` and the others that a chat template may write, by name."""
    named: dict[str, str] = {}
    for name, value in config.items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                named[name] = content
    return named


def _parse_added(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        content=str(entry["content"]),
        id=int(entry["id"]),
        special=bool(entry.get("special", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        single_word=bool(entry.get("single_word", False)),
        normalized=bool(entry.get("normalized", False)),
    )


def _load(tokenizer_json: bytes, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[AddedToken]]:
    """Return the tokenizer's file without truncation and padding, and every added token, the config's too."""
    try:
        data: dict[str, Any] = json.loads(tokenizer_json)
        entries = list(data.get("added_tokens") or [])
        if not isinstance(data["model"], dict):
            raise TypeError("model")
        known = {entry["content"] for entry in entries}
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            if entry["content"] not in known:
                entries.append({**_FLAGS, **{k: v for k, v in entry.items() if k != "__type"}, "id": int(number)})
        entries.sort(key=lambda entry: entry["id"])
        added = [_parse_added(entry) for entry in entries if entry["content"]]
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise ConfigError(f"tokenizer.json can't be read ({type(err).__name__}). Export the tokenizer again.") from err
    return {**data, "truncation": None, "padding": None, "added_tokens": entries}, added


def _unknown_token(model: Mapping[str, Any]) -> str | None:
    """Return what the model writes for text that it has no piece for."""
    if isinstance(number := model.get("unk_id"), int) and isinstance(vocab := model.get("vocab"), list):
        return str(vocab[number][0])
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None


def _new_tokenizer(data: Mapping[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(data))
    except Exception as err:
        raise ConfigError(f"tokenizer.json can't be loaded: {err}") from err


def _without_controls(data: dict[str, Any], text_tokens: Collection[str]) -> dict[str, Any]:
    """Return the tokenizer's file with only those added tokens that are text, under their own ids.

    Raises:
        ConfigError: They can't keep their ids.
    """
    kept = [entry for entry in data["added_tokens"] if entry["content"] in text_tokens]
    model = dict(data["model"])
    vocab = model.get("vocab")
    if kept and isinstance(vocab, dict):
        # The library numbers added tokens anew unless the vocabulary has them; without merges they are inert there.
        model["vocab"] = {**vocab, **{entry["content"]: entry["id"] for entry in kept}}
    plain = {**data, "model": model, "added_tokens": kept}
    tokenizer = _new_tokenizer(plain)
    for entry in kept:
        if tokenizer.token_to_id(entry["content"]) != entry["id"]:
            raise ConfigError(
                "The tokenizer's added tokens change their ids without the control tokens; it can't be served."
            )
    return plain


def _is_text(token: AddedToken, template_text: str) -> bool:
    """Whether an added token is plain text: it shapes no turn, so client text may contain it as it does in training."""
    if token.special:
        return False
    if len(token.content) == 1 or not token.content.strip(_SPACE + "▁"):
        return True
    return _HTML_TAG.fullmatch(token.content) is not None and token.content not in template_text


def _alternation(contents: Collection[str], flags: Mapping[str, AddedToken] | None = None) -> re.Pattern[str] | None:
    """Return a pattern that finds the longest of `contents` at each place."""
    if not contents:
        return None
    if flags is None or not any(flags[c].single_word for c in contents):
        return re.compile(_trie_source(contents))
    longest_first = sorted(contents, key=lambda c: (-len(c), c))
    sources = [rf"(?<!\w){re.escape(c)}(?!\w)" if flags[c].single_word else re.escape(c) for c in longest_first]
    return re.compile("|".join(sources))


def _trie_source(words: Collection[str]) -> str:
    """Return a regular expression that shares beginnings: Gemma has 6,000 tokens that begin with `<unused`.

    A plain alternation tries each of them at every `<` of a text: 3.6 s for 100,000 of these, against 1.3 ms.
    """
    heads: dict[str, list[str]] = {}
    ends_here = False
    for word in words:
        if word:
            heads.setdefault(word[0], []).append(word[1:])
        else:
            ends_here = True
    branches = []
    for head, rest in sorted(heads.items()):
        shared = _common_head(rest)
        tails = [tail[len(shared) :] for tail in rest]
        branches.append(re.escape(head + shared) + (_trie_source(tails) if any(tails) else ""))
    joined = branches[0] if len(branches) == 1 and not ends_here else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if ends_here else joined


def _common_head(words: Collection[str]) -> str:
    shortest, longest = min(words), max(words)
    length = next((n for n, char in enumerate(shortest) if char != longest[n]), len(shortest))
    return shortest[:length]


def _split_pieces(
    pieces: list[str | int], pattern: re.Pattern[str], controls: Mapping[str, AddedToken]
) -> list[str | int]:
    out: list[str | int] = []
    for piece in pieces:
        if isinstance(piece, int):
            out.append(piece)
            continue
        last = 0
        for match in pattern.finditer(piece):
            token = controls[match[0]]
            before = piece[last : match.start()]
            if token.lstrip:
                before = before.rstrip(_SPACE)
            if before:
                out.append(before)
            out.append(token.id)
            last = match.end()
            if token.rstrip:
                while last < len(piece) and piece[last] in _SPACE:
                    last += 1
        if rest := piece[last:]:
            out.append(rest)
    return out


def _surroundings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer's post-processor puts before and after a text."""
    inner = tokenizer.encode("x", add_special_tokens=False).ids
    outer = tokenizer.encode("x", add_special_tokens=True).ids
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise ConfigError("The tokenizer's post-processor changes the text's own ids; it can't be served exactly.")


def _steps(data: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer's `normalizer` or `pre_tokenizer`, whether one or a sequence."""
    node = data.get(kind)
    if not isinstance(node, dict):
        return []
    inner = node.get("pretokenizers") or node.get("normalizers") if node.get("type") == "Sequence" else [node]
    return list(inner or [])


def _without_prefix(data: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's file changed so that it puts no space in front of a text."""
    copy: dict[str, Any] = json.loads(json.dumps(data))
    for node in _steps(copy, "pre_tokenizer"):
        if node.get("type") == "Metaspace":
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)
        elif node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
    normalizer = copy.get("normalizer")
    if isinstance(normalizer, dict):
        if normalizer.get("type") == "Prepend":
            copy["normalizer"] = None
        elif normalizer.get("type") == "Sequence":
            normalizer["normalizers"] = [n for n in normalizer["normalizers"] if n.get("type") != "Prepend"]
    return copy
