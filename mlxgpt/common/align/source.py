"""Preference data as a source of batches: pairs, whose rows 2i and 2i + 1 are the better and the worse one; or rows.

``open_source`` makes it and prints what became of the data. What the run began with is known only when there is an
engine: ``reference`` and ``policy`` are given then, and a batch of a loss that needs them is an error before.

B rows, T tokens a row.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxgpt.common.align import kto
from mlxgpt.common.align_config import REFERENCE, PreferConfig
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import rotary
from mlxgpt.common.model_config import SCORE
from mlxgpt.common.rows import duplicates as row_duplicates
from mlxgpt.common.rows.preferences import Judged, Preferences, equal_pairs, open_preferences
from mlxgpt.common.rows.row import Row
from mlxgpt.common.sft import pack
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.encode import Encoder
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.protocol import Tokenizer

Logps = Callable[[Batch], np.ndarray]
"""Log-probabilities (B,) of the answers in a batch's rows."""


@dataclass
class PairSource(SftSource):
    """batch.Source over preferences; ``examples`` are flat, ``together`` of them an item.

    ``batch_size`` counts items. A pair's length is that of its longer answer. Nothing is packed.
    """

    prefer: PreferConfig = field(default_factory=PreferConfig)
    good: dict[str, np.ndarray] = field(default_factory=dict)  # of single rows, 1 or 0 (N,) float32
    margins: dict[str, np.ndarray] = field(default_factory=dict)  # of pairs (N,) float32
    reference: Mapping[str, np.ndarray] | None = None  # by split, of every example; kto: "SPLIT kl" of its mismatch
    policy: Logps | None = None  # of the model as it is
    _others: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of a reward model's head."""
        return SCORE if self.encoder.whole else ()

    @property
    def single(self) -> bool:
        """Whether rows stand alone, each good or bad."""
        return self.together == 1

    def describe(self) -> dict[str, object]:
        """Counts and settings; also the good ones of single answers."""
        good = {split: int(values.sum()) for split, values in self.good.items()} if self.single else {}
        return super().describe() | {"answers_of_an_item": self.together} | ({"good": good} if good else {})

    def mismatched(self, split: str, rows: Sequence[int]) -> list[Example]:
        """The prompts of kto's rows, each with the answer of the row before it in its batch."""
        examples, others = self.examples[split], self._other(split)
        most = self.size - (self.encoder.tune.overflow == "start")
        return [kto.mismatch(examples[row], examples[others[row]], most) for row in rows]

    def _other(self, split: str) -> np.ndarray:
        if split not in self._others:
            order = self._order(0) if split == "train" else np.arange(len(self.examples[split]))
            self._others[split] = kto.others(self._batches(split, order), len(order))
        return self._others[split]

    def _order(self, epoch: int) -> np.ndarray:
        """Of kto that of the first epoch: which rows share a batch decides their mismatch."""
        return super()._order(0 if self.single else epoch)

    def _build(self, split: str, plan: pack.Plan) -> Batch:
        items = [item for (item,) in plan]
        rows = [self.together * item + k for item in items for k in range(self.together)]
        batch = self.padded(self.examples[split], rows)
        beside, idle = self._beside(split, items, rows, batch), ""
        held = [self.examples[split][row] for row in rows]
        if not (self.single or "nll" in beside or self.prefer.center) and all(map(_equal, held[0::2], held[1::2])):
            idle = "the answers of its pairs are cut to the same tokens"
        each = 1.0 / self.together
        return dataclasses.replace(batch, together=self.together, each=each, beside=beside, idle=idle)

    def padded(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        """Examples by index, padded on the right."""
        return pack.padded_batch(examples, [(row,) for row in rows], self.size, self.by_length)

    def _beside(self, split: str, items: list[int], rows: list[int], batch: Batch) -> dict[str, np.ndarray]:
        """What the objective reads besides."""
        made: dict[str, np.ndarray] = {}
        if self.encoder.whole:
            return {"margin": np.repeat(self.margins[split][items], 2)}
        if self.prefer.loss in REFERENCE:
            if self.reference is None:
                raise AssertionError("a batch before the reference is known")
            made["reference"] = self.reference[split][rows]
        if self.single:
            made["good"] = self.good[split][rows]
            made["kl"] = np.full(len(rows), self._divergence(split, rows), np.float32)
        elif self.prefer.loss == "orpo":
            made["nll"] = self._nll(batch, np.array(self._real(split, rows, batch)), 1.0)
        elif self.prefer.sft:
            made["nll"] = self._nll(batch, batch.weights, self.prefer.sft)
        return made

    def _real(self, split: str, rows: list[int], batch: Batch) -> np.ndarray:
        """1 where a position has a next token, in prompts too (B, T)."""
        lengths = np.array([len(self.examples[split][row]) for row in rows])
        return (np.arange(batch.tokens.shape[1]) < lengths[:, None]).astype(np.float32)

    def _nll(self, batch: Batch, weights: np.ndarray, scale: float) -> np.ndarray:
        """Weights (B, T) by which the better answers' losses sum to ``scale`` times their token mean, times pairs."""
        better = weights.copy()
        better[1::2] = 0
        return (better * (scale * len(weights) / 2 / better.sum(dtype=np.float64))).astype(np.float32)

    def _divergence(self, split: str, rows: list[int]) -> float:
        """The batch's estimate of the divergence from the reference, at least 0."""
        assert self.policy and self.reference is not None
        batch = self.padded(self.mismatched(split, rows), range(len(rows)))
        return kto.divergence(self.policy(batch), self.reference[f"{split} kl"][rows])


def open_source(
    tune: TuneConfig,
    prefer: PreferConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    config: ModelConfig,
    say: Callable[[str], None] = print,
) -> PairSource:
    """The preferences of ``tune.source`` as batches for a model of ``config``; see sft.source.open_source.

    Raises:
        UserError: anything wrong with source, answers, template or window.
    """
    single = tune.task == "prefer" and prefer.loss == "kto"
    found = open_preferences(tune, single)
    encoder, added = sft_source.encoder_of(tune, found.format, tokenizer, config)
    examples, counts, kept = {}, {}, {}
    for split, held in found.splits.items():
        rows = [row for item in held for row in item.rows]
        if tune.unroll:
            _expect_one_answer(rows)
        examples[split], counts[split] = encoder.examples(rows, 1 if single else 2)
        kept[split] = [held[k] for k in encoder.kept]
    if not examples["train"]:
        raise UserError(f"{tune.source}: {sft_source.none_left(counts['train'], encoder)}")
    if single:
        _check_judged(tune, train, kept["train"])
    else:
        found.notes += _different(examples, kept, encoder)
    duplicates = row_duplicates.near_duplicates(found.splits["train"], found.splits["valid"])
    digest = found.digest | {"tokenizer": encoder.tokenizer.digest}
    source = PairSource(train, encoder, False, encoder.size, examples, counts, digest, added, duplicates)
    source.together, source.prefer, source.by_length = 1 if single else 2, prefer, rotary.by_length(config)
    for split, items in kept.items():
        source.good[split] = np.array([item.good for item in items], np.float32)
        source.margins[split] = np.array([item.margin for item in items], np.float32)
    source.add_digests()
    for name in ("good", "margins"):
        values = getattr(source, name)
        source.digest[name] = pack.digest([], *(values[split].tolist() for split in values))
    for line in [*found.notes, *_lines(tune, source, found, kept)]:
        say(line)
    return source


def open_recipe(recipe: Recipe, tokenizer: Tokenizer, config: ModelConfig, say: Callable[[str], None]) -> PairSource:
    """The preferences of a recipe."""
    assert recipe.tune and recipe.prefer
    return open_source(recipe.tune, recipe.prefer, recipe.train, tokenizer, config, say)


def _expect_one_answer(rows: Sequence[Row]) -> None:
    """Refuses rows of which tune.unroll would make several examples."""
    for row in rows:
        turns = [k for k, message in enumerate(row.messages) if message["role"] == "assistant"]
        trained = [k for k in turns if not row.train or row.train[k]]
        if len(trained) > 1:
            raise UserError(f"{row.where}: {len(trained)} turns of the assistant, and tune.unroll makes an example of "
                            "each: expected a single one to judge")  # fmt: skip


def _check_judged(tune: TuneConfig, train: TrainConfig, items: Sequence[Judged]) -> None:
    """Refuses what KTO cannot learn from."""
    kinds = Counter(item.good for item in items)
    if len(items) < 2 or len(kinds) < 2:
        same = "good" if kinds[True] else "bad"
        found = f"one {same} answer" if len(items) == 1 else f"{len(items):,} answers, all {same}"
        raise UserError(f"{tune.source}: {found}, to train on: expected good and bad ones, as prefer.loss = kto needs")
    if train.batch_size < 2:
        raise UserError("train.batch_size = 1: prefer.loss = kto compares the rows of a batch: expected 2 or more")


def _equal(better: Example, worse: Example) -> bool:
    """Whether a model reads the same in both."""
    return np.array_equal(better.tokens, worse.tokens) and better.targets[-1] == worse.targets[-1]


def _different(examples: dict[str, list[Example]], kept: dict[str, list[Judged]], encoder: Encoder) -> Iterator[str]:
    """Leaves out pairs whose answers differ as text and not in tokens, and counts those that are cut to the same ones.

    Raises:
        UserError: the former are more than a tenth.
    """
    equal: list[str] = []
    for split, rows in examples.items():
        same = [n for n in range(len(kept[split])) if _equal(rows[2 * n], rows[2 * n + 1])]
        cut = {n for n in same if len(rows[2 * n]) >= encoder.size - 1}
        equal += [kept[split][n].where for n in same if n not in cut]
        stay = [n for n in range(len(kept[split])) if n not in same or n in cut]
        examples[split] = [rows[2 * n + k] for n in stay for k in range(2)]
        kept[split] = [kept[split][n] for n in stay]
        if cut:
            yield f"{split}: {len(cut):,} pairs are cut to the same tokens, of which nothing is learned"
    yield from equal_pairs(equal, len(equal) + sum(map(len, kept.values())), " as the model reads them")


def _lines(
    tune: TuneConfig, source: PairSource, found: Preferences, kept: Mapping[str, Sequence[Judged]]
) -> Iterator[str]:
    """Lines about the answers, printed before training."""
    counts, train = source.counts, source.counts["train"]
    what = "judged answers" if source.single else "pairs"
    sizes = ", ".join(f"{len(kept[name]):,} {name}" for name in counts if counts[name].rows)
    share = f"{train.tokens:,} tokens"
    if not source.encoder.whole:
        share = f"{train.trained / train.tokens:.1%} of {share} count"
    yield f"{what}: {tune.source}: {found.format}: {sizes}; {share}"
    if source.single:
        good = int(source.good["train"].sum())
        yield f"{what}: {good:,} good and {len(kept['train']) - good:,} bad ones train{_balance(source, good)}"
    elif tune.task == "prefer" and any(margins.any() for margins in source.margins.values()):
        yield "margin: only --task reward reads it"
    for name, count in counts.items():
        yield from sft_source.long(name, count, len(kept[name]) + count.dropped, source.encoder, False)
    if source.duplicates:
        first = ", ".join(f"{pair.valid} and {pair.train}" for pair in source.duplicates[:3])
        known = f"{len(source.duplicates):,} of {counts['valid'].rows:,} validation {what}"
        yield f"near-duplicates: {known} have a similar one in training: {first}"
    rows = {split: [row for item in held for row in item.rows] for split, held in found.splits.items()}
    yield from sft_source.template_lines(source, rows)
    yield sft_source.batches_line(source)


def _balance(source: PairSource, good: int) -> str:
    """What to set where weighted good and bad answers do not balance (Ethayarajh et al. 2024, equation 8)."""
    bad, prefer = len(source.good["train"]) - good, source.prefer
    ratio = prefer.desirable * good / (prefer.undesirable * bad) if prefer.undesirable else 1.0
    if 1.0 <= ratio <= 4 / 3 or good == bad:
        return ""
    name, value = ("undesirable", good / bad) if good > bad else ("desirable", bad / good)
    return f"; --set prefer.{name}={value:.2g} would balance them"
