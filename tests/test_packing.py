"""From examples to batches: order as a pure function, and packing equal to examples alone."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import worst
from models import tiny, weights
from small_rows import chat_rows, opened, small_tokenizer

from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig
from mlxgpt.common.sft import pack
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.protocol import Tokenizer

BACKENDS = ["mlxgpt", "torch_ref"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def epoch(source: SftSource, number: int = 0) -> list[Batch]:
    """The batches of an epoch."""
    first = source.steps(number) + 1 if number else 1
    return [source.batch(step) for step in range(first, source.steps(number + 1) + 1)]


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Each row's tokens, targets and weights, taken out of a packed batch."""
    assert batch.segments is not None and batch.positions is not None
    made = []
    for b in range(len(batch.tokens)):
        for number in range(1, int(batch.segments[b].max()) + 1):
            at = np.flatnonzero(batch.segments[b] == number)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(batch.positions[b, at], np.arange(len(at)))
            made.append(tuple(tuple(a[b, at].tolist()) for a in (batch.tokens, batch.targets, batch.weights)))
    return made


def expected_rows(source: SftSource, split: str = "train") -> list[tuple[Any, ...]]:
    return [tuple(tuple(a.tolist()) for a in (e.tokens, e.targets, e.weights)) for e in source.rows(split)]


def test_an_epoch_holds_every_row_once_whole_and_in_another_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = opened(tmp_path, tokenizer, chat_rows(200, longest=16))
    expected = Counter(expected_rows(source))
    orders = []
    for number in range(2):
        rows = [row for batch in epoch(source, number) for row in rows_of(batch)]
        assert Counter(rows) == expected
        orders.append(rows)
    assert orders[0] != orders[1]
    held = [row for batch in source.validation() for row in rows_of(batch)]
    assert Counter(held) == Counter(expected_rows(source, "valid"))
    assert source.real_share > 0.85
    for batch in source.validation():
        assert batch.segments is not None and not batch.weights[batch.segments == 0].any()


