"""Finds the assistant's turns in what a template makes of a conversation, or says why they cannot be found."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from mlxgpt.common.chat import jinja, turns
from mlxgpt.common.chat.control import Control
from mlxgpt.common.chat.turns import Form, Plan
from mlxgpt.common.errors import UserError

SAID, ASKED = "2f6b51c8", "9d30e7a4"  # texts that no template alters
UNROLL = "tune.unroll = true makes an example of each answer and what precedes it"

Messages = Sequence[dict[str, Any]]


class Talk(NamedTuple):
    """A conversation to encode: ``where`` names its row, ``kwargs`` are values that the row gives its template."""

    where: str
    messages: Messages
    tools: Messages = ()
    train: Sequence[bool] = ()  # one for each message, whether it is trained on; empty: every assistant's is
    kwargs: Mapping[str, Any] = MappingProxyType({})

    @property
    def answers(self) -> list[int]:
        """The assistant's messages, as indexes."""
        return [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def turns(self) -> list[int]:
        """The assistant's messages that are trained on, as indexes."""
        return [k for k in self.answers if not self.train or self.train[k]]


class Renders(Protocol):
    """What is asked of a template."""

    name: str
    marked: bool
    """Whether it marks turns with {% generation %}."""

    control: Control

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text."""
        ...

    def render(
        self, messages: Messages, tools: Messages = (), generation: bool = False, marks: bool = False, **more: Any
    ) -> str:
        """The text of a conversation."""
        ...


class Locator:
    """Finds turns in what one template writes."""

    def __init__(self, template: Renders) -> None:
        self._template, self._name = template, template.name
        self._asked: list[dict[str, Any]] = [{"role": "user", "content": ASKED}]
        try:
            start = template.render(self._asked)
        except UserError as error:  # some templates want a system prompt
            self._asked.insert(0, {"role": "system", "content": SAID[::-1]})
            try:
                start = template.render(self._asked)
            except UserError:
                raise error from None
        prompt = template.render(self._asked, generation=True)
        self._header = prompt[len(start) :] if prompt.startswith(start) else ""

    @functools.cached_property
    def form(self) -> Form:
        """How the template writes a turn.

        Raises:
            UserError: no token ends it.
        """
        said = [*self._asked, {"role": "assistant", "content": SAID}]
        text, more = self._template.render(said), self._template.render([*said, self._asked[-1]])
        if SAID not in text:
            raise UserError(f"{self._name} does not write the content of an answer: expected a template that does")
        last, past = (one.partition(SAID)[2] for one in (text, more))
        header = text[: text.find(SAID)]
        header = header[header.rfind(ASKED) + len(ASKED) :]  # with the user's end
        prompt = self._template.render(self._asked, generation=True)
        prompt = prompt[prompt.rfind(ASKED) + len(ASKED) :]
        both = turns.common(header, prompt)
        opening, lead = prompt[both:], header[both:]
        if opening and lead:  # two ways to begin, not one that goes on
            opening = lead = ""
        if run := self._run(last, past, header):
            end = "".join(run)
            return Form(self._number(run), end, last[last.find(end) + len(end) :], False, opening, lead)
        following = self._template.control.leading(past)[:1]
        if last.strip() or not following:
            raise UserError(
                f"{self._name}: an answer is followed by {(last or past)[:40]!r}: expected a special token that "
                "ends it, or a model tuned on this never stops: tune.template = chatml adds one, or names a jinja file "
                "that writes eos_token there"
            )
        return Form(self._number(following), following[0], last, True, opening, lead)

    def _number(self, tokens: Sequence[str]) -> tuple[int, ...]:
        return tuple(n for token in tokens if (n := self._template.id_of(token)) is not None)

    def _run(self, last: str, past: str, header: str) -> list[str]:
        """The tokens that end an answer, from the texts behind the last one and one that more follows.

        What begins a turn is none of them: Cohere's template writes the next turn's beginning unasked.
        """
        run, shared = (self._template.control.leading(text.lstrip()) for text in (last, past))
        begins = self._template.control.all(header)[1:]
        kept = run[:1]
        for one, other in zip(run[1:], shared[1:], strict=False):
            if kept[0] != shared[0] or one != other or one in begins:
                break
            kept.append(one)
        return kept

    def plan(self, talk: Talk, last_only: bool) -> Plan:
        """The text of a conversation and its trained turns; ``last_only``: the last one, behind its generation prompt.

        Raises:
            UserError: names the row whose turns cannot be located exactly.
        """
        try:
            if self._template.marked:
                return self._from_marks(talk, last_only)
            return self._unrolled(talk, talk.answers[-1]) if last_only else self._located(talk)
        except UserError as error:
            raise UserError(f"{talk.where}: {error}") from None

    def _located(self, talk: Talk) -> Plan:
        """Each turn by the text before it and the text up to its end."""
        text, unopened, spans, opening = self._render(talk), False, [], self.form.opening
        for k in talk.turns:
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
                    f"{self._name} changes an answer when more follows (as Qwen3 drops its thinking), "
                    f"so the assistant's tokens cannot be located: {UNROLL}"
                )
            if self.form.bare:
                text, stop = self._closed(text, stop)
            spans.append(turns.span(text, start, stop))
        return Plan(text, spans, unopened)

    def _render(self, talk: Talk, count: int | None = None, generation: bool = False) -> str:
        return self._template.render(talk.messages[:count], talk.tools, generation, **talk.kwargs)

    def _otherwise(self, talk: Talk, k: int, alone: bool) -> str:
        """Why the prompt of the answer ``k`` is not in the text, and what to do."""
        if alone:
            why = "changes what precedes an answer when more follows, so the assistant's tokens cannot be located"
            return f"{self._name} {why}: {UNROLL}"
        self._unrolled(talk, k)
        why = (
            "writes the prompt of an answer otherwise when the answer follows, so training would not see what chat sees"
        )
        return f"{self._name} {why}: {UNROLL}"

    def _unrolled(self, talk: Talk, k: int) -> Plan:
        """The answer ``k`` behind its generation prompt."""
        before, upto, message = self._render(talk, k, True), self._render(talk, k + 1), talk.messages[k]
        text = turns.unrolled(before, upto, self.form, message, lambda: self._content(talk, k, upto))
        if text is None:
            raise UserError(
                f"{self._name} writes the prompt of an answer otherwise when the answer follows: expected "
                "tune.template = a jinja file that does not"
            )
        stop = len(text) - len(upto) + self._stop(upto)
        if self.form.bare:
            text, stop = self._closed(text, stop)
        return Plan(text, [turns.span(text, len(before), stop)])

    def _content(self, talk: Talk, k: int, upto: str) -> int | None:
        """Where the content of the answer ``k`` begins in ``upto``; None if that is uncertain."""
        message = {**talk.messages[k], "content": SAID}
        place = self._template.render([*talk.messages[:k], message], talk.tools, **talk.kwargs)
        found = place.rfind(SAID)
        return found if found >= 0 and upto.startswith(place[:found]) else None

    def _stop(self, upto: str) -> int:
        """Where the last turn of ``upto`` ends: behind its end tokens."""
        form = self.form
        stop = len(upto) - len(form.rest) if upto.endswith(form.rest) else len(upto.rstrip())
        if not form.bare and not upto.endswith(self._template.control.texts, 0, stop):
            raise UserError(f"{self._name}: an answer without {form.end}, which ends the others")
        return stop

    def _closed(self, text: str, stop: int) -> tuple[str, int]:
        """Text and turn with the token that ends it, where the template writes none: the next turn's first."""
        if following := self._template.control.leading(text[stop:]):
            return text, stop + len(following[0])
        if text[stop:].strip():
            raise UserError(f"{self._name}: an answer without {self.form.end}, which ends the others")
        return text[:stop] + self.form.end, stop + len(self.form.end)

    def _from_marks(self, talk: Talk, last_only: bool) -> Plan:
        """The turns that the template marks, without the header that some templates enclose."""
        text, spans, form = "", [], self.form
        marked = self._template.render(talk.messages, talk.tools, marks=True, **talk.kwargs)
        parts = marked.replace(jinja.END, jinja.BEGIN).split(jinja.BEGIN)
        whole, heads = "".join(parts), (self._header, self._header.removesuffix(form.opening))
        for number, part in enumerate(parts):
            if number % 2:
                skip = next((len(head) for head in heads if head and part.startswith(head)), 0)
                start, stop = len(text) + skip, len(text) + len(part)
                if form.bare:
                    whole, stop = self._closed(whole, stop)
                else:
                    stop = self._marked_stop(whole, start, stop)
                spans.append(turns.span(whole, start, stop))
            text += part
        if not spans:
            raise UserError(f"{self._name} encloses nothing in {{% generation %}}: expected an answer")
        if last_only:
            return Plan(whole, spans[-1:])
        if len(talk.turns) < len(talk.answers):
            if len(spans) != len(talk.answers):
                raise UserError(
                    f"{self._name} encloses {len(spans)} parts of {len(talk.answers)} answers in {{% generation %}}, "
                    f"so a turn of weight 0 cannot be located: {UNROLL}"
                )
            spans = [one for k, one in zip(talk.answers, spans, strict=True) if k in talk.turns]
        return Plan(whole, spans)

    def _marked_stop(self, text: str, start: int, stop: int) -> int:
        """Where a marked turn ends: behind its end tokens, which the mark may leave out, and before what follows."""
        end, texts = self.form.end, self._template.control.texts
        trimmed = len(text[:stop].removesuffix(self.form.rest).rstrip())
        if trimmed > start and text.endswith(texts, start, trimmed):
            stop = trimmed
        for held in range(len(end), -1, -1):
            if text.endswith(end[:held], start, stop) and text.startswith(end[held:], stop):
                return stop + len(end) - held
        if not text.endswith(texts, start, stop):
            raise UserError(f"{self._name}: an answer without {end}, which ends the others")
        return stop
