"""Chat templates, and the tokens of the assistant's turns: located exactly, or refused.

A template is the tokenizer's own (jinja2, sandboxed, with what transformers gives it), or ChatML. A conversation is
rendered and tokenized whole, so its ids are those of transformers' apply_chat_template. An assistant's turn begins
after the generation prompt and ends with the template's end-of-turn tokens. Both are accepted only if the text before
the turn is what the model sees when it is asked, and if its ids, tokenized alone, are a prefix of the whole. Templates
that mark turns with {% generation %} give the positions themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np

from mlxgpt.common.chat import jinja, turns
from mlxgpt.common.chat.control import Control
from mlxgpt.common.chat.locate import Locator, Messages, Talk
from mlxgpt.common.chat.turns import Form, Plan
from mlxgpt.common.errors import UserError
from mlxgpt.common.sft import forms
from mlxgpt.common.sft.forms import Reads
from mlxgpt.common.tokenizers.adding import with_tokens
from mlxgpt.common.tokenizers.protocol import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_PERSONS = ("system", "developer", "user", "tool")


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens; ``mask`` is True for what is trained."""

    ids: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool
    unopened: bool = False  # the answers' prompts lack what the generation prompt opens


class Template:
    """A chat template and its tokenizer.

    Args:
        sources: jinja by name; ``tool_use`` for conversations with tools, else ``default``.
        special: bos_token and the like, which templates write.
        name: for messages.
        date: the date that templates may write, such as 2026-11-25; default: today.
        kwargs: values that the template may read, such as enable_thinking.
        sanitize: control tokens in messages, tools and kwargs are text.

    Raises:
        UserError: not jinja, or an error of the template.
    """

    def __init__(
        self,
        sources: dict[str, str],
        tokenizer: Tokenizer,
        special: dict[str, str],
        name: str,
        date: str = "",
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        sanitize: bool = False,
    ) -> None:
        self.sources, self.tokenizer, self.special, self.name = sources, tokenizer, special, name
        self.kwargs, self.sanitize = dict(kwargs), sanitize
        self._reads: dict[str, Reads] = {}
        self._day = datetime.fromisoformat(date) if date else None
        for source in sources.values():
            try:
                jinja.compiled(source, False)
            except jinja2.TemplateError as error:
                raise UserError(f"{name}: not a template: {jinja.said(error)}") from None
        self.check_kwargs(self.kwargs, f"{name}: chat_template_kwargs")
        self.marked = any("generation" in jinja.tags(source) for source in sources.values())
        self._controls = {name: Control(tokenizer, jinja.literals(source)) for name, source in sources.items()}
        self.control = Control(tokenizer, "\0".join(map(jinja.literals, sources.values())))
        self._locator = Locator(self)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text."""
        return self.tokenizer.id_of(token)

    def check_kwargs(self, kwargs: Mapping[str, Any], where: str) -> None:
        """Refuses values for the template that it does not read; see forms.check_kwargs."""
        if kwargs:
            sources = list(self.sources.values())
            known = forms.variables(jinja.compiled(sources[0], False).environment, sources)
            forms.check_kwargs(kwargs, known, where)

    @property
    def form(self) -> Form:
        """How the template writes an assistant's turn.

        Raises:
            UserError: no token ends it.
        """
        return self._locator.form

    @property
    def end(self) -> str:
        """The text of the end token."""
        return self.tokenizer.decode([self.end_id])

    @property
    def opening(self) -> str:
        """How the generation prompt goes on behind what an answer begins with, such as <think>; '' if it does not."""
        return self._locator.form.opening

    @property
    def end_id(self) -> int:
        """The token that ends an assistant's turn, the last where several do."""
        return self._locator.form.ends[-1]

    def render(
        self, messages: Messages, tools: Messages = (), generation: bool = False, marks: bool = False, **more: Any
    ) -> str:
        """The text of a conversation; ``generation`` adds the generation prompt.

        Raises:
            UserError: an error of the template.
        """
        name = self._chosen(tools)
        if name not in self.sources:
            raise UserError(f"{self.name}: templates {', '.join(self.sources)}: expected one called default")
        fitted = self.reads(name).fitted(messages)
        return self._rendered(self.sources[name], fitted, tools, generation, marks, more)

    def _chosen(self, tools: Messages) -> str:
        return "tool_use" if tools and "tool_use" in self.sources else "default"

    def reads(self, name: str = "default") -> Reads:
        """What the template reads of a message."""
        if name not in self._reads:
            source = self.sources[name]
            self._reads[name] = Reads(lambda messages: self._rendered(source, messages, (), False, False, {}))
        return self._reads[name]

    def _rendered(
        self, source: str, messages: Messages, tools: Messages, generation: bool, marks: bool, more: Mapping[str, Any]
    ) -> str:
        given = {"messages": list(messages), "tools": list(tools) or None, "documents": None}
        try:
            return jinja.compiled(source, marks).render(
                {**self.special, "strftime_now": self._now, **self.kwargs, **more, **given},
                add_generation_prompt=generation,
            )
        except jinja.ERRORS as error:
            raise UserError(f"{self.name}: {jinja.said(error)}") from None

    def _now(self, form: str) -> str:
        return (self._day or datetime.now()).strftime(form)

    def encode(
        self, messages: Messages, tools: Messages = (), generation: bool = False, typed: bool = False, **more: Any
    ) -> list[int]:
        """The ids of a conversation, as transformers' apply_chat_template gives them.

        ``typed``: control tokens in what people wrote are text, as with its sanitize_control_tokens; what the assistant
        wrote stays.
        """
        if typed:
            mark = self._marks(tools)
            messages = [mark(one) if one.get("role") in _PERSONS else one for one in messages]
            return self.control.encode(self.render(messages, mark(list(tools)), generation, **more)).tolist()
        talk = self._safe(Talk("", messages, tools, kwargs=more))
        return self._ids([self.render(talk.messages, talk.tools, generation, **talk.kwargs)])[0].tolist()

    def _marks(self, tools: Messages) -> Callable[[Any], Any]:
        """What marks the control tokens of the template for these tools."""
        return self._controls.get(self._chosen(tools), self.control).mark

    def _safe(self, talk: Talk) -> Talk:
        """The conversation, marked where control tokens in it are text."""
        if not self.sanitize:
            return talk
        mark = self._marks(talk.tools)
        given = mark({**self.kwargs, **talk.kwargs})
        return talk._replace(messages=mark(list(talk.messages)), tools=mark(list(talk.tools)), kwargs=given)

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.sanitize:
            return [self.control.encode(text) for text in texts]
        return self.tokenizer.encode_batch(texts)

    def encode_whole(self, talks: Sequence[Talk]) -> list[np.ndarray]:
        """The tokens of conversations, whoever wrote them.

        Raises:
            UserError: names the row that the template refuses, or that has a character without a token.
        """
        made = []
        for talk in map(self._safe, talks):
            try:
                made += self._ids([self.render(talk.messages, talk.tools, **talk.kwargs)])
            except UserError as error:
                raise UserError(f"{talk.where}: {error}") from None
        return made

    def encode_turns(
        self, conversations: Sequence[tuple[Any, ...]], last_only: bool = False, part: str = "both"
    ) -> list[Encoded]:
        """Tokens and masks of conversations, each a Talk; ``last_only``: of the last answer, behind its prompt.

        ``part``: both, answer or thinking. If template and answer would share a token, the text is split there, as it
        is in generation.

        Raises:
            UserError: names the row whose turns cannot be located exactly.
        """
        talks = [Talk(*each) for each in conversations]
        plans = [self._locator.plan(self._safe(talk), last_only) for talk in talks]
        edges = [turns.chosen(plan.spans, part) for plan in plans]
        pieces = [
            [plan.text, *(plan.text[:at] for pair in pairs for at in pair)]
            for plan, pairs in zip(plans, edges, strict=True)
        ]
        texts = list(dict.fromkeys(text for every in pieces for text in every))
        encoded = dict(zip(texts, self._ids(texts), strict=True))
        made = []
        for talk, plan, pairs, every in zip(talks, plans, edges, pieces, strict=True):
            cuts: list[int] = []
            ids = [encoded[text] for text in every]
            while isinstance(found := _masked(plan, pairs, ids), int):
                if found in cuts:
                    raise UserError(f"{talk.where}: {self.name}: no token boundary at the start of an answer")
                cuts.append(found)
                ids = [self._encode_cut(text, cuts) for text in every]
            as_whole = self.tokenizer.decode(encoded[plan.text].tolist()) if cuts else ""
            if cuts and self.tokenizer.decode(found.ids.tolist()) != as_whole:
                raise UserError(
                    f"{talk.where}: {self.name} and the answer share a token, and this {self.tokenizer.kind} tokenizer "
                    "cannot split it: expected no white space at the start of the answer"
                )
            made.append(found)
        return made

    def _encode_cut(self, text: str, cuts: list[int]) -> np.ndarray:
        """The ids of ``text``, split at the characters ``cuts``."""
        ends = sorted({cut for cut in cuts if cut < len(text)} | {len(text)})
        return np.concatenate(self._ids([text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]))


