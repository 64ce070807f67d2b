"""The recipe that ``mlxgpt train --data`` makes for a corpus: everything in it follows from the corpus and --size.

Two moments decide. Before the corpus is tokenized, its bytes give the vocabulary and the context; after, its tokens
give steps, warm-up, dropout and cadence. What the user set himself (--set and flags) stays.
"""

import dataclasses
import math
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxgpt.common.config import DataConfig, Recipe
from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data import shards
from mlxgpt.common.data.token_source import is_flat
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import KINDS
from mlxgpt.common.units import counted

Sections = dict[str, dict[str, Any]]


class Size(NamedTuple):
    """A model and the length of its first run, which is minutes on a laptop for 1m; a GPU's work for the others."""

    n_layer: int
    n_head: int
    n_kv_head: int  # 0: as many as heads
    n_embd: int
    n_hidden: int  # 0: 8/3 n_embd, as families have it
    block_size: int
    batch_size: int
    micro_batch_size: int
    lr: float
    steps: int
    vocab_size: int  # at most
    compute_dtype: str


SIZES = {
    "1m": Size(4, 4, 0, 128, 0, 256, 8, 0, 1e-3, 1000, 2048, "float32"),
    "10m": Size(6, 6, 3, 384, 896, 512, 16, 0, 1e-3, 2000, 4096, "float32"),
    "30m": Size(9, 8, 4, 512, 0, 1024, 24, 12, 6e-4, 3000, 8192, "bfloat16"),
    "124m": Size(12, 12, 0, 768, 0, 1024, 32, 8, 4e-4, 5000, 50257, "bfloat16"),
}
DEFAULT = "1m"

BYTES_A_TOKEN = 1000  # of corpus for each entry of the vocabulary: a rarer token is not learned
_SMALLEST = 512  # entries: 256 bytes and as many merges
_EPOCHS = 30  # a small corpus is seen at most so often: after that it is learned by heart
_REPEATED = 4  # epochs up to which seeing a text again is as good as new text (Muennighoff et al. 2023)
_TABLES = (".csv", ".tsv", ".json", ".arrow")  # that finetune reads, and train does not
_SCANNED = 64 << 20  # bytes of files up to which the corpus is read to be measured


class Facts(NamedTuple):
    """What is known of a corpus before it is tokenized: bytes and documents of text, or tokens of each split."""

    size: int = 0
    documents: int = 0
    files: int = 0
    tokens: tuple[int, int] | None = None  # to train and to validate, of shards and flat files
    vocab_size: int = 0  # of their tokenizer; 0: unknown


def measure(data: DataConfig) -> Facts:
    """What a source holds.

    Raises:
        UserError: nothing to read there, or rows without text, with what to type for them.
    """
    path = Path(data.source).expanduser() if isinstance(data.source, str) else None
    if path and shards.is_shards(path):
        index = shards.read_index(path)
        train, val = (index["splits"][name]["tokens"] for name in ("train", "val"))
        return Facts(tokens=(train, val), vocab_size=index["vocab_size"])
    if path and is_flat(path):
        if not path.exists():
            raise UserError(f"{path}: no such file")
        first, second, _ = shards.open_flat(path, data.val_fraction)
        return Facts(tokens=(len(first), len(second)))
    if path and path.suffix.lower() in _TABLES and path.is_file():
        raise UserError(f"{path}: rows, not texts; {_rows(data)}; texts: one in each row of a .jsonl or .parquet")
    corpus = corpora.open_corpus(data.source, data.text_key)
    size = sum(file.stat().st_size for file in corpus.files)
    if size > _SCANNED and corpus.name != "pydocs":
        return Facts(size=size, files=len(corpus.files))
    try:
        scanned = corpora.scan(corpus)
    except corpora.NoText as error:
        raise UserError(f"{error}; --set data.text_key=KEY names another; {_rows(data)}") from None
    return Facts(scanned.size, scanned.documents, len(corpus.files))


def _rows(data: DataConfig) -> str:
    """What trains on rows of questions and answers."""
    source = shlex.quote(data.source) if isinstance(data.source, str) else "FILE"
    return f"rows of questions and answers: mlxgpt finetune --model DIR --data {source}"


def sections(data: DataConfig, facts: Facts, size: str) -> Sections:
    """The recipe for a corpus, as far as its bytes decide.

    Raises:
        UserError: too little text for any context.
    """
    chosen = SIZES[size]
    vocabulary = _vocabulary(facts.size, chosen.vocab_size)
    model = {
        "family": "llama", "n_layer": chosen.n_layer, "n_head": chosen.n_head, "n_kv_head": chosen.n_kv_head,
        "n_embd": chosen.n_embd, "n_hidden": chosen.n_hidden,
        "block_size": _context(data, facts, chosen.block_size),
    }  # fmt: skip
    own = {"tokenizer": "bpe", "vocab_size": vocabulary} if facts.tokens is None else {}
    return {
        "model": model,
        "data": own | {"sampling": "epoch"},
        "optim": {"lr": chosen.lr, "min_lr": chosen.lr / 10, "beta2": 0.95, "schedule": "wsd", "warmup": 100},
        "train": {
            "steps": chosen.steps,
            "batch_size": chosen.batch_size,
            "micro_batch_size": chosen.micro_batch_size,
            "compute_dtype": chosen.compute_dtype,
        },
    }


