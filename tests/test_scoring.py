"""What follows a context is as likely as in a plain pass of the whole, however rows are batched and shared."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from compare import agree
from decoding import BACKENDS, logits_of
from models import CASES, VARIANTS, tiny, weights

import mlxgpt.blas  # noqa: F401  (before MLX)

# isort: split
import mlx.core as mx
import torch

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.tasks import reading
from mlxgpt.common.tasks.reading import Group
from mlxgpt.model import Model as MlxModel
from torch_ref.model import Model as TorchModel

SCORING = {"mlx": importlib.import_module("mlxgpt.scoring"), "torch": importlib.import_module("torch_ref.scoring")}
FAMILIES = {
    **{name: CASES[name] for name in ("gpt2", "llama-gqa", "mistral", "gemma2", "gemma3_text")},
    **{name: VARIANTS[name] for name in ("phi3-longrope-window", "mistral-dynamic-window")},
    "alibi": tiny(family="mlxgpt", position="alibi", n_kv_head=2),
}


def made(backend: str, config: ModelConfig) -> Any:
    values = weights(config, scale=3.0)
    if backend == "mlx":
        model = MlxModel(config)
        model.load_weights([(name, mx.array(value)) for name, value in values.items()])
        return model
    model = TorchModel(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return model


def some_groups(config: ModelConfig, seed: int, count: int = 9) -> list[Group]:
    """Contexts of any length, some with beginnings of others, some that end where others go on, up to the context."""
    draw = np.random.default_rng(seed)
    made: list[Group] = []
    shared = draw.integers(0, config.vocab_size, config.block_size).tolist()
    for _ in range(count):
        length = int(draw.integers(1, config.block_size - 2))
        held = int(draw.integers(0, length + 1)) if draw.random() < 0.7 else 0
        context = shared[:held] + draw.integers(0, config.vocab_size, length - held).tolist()
        most = config.block_size - length + 1
        sizes = draw.integers(1, min(most, 9) + 1, int(draw.integers(1, 5)))
        made.append(Group(context, [draw.integers(0, config.vocab_size, size).tolist() for size in sizes]))
    return made


def plain(backend: str, model: Any, group: Group, of: Sequence[int]) -> tuple[float, bool]:
    """In float64, from the logits of the whole alone."""
    logits = logits_of(backend, model, [[*group.context, *of][:-1]])[0].astype(np.float64)
    rows = logits[len(group.context) - 1 :]
    values = rows[np.arange(len(of)), of] - np.logaddexp.reduce(rows, axis=-1)
    return float(values.sum()), bool((rows.argmax(-1) == of).all())


def said(backend: str, model: Any, groups: Sequence[Group], rows: int = 4) -> tuple[np.ndarray, list[bool]]:
    found = [each for row in SCORING[backend].continuations(model, groups, rows) for each in row]
    return np.array([each.logprob for each in found]), [each.greedy for each in found]


def expected(backend: str, model: Any, groups: Sequence[Group]) -> tuple[np.ndarray, list[bool]]:
    made = [plain(backend, model, group, each) for group in groups for each in group.continuations]
    return np.array([value for value, _ in made]), [greedy for _, greedy in made]


@pytest.fixture
def shared_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings are shared however little that saves."""
    monkeypatch.setattr(reading, "WORTH", 2)


@pytest.mark.usefixtures("shared_early")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_likely_as_in_a_plain_pass(backend: str, name: str) -> None:
    config = FAMILIES[name]
    model, groups = made(backend, config), some_groups(config, len(name))
    best = logits_of(backend, model, [list(groups[0].context)])[0, -1].argmax()  # so that something is greedy
    groups[0] = Group(groups[0].context, [[int(best)], *groups[0].continuations])
    (found, greedy), (values, best) = said(backend, model, groups), expected(backend, model, groups)
    assert greedy == best and any(greedy)
    agree(name, found, values, 3e-5, 1.0)


