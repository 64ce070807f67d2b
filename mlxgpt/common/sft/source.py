"""Fine-tuning examples as a source of batches: read, rendered, tokenized, truncated and packed.

``open_source`` makes it and prints what became of the examples; SftSource.counts has the numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.chat.control import first_spelled
from mlxgpt.common.config import ModelConfig, TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import rotary
from mlxgpt.common.rows import duplicates as row_duplicates
from mlxgpt.common.rows import formats as row_formats
from mlxgpt.common.rows.row import Row, as_messages
from mlxgpt.common.sft import pack, written
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.sft.encode import Counts, Encoder, shortened
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers import ends as text_ends
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.padding import with_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer

_LONGEST = 2048  # default limit on the tokens of an example


@dataclass
class SftSource:
    """batch.Source over examples.

    A batch is ``batch_size`` bins of ``size`` tokens if examples are packed, else ``batch_size`` examples; none crosses
    the end of an epoch, so an epoch's last one may be smaller. ``added``: tokens added to the tokenizer.
    """

    train: TrainConfig
    encoder: Encoder
    packing: bool
    size: int
    examples: dict[str, list[Example]]
    counts: dict[str, Counts]
    digest: dict[str, str]
    added: tuple[str, ...] = ()
    duplicates: list[row_duplicates.Pair] = field(default_factory=list)
    by_length: bool = False  # the model's frequencies depend on the length of an example, padding not counted
    together: int = 1  # examples of an item, which a batch never separates
    _plans: dict[int, list[pack.Plan]] = field(default_factory=dict)
    _steps: list[int] = field(default_factory=list)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with what was added to it."""
        return self.encoder.tokenizer

    @property
    def template(self) -> Template | None:
        """The chat template that rendered the examples."""
        return self.encoder.template

    @property
    def labels(self) -> tuple[str, ...]:
        """For classification: the labels, in the order of their class ids."""
        return self.encoder.labels

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch."""
        return len(self._plan(0))

    def steps(self, epochs: float) -> int:
        """Batches in so many epochs, at least one."""
        whole, rest = int(epochs), epochs - int(epochs)
        count = sum(len(self._plan(epoch)) for epoch in range(whole))
        return max(1, count + round(rest * len(self._plan(whole)) if rest else 0))

    def batch(self, step: int) -> Batch:
        """The global batch of ``step`` (from 1): a pure function of (seed, step)."""
        epoch, place = 0, step - 1
        while place >= self._count(epoch):
            place -= self._count(epoch)
            epoch += 1
        return self._build("train", self._plan(epoch)[place])

    def validation(self) -> Iterator[Batch]:
        """The validation batches, the same each time: every example once, or ``eval_batches`` evenly spaced batches."""
        yield from self.split("valid")

    def split(self, name: str) -> Iterator[Batch]:
        """The same for ``valid`` or ``test``; nothing if the split is empty."""
        plans = self._batches(name, np.arange(len(self._lengths(name))))
        most = self.train.eval_batches
        if 0 < most < len(plans):
            plans = [plans[i * len(plans) // most] for i in range(most)]
        for plan in plans:
            yield self._build(name, plan)

    def rows(self, split: str) -> list[Example]:
        """A split's examples; Example.last_answer separates the prompt from the answer."""
        return self.examples[split]

    @property
    def real_share(self) -> float:
        """The share of the first epoch's positions that hold a token of an example, not padding."""
        lengths, places = self._lengths("train"), 0
        for plan in self._plan(0):
            longest = max(lengths[row] for (row, *_) in plan)
            places += len(plan) * self.together * (self.size if self.packing else pack.bucket(longest, self.size))
        return sum(map(len, self.examples["train"])) / places

    def describe(self) -> dict[str, object]:
        """Counts and settings, for --json and environment.json."""
        splits = {name: vars(counts) for name, counts in self.counts.items() if counts.rows}
        share = self.counts["train"].trained / self.counts["train"].tokens
        return {
            "splits": splits,
            "trained_share": share,
            "real_share": self.real_share,
            "packing": self.packing,
            "row_tokens": self.size,
            "steps_per_epoch": self.steps_per_epoch,
            "template": self.template.name if self.template else None,
            "chat_template_kwargs": self.encoder.tune.chat_template_kwargs,
            "added_tokens": list(self.added),
            "near_duplicates": [pair.as_dict() for pair in self.duplicates],
            "labels": list(self.labels),
            **beginning.described(self.tokenizer, self.begins_with),
        }

    @property
    def begins_with(self) -> list[int]:
        """What every example begins with, of what its tokenizer puts before a text."""
        return beginning.shared(self.tokenizer, [row.tokens for held in self.examples.values() for row in held])

    def add_digests(self) -> None:
        """Adds those of the examples and of the first epoch's order."""
        self.digest["rows"] = pack.digest(self.examples["train"])
        self.digest["valid rows"] = pack.digest(self.examples["valid"])
        self.digest["order"] = pack.digest([], self.size, self._plan(0))

    def _count(self, epoch: int) -> int:
        while len(self._steps) <= epoch:
            self._steps.append(len(self._plan(len(self._steps))))
        return self._steps[epoch]

    def _plan(self, epoch: int) -> list[pack.Plan]:
        """The batches of an epoch; the last two plans are kept."""
        if epoch not in self._plans:
            made = self._batches("train", self._order(epoch), epoch)
            for old in sorted(self._plans)[:-1]:
                del self._plans[old]
            self._plans[epoch] = made
        return self._plans[epoch]

    def _order(self, epoch: int) -> np.ndarray:
        """The order in which an epoch's batches take the training items."""
        return rng.permutation(self.train.seed, "sft rows", epoch, count=len(self._lengths("train")))

    def _lengths(self, split: str) -> np.ndarray:
        """The tokens of each item of a split, those of its longest example."""
        lengths = np.array([len(example) for example in self.examples[split]], np.int64)
        return lengths.reshape(-1, self.together).max(axis=1, initial=0)

    def _batches(self, split: str, order: np.ndarray, epoch: int | None = None) -> list[pack.Plan]:
        """Batches of the examples in ``order``; with ``epoch``, their order is shuffled."""
        rows, lengths = self.train.batch_size, self._lengths(split)
        if not len(order):
            return []
        if not self.packing:
            plans = pack.padded_plan(lengths, order, rows)
            return plans if epoch is None else pack.shuffled(plans, self.train.seed, epoch)
        bins = pack.pack(lengths, order, self.size)
        if epoch is not None:
            bins = pack.shuffled(bins, self.train.seed, epoch)
        return [bins[start : start + rows] for start in range(0, len(bins), rows)]

    def _build(self, split: str, plan: pack.Plan) -> Batch:
        examples = self.examples[split]
        if self.packing:
            return pack.packed_batch(examples, plan, self.size)
        return pack.padded_batch(examples, plan, self.size, self.by_length)


