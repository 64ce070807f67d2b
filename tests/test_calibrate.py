"""The walk through a model: what Model.hidden computes, the sums of inputs, and how little of a model it holds."""

import importlib
from typing import Any

import numpy as np
import pytest
from models import CASES, VARIANTS, tiny, weights

from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.inference import calibration
from mlxgpt.common.inference.calibration import Inputs, Stream
from mlxgpt.common.model import params
from mlxgpt.common.model.affine import Quantized

OWN = {
    "alibi": tiny(family="mlxgpt", position="alibi", n_kv_head=2),
    "sinusoidal": tiny(family="mlxgpt", position="sinusoidal", embed_norm=True, placement="post_add", final_norm=False),
    "no positions": tiny(family="mlxgpt", position="none", qk_norm="full", norm="layer"),
    "fused": tiny(family="mlxgpt", fused_qkv=True, qkv_by_head=True, gated=True, fused_mlp=True),
}
FAMILIES = CASES | VARIANTS | OWN


def rows(config: ModelConfig, count: int = 2) -> np.ndarray:
    """Tokens (count, block_size)."""
    return np.random.default_rng(5).integers(config.vocab_size, size=(count, config.block_size), dtype=np.int32)


def of(package: str, module: str) -> Any:
    return importlib.import_module(f"{package}.{module}")


def whole(package: str, config: ModelConfig, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> Any:
    """The whole model, and its logits (N, T, V)."""
    model = of(package, "model").Model(config, seed=None)
    for name, array in arrays.items():
        path, _, kind = name.rpartition(".")
        if package == "mlxgpt":
            setattr(model.at(path), kind, of("mlx", "core").array(array))
        else:
            getattr(model.at(path), kind).data = importlib.import_module("torch").from_numpy(array)
    return model.eval(), np.array(model.eval()(tokens).tolist())


def walk(package: str, config: ModelConfig, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> Any:
    """A walk, what the last block gave, and the inputs of every block's matrices."""
    made = of(package, "calibrate").Walk(config, "cpu")
    x, seen = made.start(arrays, tokens), {}
    for n in range(config.n_layer):
        block = {name: arrays[name] for name in calibration.block_names(config, n)}
        x, inputs = made.block(n, block, x, watch=list(calibration.sites(config)))
        seen |= {f"h.{n}.{path}": each for path, each in inputs.items()}
    return made, x, seen


def likelihoods(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_walk_computes_what_the_model_does_in_both_frameworks(name: str) -> None:
    config = FAMILIES[name]
    arrays, tokens = weights(config, scale=4.0), rows(config)
    targets, seen, streams = np.roll(tokens, -1, axis=1), {}, {}
    for package in PACKAGES.values():
        made, streams[package], seen[package] = walk(package, config, arrays, tokens)
        expected = likelihoods(whole(package, config, arrays, tokens)[1])
        expected = -np.take_along_axis(expected, targets[..., None].astype(np.int64), axis=-1)[..., 0]
        head = {name: arrays[name] for name in calibration.head_names(config)}
        np.testing.assert_allclose(made.losses(Stream(head, streams[package]), targets), expected, atol=1e-4)
    for place, one in seen["mlxgpt"].items():
        other = seen["torch_ref"][place]
        assert one.tokens == other.tokens == tokens.size
        np.testing.assert_allclose(one.gram, other.gram, atol=1e-4 * np.abs(one.gram).max())
        np.testing.assert_allclose(one.mean, other.mean, atol=1e-4 * one.mean.max())


@pytest.mark.parametrize("package", PACKAGES.values())
def test_the_inputs_of_a_matrix_are_what_it_multiplies(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block by hand, and the same sums however few rows are taken at once."""
    config = tiny(family="llama", n_hidden=80, **{"block_size": 16})
    arrays, tokens = weights(config), rows(config, 5)
    seen = walk(package, config, arrays, tokens)[2]
    x = arrays["wte.weight"][tokens].reshape(-1, config.n_embd).astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * arrays["h.0.ln_1.weight"]
    found: Inputs = seen["h.0.attn.q_proj"]
    np.testing.assert_allclose(found.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.mean, np.abs(x).mean(0), rtol=1e-5)
    assert seen["h.1.mlp.c_proj"].gram.shape == (80, 80) and found.gram.dtype == np.float64
    monkeypatch.setattr(calibration, "TOKENS", 1)
    monkeypatch.setattr(calibration.batches, "__defaults__", (32,))
    for place, again in walk(package, config, arrays, tokens)[2].items():
        np.testing.assert_allclose(again.gram, seen[place].gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("package", PACKAGES.values())
@pytest.mark.parametrize("name", ["gpt2", "llama-untied", "gemma2", "granite"])
def test_a_quantized_model_is_held_against_the_one_it_came_from(package: str, name: str) -> None:
    config = FAMILIES[name]
    arrays, tokens = weights(config, scale=4.0), rows(config)
    targets = np.roll(tokens, -1, axis=1)
    small: dict[str, Any] = dict(arrays)
    for each, param in params.table(config).items():
        if param.adaptable and param.shape[1] % 32 == 0:  # the tables are 48 wide
            small[each] = Quantized.of(arrays[each], 4, 32)
    assert any(isinstance(each, Quantized) for each in small.values())
    rough = {name: each.dequantize() if isinstance(each, Quantized) else each for name, each in small.items()}
    tail = "lm_head.weight" if not config.tied else "wte.weight"
    small[tail] = rough[tail] = arrays[tail] + np.float32(0.01)
    made, before, _ = walk(package, config, arrays, tokens)
    _, after, _ = walk(package, config, small, tokens)
    found = made.compare(Stream(arrays, before), Stream(small, after), targets)
    p, q = (likelihoods(whole(package, config, each, tokens)[1]) for each in (arrays, rough))
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), atol=1e-5)
    assert found.kl.mean() > 1e-4
    picked = targets[..., None].astype(np.int64)
    np.testing.assert_allclose(found.after, -np.take_along_axis(q, picked, -1)[..., 0], atol=1e-4)
    np.testing.assert_allclose(found.before, -np.take_along_axis(p, picked, -1)[..., 0], atol=1e-4)


@pytest.mark.parametrize("package", PACKAGES.values())
@pytest.mark.parametrize("name", ["gpt2", "llama-untied", "gemma2"])
def test_a_walk_keeps_no_weights(package: str, name: str) -> None:
    config = FAMILIES[name]
    arrays, tokens = weights(config), rows(config)
    made, x, _ = walk(package, config, arrays, tokens)
    made.losses(Stream(arrays, x), tokens)
    made.head_inputs(arrays, x)
    model = made._model
    parts = (
        model.parameters()
        if package == "torch_ref"
        else [each for _, each in of("mlx", "utils").tree_flatten(model.parameters())]
    )
    assert sum(int(np.prod(each.shape)) for each in parts) == 0