@pytest.mark.usefixtures("shared_early")
def test_both_frameworks_agree_whatever_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(family="llama", n_kv_head=2, block_size=64)
    groups = [each for seed in range(2) for each in some_groups(config, seed, 6)]
    first, greedy = said("torch", made("torch", config), groups)
    for backend in BACKENDS:
        model = made(backend, config)
        for rows, tokens, kept in ((5, 96, 1 << 28), (64, 8192, 1 << 16)):
            monkeypatch.setattr(reading, "TOKENS", tokens)
            monkeypatch.setattr(reading, "KEPT", kept)
            monkeypatch.setattr(SCORING[backend], "LOGITS", 3 * config.vocab_size)
            values, best = said(backend, model, groups, rows)
            assert best == greedy
            agree(f"{backend} {rows} rows", values, first, 1e-5, 1.0)
        order = np.random.default_rng(rows).permutation(len(groups))
        values, _ = said(backend, model, [groups[n] for n in order])
        starts = np.cumsum([0, *(len(group.continuations) for group in groups)]).tolist()
        places = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in order])
        agree(f"{backend}, another order", values, first[places], 1e-5, 1.0)


def test_a_model_in_training_is_scored_without_dropout_and_goes_on_to_train() -> None:
    config = tiny(family="gpt2")
    for backend in BACKENDS:
        model = made(backend, config)
        groups = some_groups(config, 5, 3)
        values, _ = said(backend, model, groups)
        model.train()
        model.dropout = 0.5
        agree(backend, said(backend, model, groups)[0], values, 1e-6, 1.0)
        assert model.training


def test_what_contexts_share_is_read_once() -> None:
    shared, config = list(range(40)), tiny(family="llama", block_size=64)
    groups = [Group([*shared, n, n + 1], [[1], [2], [3]]) for n in range(8)]
    batches = list(reading.batches(groups, config))
    assert [(batch.prefix, batch.first.tokens.shape, batch.others) for batch in batches] == [
        (tuple(shared), (8, 2), [])
    ]
    assert len(np.unique(batches[0].first.places)) == 8, "one place for choices of one token"
    several = [*groups, *(Group([50 + n] * 30 + [*shared[:20], n], [[1, 2]]) for n in range(2) for _ in range(2))]
    assert len({batch.prefix for batch in reading.batches(several, config)}) >= 2
    alone = dataclasses.replace(config, rope_scaling="dynamic", rope_factor=4.0, rope_original=16)
    assert {batch.prefix for batch in reading.batches(groups, alone)} == {()}


def test_short_contexts_are_not_padded_to_much_longer_ones() -> None:
    groups = [Group([n, *[0] * (199 if n % 5 == 0 else 19)], [[1]]) for n in range(40)]
    read = [batch.first.tokens.shape for batch in reading.batches(groups, tiny(block_size=2048))]
    assert read == [(8, 200), (32, 20)]


def shifted(read: reading.Read) -> reading.Read:
    return read._replace(targets=np.roll(read.targets, 1))


def off_by_one(read: reading.Read) -> reading.Read:
    return read._replace(starts=np.maximum(read.starts - 1, 0))


def padding_seen(read: reading.Read) -> reading.Read:
    return read._replace(starts=np.full_like(read.starts, read.starts.max()))


def other_row(read: reading.Read) -> reading.Read:
    return read._replace(sources=read.sources[::-1].copy())


@pytest.mark.usefixtures("shared_early")
@pytest.mark.parametrize("broken", [shifted, off_by_one, padding_seen, other_row])
def test_a_mistake_is_seen(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, make = FAMILIES["llama-gqa"], reading._read
    model, groups = made("torch", config), some_groups(config, 3)
    values, _ = said("torch", model, groups)
    monkeypatch.setattr(reading, "_read", lambda rows: broken(make(rows)))
    assert np.abs(said("torch", model, groups)[0] - values).max() > 1e-3
