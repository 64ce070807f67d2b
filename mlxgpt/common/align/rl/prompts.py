"""The prompts of reinforcement learning: a file of rows with ``prompt`` (text or messages) or ``messages``.

Other keys of a row, such as ``answer``, are what reward functions receive.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.common import rng
from mlxgpt.common.config import ModelConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import digests, find_files, read_values
from mlxgpt.common.rows.messages import read_messages
from mlxgpt.common.rows.values import string_at
from mlxgpt.common.sft.template import Template, template_of
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """One row."""

    where: str  # file and row
    text: str  # as it was given; of messages their last
    messages: tuple[Mapping[str, Any], ...] | None  # None: a text
    columns: Mapping[str, Any]
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """The first half of sha256 of its tokens."""
        return hashlib.sha256(" ".join(map(str, self.ids)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Prompts:
    """Those of a file that leave room for a completion, and sha256 of the file by its name."""

    rows: list[Prompt]
    digest: dict[str, str]
    template: Template | None
    dropped: int  # too long

    def of_rollout(self, number: int, count: int, seed: int) -> list[int]:
        """The rows (from 0) of rollout ``number`` (from 0): each once in an epoch, in an order of its own."""
        found, size = [], len(self.rows)
        for place in range(number * count, (number + 1) * count):
            order = rng.permutation(seed, "rl prompts", place // size, count=size)
            found.append(int(order[place % size]))
        return found


def read(
    tune: TuneConfig,
    tokenizer: Tokenizer,
    config: ModelConfig,
    raw: bool,
    max_tokens: int,
    say: Callable[[str], None] = print,
) -> Prompts:
    """The prompts of ``tune.source``; texts are asked in the model's chat template, if it has one and not ``raw``.

    Raises:
        UserError: no file, a row without a prompt, messages without a template, or no prompt that leaves room.
    """
    path = Path(tune.source).expanduser()
    files = find_files(path)
    template = _template(tune, tokenizer, raw)
    rows = [_prompt(row, where, tune, tokenizer, template, raw) for where, row in read_values(files["train"])]
    if not rows:
        raise UserError(f"{path}: no rows: expected prompts")
    most = config.block_size - max_tokens
    kept = [row for row in rows if 0 < len(row.ids) <= most]
    dropped = len(rows) - len(kept)
    if dropped:
        longest = max(rows, key=lambda row: len(row.ids))
        what = (
            f"{dropped:,} of {len(rows):,} prompts have more than {most} tokens, which leaves no room for "
            f"rl.max_tokens = {max_tokens} in the context of {config.block_size}"
        )
        if not kept:
            raise UserError(f"{path}: {what}: expected shorter prompts, or a smaller rl.max_tokens")
        say(f"{path}: {what}: left out, the longest in {longest.where}")
    form = "as they are" if template is None or raw else f"in {template.name}"
    say(f"prompts: {path}: {len(kept):,}, {form}")
    return Prompts(kept, digests([files["train"]]), template, dropped)


def _template(tune: TuneConfig, tokenizer: Tokenizer, raw: bool) -> Template | None:
    if tune.template not in ("auto", ""):
        raise UserError(f"tune.template = {tune.template}: expected auto: the model's own template asks, as in chat")
    where = f"{tune.model}: chat template"
    return template_of(tokenizer, where, date=tune.date, kwargs=tune.chat_template_kwargs)


def _prompt(
    row: Mapping[str, Any], where: str, tune: TuneConfig, tokenizer: Tokenizer, template: Template | None, raw: bool
) -> Prompt:
    key = tune.prompt_key if tune.prompt_key in row else tune.messages_key
    if key not in row:
        known = ", ".join(map(repr, list(row)[:8]))
        raise UserError(f"{where}: keys {known}: expected {tune.prompt_key} (a text or messages), or tune.prompt_key")
    columns = {name: value for name, value in row.items() if name != key}
    if not isinstance(row[key], list):
        text = string_at(dict(row), key, where)
        asked: Sequence[Mapping[str, Any]] = [{"role": "user", "content": text}]
        if template is None or raw:
            ids = beginning.start(tokenizer, text)
            ids = ids if ids or tokenizer.eos_id is None else [tokenizer.eos_id]
            return _nonempty(Prompt(where, text, None, columns, tuple(ids)))
        return _nonempty(Prompt(where, text, None, columns, tuple(_rendered(template, asked, where))))
    if template is None:
        raise UserError(f"{where}: messages: {tune.model} has no chat template: expected prompts as texts")
    messages, _ = read_messages(dict(row), key, where)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: ends with an assistant's message: expected a question, which the model answers")
    text = messages[-1].get("content") or ""
    return _nonempty(Prompt(where, str(text), messages, columns, tuple(_rendered(template, messages, where))))


def _rendered(template: Template, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    try:
        return template.encode([dict(each) for each in messages], generation=True, typed=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _nonempty(prompt: Prompt) -> Prompt:
    if not prompt.ids:
        raise UserError(f"{prompt.where}: an empty prompt: expected at least one token")
    return prompt


def add_ends(tokenizer: Tokenizer, prompts: Prompts, raw: bool) -> None:
    """What ends an answer in the template ends a completion, too."""
    if prompts.template and not raw:
        tokenizer.ends |= {prompts.template.end_id} - {tokenizer.eos_id}
