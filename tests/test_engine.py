"""The engines: one curve whatever the micro-batch, dropout included; skipped updates; strict state; dtypes; repeats."""

import dataclasses
import importlib

import numpy as np
import pytest
from compare import agree, worst
from models import tiny

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import OptimConfig, Recipe, TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

BACKENDS = ["mlxgpt", "torch_ref"]


def recipe(family: str = "gpt2", optim: str = "adamw", **train) -> Recipe:
    """A tiny recipe; keyword arguments are train's."""
    return Recipe(model=tiny(family=family), optim=OptimConfig(name=optim), train=TrainConfig(batch_size=6, **train))


def batch(config: Recipe, step: int, rows: int = 6, extra: int = 0) -> Batch:
    """Skewed random tokens, ``extra`` beyond the context; every third target of odd rows has no weight."""
    size, vocabulary = config.model.block_size + extra, config.model.vocab_size
    draw = rng.integers(0, "tokens", step, count=rows * (size + 1), high=vocabulary * vocabulary)
    tokens = np.sqrt(draw).astype(np.int32).reshape(rows, size + 1)
    weights = np.ones((rows, size), np.float32)
    weights[1::2, ::3] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def engine(backend: str, config: Recipe):
    """An engine with initial weights."""
    made = importlib.import_module(f"{backend}.engine").Engine(config, params.init_params(config.model, 3), "cpu")
    return made


