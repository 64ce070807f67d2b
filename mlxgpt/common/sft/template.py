"""Chat templates, and the tokens of the assistant's turns: located exactly, or refused.

A template is the tokenizer's own (jinja2, sandboxed, with what transformers gives it), or ChatML. A conversation is
rendered and tokenized whole, so its ids are those of transformers' apply_chat_template. An assistant's turn begins
after the generation prompt and ends with the template's end-of-turn tokens. Both are accepted only if the text before
the turn is what the model sees when it is asked, and if its ids, tokenized alone, are a prefix of the whole. Templates
that mark turns with {% generation %} give the positions themselves.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from mlxgpt.common.chat import jinja, turns
from mlxgpt.common.chat.control import Control
from mlxgpt.common.chat.turns import Form, Plan
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.protocol import Tokenizer, read_json

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_SAID, _ASKED = "2f6b51c8", "9d30e7a4"  # texts that no template alters
_UNROLL = "tune.unroll = true makes an example of each answer and what precedes it"
_PERSONS = ("system", "developer", "user", "tool")

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens; ``mask`` is True for what is trained."""

    ids: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool
    unopened: bool = False  # the answers' prompts lack what the generation prompt opens


class Talk(NamedTuple):
    """A conversation to encode."""

    where: str
    messages: Messages
    tools: Messages = ()
    given: dict[str, Any] = {}  # noqa: RUF012  what the template is given beside: enable_thinking and kin
    trained: Sequence[bool] | None = None  # by message; default: every assistant's


