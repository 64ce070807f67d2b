"""Chat templates, and the tokens of the assistant's turns: located exactly, or refused.

A template is the tokenizer's own (jinja2, sandboxed, with what transformers gives it), or ChatML. A conversation is
rendered and tokenized whole, so its ids are those of transformers' apply_chat_template. An assistant's turn begins
after the generation prompt and ends with the template's end-of-turn token. Both are accepted only if the ids of the
text before the turn, tokenized alone, are a prefix of the whole: at inference the model sees that prefix. Templates
that mark turns with {% generation %} give the positions themselves.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import numpy as np
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxgpt.common.errors import UserError
from mlxgpt.common.sft import forms
from mlxgpt.common.sft.forms import Reads
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.protocol import Tokenizer, read_json

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters, around what {% generation %} encloses
_SAID = "2f6b51c8"  # an answer that no template alters
_UNROLL = "tune.unroll = true makes an example of each answer and what precedes it"

Messages = Sequence[dict[str, Any]]


class _Generation(jinja2.ext.Extension):
    """{% generation %}: what it encloses, between _BEGIN and _END if the environment has marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}" if getattr(self.environment, "marks", False) else caller()


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(16)
def _compile(source: str, marks: bool) -> jinja2.Template:
    """The template, compiled as transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.extend(marks=marks)
    return environment.from_string(source)


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens; ``mask`` is True for the assistant's."""

    ids: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool


class Talk(NamedTuple):
    """A conversation to encode: ``where`` names its row, ``kwargs`` are values that the row gives its template."""

    where: str
    messages: Messages
    tools: Messages = ()
    train: Sequence[bool] = ()  # one for each message, whether it is trained on; empty: every assistant's is
    kwargs: Mapping[str, Any] = MappingProxyType({})

    @property
    def turns(self) -> list[int]:
        """The assistant's messages that are trained on, as indexes."""
        asked = [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [k for k in asked if not self.train or self.train[k]]


class Template:
    """A chat template and its tokenizer.

    Args:
        sources: jinja by name; ``tool_use`` for conversations with tools, else ``default``.
        special: bos_token and the like, which templates write.
        name: for messages.
        date: the date that templates may write, such as 2026-11-25; default: today.
        kwargs: values that the template may read, such as enable_thinking.

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
    ) -> None:
        self.sources, self.tokenizer, self.special, self.name = sources, tokenizer, special, name
        self.kwargs = dict(kwargs)
        self._reads: dict[str, Reads] = {}
        self._day = datetime.fromisoformat(date) if date else None
        for source in sources.values():
            try:
                _compile(source, False)
            except jinja2.TemplateError as error:
                raise UserError(f"{name}: not a template: {_said(error)}") from None
        self.check_kwargs(self.kwargs, f"{name}: chat_template_kwargs")
        self.marked = any("generation" in _tags(source) for source in sources.values())
        start = self.render([{"role": "user", "content": _SAID}])
        asked = self.render([{"role": "user", "content": _SAID}], generation=True)
        self._header = asked[len(start) :] if asked.startswith(start) else ""

    def check_kwargs(self, kwargs: Mapping[str, Any], where: str) -> None:
        """Refuses values for the template that it does not read; see forms.check_kwargs."""
        if kwargs:
            sources = list(self.sources.values())
            known = forms.variables(_compile(sources[0], False).environment, sources)
            forms.check_kwargs(kwargs, known, where, self.name)

    @property
    def end(self) -> str:
        """The text of the end token."""
        return self.tokenizer.decode([self.end_id])

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
        fitted = self.reads(name).fitted(messages)
        return self._rendered(self.sources[name], fitted, tools, generation, marks, more)

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
            return _compile(source, marks).render(
                {**self.special, "strftime_now": self._now, **self.kwargs, **more, **given},
                add_generation_prompt=generation,
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
            raise UserError(f"{self.name}: {_said(error)}") from None

    def _now(self, form: str) -> str:
        return (self._day or datetime.now()).strftime(form)

    def encode(self, messages: Messages, tools: Messages = (), generation: bool = False, **more: Any) -> list[int]:
        """The ids of a conversation, as transformers' apply_chat_template gives them."""
        return self.tokenizer.encode(self.render(messages, tools, generation, **more))

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an assistant's turn: the first special one after an answer.

        Raises:
            UserError: there is none.
        """
        text = self.render([{"role": "user", "content": _SAID}, {"role": "assistant", "content": _SAID}])
        tail = text[text.rfind(_SAID) + len(_SAID) :]
        special = self.tokenizer.special
        found = next((token for token in self.tokenizer.encode(tail) if token in special), None)
        if found is None:
            raise UserError(
                f"{self.name}: an answer is followed by {tail[:40]!r}: expected a special token that ends it"
            )
        return found

    def encode_turns(self, conversations: Sequence[tuple[Any, ...]], last_only: bool = False) -> list[Encoded]:
        """Tokens and assistant masks of conversations, each a Talk; ``last_only``: train only the last turn.

        If template and answer would share a token, the text is split there, as it is in generation.

        Raises:
            UserError: names the row whose turns cannot be located exactly.
        """
        talks = [Talk(*each) for each in conversations]
        plans = [self._plan(talk, last_only) for talk in talks]
        texts = list(dict.fromkeys(text for plan in plans for text in plan))
        encoded = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))
        made = []
        for (where, *_), plan in zip(talks, plans, strict=True):
            cuts: list[int] = []
            ids = [encoded[text] for text in plan]
            while isinstance(found := self._masked(where, plan, ids), int):
                if found in cuts:
                    raise UserError(f"{where}: {self.name}: no token boundary at the start of an answer")
                cuts.append(found)
                ids = [self._encode_cut(text, cuts) for text in plan]
            as_whole = self.tokenizer.decode(encoded[plan[0]].tolist()) if cuts else ""
            if cuts and self.tokenizer.decode(found.ids.tolist()) != as_whole:
                raise UserError(
                    f"{where}: {self.name} and the answer share a token, and this {self.tokenizer.kind} tokenizer "
                    "cannot split it: expected no white space at the start of the answer"
                )
            made.append(found)
        return made

    def _encode_cut(self, text: str, cuts: list[int]) -> np.ndarray:
        """The ids of ``text``, split at the characters ``cuts``."""
        ends = sorted({cut for cut in cuts if cut < len(text)} | {len(text)})
        return np.concatenate(
            self.tokenizer.encode_batch([text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)])
        )

    def _plan(self, talk: Talk, last_only: bool) -> list[str]:
        """The texts to encode: the whole, then for each trained turn the text before it and the text up to its end."""
        where, messages, tools, _, more = talk
        try:
            if self.marked:
                texts = self._marked_plan(self.render(messages, tools, marks=True, **more))
                texts = self._marked_trained(talk, texts)
            else:
                texts = [self.render(messages, tools, **more)]
                for k in talk.turns:
                    texts += [
                        self.render(messages[:k], tools, generation=True, **more),
                        self.render(messages[: k + 1], tools, **more),
                    ]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if len(texts) < 3:
            raise UserError(f"{where}: {self.name} encloses nothing in {{% generation %}}: expected an answer")
        if last_only:
            texts = [texts[0], *texts[-2:]]
        for before in texts[1::2]:
            if not texts[0].startswith(before):
                raise UserError(
                    f"{where}: {self.name} changes what precedes an answer when more follows, so the "
                    f"assistant's tokens cannot be located: {_UNROLL}"
                )
        return texts

    def _marked_plan(self, marked: str) -> list[str]:
        """The same from marks, without the header that some templates enclose."""
        text, texts = "", []
        for number, part in enumerate(marked.replace(_END, _BEGIN).split(_BEGIN)):
            if number % 2:
                skip = len(self._header) if part.startswith(self._header) else 0
                texts += [text + part[:skip], text + part]
            text += part
        return [text, *texts]

    def _marked_trained(self, talk: Talk, texts: list[str]) -> list[str]:
        """``texts`` without the pairs of turns that are not trained on."""
        asked = [k for k, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if len(talk.turns) == len(asked):
            return texts
        if len(texts) - 1 != 2 * len(asked):
            raise UserError(
                f"{self.name} encloses {(len(texts) - 1) // 2} parts of {len(asked)} answers in {{% generation %}}, so "
                f"a turn of weight 0 cannot be located: {_UNROLL}"
            )
        pairs = [texts[1 + 2 * n : 3 + 2 * n] for n, k in enumerate(asked) if k in talk.turns]
        return [texts[0], *(text for pair in pairs for text in pair)]

    def _masked(self, where: str, texts: list[str], encoded: Sequence[np.ndarray]) -> Encoded | int:
        """The tokens of the whole and the assistant's mask; or the character at which the text must be split."""
        whole = np.asarray(encoded[0], np.int32)
        mask = np.zeros(len(whole), bool)
        for number in range(1, len(texts), 2):
            before, upto = encoded[number], encoded[number + 1]
            start = len(before)
            if not np.array_equal(whole[:start], before):
                return len(texts[number])
            if self.marked and np.array_equal(whole[: len(upto)], upto):
                upto = whole[: len(upto) + 1]  # the end token may follow the mark
            ends = np.flatnonzero(upto[start:] == self.end_id)
            if not len(ends):
                raise UserError(f"{where}: {self.name}: an answer without {self.end}, which ends the others")
            stop = start + int(ends[-1]) + 1
            if not np.array_equal(whole[:stop], upto[:stop]):
                raise UserError(
                    f"{where}: {self.name} changes an answer when more follows (as Qwen3 drops its thinking), "
                    f"so the assistant's tokens cannot be located: {_UNROLL}"
                )
            mask[start:stop] = True
        return Encoded(whole, mask)


def _said(error: Exception) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return " ".join(str(error).split())[:200] + line


@functools.lru_cache(16)
def _tags(source: str) -> set[str]:
    """Names of the block tags in a template."""
    tokens = list(_compile(source, False).environment.lex(source))
    names = [
        next((value for _, kind, value in tokens[n + 1 :] if kind != "whitespace"), "")
        for n, (_, kind, _) in enumerate(tokens)
        if kind == "block_begin"
    ]
    return set(names)


def template_of(
    tokenizer: Tokenizer,
    where: str = "chat template",
    date: str = "",
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Template | None:
    """The tokenizer's own template; None if it has none."""
    sources = tokenizer.templates
    return Template(sources, tokenizer, tokenizer.named, where, date, kwargs) if sources else None


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
