"""train.deterministic in MLX: no gradient is a scatter, which a GPU adds in whatever order its threads arrive."""

import dataclasses
import io
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from compare import agree
from doubles.metal import Metal

from mlxgpt import engine as engines
from mlxgpt import fast
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters, params
from mlxgpt.common.recipes import build

Sections = dict[str, dict[str, Any]]
VOCABULARY, CHUNK = 50, 16


def sections(family: str = "gpt2", train: dict[str, Any] | None = None, **more: Any) -> Sections:
    """Two small layers, with more entries in the vocabulary than in a chunk of the head."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=VOCABULARY) | more.pop("model", {})
    fixed = {"deterministic": True, "batch_size": 2, "loss_chunk": CHUNK, "compile": "off"}
    return {"model": {"family": family, **sizes}, "train": fixed | (train or {}), **more}


def tuned(family: str, **adapter: Any) -> Sections:
    return sections(family, model={"tied": False}, adapter=adapter, tune={"source": "rows", "neftune": 5.0})


EMBEDDING = {"gpt2": ["wte", "c_attn"], "llama": ["embed_tokens", "lm_head", "q_proj"]}
KINDS: dict[str, Sections] = {
    **{family: sections(family) for family in ("gpt2", "llama", "gemma2", "gpt_neox", "phi", "olmo2")},
    "untied": sections(model={"tied": False}),
    "whole logits": sections(train={"loss_chunk": 0}),
    "bfloat16": sections("llama", {"compute_dtype": "bfloat16"}),
    "every regularizer": sections(
        train={"label_smoothing": 0.1, "z_loss": 1e-3, "dropout": 0.1, "checkpoint_activations": True}
    ),
    "window": sections("mistral", model={"window": 4}),
    "classifier": sections("llama"),
    "full": tuned("llama", method="full"),
    "quantized base": tuned("llama", method="lora", rank=4, bits=4, group_size=32, dequantize="never"),
    "head and biases": tuned("phi", method="lora", rank=4, bias="all", train=["lm_head"]),
    **{
        f"{method} on embeddings of {family}": sections(
            family, model={"tied": family == "gpt2"}, adapter={"method": method, "rank": 4, "targets": targets},
            tune={"source": "rows"},
        )
        for method in ("lora", "dora")
        for family, targets in EMBEDDING.items()
    },
}  # fmt: skip


def recipe_of(kind: str, **train: Any) -> Recipe:
    recipe = build(KINDS[kind], "test")
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **train))
    labels = ("a", "b", "c") if kind == "classifier" else ()
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, labels=labels))


def gradients(recipe: Recipe, packed: bool, device: str = "cpu") -> list[mx.array]:
    """Losses and gradients of one batch, not computed yet."""
    base = params.init_params(recipe.model, 0)
    engine = engines.Engine(recipe, base | (adapters.init(recipe, base) if recipe.adapter else {}), device)
    rng, shape = np.random.default_rng(0), (2, recipe.model.block_size)
    tokens, targets = rng.integers(0, len(recipe.model.labels) or VOCABULARY, (2, *shape)).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, shape)).astype(np.int32) if packed else None
    positions = rng.integers(0, 16, shape).astype(np.int32) if packed else None
    batch = Batch(tokens, targets, np.ones(shape, np.float32), positions=positions, segments=segments)
    terms, _, grads = engine._gradients(engine._arrays(batch), engine._keys(1), mx.array(0, mx.uint32))
    return [terms, *grads.values()]


def scatters(arrays: list[mx.array]) -> list[str]:
    """The primitives in a graph that add where an index says."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return [name for name in re.findall(r'label ?= ?"([^"]*)"', graph.getvalue()) if "Scatter" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_a_scatter(kind: str) -> None:
    assert scatters(gradients(recipe_of(kind), packed=True)) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "every regularizer", "quantized base"])
def test_nor_where_the_device_is_a_gpu(kind: str, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "SCORES", 64)
    assert scatters(gradients(recipe_of(kind), True, "gpu")) == []
    assert metal.used


@pytest.mark.parametrize("kind", ["gpt2", "whole logits", "llama", "dora on embeddings of llama"])
def test_a_scatter_is_seen_where_nobody_asked_for_determinism(kind: str) -> None:
    assert scatters(gradients(recipe_of(kind, deterministic=False), packed=False))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi", "every regularizer", "dora on embeddings of llama"])
def test_the_gradients_are_the_same(kind: str) -> None:
    ours, plain = ([np.array(each) for each in gradients(recipe_of(kind, deterministic=on), True)] for on in (1, 0))
    for one, other in zip(ours, plain, strict=True):
        agree("gradient", one, other, 1e-5 * max(1.0, float(np.abs(other).max())))