def test_batches_are_functions_of_seed_and_step(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, again = (opened(tmp_path, tokenizer, chat_rows(60)) for _ in range(2))
    late = source.steps(3)
    for step in (late, 1, late - 1):
        assert np.array_equal(source.batch(step).tokens, again.batch(step).tokens)
        assert source.batch(step).row_ids == again.batch(step).row_ids
    assert source.digest == again.digest
    other = opened(tmp_path, tokenizer, chat_rows(60), {"seed": 6})
    assert other.digest["order"] != source.digest["order"] and other.digest["rows"] == source.digest["rows"]
    masked = opened(tmp_path, tokenizer, chat_rows(60), train_on_prompt=True)
    assert masked.digest["rows"] != source.digest["rows"]


def test_shapes_are_few(tmp_path: Path, tokenizer: Tokenizer) -> None:
    packed = opened(tmp_path, tokenizer, chat_rows(200))
    assert len({batch.tokens.shape[1] for batch in epoch(packed)}) == 1
    padded = opened(tmp_path, tokenizer, chat_rows(200), packing=False)
    widths = {batch.tokens.shape[1] for batch in epoch(padded)}
    assert len(widths) > 1 and widths <= {32, 48, 64, 96, 128, 192, 256}
    assert [pack.bucket(n, 2048) for n in (1, 32, 33, 49, 65, 97, 129)] == [32, 32, 48, 64, 96, 128, 192]
    assert pack.bucket(130, 160) == 160
    rows = [row for batch in epoch(padded) for row in batch.row_ids]
    assert Counter(rows) == Counter(example.where for example in padded.rows("train"))


def test_a_small_set_makes_small_batches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for count, packing in ((1, True), (1, False), (3, True), (3, False)):
        source = opened(tmp_path, tokenizer, chat_rows(count), {"batch_size": 16}, packing=packing)
        batch = source.batch(1)
        assert source.steps_per_epoch == 1 and batch.tokens.shape[0] <= count and batch.tokens.shape[1] <= 256
        assert batch.weight == sum(example.weights.sum() for example in source.rows("train"))
        assert len(list(source.validation())) == (1 if count > 1 else 0)
    assert source.steps(0.1) == 1 and source.steps(2.0) == 2


def test_eval_batches_are_evenly_spaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = chat_rows(200)
    every = list(opened(tmp_path, tokenizer, rows, {"batch_size": 1}, val_fraction=0.5).validation())
    some = list(opened(tmp_path, tokenizer, rows, {"batch_size": 1, "eval_batches": 3}, val_fraction=0.5).validation())
    places = [next(i for i, batch in enumerate(every) if batch.row_ids == one.row_ids) for one in some]
    assert places == [i * len(every) // 3 for i in range(3)]


# packing


def losses(backend: str, config: ModelConfig, batch: Batch) -> np.ndarray:
    """Weighted token losses (B, T)."""
    engine = importlib.import_module(f"{backend}.engine").Engine
    made = engine(Recipe(model=config, train=TrainConfig(batch_size=4)), weights(config, scale=4.0), "cpu")
    lm = importlib.import_module(f"{backend}.losses").lm
    found = lm(made.model, made._arrays(batch), made.recipe.train, plain=True)
    return (found.detach().numpy() if backend == "torch_ref" else np.array(found)) * batch.weights


def row_means(backend: str, config: ModelConfig, source: SftSource, packed: bool) -> np.ndarray:
    """The mean loss of each training row, packed or alone."""
    means: dict[str, float] = {}
    examples = source.rows("train")
    if packed:
        order = np.arange(len(examples))
        bins = pack.pack(np.array([len(e) for e in examples]), order, source.size)
        batch = pack.packed_batch(examples, bins, source.size)
        terms = losses(backend, config, batch)
        for b, rows in enumerate(bins):
            start = 0
            for row in rows:
                stop = start + len(examples[row])
                means[examples[row].where] = terms[b, start:stop].sum() / examples[row].weights.sum()
                start = stop
    else:
        for number in range(0, len(examples), 8):
            plan = [(row,) for row in range(number, min(number + 8, len(examples)))]
            batch = pack.padded_batch(examples, plan, source.size)
            terms = losses(backend, config, batch)
            for b, (row,) in enumerate(plan):
                means[examples[row].where] = terms[b].sum() / examples[row].weights.sum()
    return np.array([means[example.where] for example in examples])


def packing_gap(backend: str, family: str, folder: Path, tokenizer: Tokenizer) -> float:
    source = opened(folder, tokenizer, chat_rows(30, longest=12), block_size=96)
    assert max(len(rows) for rows in source._plan(0)[0]) > 1
    config = tiny(**{**BASE[family], "block_size": 96, "vocab_size": 400})
    packed, alone = (row_means(backend, config, source, way) for way in (True, False))
    return worst(f"{family}: per-row mean loss", packed, alone)


BASE: dict[str, dict[str, Any]] = {
    "gpt2": dict(family="gpt2"),
    "llama": dict(family="llama", n_kv_head=2),
    "mistral": dict(family="mistral", window=12),
}


@pytest.mark.parametrize("family", BASE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_have_the_losses_that_they_have_alone(
    backend: str, family: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    assert packing_gap(backend, family, tmp_path, tokenizer) <= 1e-5


def _no_segments(batch: Batch) -> Batch:
    assert batch.segments is not None
    return Batch(batch.tokens, batch.targets, batch.weights, batch.positions, np.ones_like(batch.segments))


def _running_positions(batch: Batch) -> Batch:
    running = np.tile(np.arange(batch.tokens.shape[1], dtype=np.int32), (len(batch.tokens), 1))
    return Batch(batch.tokens, batch.targets, batch.weights, running, batch.segments)


def _shifted_targets(batch: Batch) -> Batch:
    return Batch(batch.tokens, np.roll(batch.targets, 1, axis=1), batch.weights, batch.positions, batch.segments)


@pytest.mark.parametrize(
    ("broken", "family"),
    [
        (_no_segments, "gpt2"),
        (_no_segments, "llama"),
        (_running_positions, "gpt2"),  # rotary positions are relative: elsewhere it would not matter
        (_shifted_targets, "llama"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_done_wrongly_is_seen(
    backend: str, broken: Any, family: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pack.packed_batch
    monkeypatch.setattr(pack, "padded_batch", lambda *args: padded(right, *args))
    monkeypatch.setattr(pack, "packed_batch", lambda *args: broken(right(*args)))
    assert packing_gap(backend, family, tmp_path, tokenizer) > 1e-3


def padded(right: Any, examples: Any, plan: Any, most: int) -> Batch:
    batch = right(examples, plan, most)
    return Batch(batch.tokens, batch.targets, batch.weights, row_ids=batch.row_ids)
