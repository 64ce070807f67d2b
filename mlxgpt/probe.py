"""What a model makes of given tokens, in MLX; common/inference/probe.py names the arrays and their use."""

import sys
from collections.abc import Iterator
from pathlib import Path

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import device as devices
from mlxgpt.common import tf32
from mlxgpt.common.config import SampleConfig, TrainConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference import probe as probing
from mlxgpt.common.inference.probe import KEPT, Request
from mlxgpt.generate import generate
from mlxgpt.layers import Array
from mlxgpt.load import load
from mlxgpt.losses import Arrays, lm
from mlxgpt.model import Block, Model


class Watched(nn.Module):
    """A block that keeps what it was last given and gave."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        self._given = self._gave = mx.zeros(())

    def __call__(self, x: Array, *rest: object) -> Array:
        self._given = x
        self._gave = self.block(x, *rest)  # type: ignore[arg-type]
        return self._gave


def multiply(model: Model, scale: float, before: float) -> None:
    """Brings the matrices from one scale to another."""
    weights = dict(tree_flatten(model.parameters()))
    grown = probing.growth(model.config, scale, before)
    model.update(tree_unflatten([(name, weights[name] * factor) for name, factor in grown.items()]))


def host(array: Array) -> np.ndarray:
    """An array as numpy, which has no bfloat16: that as float32."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def activations(model: Model, tokens: Array) -> Iterator[tuple[str, np.ndarray]]:
    """Logits and hidden states of the last tokens, as ``logits``, ``hidden.embed``, ``hidden.h.N``, ``hidden.ln_f``."""
    blocks = list(model.h)
    watched = [Watched(block) for block in blocks]
    model.h = watched  # type: ignore[assignment]
    last = model.hidden(tokens)
    model.h = blocks
    yield "logits", host(model.head(last[:, -KEPT:])[0])
    yield "hidden.embed", host(watched[0]._given[0, -KEPT:])
    for n, block in enumerate(watched):
        yield f"hidden.h.{n}", host(block._gave[0, -KEPT:])
    yield "hidden.ln_f", host(last[0, -KEPT:])


def gradients(model: Model, tokens: Array, targets: Array) -> Iterator[tuple[str, np.ndarray]]:
    """The mean loss's gradient of everything that trains."""
    arrays = Arrays(tokens, targets, mx.ones(tokens.shape), None, None)
    mean = nn.value_and_grad(model, lambda: lm(model, arrays, TrainConfig()).mean())
    found = dict(tree_flatten(mean()[1]))
    for name in list(found):
        yield name, np.array(found.pop(name))


def probe(folder: Path | str, request: Request, device: str = "auto") -> Iterator[tuple[str, np.ndarray]]:
    """Computes what was asked for, in float32, an array at a time.

    Raises:
        UserError: see ``load`` and tf32.judged; ids that the model does not have; float64, which is torch's.
    """
    if request.exact:
        raise UserError("--exact: float64 is of the torch backend alone")
    model, _ = load(folder, device=device)
    if note := tf32.judged(devices.tf32_state(mx.default_device())):
        print(note, file=sys.stderr)
    request.check(model.config, str(folder))
    tokens, targets = (mx.array(array) for array in request.batch)
    before = 1.0
    for scale in request.scales:
        multiply(model, scale, before)
        before, spelled = scale, probing.spell(scale)
        for name, array in activations(model, tokens):
            kind, _, rest = name.partition(".")
            yield ".".join(filter(None, (kind, spelled, rest))), array
        for name, array in gradients(model, tokens, targets) if request.gradients else ():
            yield f"gradient.{spelled}.{name}", array
    if request.greedy:
        multiply(model, 1.0, before)
        prompt = request.ids[: request.prompt].tolist()
        drawn = generate(model, None, [prompt], SampleConfig(temperature=0.0, max_tokens=request.greedy))[0].tokens
        logits = np.array(model(mx.array([(prompt + drawn)[:-1]]))[0, -len(drawn) :])
        yield "greedy.tokens", np.array(drawn, np.int32)
        yield "greedy.margins", probing.margins(logits)