def curve(backend: str, config: Recipe, steps: int = 5) -> np.ndarray:
    """Mean loss a step."""
    trained = engine(backend, config)
    rows = config.train.micro_batch_size
    stats = [trained.train_step(step, batch(config, step).split(rows), 1e-2) for step in range(1, steps + 1)]
    assert all(stat.finite for stat in stats) and trained.t == steps
    return np.array([stat.loss_sum / stat.weight for stat in stats])


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_change_the_curve_by_rounding_only(backend):
    whole = curve(backend, recipe(dropout=0.2))
    for rows in (4, 1):
        agree(f"micro-batches of {rows}", curve(backend, recipe(dropout=0.2, micro_batch_size=rows)), whole, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_that_forgot_their_place_would_be_seen(backend, monkeypatch):
    """Dropout addressed by the row of the micro-batch, not of the global batch, gives another curve."""
    whole = curve(backend, recipe(dropout=0.2))
    split = Batch.split
    monkeypatch.setattr(Batch, "split", lambda b, rows: [dataclasses.replace(m, first_row=0) for m in split(b, rows)])
    assert worst("misplaced rows", curve(backend, recipe(dropout=0.2, micro_batch_size=2)), whole) > 1e-4


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_frameworks_learn_alike_with_every_regularizer(optim):
    config = recipe("llama", optim, dropout=0.1, label_smoothing=0.1, z_loss=1e-3, micro_batch_size=4)
    agree("loss a step", curve("mlxgpt", config, 12), curve("torch_ref", config, 12), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_changes_no_bit(backend):
    plain, recomputed = (
        curve(backend, recipe("qwen3", dropout=0.1, checkpoint_activations=on, compile="off")) for on in (False, True)
    )
    assert (plain == recomputed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_training_learns_the_same(backend):
    agree("loss a step", curve(backend, recipe(deterministic=True)), curve(backend, recipe()), 1e-6)


def test_deterministic_embedding_gradient_is_a_product():
    import mlx.core as mx

    from mlxgpt.layers import gather

    weight, index = mx.random.normal((7, 5)), mx.array([[1, 1, 6], [0, 1, 6]])
    cotangent = mx.random.normal((2, 3, 5))
    expected = np.zeros((7, 5))
    np.add.at(expected, np.array(index), np.array(cotangent))
    agree("gradient", np.array(mx.vjp(lambda w: gather(w, index), [weight], [cotangent])[1][0]), expected, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_that_is_not_finite_changes_nothing(backend, rows):
    config = recipe(micro_batch_size=rows)
    trained = engine(backend, config)
    trained.train_step(1, batch(config, 1).split(rows), 1e-2)
    before = trained.snapshot()
    poisoned = batch(config, 2)
    poisoned.weights[2, 5] = np.nan
    stats = trained.train_step(2, dataclasses.replace(poisoned).split(rows), 1e-2)
    after = trained.snapshot()
    assert not stats.finite and trained.t == after["t"] == 1
    for key in ("params", "m", "v"):
        for name in before[key]:
            assert (before[key][name] == after[key][name]).all(), name
    assert trained.train_step(3, batch(config, 3).split(rows), 1e-2).finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_snapshot_goes_on_bit_equal(backend, optim):
    config = recipe(optim=optim, dropout=0.1)
    first = engine(backend, config)
    for step in (1, 2):
        first.train_step(step, batch(config, step).split(0), 1e-2)
    state = first.snapshot()
    expected = [first.train_step(step, batch(config, step).split(0), 1e-2).loss_sum for step in (3, 4)]
    second = engine(backend, config)
    second.load_state(state)
    assert second.t == 2
    assert [second.train_step(step, batch(config, step).split(0), 1e-2).loss_sum for step in (3, 4)] == expected
    assert (first.snapshot()["params"]["wte.weight"] != state["params"]["wte.weight"]).any(), "the copy is its owner's"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["params"].pop("ln_f.bias"), r"ln_f\.bias is missing"),
        (lambda state: state["m"].update({"h.9.x": np.zeros(1, np.float32)}), r"unknown tensor h\.9\.x"),
        (lambda state: state["v"].update({"ln_f.bias": np.zeros(3, np.float32)}), r"ln_f\.bias has shape \(3,\)"),
        (lambda state: state["v"].update({"ln_f.bias": np.zeros(48)}), r"ln_f\.bias is float64"),
    ],
)
def test_state_is_taken_strictly(backend, damage, message):
    config = recipe()
    trained = engine(backend, config)
    state = trained.snapshot()
    damage(state)
    with pytest.raises(UserError, match=message):
        trained.load_state(state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_without_gradient_is_named(backend):
    """A projection of zeros cuts off what lies before it in its branch."""
    config = recipe()
    trained = engine(backend, config)
    assert trained.train_step(1, batch(config, 1).split(0), 1e-3).zero_grads == ()
    silent = params.init_params(config.model, 3) | {"h.0.mlp.c_proj.weight": np.zeros((48, 192), np.float32)}
    trained = importlib.import_module(f"{backend}.engine").Engine(config, silent, "cpu")
    zero = trained.train_step(1, batch(config, 1).split(0), 1e-3).zero_grads
    assert set(zero) == {f"h.0.{name}.{kind}" for name in ("ln_2", "mlp.c_fc") for kind in ("weight", "bias")}


def test_bf16_is_as_far_from_fp32_in_both_frameworks():
    """Rung 10: the distance to the framework's own fp32 is at most 1.5x the other framework's."""
    gaps = {}
    for backend in BACKENDS:
        exact, rough = (curve(backend, recipe("llama", compute_dtype=dtype), 8) for dtype in ("float32", "bfloat16"))
        gaps[backend] = float(np.sqrt(np.mean((exact - rough) ** 2)))
    print(gaps)
    assert 0 < gaps["mlxgpt"] <= 1.5 * gaps["torch_ref"]
    assert 0 < gaps["torch_ref"] <= 1.5 * gaps["mlxgpt"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_and_moments_stay_float32_under_bf16(backend):
    config = recipe(compute_dtype="bfloat16")
    trained = engine(backend, config)
    trained.train_step(1, batch(config, 1).split(0), 1e-3)
    state = trained.snapshot()
    assert {array.dtype for key in ("params", "m", "v") for array in state[key].values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_than_the_context_are_refused(backend):
    config = recipe("llama")
    with pytest.raises(UserError, match="33 tokens: the model's context holds 32"):
        engine(backend, config).evaluate(batch(config, 1, rows=1, extra=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_device_is_refused(backend):
    config = recipe()
    with pytest.raises(UserError, match="--device tpu"):
        importlib.import_module(f"{backend}.engine").Engine(config, params.init_params(config.model, 3), "tpu")


def test_dropout_draws_the_same_mask_in_both_frameworks_and_at_its_rate():
    import mlx.core as mx
    import torch

    from mlxgpt import noise as ours
    from torch_ref import noise as theirs

    key, shape = 0xDEADBEEF, (5, 40, 33)
    mine = np.array(ours.dropout(mx.ones(shape), 0.3, mx.array(key, mx.uint32), mx.array(2, mx.uint32)))
    as_int = torch.tensor(key - 2**32, dtype=torch.int32)
    other = theirs.dropout(torch.ones(shape), 0.3, as_int, torch.tensor(2, dtype=torch.int32)).numpy()
    assert (mine == other).all()
    assert abs((mine == 0).mean() - 0.3) < 0.02
    later = np.array(ours.dropout(mx.ones((3, 40, 33)), 0.3, mx.array(key, mx.uint32), mx.array(4, mx.uint32)))
    assert (mine[2:] == later).all(), "rows are addressed globally"
    assert (mine[0] != mine[1]).any()