def _masked(plan: Plan, pairs: Sequence[tuple[int, int]], ids: Sequence[np.ndarray]) -> Encoded | int:
    """The tokens of the text and the mask; or the character at which the text must be split.

    A token that reasoning and answer share counts as reasoning.
    """
    whole = np.asarray(ids[0], np.int32)
    mask, begins = np.zeros(len(whole), bool), {one.start for one in plan.spans}
    for number, (start, _) in enumerate(pairs):
        before, upto = ids[2 * number + 1], ids[2 * number + 2]
        if start in begins and not np.array_equal(whole[: len(before)], before):
            return start
        mask[_reached(whole, before) : _reached(whole, upto)] = True
    return Encoded(whole, mask, plan.unopened)


def _reached(whole: np.ndarray, part: np.ndarray) -> int:
    """How many tokens of ``whole`` hold the text of ``part``, with which it begins."""
    if np.array_equal(whole[: len(part)], part):
        return len(part)
    size = min(len(whole), len(part))
    return int(np.argmax(whole[:size] != part[:size])) + 1


def template_of(
    tokenizer: Tokenizer,
    where: str = "chat template",
    date: str = "",
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    sanitize: bool = False,
) -> Template | None:
    """The tokenizer's own template; None if it has none."""
    sources = tokenizer.templates
    return Template(sources, tokenizer, tokenizer.named, where, date, kwargs, sanitize) if sources else None


def with_chatml(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with ChatML: its template and two tokens, which get new ids if they are missing.

    ``<|im_end|>`` becomes the token at which generation stops. transformers reads the same ids and template.

    Raises:
        UserError: see ``with_tokens``.
    """
    return with_tokens(tokenizer, CHATML_TOKENS, {"chat_template": CHATML, "eos_token": CHATML_TOKENS[1]})
