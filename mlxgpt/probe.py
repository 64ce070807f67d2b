"""What a model makes of given tokens, in MLX; common/inference/probe.py names the arrays and their use."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from mlxgpt.model import Model


class Watched(nn.Module):
    """A module that keeps what it was last given and gave."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._given: tuple[Any, ...] = ()
        self._gave = mx.zeros(())

    def __call__(self, *given: Any) -> Array:
        self._given = given
        self._gave = self.module(*given)  # type: ignore[operator]
        return self._gave


def multiply(model: Model, scale: float, before: float) -> None:
    """Brings the matrices from one scale to another."""
    weights = dict(tree_flatten(model.parameters()))
    grown = probing.growth(model.config, scale, before)
    model.update(tree_unflatten([(name, weights[name] * factor) for name, factor in grown.items()]))


def host(array: Array) -> np.ndarray:
    """An array as numpy, which has no bfloat16: that as float32."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def put(model: Model, path: str, module: nn.Module) -> None:
    """Puts a module where ``path`` says, such as h.0 or h.0.attn."""
    above, _, name = path.rpartition(".")
    owner: Any = model.at(above) if above else model
    if name.isdigit():
        owner[int(name)] = module
    else:
        setattr(owner, name, module)


def watch(model: Model, tokens: Array, paths: Sequence[str]) -> tuple[Array, dict[str, Watched]]:
    """What the head sees (1, T, C) in one pass over tokens (1, T); the modules at the paths, inner ones first."""
    watched = {path: Watched(model.at(path)) for path in paths}
    try:
        for path, each in watched.items():
            put(model, path, each)
        last = model.hidden(tokens)
    finally:
        for path, each in reversed(watched.items()):
            put(model, path, each.module)
    return last, watched


def activations(model: Model, tokens: Array) -> Iterator[tuple[str, np.ndarray]]:
    """Logits and hidden states of the last tokens, as ``logits``, ``hidden.embed``, ``hidden.h.N``, ``hidden.ln_f``."""
    last, seen = watch(model, tokens, [f"h.{n}" for n in range(model.config.n_layer)])
    yield "logits", host(model.head(last[:, -KEPT:])[0])
    yield "hidden.embed", host(seen["h.0"]._given[0][0, -KEPT:])
    for path, each in seen.items():
        yield f"hidden.{path}", host(each._gave[0, -KEPT:])
    yield "hidden.ln_f", host(last[0, -KEPT:])


class Inside:
    """One pass over ids (T,), of which common/inference/inspection.py asks arrays on the host."""

    def __init__(self, model: Model, ids: np.ndarray):
        self.model, layers = model, range(model.config.n_layer)
        _, self._seen = watch(
            model, mx.array(ids[None]), [f"h.{n}{part}" for n in layers for part in (".attn", ".mlp", "")]
        )

    def stream(self, place: int) -> np.ndarray:
        """The residual stream (T, C) before block ``place``; n_layer: after the last."""
        return host(self._stream(place)[0])

    def branch(self, layer: int, part: str) -> np.ndarray:
        """What ``attn`` or ``mlp`` of a block gives, (T, C), before a norm or multiplier that follows it."""
        return host(self._seen[f"h.{layer}.{part}"]._gave[0])

    def attention(self, layer: int) -> np.ndarray:
        """Where the tokens look in a layer, (H, T, T): the weights of its heads, 0 where they may not."""
        config, module = self.model.config, self._seen[f"h.{layer}.attn"]
        x, _, rope, *_ = module._given
        window = config.window if layer in config.window_layers else 0
        mask: Any = self.model.mask(x.shape[1], x.shape[1], None, None, window, fused=False)
        return host(self.model.at(f"h.{layer}.attn").weights(x, mask, rope)[0])

    def lens(self, place: int, start: int, stop: int) -> np.ndarray:
        """Logits (t, V) that the last norm and the head make of the stream at tokens start to stop."""
        return host(self.model.head(self.model.ln_f(self._stream(place)[:, start:stop]))[0])

    def embeddings(self, start: int, stop: int) -> np.ndarray:
        """Rows of the embedding, (n, C), with what an adapter adds to them."""
        return host(self.model.wte(mx.arange(start, stop)))

    def _stream(self, place: int) -> Array:
        return self._seen[f"h.{place - 1}"]._gave if place else self._seen["h.0"]._given[0]


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