def open_source(
    tune: TuneConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    config: ModelConfig,
    say: Callable[[str], None] = print,
    labels: Sequence[str] = (),
) -> SftSource:
    """The examples of ``tune.source`` as batches for a model of ``config``.

    ``SftSource.tokenizer`` may have more tokens than ``tokenizer``: those of ChatML, if examples are conversations and
    it has no template, or a classifier's padding; its ``ends`` are those of ``tokenizer``, of the template and of
    tune.end_tokens. ``labels``: those of an existing classifier; by default the sorted labels of the training split.

    Raises:
        UserError: anything wrong with source, examples, template or window.
    """
    rows = row_formats.open_rows(tune)
    encoder, added = encoder_of(tune, rows.format, tokenizer, config)
    size = encoder.size
    if tune.task == "classify":
        encoder.labels, encoder.label_weights = _labels(rows.splits["train"], tune, labels)
    examples, counts = {}, {}
    for split, held in rows.splits.items():
        examples[split], counts[split] = encoder.examples(held)
    if not examples["train"]:
        raise UserError(f"{tune.source}: {none_left(counts['train'], encoder)}")
    if tune.packing:
        size = min(size, _bin(tune.block_size, examples))
    digest = rows.digest | {"tokenizer": encoder.tokenizer.digest}
    duplicates = row_duplicates.near_duplicates(rows.splits["train"], rows.splits["valid"])
    source = SftSource(train, encoder, tune.packing, size, examples, counts, digest, added, duplicates)
    source.by_length = rotary.by_length(config)
    source.add_digests()
    for line in [*rows.notes, *_lines(tune, source, rows)]:
        say(line)
    return source


