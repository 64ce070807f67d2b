"""Turns rows into examples: tokens, targets and weights, truncated to a maximum length."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlxgpt.common.chat.locate import Talk
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.row import Row, as_messages
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer

_GROUP = 512  # rows tokenized at once


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class Counts:
    """Counts of a split; a classifier's examples have one target each."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0  # tokens that are targets
    longest: int = 0
    truncated: int = 0  # rows whose prompt was truncated from the left
    cut: int = 0  # rows whose answer alone was too long and was truncated from the right
    dropped: int = 0
    lost: int = 0  # tokens


@dataclass
class Encoder:
    """Encodes rows. ``template`` is None for plain text; ``labels`` is empty unless texts are classified."""

    tune: TuneConfig
    tokenizer: Tokenizer
    template: Template | None
    size: int  # maximum tokens of an example
    labels: tuple[str, ...] = ()
    label_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        named = self.tokenizer.named.get("bos_token")
        ids = self.tokenizer.encode(named) if named else []
        self.bos_id = ids[0] if len(ids) == 1 else None

    def examples(self, rows: Sequence[Row]) -> tuple[list[Example], Counts]:
        """The rows as examples, none longer than ``size``.

        Raises:
            UserError: names the row that cannot be rendered, tokenized or truncated, or that has no target.
        """
        made: list[Example] = []
        counts = Counts(rows=len(rows))
        for start in range(0, len(rows), _GROUP):
            group = rows[start : start + _GROUP]
            if self.labels:
                found = self._labeled(group, counts)
            else:
                found = [self._fitted(where, ids, mask, counts) for where, ids, mask in self._encoded(group)]
            made += [example for example in found if example is not None]
        counts.tokens = sum(map(len, made))
        counts.trained = sum(int(np.count_nonzero(example.weights)) for example in made)
        counts.longest = max(map(len, made), default=0)
        return made, counts

    def _encoded(self, rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(where, ids, mask) of each row, or of each of its answers with tune.unroll."""
        if self.template is None:
            yield from self._plain(rows)
            return
        rows = [as_messages(row) for row in rows]
        talks = [Talk(row.where, row.messages, row.tools, row.train, row.kwargs) for row in rows]
        for row in rows:
            self.template.check_kwargs(row.kwargs, f"{row.where}: chat_template_kwargs")
        if self.tune.train_on_prompt:
            for talk, ids in zip(talks, self.template.encode_whole(talks), strict=True):
                yield talk.where, np.asarray(ids, np.int32), np.ones(len(ids), bool)
            return
        if self.tune.unroll:
            talks = [
                talk._replace(messages=talk.messages[: k + 1], train=talk.train[: k + 1])
                for talk in talks
                for k in talk.turns
            ]
        encoded = self.template.encode_turns(talks, self.tune.unroll, self.tune.train_on)
        for (where, *_), one in zip(talks, encoded, strict=True):
            yield where, one.ids, one.mask

    def _plain(self, rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Text from its beginning to the end-of-text token; a prompt is tokenized on its own."""
        begin = functools.partial(beginning.begin, self.tokenizer)
        wholes = self._ids(rows, [row.text + (row.answer or "") for row in rows])
        prompts = self._ids(rows, [row.text if row.answer is not None else "" for row in rows])
        for row, whole, prompt in zip(rows, wholes, prompts, strict=True):
            if not np.array_equal(whole[: len(prompt)], prompt):
                whole = self._joined(row, prompt)
            whole, prompt = beginning.end(self.tokenizer, begin(whole)), begin(prompt)
            mask = np.ones(len(whole), bool)
            # what is put before a text is never predicted
            mask[: len(self.tokenizer.before if self.tune.train_on_prompt else prompt)] = False
            yield row.where, whole, mask

    def _joined(self, row: Row, prompt: np.ndarray) -> np.ndarray:
        """Prompt and answer tokenized apart, if a token of the joint text would span both."""
        (answer,) = self._ids([row], [row.answer or ""])
        joined = np.concatenate([prompt, answer])
        if self.tokenizer.decode(joined.tolist()) != row.text + (row.answer or ""):
            raise UserError(
                f"{row.where}: a token of this {self.tokenizer.kind} tokenizer spans prompt and answer: "
                "expected the white space between them at the start of the answer"
            )
        return joined

    def _ids(self, rows: Sequence[Row], texts: list[str]) -> list[np.ndarray]:
        try:
            return [np.asarray(ids, np.int32) for ids in self.tokenizer.encode_batch(texts)]
        except UserError:
            for row, text in zip(rows, texts, strict=True):
                try:
                    self.tokenizer.encode(text)
                except UserError as error:
                    raise UserError(f"{row.where}: {error}") from None
            raise

    def _fitted(self, where: str, ids: np.ndarray, mask: np.ndarray, counts: Counts) -> Example | None:
        """The row as an example of at most ``size`` tokens; None if it is dropped."""
        excess = len(ids) - (self.size + 1)
        if excess > 0:
            self._too_long(where, len(ids) - 1)
            if self.tune.overflow == "drop":
                counts.dropped, counts.lost = counts.dropped + 1, counts.lost + len(ids) - 1
                return None
            counts.lost += excess
            ids, mask = self._cut(ids, mask, excess, counts)
        weights = mask[1:].astype(np.float32)
        if not weights.any():
            raise UserError(f"{where}: all {len(ids)} tokens are masked: expected an answer to train on")
        return Example(where, ids[:-1], ids[1:], weights)

    def _too_long(self, where: str, length: int) -> None:
        if self.tune.overflow == "refuse":
            raise UserError(
                f"{where}: {length} tokens: expected at most {self.size} "
                "(tune.block_size; tune.overflow = truncate or drop takes longer rows)"
            )

    def _cut(self, ids: np.ndarray, mask: np.ndarray, excess: int, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Truncates from the left what precedes the last answer; an answer that loses its start is no longer a target.

        A beginning-of-text token stays. An answer that is still too long is truncated from the right.
        """
        starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
        keep = int(int(ids[0]) == self.bos_id and not mask[0])
        spare = max(0, int(starts[-1]) - 1 - keep) if len(starts) else 0
        left = min(excess, spare)
        if left:
            counts.truncated += 1
            mask = mask.copy()
            if mask[keep + left] and mask[keep + left - 1]:
                following = np.flatnonzero(~mask[keep + left :])
                mask[keep + left : keep + left + int(following[0])] = False
            ids, mask = (np.concatenate([a[:keep], a[keep + left :]]) for a in (ids, mask))
        if left < excess:
            counts.cut += 1
            ids, mask = ids[: self.size + 1], mask[: self.size + 1]
        return ids, mask

    def _labeled(self, rows: Sequence[Row], counts: Counts) -> list[Example | None]:
        """Texts as AutoTokenizer gives them, whose last token predicts the label; a longer text loses its end."""
        made: list[Example | None] = []
        for row, ids in zip(rows, self._ids(rows, [row.text for row in rows]), strict=True):
            if not len(ids):
                raise UserError(f"{row.where}: no tokens: expected text")
            ids = beginning.wrap(self.tokenizer, ids)
            if len(ids) > self.size:
                self._too_long(row.where, len(ids))
                if self.tune.overflow == "drop":
                    counts.dropped, counts.lost = counts.dropped + 1, counts.lost + len(ids)
                    continue
                counts.cut, counts.lost = counts.cut + 1, counts.lost + len(ids) - self.size
                ids = beginning.wrap(self.tokenizer, ids, self.size)
            if row.label not in self.labels:
                raise UserError(
                    f"{row.where}: label {row.label!r}: expected one of the training labels, {shortened(self.labels)}"
                )
            targets, weights = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.float32)
            targets[-1] = self.labels.index(row.label)
            weights[-1] = self.label_weights[targets[-1]]
            made.append(Example(row.where, ids, targets, weights))
        return made
