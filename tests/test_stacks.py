"""Weights and moments that are one array on a GPU: the update of tensors apart, under the same names."""

from typing import Any

import numpy as np
import pytest
from adapting import moved, recipe, train
from compare import agree

from mlxgpt import blas, stacks  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import params
from mlxgpt.common.model.params import Param
from mlxgpt.common.recipes import build
from mlxgpt.engine import Engine

# isort: split
import mlx.core as mx

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optim": {"name": "muon"}},
    "micro-batches": {"train": {"micro_batch_size": 2}},
    "eager": {"train": {"compile": "off", "dropout": 0.1}},
    "no clipping": {"optim": {"clip": 0.0}},
}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(stacks, "helps", lambda _: True)


def small(more: dict[str, dict[str, Any]]) -> Recipe:
    model = {
        "family": "llama",
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "vocab_size": 80,
    }
    return build(
        {
            "model": model,
            "optim": {"lr": 1e-3, **more.get("optim", {})},
            "train": {"batch_size": 4, **more.get("train", {})},
        }
    )


def batch(step: int) -> Batch:
    tokens = rng.integers(0, "tokens", step, count=68, high=80).astype(np.int32).reshape(4, 17)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 16), np.float32))


def steps(engine: Engine, first: int, last: int) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    made = []
    for step in range(first, last + 1):
        stats = engine.train_step(step, batch(step).split(engine.recipe.train.micro_batch_size), 1e-3)
        assert stats.finite and not stats.zero_grads
        made.append((stats.loss_sum / stats.weight, stats.grad_norm))
    return made


def made(config: Recipe) -> Engine:
    return Engine(config, params.init_params(config.model, 0), "cpu")


def test_tensors_of_one_shape_and_rule_are_one_array(together: None) -> None:
    table = {
        "a": Param((3, 4)), "b": Param((4, 3)), "c": Param((3, 4)), "d": Param((3, 4), lr=16.0),
        "e": Param((3, 4), decay=True), "f": Param((4,)), "g": Param((3, 4)),
    }  # fmt: skip
    made = stacks.Stacks(table, {"g"}, mx.Device(mx.cpu))
    arrays = {name: mx.array(rng.normal(0, name, shape=param.shape, std=1.0)) for name, param in table.items()}
    joined = made.join(arrays)
    assert {name: array.shape[0] for name, array in joined.items()} == {"a": 2, "b": 1, "d": 1, "e": 1, "f": 1, "g": 1}
    assert made.names == ["a", "c", "b", "d", "e", "f", "g"]
    parts = made.split(joined)
    assert parts.keys() == arrays.keys()
    squares = np.concatenate([np.array(made.squares(array)) for array in joined.values()])
    for name, array in arrays.items():
        assert (np.array(parts[name]) == np.array(array)).all(), name
    agree("squares", squares, np.array([np.square(np.array(arrays[name])).sum() for name in made.names]), 1e-6)
    assert made.join({"a": arrays["a"], "c": arrays["c"]}).keys() == {"a"}


def test_a_cpu_keeps_tensors_apart() -> None:
    assert not stacks.helps(mx.Device(mx.cpu)) and stacks.helps(mx.Device(mx.gpu))
    assert made(small({})).m.keys() == params.table(small({}).model).keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_update_is_that_of_tensors_apart(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, norms, and the state by name; taken back by an engine of the other kind, which goes on with it."""
    config = small(SETTINGS[setting])
    apart = made(config)
    expected = steps(apart, 1, 3)
    monkeypatch.setattr(stacks, "helps", lambda _: True)
    one = made(config)
    found = steps(one, 1, 3)
    assert len(one.m) < len(one.table) / 2
    agree("losses and norms", np.array(found), np.array(expected), 1e-6)
    states = apart.snapshot(), one.snapshot()
    for kind in ("params", "m", "v"):
        assert list(states[1][kind]) == list(states[0][kind])
        for name, value in states[0][kind].items():
            agree(f"{kind} {name}", states[1][kind][name], value, 2e-4)  # AdamW divides tiny gradients by tiny roots
    onward = steps(apart, 4, 5)
    one.load_state(states[0])
    agree("from the other's state", np.array(steps(one, 4, 5)), np.array(onward), 1e-6)
    other = apart.evaluate(batch(9))
    for _ in range(2):  # traced, and as it was traced
        agree("validation", np.array(one.evaluate(batch(9))["loss"]), np.array(other["loss"]), 1e-6)
        other = (steps(apart, 6, 6), apart.evaluate(batch(9)))[1]
        steps(one, 6, 6)


def test_adapters_with_a_rate_of_their_own(together: None) -> None:
    """LoRA+ and DoRA: what is trained is joined, the base is not."""
    config = recipe("llama-gqa", method="dora", b_lr=16.0)
    engine, found = train("mlxgpt", config, moved(config), 3)
    assert {name for name in engine.p} <= set(engine.table) and len(engine.p) < len(engine.table) / 2
    _, expected = train("torch_ref", config, moved(config), 3)
    agree("loss a step", found, expected, 1e-5)


def test_what_is_not_finite_changes_nothing(together: None) -> None:
    for optimizer in ("adamw", "muon"):
        engine = made(small({"optim": {"name": optimizer}}))
        steps(engine, 1, 1)
        before = engine.snapshot()
        broken = batch(2)
        broken.weights[0, 0] = np.inf
        assert not engine.train_step(2, [broken], 1e-3).finite
        after = engine.snapshot()
        assert after["t"] == before["t"]
        for kind in ("params", "m", "v"):
            assert all((after[kind][name] == value).all() for name, value in before[kind].items())


def test_a_gradient_that_is_zero_is_named(together: None) -> None:
    engine = made(small({}))
    nothing = batch(1)
    nothing.weights[:] = 0
    nothing.weights[0, 0] = 1  # the first token looks at itself alone: queries and keys get no gradient
    zeros = engine.train_step(1, [nothing], 1e-3).zero_grads
    assert set(zeros) == {f"h.{n}.attn.{name}.weight" for n in range(3) for name in ("q_proj", "k_proj")}