def encoder_of(
    tune: TuneConfig, form: str, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[Encoder, tuple[str, ...]]:
    """What encodes rows of a format (see row_formats.Rows), and the tokens that were added to the tokenizer.

    Raises:
        UserError: the window is wider than the model's context, or the template cannot be used.
    """
    size = tune.block_size or min(config.block_size, _LONGEST)
    if size > config.block_size:
        raise UserError(f"tune.block_size = {size}: the model's context holds {config.block_size}")
    if tune.task == "classify":
        return Encoder(tune, with_padding(tokenizer), None, size, config.block_size), ()
    before = {tokenizer.eos_id, *tokenizer.ends}
    template, tokenizer, added = choose_template(tune, form, tokenizer)
    if template is None and tune.train_on != "both":
        raise UserError(f"tune.train_on = {tune.train_on}: examples without a chat template have no reasoning: both")
    after = {template.end_id} if template else set()
    after |= set(text_ends.named(tune.end_tokens, tokenizer, "tune.end_tokens"))
    tokenizer.ends = frozenset(end for end in before | after if end not in (None, tokenizer.eos_id))
    whole = tune.task == "reward"
    tokenizer = with_padding(tokenizer) if whole else tokenizer
    return Encoder(tune, tokenizer, template, size, config.block_size, whole=whole), added


def _bin(asked: int, examples: dict[str, list[Example]]) -> int:
    """Tokens of a bin: ``asked``, else six average examples; at least the longest one, at most all of them together."""
    lengths = [len(example) for example in examples["train"]]
    longest = max(len(example) for held in examples.values() for example in held)
    wanted = asked or 6 * sum(lengths) // len(lengths)
    return -(-max(longest, min(wanted, sum(lengths))) // 8) * 8


def choose_template(
    tune: TuneConfig, form: str, tokenizer: Tokenizer
) -> tuple[Template | None, Tokenizer, tuple[str, ...]]:
    """The template for the examples, the tokenizer with it, and the tokens that were added for it."""
    kwargs = tune.chat_template_kwargs
    if form == "text":
        _unused(kwargs, "rows of text are not rendered")
        return None, tokenizer, ()
    given: Any = {"date": tune.date, "kwargs": kwargs, "sanitize": tune.sanitize}
    if tune.template == "auto" and (tokenizer.templates or form == "completion"):
        where = f"{tune.model}: chat template" if tune.model else "chat template"
        own = sft_template.template_of(tokenizer, where, **given)
        if own is None:
            _unused(kwargs, f"{where}: there is none: prompts and completions are plain text")
        return own, tokenizer, ()
    if tune.template in ("auto", "chatml"):
        known = tokenizer.encode("".join(sft_template.CHATML_TOKENS))
        with_them = sft_template.with_chatml(tokenizer)
        added = () if len(known) == 2 and set(known) <= tokenizer.special else sft_template.CHATML_TOKENS
        return sft_template.template_of(with_them, "ChatML", **given), with_them, added
    path = Path(tune.template).expanduser()
    if not path.is_file():
        raise UserError(f"tune.template = {tune.template}: no such file: expected auto, chatml or a jinja file")
    with_it = from_files(tokenizer.files | {"chat_template.jinja": path.read_bytes()}, path.parent)
    return sft_template.template_of(with_it, str(path), **given), with_it, ()


def _unused(kwargs: dict[str, Any], why: str) -> None:
    if kwargs:
        raise UserError(f"tune.chat_template_kwargs = {kwargs}: {why}: expected none")


def _labels(rows: Sequence[Row], tune: TuneConfig, known: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Labels in order (integers numerically), and their weights: 1, or inversely proportional to frequency, mean 1."""
    found = [row.label or "" for row in rows]
    names = set(found)
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    labels = tuple(known) or tuple(sorted(names, key=int) if numbers else sorted(names))
    if len(labels) < 2:
        raise UserError(f"{tune.source}: only one label, {found[0]!r}: expected at least two")
    if tune.class_weights == "none":
        return labels, (1.0,) * len(labels)
    for label in labels:
        if label not in names:
            raise UserError(
                f"{tune.source}: no training example has the label {label!r}, which tune.class_weights needs"
            )
    return labels, tuple(len(found) / (len(labels) * found.count(label)) for label in labels)


def _lines(tune: TuneConfig, source: SftSource, rows: row_formats.Rows) -> Iterator[str]:
    """Lines about the examples, printed before training."""
    counts = source.counts
    sizes = ", ".join(f"{len(source.examples[name]):,} {name}" for name in counts if counts[name].rows)
    train = counts["train"]
    share = f"{train.trained / train.tokens:.1%} of {train.tokens:,} tokens are trained on"
    if source.labels:
        found = Counter(row.label for row in rows.splits["train"])
        share = "labels " + shortened([f"{label} ({found[label]:,})" for label in source.labels])
    yield f"examples: {tune.source}: {rows.format}: {sizes}; {share}"
    for name, count in counts.items():
        alone = bool(source.labels) or rows.format == "text"
        yield from long(name, count, len(source.examples[name]) + count.dropped, source.encoder, alone)
    if source.duplicates:
        first = ", ".join(f"{pair.valid} and {pair.train}" for pair in source.duplicates[:3])
        known = f"{len(source.duplicates):,} of {counts['valid'].rows:,} validation examples"
        yield f"near-duplicates: {known} have a similar training example: {first}"
    yield from template_lines(source, rows.splits)
    yield batches_line(source)


def batches_line(source: SftSource) -> str:
    """How examples become batches."""
    form = f"packed into {source.size} tokens" if source.packing else "padded by length"
    share = f"{source.real_share:.1%} of the positions are tokens"
    steps = source.steps_per_epoch
    return f"batches: {form}: {share}; {steps:,} step{'s' * (steps != 1)} an epoch"


def none_left(count: Counts, encoder: Encoder) -> str:
    """Why no training example is left."""
    why = f"all {count.dropped} training examples are longer than {encoder.size} tokens: nothing is left to train on"
    if encoder.tune.overflow == "start":
        return f"{why}: their prompts fill them: expected a larger tune.block_size"
    if count.unanswerable:
        return f"{why}: shortened, their answers would lose their questions: expected a larger tune.block_size"
    wider = f"tune.block_size = {count.wider} or " if count.wider else ""
    return f"{why} (tune.overflow = drop): expected {wider}tune.overflow = truncate"


def long(name: str, count: Counts, made: int, encoder: Encoder, alone: bool) -> Iterator[str]:
    """Lines about the examples of a split that are longer than the window."""
    longer = f"examples longer than {encoder.size} tokens"
    if count.truncated:
        yield f"{name}: {count.truncated:,} {longer}: they lost their oldest turns, or the middle of the prompt"
    if count.cut:
        yield f"{name}: {count.cut:,} {longer}{'' if alone else ' in the answer'}: they lost the end"
    if count.unanswerable and encoder.tune.overflow == "start":
        yield f"{name}: dropped {count.dropped:,} of {made:,} {longer}, which their prompts fill"
    elif count.unanswerable:
        yield f"{name}: dropped {count.unanswerable:,} {longer} whose answers would have lost their questions"
    elif count.dropped:
        cure = f"the model's context of {encoder.context} holds none of them; tune.overflow = truncate shortens them"
        if count.wider:
            cure = f"tune.block_size = {count.wider} keeps all" + (f" but {count.beyond:,}" if count.beyond else "")
        yield f"{name}: dropped {count.dropped:,} of {made:,} {longer} ({count.lost:,} tokens); {cure}"


def template_lines(source: SftSource, splits: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Lines about the template and what of the rows it does not write."""
    template, tune = source.template, source.encoder.tune
    if not template:
        return
    added = f", with the new tokens {' and '.join(source.added)}" if source.added else ""
    values = "".join(f", {name} = {value}" for name, value in tune.chat_template_kwargs.items())
    yield f"template: {template.name}, an answer ends with {template.end}{added}{values}"
    if unopened := sum(count.unopened for count in source.counts.values()):
        yield (
            f"template: {template.name}: the generation prompt ends in {template.opening!r}, which "
            f"{unopened:,} examples lack: tune.unroll = true trains each answer behind the prompt that chat gives"
        )
    yield from written.lines(template, splits["train"], tune.unroll)
    yield from _spelled(template, [row for held in splits.values() for row in held])


def _spelled(template: Template, rows: Sequence[Row]) -> Iterator[str]:
    """A line about the rows whose messages spell control tokens."""
    found = [(row, spelled) for row in rows if (spelled := first_spelled(template.control, as_messages(row).messages))]
    if found:
        row, (role, token) = found[0]
        became = "they are text (tune.sanitize)" if template.sanitize else "tune.sanitize = true makes them text"
        yield (
            f"control tokens: the messages of {len(found):,} of {len(rows):,} rows spell some, such as {token} in "
            f"{row.where} ({role}): {became}"
        )