class Template:
    """A chat template and its tokenizer.

    Args:
        sources: jinja by name; ``tool_use`` for conversations with tools, else ``default``.
        special: bos_token and the like, which templates write.
        name: for messages.
        date: the date that templates may write, such as 2026-11-25; default: today.
        sanitize: control tokens in messages, tools and settings are text.

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
        sanitize: bool = False,
    ) -> None:
        self.sources, self.tokenizer, self.special, self.name = sources, tokenizer, special, name
        self.sanitize = sanitize
        self._day = datetime.fromisoformat(date) if date else None
        for source in sources.values():
            try:
                jinja.compiled(source, False)
            except jinja2.TemplateError as error:
                raise UserError(f"{name}: not a template: {jinja.said(error)}") from None
        self.marked = any("generation" in jinja.tags(source) for source in sources.values())
        start = self.render([{"role": "user", "content": _ASKED}])
        asked = self.render([{"role": "user", "content": _ASKED}], generation=True)
        self._header = asked[len(start) :] if asked.startswith(start) else ""

    @functools.cached_property
    def control(self) -> Control:
        """The control tokens."""
        return Control(self.tokenizer, "\0".join(map(jinja.literals, self.sources.values())))

    @property
    def end(self) -> str:
        """The text of the end token."""
        return self.tokenizer.decode([self.end_id])

    @property
    def end_id(self) -> int:
        """The token that ends an assistant's turn, the last where several do."""
        return self.form.ends[-1]

    def render(
        self, messages: Messages, tools: Messages = (), generation: bool = False, marks: bool = False, **more: Any
    ) -> str:
        """The text of a conversation; ``generation`` adds the generation prompt.

        Raises:
            UserError: an error of the template.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise UserError(f"{self.name}: templates {', '.join(self.sources)}: expected one called default")
        given = {"messages": list(messages), "tools": list(tools) or None, "documents": None}
        try:
            return jinja.compiled(self.sources[name], marks).render(
                **{**self.special, "strftime_now": self._now, **given, "add_generation_prompt": generation, **more}
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
            mark = self.control.mark
            messages = [mark(one) if one.get("role") in _PERSONS else one for one in messages]
            return self.control.encode(self.render(messages, mark(list(tools)), generation, **more)).tolist()
        messages, tools, more = self._safe(messages, tools, more)
        return self._ids([self.render(messages, tools, generation, **more)])[0].tolist()

    def _safe(self, messages: Messages, tools: Messages, given: dict[str, Any]) -> tuple[Messages, Messages, dict]:
        """Messages, tools and settings, marked where control tokens in them are text."""
        if not self.sanitize:
            return messages, tools, given
        mark = self.control.mark
        return mark(list(messages)), mark(list(tools)), mark(given)

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.sanitize:
            return [self.control.encode(text) for text in texts]
        return self.tokenizer.encode_batch(texts)

    @functools.cached_property
    def form(self) -> Form:
        """How the template writes a turn.

        Raises:
            UserError: no token ends it.
        """
        asked, said = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}
        text = self.render([asked, said])
        more = self.render([asked, said, asked])
        last, past = (one[one.find(_SAID) + len(_SAID) :] for one in (text, more))
        header = text[: text.find(_SAID)]
        header = header[header.rfind(_ASKED) + len(_ASKED) :]  # with the user's end
        prompt = self.render([asked], generation=True)
        prompt = prompt[prompt.rfind(_ASKED) + len(_ASKED) :]
        both = turns.common(header, prompt)
        opening, lead = prompt[both:], header[both:]
        if opening and lead:  # two ways to begin, not one that goes on
            opening = lead = ""
        if run := self._run(last, past, header):
            end = "".join(run)
            return Form(self._number(run), end, last[last.find(end) + len(end) :], False, opening, lead)
        following = self.control.leading(past)[:1]
        if last.strip() or not following:
            raise UserError(
                f"{self.name}: an answer is followed by {(last or past)[:40]!r}: expected a special token that ends it, "
                "or a model tuned on this never stops: tune.template = chatml adds one, or names a jinja file that "
                "writes eos_token there"
            )
        return Form(self._number(following), following[0], last, True, opening, lead)

    def _number(self, tokens: Sequence[str]) -> tuple[int, ...]:
        return tuple(n for token in tokens if (n := self.tokenizer.id_of(token)) is not None)

    def _run(self, last: str, past: str, header: str) -> list[str]:
        """The tokens that end an answer, from the texts behind the last one and one that more follows.

        What begins a turn is none of them: Cohere's template writes the next turn's beginning unasked.
        """
        run, shared = (self.control.leading(text.lstrip()) for text in (last, past))
        begins = self.control.all(header)[1:]
        kept = run[:1]
        for one, other in zip(run[1:], shared[1:], strict=False):
            if kept[0] != shared[0] or one != other or one in begins:
                break
            kept.append(one)
        return kept

    def encode_turns(self, talks: Sequence[Talk | tuple], last_only: bool = False, part: str = "both") -> list[Encoded]:
        """Tokens and masks of conversations; ``last_only``: of the last answer, behind its generation prompt.

        ``part``: both, answer or thinking. If template and answer would share a token, the text is split there, as it
        is in generation.

        Raises:
            UserError: names the row whose turns cannot be located exactly.
        """
        held = [Talk(*talk) for talk in talks]
        plans = [self._plan(talk, last_only) for talk in held]
        edges = [turns.chosen(plan.spans, part) for plan in plans]
        pieces = [
            [plan.text, *(plan.text[:at] for pair in pairs for at in pair)]
            for plan, pairs in zip(plans, edges, strict=True)
        ]
        texts = list(dict.fromkeys(text for every in pieces for text in every))
        encoded = dict(zip(texts, self._ids(texts), strict=True))
        made = []
        for talk, plan, pairs, every in zip(held, plans, edges, pieces, strict=True):
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

    def _plan(self, talk: Talk, last_only: bool) -> Plan:
        """The text of a conversation, and of its turns those that are trained."""
        messages, tools, given = self._safe(talk.messages, talk.tools, talk.given)
        safe = Talk(talk.where, messages, tools, given)
        numbers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        numbers = numbers[-1:] if last_only else numbers
        kept = [k for k in numbers if talk.trained is None or talk.trained[k]]
        try:
            if self.marked:
                return self._from_marks(safe, numbers, kept)
            return self._unrolled(safe, numbers[0]) if last_only else self._located(safe, kept)
        except UserError as error:
            raise UserError(f"{talk.where}: {error}") from None

    def _located(self, talk: Talk, numbers: Sequence[int]) -> Plan:
        """The turns ``numbers``, each by the text before it and the text up to its end."""
        text, unopened, spans, opening = self._render(talk), False, [], self.form.opening
        for k in numbers:
            before, upto = self._render(talk, k, True), self._render(talk, k + 1)
            start = len(before)
            if not text.startswith(before):
                base = before.removesuffix(opening)
                if base == before or not text.startswith(base):
                    raise UserError(self._otherwise(talk, k, upto.startswith((before, base))))
                start, unopened = len(base), True
            stop = self._stop(upto)
            if not text.startswith(upto[:stop]):
                raise UserError(
                    f"{self.name} changes an answer when more follows (as Qwen3 drops its thinking), "
                    f"so the assistant's tokens cannot be located: {_UNROLL}"
                )
            if self.form.bare:
                text, stop = self._closed(text, stop)
            spans.append(turns.span(text, start, stop))
        return Plan(text, spans, unopened)

    def _render(self, talk: Talk, count: int | None = None, generation: bool = False) -> str:
        return self.render(talk.messages[:count], talk.tools, generation, **talk.given)

    def _otherwise(self, talk: Talk, k: int, alone: bool) -> str:
        """Why the prompt of the answer ``k`` is not in the text, and what to do."""
        if alone:
            why = "changes what precedes an answer when more follows, so the assistant's tokens cannot be located"
            return f"{self.name} {why}: {_UNROLL}"
        self._unrolled(talk, k)
        why = (
            "writes the prompt of an answer otherwise when the answer follows, so training would not see what chat sees"
        )
        return f"{self.name} {why}: {_UNROLL}"

    def _unrolled(self, talk: Talk, k: int) -> Plan:
        """The answer ``k`` behind its generation prompt."""
        before, upto, message = self._render(talk, k, True), self._render(talk, k + 1), talk.messages[k]
        text = turns.unrolled(before, upto, self.form, message, lambda: self._content(talk, k, upto))
        if text is None:
            raise UserError(
                f"{self.name} writes the prompt of an answer otherwise when the answer follows: expected "
                "tune.template = a jinja file that does not"
            )
        stop = len(text) - len(upto) + self._stop(upto)
        if self.form.bare:
            text, stop = self._closed(text, stop)
        return Plan(text, [turns.span(text, len(before), stop)])

    def _content(self, talk: Talk, k: int, upto: str) -> int | None:
        """Where the content of the answer ``k`` begins in ``upto``; None if that is uncertain."""
        message = {**talk.messages[k], "content": _SAID}
        place = self.render([*talk.messages[:k], message], talk.tools, **talk.given)
        found = place.rfind(_SAID)
        return found if found >= 0 and upto.startswith(place[:found]) else None

    def _stop(self, upto: str) -> int:
        """Where the last turn of ``upto`` ends: behind its end tokens."""
        form = self.form
        stop = len(upto) - len(form.rest) if upto.endswith(form.rest) else len(upto.rstrip())
        if not form.bare and not upto.endswith(self.control.texts, 0, stop):
            raise UserError(f"{self.name}: an answer without {form.end}, which ends the others")
        return stop

    def _closed(self, text: str, stop: int) -> tuple[str, int]:
        """Text and turn with the token that ends it, where the template writes none: the next turn's first."""
        if following := self.control.leading(text[stop:]):
            return text, stop + len(following[0])
        if text[stop:].strip():
            raise UserError(f"{self.name}: an answer without {self.form.end}, which ends the others")
        return text[:stop] + self.form.end, stop + len(self.form.end)

    def _from_marks(self, talk: Talk, numbers: Sequence[int], kept: Sequence[int]) -> Plan:
        """The turns that the template marks, without the header that some templates enclose."""
        text, spans, form = "", [], self.form
        marked = self.render(talk.messages, talk.tools, marks=True, **talk.given)
        parts = marked.replace(jinja.END, jinja.BEGIN).split(jinja.BEGIN)
        whole, heads = "".join(parts), (self._header, self._header.removesuffix(form.opening))
        for number, part in enumerate(parts):
            if number % 2:
                skip = next((len(head) for head in heads if head and part.startswith(head)), 0)
                start, stop = len(text) + skip, len(text) + len(part)
                spans.append(turns.span(whole, start, self._marked_stop(whole, start, stop)))
            text += part
        if not spans:
            raise UserError(f"{self.name} encloses nothing in {{% generation %}}: expected an answer")
        if len(numbers) == 1:
            spans = spans[-1:]
        if len(kept) < len(numbers):
            if len(spans) != len(numbers):
                raise UserError(
                    f"{self.name} encloses {len(spans)} turns in {{% generation %}}, the row has {len(numbers)}: which "
                    "of them are not to be trained cannot be told"
                )
            spans = [one for k, one in zip(numbers, spans, strict=True) if k in kept]
        return Plan(whole, spans)

    def _marked_stop(self, text: str, start: int, stop: int) -> int:
        """Where a marked turn ends: behind its end tokens, which the mark may leave out, and before what follows."""
        end, texts = self.form.end, self.control.texts
        trimmed = len(text[:stop].removesuffix(self.form.rest).rstrip())
        if trimmed > start and text.endswith(texts, start, trimmed):
            stop = trimmed
        for held in range(len(end), -1, -1):
            if text.endswith(end[:held], start, stop) and text.startswith(end[held:], stop):
                return stop + len(end) - held
        if not text.endswith(texts, start, stop):
            raise UserError(f"{self.name}: an answer without {end}, which ends the others")
        return stop


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


