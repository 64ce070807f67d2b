"""What follows a context is as likely as in a plain pass of the whole, however rows are batched and shared."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from compare import agree
from decoding import BACKENDS, logits_of
from models import CASES, VARIANTS, weights

import mlxgpt.blas  # noqa: F401  (before MLX)

# isort: split
import mlx.core as mx
import torch

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.tasks.reading import Group
from mlxgpt.model import Model as MlxModel
from torch_ref.model import Model as TorchModel

SCORING = {"mlx": importlib.import_module("mlxgpt.scoring"), "torch": importlib.import_module("torch_ref.scoring")}


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
    """Contexts of any length, some with beginnings of others, some that end where others go on."""
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
    ids = [*group.context, *of]
    logits = logits_of(backend, model, [ids[:-1]])[0].astype(np.float64)
    rows = logits[len(group.context) - 1 :]
    values = rows[np.arange(len(of)), of] - np.logaddexp.reduce(rows, axis=-1)
    return float(values.sum()), bool((rows.argmax(-1) == of).all())


@pytest.mark.parametrize("name", sorted(CASES | VARIANTS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_likely_as_in_a_plain_pass(backend: str, name: str) -> None:
    config = (CASES | VARIANTS)[name]
    model, groups = made(backend, config), some_groups(config, len(name))
    # the likeliest answer of one group, so that something is greedy
    best = logits_of(backend, model, [list(groups[0].context)])[0, -1].argmax()
    groups[0] = Group(groups[0].context, [[int(best)], *groups[0].continuations])
    found = SCORING[backend].continuations(model, groups, rows=4)
    expected = [[plain(backend, model, group, each) for each in group.continuations] for group in groups]
    flat = [each for row in found for each in row]
    assert [each.greedy for each in flat] == [greedy for row in expected for _, greedy in row]
    values = np.array([value for row in expected for value, _ in row])
    agree(name, np.array([each.logprob for each in flat]), values, 3e-5, 1.0)
