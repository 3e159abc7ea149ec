"""From request and obligations to the prompt: implements the pipeline's `PromptRenderer` for one model."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError, RequestError
from server.template import fim
from server.template.chat_template import ChatTemplate
from server.template.conversation import MARKS, NEUTRAL
from server.template.neutral import neutralise
from server.template.registry import verify_values
from server.template.render import ChatRenderer
from server.template.vocabulary import Vocabulary, named_tokens
from server.types import Chat, Completion, Embedding, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from server.template.registry import ComposedTemplate, TemplateRegistry, TemplateSet
    from server.types import ModelRequest, Obligations, Principal

# What a model directory may hold for us; whoever opens a sealed model passes these files.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


ANSWER_TOKENS = 256
"""Room that a completion is left where its caller asks for no length; a quarter of the context at most."""

MAX_BANNED_IDS = 256
"""Tokens that policy may ban from one answer: they travel with every request."""

MOST_TOKEN_CHARS = 16
"""No file has tokens of more characters than this on average."""


class StandIn(StrEnum):
    """What stands in for the template where the wire format has no turns; policy names one."""

    DEFAULT = ""
    TEMPLATE_AS_TEXT = "template-as-text"
    COMMENT_PREAMBLE = "comment-preamble"
    FIM = "fim"
    RAW = "raw"
    NONE = "none"


class PromptBuilder:
    """Builds prompts for one model.

    Args:
        registry: The loaded security templates.
        files: The model's tokenizer files by name (`TOKENIZER_FILES`); `tokenizer.json` is needed.
        chat_template: Serves instead of the model's own, for models whose own has no system turn.
        variables: The deployment's values for template variables.
        accept_shared_turn: See `ChatRenderer`.
        max_model_len: The model's context in tokens, to which completions are trimmed around the cursor; None for no
            trimming.
        fim_family: Name of the fill-in-the-middle family; told from the vocabulary where None.
        embeds: The model gives embeddings; it needs no chat template.
        messages: The engine takes messages and renders them by itself; its prompts carry the neutralised conversation.
        end_ids: Tokens that end an answer, which policy can't ban.

    Raises:
        ConfigError: The model can't be served with an enforced template; the reason is named.
    """

    def __init__(
        self,
        registry: TemplateRegistry,
        files: Mapping[str, bytes],
        *,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        accept_shared_turn: bool = False,
        max_model_len: int | None = None,
        fim_family: str | None = None,
        embeds: bool = False,
        messages: bool = False,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        if "tokenizer.json" not in files:
            raise ConfigError(
                "The model has no tokenizer.json; exact prompts need one. Export the tokenizer in that form."
            )
        config = _parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
        source = chat_template if chat_template is not None else _find_chat_template(files, config)
        self._registry = registry
        self._max_model_len = max_model_len
        self._variables = dict(variables or {})
        self._messages = messages
        self.chat: ChatRenderer | None = None
        template = ChatTemplate(source, named_tokens(config)) if source else None
        self.vocabulary = Vocabulary(
            files["tokenizer.json"], config, template_text=(template.source if template else "") + "".join(fim.MARKERS)
        )
        end = self.vocabulary.controls.get(named_tokens(config).get("eos_token", ""))
        self._end_ids = end_ids | ({end.id} if end is not None else set())
        self.family = fim.choose_family(fim_family, self.vocabulary.controls)
        if template is not None:
            self.chat = ChatRenderer(self.vocabulary, template, accept_shared_turn=accept_shared_turn)
        elif self.family is None and not embeds:
            raise ConfigError(
                "The model has no chat template and no fill-in-the-middle markers. Give it a chat template."
            )
        self._verified: set[str] = set()
        registry.require(self._verify_set)

    @classmethod
    def load(cls, registry: TemplateRegistry, model_dir: Path, **options: Any) -> PromptBuilder:
        """Return a builder from the tokenizer files in a directory; `options` as the constructor's."""
        files = {name: (model_dir / name).read_bytes() for name in TOKENIZER_FILES if (model_dir / name).exists()}
        return cls(registry, files, **options)

    def render(self, request: ModelRequest, obligations: Obligations, principal: Principal) -> Prompt:
        """Return the prompt with the security template first and client text neutralised.

        Raises:
            RequestError: The text can't be rendered without control tokens of the client's making.
            ConfigError: The obligation names a template that is not loaded, a stand-in that is not known, or a token to
                ban that the model does not have.
        """
        composed = self._registry.compose(obligations.templates, self._variables, subject=principal.subject)
        self._verify_block(composed)
        self._verify_bias(request.sampling.get("logit_bias"))
        prompt = self._render_payload(request, composed, obligations, principal.tenant)
        if obligations.ban_tokens and not isinstance(request.payload, Embedding):
            prompt = replace(prompt, banned_ids=self._banned_ids(obligations.ban_tokens))
        shadow = self._registry.shadow(obligations.templates, self._variables, subject=principal.subject)
        return prompt if shadow is None else replace(prompt, shadow=shadow.ref)

    def _render_payload(
        self, request: ModelRequest, composed: ComposedTemplate, obligations: Obligations, space: str
    ) -> Prompt:
        payload = request.payload
        if isinstance(payload, Chat):
            return self._render_chat(payload, composed, space)
        if self._messages:
            raise RequestError(
                "The engine of this model takes conversations only; use a chat route.", code="completion_unsupported"
            )
        stand_in = _parse_stand_in(obligations.stand_in)
        if isinstance(payload, Completion):
            asked = min(request.max_tokens or ANSWER_TOKENS, obligations.max_tokens or ANSWER_TOKENS)
            return self._render_completion(payload, composed, stand_in, space, answer_tokens=asked)
        return self._render_embedding(payload, composed, space)

    def _render_chat(self, chat: Chat, composed: ComposedTemplate, space: str) -> Prompt:
        if self.chat is None:
            raise RequestError("This model has no chat form. Use /v1/completions with it.", code="chat_unsupported")
        text, token_ids = self.chat.render(chat, composed.text, space=space)
        conversation = neutralise(chat, composed.text) if self._messages else None
        return Prompt(text, token_ids, composed.ref, conversation=conversation)

    def _render_completion(
        self, completion: Completion, composed: ComposedTemplate, stand_in: StandIn, space: str, *, answer_tokens: int
    ) -> Prompt:
        parts = None
        if completion.suffix is not None:
            parts = fim.FimPrompt(completion.prompt, completion.suffix)
        elif self.family is not None and stand_in not in (StandIn.RAW, StandIn.TEMPLATE_AS_TEXT):
            parts = fim.parse_raw(completion.prompt, self.family)
        if parts is None:
            return self._render_text(completion.prompt, composed, stand_in, space)
        family = self.family

        def render(parts: fim.FimPrompt) -> Prompt:
            if family is None:
                # A chat model fills in by instruction: the template then stands in a real system turn.
                message = {"role": "user", "content": fim.instruct(parts)}
                return self._render_chat(Chat(messages=(message,)), composed, space)
            return self._render_fim(parts, family, composed, stand_in, space)

        return self._fit(parts, render, answer_tokens)

    def _fit(self, parts: fim.FimPrompt, render: Callable[[fim.FimPrompt], Prompt], answer_tokens: int) -> Prompt:
        """Return the prompt, trimmed around the cursor until it leaves room for the answer.

        One that does not fit with nothing around the cursor is returned as it is, and refused where limits are checked.
        """
        limit = self._max_model_len
        if limit is None:
            return render(parts)
        limit -= min(answer_tokens, limit // 4)
        if len(parts.prefix) + len(parts.suffix) > limit * MOST_TOKEN_CHARS:  # tokenizing it would tell nothing
            parts = fim.trim(parts, limit * MOST_TOKEN_CHARS)
        prompt = render(parts)
        while (over := prompt.num_tokens - limit) > 0 and (parts.prefix or parts.suffix or parts.context):
            num_chars = len(parts.prefix) + len(parts.suffix)
            if not parts.context:
                num_chars -= max(1, -(-over * num_chars // prompt.num_tokens))
            parts = fim.trim(parts, num_chars)
            prompt = render(parts)
        return prompt

    def _render_text(self, text: str, composed: ComposedTemplate, stand_in: StandIn, space: str) -> Prompt:
        """A raw prompt is plain text all through; by default the whole template stands before it.

        Text is the strongest form that a format without turns can carry, and unlike a comment it needs no language.
        """
        if stand_in is StandIn.DEFAULT:
            stand_in = StandIn.TEMPLATE_AS_TEXT
        if stand_in is StandIn.TEMPLATE_AS_TEXT and composed.text:
            text = f"{composed.text}\n\n{text}"
        elif stand_in is StandIn.COMMENT_PREAMBLE and composed.preamble:
            text = fim.comment(composed.preamble, text) + text
        return Prompt(text, self.vocabulary.encode_alone(text, space=space), composed.ref, stand_in.value)

    def _render_fim(
        self, parts: fim.FimPrompt, family: fim.FimFamily, composed: ComposedTemplate, stand_in: StandIn, space: str
    ) -> Prompt:
        """By default one comment line stands at the head of the prefix: a page of rules spoils small completions."""
        if stand_in is StandIn.DEFAULT:
            stand_in = StandIn.COMMENT_PREAMBLE
        lead = {StandIn.COMMENT_PREAMBLE: composed.preamble, StandIn.TEMPLATE_AS_TEXT: composed.text}.get(stand_in, "")
        prefix = (fim.comment(lead, parts.prefix + "\n" + parts.suffix) if lead else "") + parts.prefix
        pieces: list[tuple[str, str]] = [*parts.context]
        if family.order == "psm":
            pieces += [(family.prefix, prefix), (family.suffix, parts.suffix), (family.middle, "")]
        else:
            pieces += [(family.suffix, parts.suffix), (family.prefix, prefix)]
        vocabulary = self.vocabulary
        token_ids = list(vocabulary.lead_ids)
        for marker, text in pieces:
            token_ids.append(vocabulary.controls[marker].id)
            if text:
                token_ids.extend(vocabulary.encode(text, first=False, space=space))
        return Prompt("".join(m + t for m, t in pieces), token_ids, composed.ref, stand_in.value)

    def _render_embedding(self, embedding: Embedding, composed: ComposedTemplate, space: str) -> Prompt:
        """An embedding follows no instructions, so nothing stands in; the record says so."""
        inputs = tuple(self.vocabulary.encode_alone(text, space=space) for text in embedding.inputs)
        return Prompt("\n".join(embedding.inputs), [], composed.ref, StandIn.NONE.value, inputs=inputs)

    def _banned_ids(self, words: tuple[str, ...]) -> tuple[int, ...]:
        """Return the tokens behind the spellings that policy bans.

        Raises:
            ConfigError: One of them is no token of this model, ends its answers, or there are too many: what policy
                says must hold, so the request is refused where it can't.
        """
        if self._messages:
            raise ConfigError("Policy bans tokens, and the engine of this model takes messages only: it can't ban any.")
        banned: set[int] = set()
        for word in words:
            ids = self.vocabulary.ids_of_word(word)
            if not ids:
                raise ConfigError(f"Policy bans the token {word!r}, and this model has no token that is spelled so.")
            if ids & self._end_ids:
                raise ConfigError(f"Policy bans the token {word!r}, without which no answer of this model ends.")
            banned |= ids
        if len(banned) > MAX_BANNED_IDS:
            raise ConfigError(f"Policy bans {len(banned)} tokens of this model; at most {MAX_BANNED_IDS} are possible.")
        return tuple(sorted(banned))

    def _verify_set(self, templates: TemplateSet) -> None:
        """Check that this model can be served under every template of a set, before the set is in force.

        Raises:
            ConfigError: It can't; the template is named.
        """
        verify_values(templates.templates, self._variables)
        for versions in templates.templates.values():
            for template in versions.values():
                text = template.render({k: v for k, v in self._variables.items() if k in template.variables})
                self._verify_text(f"{template.id} {template.version}", text, template.preamble)

    def _verify_block(self, composed: ComposedTemplate) -> None:
        """Check once per composed text that putting templates together made no control token of this model.

        Raises:
            ConfigError: It did.
        """
        if composed.ref.digest not in self._verified:
            self._verify_text(composed.ref.id, composed.text, composed.preamble)
            self._verified.add(composed.ref.digest)

    def _verify_text(self, name: str, *texts: str) -> None:
        for text in texts:
            spelled = any(isinstance(piece, int) for piece in self.vocabulary.split(text))
            if spelled or any(mark in text for mark in (*MARKS, NEUTRAL)):
                raise ConfigError(f"Template {name} spells a control token of the served model. Reword it.")

    def _verify_bias(self, bias: object) -> None:
        """Check that no `logit_bias` forces or forbids a control token.

        Raises:
            RequestError: It does, or it is not a map of token ids.
        """
        if not bias:
            return
        try:
            ids = {int(key) for key in bias}  # type: ignore[attr-defined]
        except (TypeError, ValueError) as err:
            raise RequestError("logit_bias maps token ids to numbers.", param="logit_bias") from err
        if ids & self.vocabulary.control_ids:
            raise RequestError("logit_bias must leave control tokens alone.", param="logit_bias", code="field_refused")


def _parse_stand_in(name: str) -> StandIn:
    try:
        return StandIn(name)
    except ValueError as err:
        known = ", ".join(repr(s.value) for s in StandIn if s)
        raise ConfigError(f"The policy names the stand-in {name!r}. Known: {known}.") from err


def _find_chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | dict[str, str] | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    if "chat_template.json" in files:
        source = _parse_json(files["chat_template.json"], "chat_template.json").get("chat_template")
    else:
        source = config.get("chat_template")
    if isinstance(source, list):
        return {str(part["name"]): str(part["template"]) for part in source}
    return source if isinstance(source, str) else None


def _parse_json(content: bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as err:
        raise ConfigError(f"{name} can't be parsed.") from err
    if not isinstance(data, dict):
        raise ConfigError(f"{name} must hold an object.")
    return data