def template_of(tokenizer: Tokenizer, where: str = "chat template", date: str = "") -> Template | None:
    """The tokenizer's own template; None if it has none."""
    sources = tokenizer.templates
    return Template(sources, tokenizer, tokenizer.named, where, date) if sources else None


def with_chatml(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with ChatML: its template and two tokens, which get new ids if they are missing.

    ``<|im_end|>`` becomes the token at which generation stops. transformers reads the same ids and template.

    Raises:
        UserError: a SentencePiece tokenizer.model, which cannot take more tokens.
    """
    if "tokenizer.json" not in tokenizer.files:
        raise UserError(
            "ChatML needs two more tokens, which a tokenizer.model cannot take: expected a tokenizer.json "
            "(transformers' AutoTokenizer ... save_pretrained writes one), or a tokenizer with a chat template"
        )
    import tokenizers

    backend = tokenizers.Tokenizer.from_buffer(tokenizer.files["tokenizer.json"])
    added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in CHATML_TOKENS]
    backend.add_special_tokens(added)
    config = read_json(tokenizer.files, "tokenizer_config.json", Path("."))
    stale = (
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
    )  # tokenizer_config.json replaces them
    config = tokenizer.named | config
    config |= {"chat_template": CHATML, "eos_token": CHATML_TOKENS[1]}
    files = {name: data for name, data in tokenizer.files.items() if name not in stale}
    files |= {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }
    return from_files(files, Path("."))