def _vocabulary(size: int, most: int) -> int:
    """Entries for a corpus of ``size`` bytes: a power of two, or ``most``."""
    entries = size // BYTES_A_TOKEN
    return most if entries >= most else max(_SMALLEST, 1 << (entries.bit_length() - 1) if entries else 0)


def _context(data: DataConfig, facts: Facts, most: int) -> int:
    """The longest context, a power of two up to ``most``, of which the validation text surely holds two."""
    tokens = facts.tokens[1] if facts.tokens else int(facts.size * data.val_fraction) // 4
    context = most
    while context >= 16 and 2 * context + 1 > tokens:
        context //= 2
    if context < 16:
        where, needed = corpora.called(data.source), 2 * 16 + 1
        if facts.tokens:
            raise UserError(f"{where}: {tokens:,} tokens to validate: too little; expected {needed} at least")
        size = math.ceil(math.ceil(4 * needed / data.val_fraction) / 100) * 100
        raise UserError(
            f"{where}: {facts.size:,} bytes: too little to train on and to validate data.val_fraction = "
            f"{data.val_fraction:g} of; expected {size:,} bytes at least"
        )
    return context


def with_length(recipe: Recipe, tokens: int, own: Collection[str], epochs: float | None) -> Recipe:
    """The recipe with steps, warm-up, dropout and cadence for ``tokens`` of training text; keys in ``own`` stay."""
    each = recipe.train.batch_size * recipe.model.block_size
    steps = recipe.train.steps
    if epochs:
        steps = steps_of(epochs, tokens, recipe)
    elif "train.steps" not in own:
        steps = min(steps, max(100, _round(_EPOCHS * tokens / each)))
    every = max(1, _round(steps / 8))
    found = {
        "train.steps": steps,
        "train.eval_every": every,
        "train.save_every": every,
        "train.sample_every": 2 * every,
        "train.dropout": 0.1 if steps * each > _REPEATED * tokens else 0.0,
        "optim.warmup": min(recipe.optim.warmup, steps // 10),
    }
    made: dict[str, dict[str, Any]] = {"train": {"steps": steps}, "optim": {}}
    for name, value in found.items():
        section, _, key = name.partition(".")
        if name not in own:
            made[section][key] = value
    train, optim = (dataclasses.replace(getattr(recipe, section), **values) for section, values in made.items())
    return dataclasses.replace(recipe, train=train, optim=optim)


def steps_of(epochs: float, tokens: int, recipe: Recipe) -> int:
    """The steps in which ``tokens`` of training text are seen ``epochs`` times, at least one."""
    return max(1, round(epochs * tokens / (recipe.train.batch_size * recipe.model.block_size)))


def _round(number: float) -> int:
    """To two digits, as people write lengths of runs."""
    return round(float(f"{number:.2g}"))


def name_of(source: str | Sequence[str]) -> str:
    """What to call a run on this source: the folder, or the file without its ending; of several, their folder."""
    places = [source] if isinstance(source, str) else list(source)
    paths = [Path(place).expanduser().absolute() for place in places]
    if len(paths) > 1 and len({path.parent for path in paths}) == 1:
        paths = [paths[0].parent]
    path = paths[0].resolve() if paths[0].name in ("", "..") else paths[0]
    return (path.name if path.is_dir() else path.stem) or "data"


def prompt(text: str) -> str:
    """The beginning of a sentence of ``text``, at most five words or 40 characters; '' where there is none."""
    usable = (line.strip() for line in text.splitlines() if "\ufffd" not in line)
    lines = [line for line in usable if sum(map(str.isalpha, line)) > 12]
    words = (max(lines[:8], key=len) if lines else "").split()[:5]
    return " ".join(words)[:40]


def told(recipe: Recipe, facts: Facts, size: str, tokens: int, parameters: int) -> list[str]:
    """What was chosen, and why, in a few lines."""
    data, model, train, optim = recipe.data, recipe.model, recipe.train, recipe.optim
    held = f"{facts.size:,} bytes" if facts.size else f"{tokens:,} tokens"
    number = facts.documents or facts.files
    held += f" in {counted(number, 'document' if facts.documents else 'file')}" if number else ""
    trained = data.tokenizer in KINDS and facts.tokens is None
    spelled = f"{data.tokenizer} of {model.vocab_size:,}"
    spelled += f" (an entry for {BYTES_A_TOKEN:,} bytes, {SIZES[size].vocab_size:,} at most)" if trained else ""
    each = train.batch_size * model.block_size
    others = ", ".join(name for name in SIZES if name != size)
    return [
        f"recipe for {name_of(data.source)}: {held}; tokenizer: {spelled}",
        f"model: {parameters:,} parameters, {counted(model.n_layer, 'layer')} of {model.n_embd}, context "
        f"{model.block_size}; --size {others} for others",
        f"run: {counted(train.steps, 'step')} of {train.batch_size} x {model.block_size} tokens, "
        f"{train.steps * each / tokens:.1f} epochs; rate {optim.lr:g}; dropout {train.dropout:g}; samples after "
        f"{recipe.sample.prompt!r}",
    ] + ["longer later: --resume RUN --steps N, from where the rate is still at its peak"] * (optim.schedule == "wsd")
