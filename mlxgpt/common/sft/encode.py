"""Turns rows into examples: tokens, targets and weights, truncated to a maximum length."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxgpt.common.chat import shorten
from mlxgpt.common.chat.locate import Talk
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.row import Row, as_messages
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.template import Encoded, Template
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.padding import own_padding, without_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer

_GROUP = 512  # rows tokenized at once
_Encoded = tuple[str, np.ndarray, np.ndarray, Talk | None]
"""Where a row came from, its ids, what is trained of them, and the conversation."""


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
    truncated: int = 0  # rows that lost oldest turns or the middle of their prompt
    cut: int = 0  # rows that lost the end of the answer, or of a text
    dropped: int = 0
    unanswerable: int = 0  # of these, rows that would have lost the question of their answer, or all of the answer
    lost: int = 0  # tokens
    wider: int = 0  # tune.block_size that keeps most of the dropped rows, if the model's context holds one
    beyond: int = 0  # rows that are longer even so
    unopened: int = 0  # examples whose answers lack what the generation prompt opens


@dataclass
class Encoder:
    """Encodes rows. ``template`` is None for plain text; ``labels`` is empty unless texts are classified."""

    tune: TuneConfig
    tokenizer: Tokenizer
    template: Template | None
    size: int  # maximum tokens of an example
    context: int = 0  # the model's
    labels: tuple[str, ...] = ()
    label_weights: tuple[float, ...] = ()
    whole: bool = False  # an example is a whole text, whose last token is given a score
    kept: list[int] = field(default_factory=list)

    def examples(self, rows: Sequence[Row], together: int = 1) -> tuple[list[Example], Counts]:
        """The rows as examples, none longer than ``size``.

        ``together`` rows stand for one item, such as the two of a pair: they stay or are dropped as one, and counts
        of rows are of items. ``kept`` then has the items that stayed, by index.

        Raises:
            UserError: names the row that cannot be rendered, tokenized or truncated, or that has no target.
        """
        made: list[Example | int] = []  # or the length of one that is dropped
        counts = Counts(rows=len(rows) // together)
        for start in range(0, len(rows), _GROUP):
            group = rows[start : start + _GROUP]
            if self.labels:
                made += self._labeled(group, counts)
            else:
                made += self._all_fitted(list(self._encoded(group, counts)), together, counts)
        items = [made[start : start + together] for start in range(0, len(made), together)]
        self.kept = [k for k, item in enumerate(items) if not any(isinstance(each, int) for each in item)]
        others = [item for item in items if any(isinstance(each, int) for each in item)]
        lengths = [[each if isinstance(each, int) else len(each) for each in item] for item in others]
        dropped = list(map(max, lengths))
        counts.dropped, counts.lost = len(dropped), counts.lost + sum(map(sum, lengths))
        examples = [each for k in self.kept for each in items[k] if not isinstance(each, int)]
        counts.tokens = sum(map(len, examples))
        counts.trained = sum(int(np.count_nonzero(example.weights)) for example in examples)
        counts.longest = max(map(len, examples), default=0)
        if dropped:
            counts.wider = self._wider(dropped)
            counts.beyond = sum(length > counts.wider for length in dropped)
        return examples, counts

    def _wider(self, dropped: Sequence[int]) -> int:
        """Twice the window, or four times it and so on: what keeps most of the dropped, up to the model's context.

        0 if even that keeps none.
        """
        size, best, left = self.size, 0, len(dropped)
        while size < self.context and left > len(dropped) // 5:
            size = min(2 * size, self.context)
            longer = sum(length > size for length in dropped)
            best, left = (size, longer) if longer < left else (best, left)
        return best

    def _all_fitted(self, rows: Sequence[_Encoded], together: int, counts: Counts) -> list[Example | int]:
        """Rows as examples; those of an item have one prompt, shortened to leave room for the longest of its answers.

        An item whose prompts cannot be shortened alike is dropped.
        """
        made: list[Example | int] = []
        for start in range(0, len(rows), together):
            item, before = rows[start : start + together], dataclasses.replace(counts)
            answers = [len(ids) - int(np.argmax(mask)) for _, ids, mask, _ in item]
            most = [self.size + self._unseen - max(answers) + answer for answer in answers]
            found = [self._fitted(*row, room, counts) for row, room in zip(item, most, strict=True)]
            whole = not any(isinstance(each, int) for each in found)
            cut = together > 1 and any(len(ids) > room for (_, ids, *_), room in zip(item, most, strict=True))
            if (
                cut
                and not self.whole
                and len({each.prompt.tobytes() for each in found if isinstance(each, Example)}) > 1
            ):
                whole = False
            if not whole:
                counts.truncated, counts.cut, counts.lost = before.truncated, before.cut, before.lost
                counts.unanswerable = before.unanswerable + (self.tune.overflow != "drop")
                found = [len(ids) - self._unseen for _, ids, *_ in item]
            made += found
        return made

    def _encoded(self, rows: Sequence[Row], counts: Counts) -> Iterator[_Encoded]:
        """(where, ids, mask) of each row, or of each of its answers with tune.unroll; with the conversation."""
        if self.template is None:
            for plain in self._plain(rows):
                yield *plain, None
            return
        rows = [as_messages(row) for row in rows]
        talks = [Talk(row.where, row.messages, row.tools, row.train, row.kwargs) for row in rows]
        for row in rows:
            self.template.check_kwargs(row.kwargs, f"{row.where}: chat_template_kwargs")
        if self.tune.unroll:
            talks = [
                talk._replace(messages=talk.messages[: k + 1], train=talk.train[: k + 1])
                for talk in talks
                for k in talk.turns
            ]
        for talk, one in zip(talks, self._turns(talks), strict=True):
            counts.unopened += one.unopened
            yield talk.where, one.ids, one.mask, talk

    def _turns(self, talks: Sequence[Talk]) -> list[Encoded]:
        assert self.template
        if self.tune.train_on_prompt or self.whole:
            wholes = [np.asarray(ids, np.int32) for ids in self.template.encode_whole(talks)]
            return [Encoded(ids, np.ones(len(ids), bool)) for ids in wholes]
        return self.template.encode_turns(talks, self.tune.unroll, self.tune.train_on)

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
            encode = self.tokenizer.encode_plain if self.tune.sanitize else self.tokenizer.encode_batch
            return [np.asarray(ids, np.int32) for ids in encode(texts)]
        except UserError:
            for row, text in zip(rows, texts, strict=True):
                try:
                    self.tokenizer.encode(text)
                except UserError as error:
                    raise UserError(f"{row.where}: {error}") from None
            raise

    @property
    def _unseen(self) -> int:
        """Tokens of a row that are only a target: its last, unless that is given a score."""
        return 0 if self.whole else 1

    def _fitted(
        self, where: str, ids: np.ndarray, mask: np.ndarray, talk: Talk | None, most: int, counts: Counts
    ) -> Example | int:
        """The row as an example of at most ``most`` tokens, the last of which is only a target.

        Its length if it is dropped.
        """
        if not mask[1:].any():
            raise UserError(f"{where}: {self._untrained(len(ids))}")
        if self.tune.overflow == "start":  # as trl counts: the last token among them
            most = self.size
        if len(ids) > most:
            self._too_long(where, len(ids) - self._unseen)
            fitted = None if self.tune.overflow == "drop" else self._shortened(ids, mask, talk, most)
            if fitted is None:
                counts.unanswerable += self.tune.overflow != "drop"
                return len(ids) - self._unseen
            counts.lost += len(ids) - len(fitted[0][0])
            (ids, mask), truncated, cut = fitted
            counts.truncated, counts.cut = counts.truncated + truncated, counts.cut + cut
        if self.whole:
            return Example(where, ids, np.zeros(len(ids), np.int32), np.eye(1, len(ids), len(ids) - 1, np.float32)[0])
        return Example(where, ids[:-1], ids[1:], mask[1:].astype(np.float32))

    def _untrained(self, count: int) -> str:
        if self.tune.train_on == "thinking":
            return "no reasoning in its answers: expected some to train on, or tune.train_on = both"
        return f"all {count} tokens are masked: expected an answer to train on"

    def _too_long(self, where: str, length: int) -> None:
        if self.tune.overflow == "refuse":
            raise UserError(
                f"{where}: {length} tokens: expected at most {self.size} "
                "(tune.block_size; tune.overflow = drop, truncate or start takes longer rows)"
            )

    def _shortened(
        self, ids: np.ndarray, mask: np.ndarray, talk: Talk | None, most: int
    ) -> tuple[shorten.Pair, bool, bool] | None:
        """Tokens and mask that fit, whether the prompt was shortened, and whether the end was cut."""
        if self.tune.overflow == "start":
            return ((ids[:most], mask[:most]), False, True) if mask[1:most].any() else None
        if talk:
            found = shorten.fit_talk(talk, most, self._pair, lambda text: len(self.tokenizer.encode(text)))
            return found if found and found[0][1][1:].any() else None
        start = int(np.argmax(mask))
        if start < 2:  # a text
            return (ids[:most], mask[:most]), False, True
        kept = shorten.fit_prompt(min(len(self.tokenizer.before), start), start, len(ids), most)
        if kept is None:
            return None
        return (ids[kept], mask[kept]), bool(np.any(np.diff(kept) > 1)), bool(kept[-1] < len(ids) - 1)

    def _pair(self, talk: Talk) -> shorten.Pair:
        (found,) = self._turns([talk])
        return found.ids, found.mask

    def _labeled(self, rows: Sequence[Row], counts: Counts) -> list[Example | int]:
        """Texts as AutoTokenizer gives them, whose last token predicts the label; a longer text loses its end."""
        made: list[Example | int] = []
        pad = own_padding(self.tokenizer)
        for row, ids in zip(rows, self._ids(rows, [row.text for row in rows]), strict=True):
            if not len(ids):
                raise UserError(f"{row.where}: no tokens: expected text")
            ids = without_padding(beginning.wrap(self.tokenizer, ids), pad)
            if len(ids) > self.size:
                self._too_long(row.where, len(ids))
                if self.tune.overflow == "drop":
                    made.append(len(ids))
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
