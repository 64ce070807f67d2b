"""What a model makes of given tokens, in PyTorch; common/inference/probe.py names the arrays and their use."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from mlxgpt.common import tf32
from mlxgpt.common.config import SampleConfig, TrainConfig
from mlxgpt.common.inference import probe as probing
from mlxgpt.common.inference.probe import KEPT, Request
from torch_ref import device as devices
from torch_ref.generate import generate
from torch_ref.layers import Array
from torch_ref.load import load
from torch_ref.losses import Arrays, lm
from torch_ref.model import Block, Model


class Watched(nn.Module):
    """A block that keeps what it was last given and gave."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        self._given = self._gave = torch.zeros(())

    def forward(self, x: Array, *rest: object) -> Array:
        self._given = x
        self._gave = self.block(x, *rest)
        return self._gave


@torch.no_grad()
def multiply(model: Model, scale: float, before: float) -> None:
    """Brings the matrices from one scale to another."""
    weights = dict(model.named_parameters())
    grown = probing.growth(model.config, scale, before)
    for name, factor in grown.items():
        weights[name].mul_(factor)


def host(array: Array) -> np.ndarray:
    """An array as numpy, which has no bfloat16: that as float32."""
    return (array.float() if array.dtype == torch.bfloat16 else array).cpu().numpy()


@torch.no_grad()
def activations(model: Model, tokens: Array) -> Iterator[tuple[str, np.ndarray]]:
    """Logits and hidden states of the last tokens, as ``logits``, ``hidden.embed``, ``hidden.h.N``, ``hidden.ln_f``."""
    blocks = model.h
    watched = [Watched(block) for block in blocks]  # type: ignore[arg-type]
    model.h = nn.ModuleList(watched)
    last = model.hidden(tokens)
    model.h = blocks
    yield "logits", host(model.head(last[:, -KEPT:])[0])
    yield "hidden.embed", host(watched[0]._given[0, -KEPT:])
    for n, block in enumerate(watched):
        yield f"hidden.h.{n}", host(block._gave[0, -KEPT:])
    yield "hidden.ln_f", host(last[0, -KEPT:])


def gradients(model: Model, tokens: Array, targets: Array) -> Iterator[tuple[str, np.ndarray]]:
    """The mean loss's gradient of everything that trains."""
    arrays = Arrays(tokens, targets, torch.ones(tokens.shape, device=tokens.device), None, None)
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    grads = torch.autograd.grad(lm(model, arrays, TrainConfig()).mean(), tuple(weights.values()))
    found = dict(zip(weights, grads, strict=True))
    for name in list(found):
        yield name, found.pop(name).cpu().numpy()


def probe(folder: Path | str, request: Request, device: str = "auto") -> Iterator[tuple[str, np.ndarray]]:
    """Computes what was asked for, in float32 or with ``request.exact`` in float64, an array at a time.

    Raises:
        UserError: see ``load`` and tf32.judged; ids that the model does not have.
    """
    if request.exact and devices.use(device).type == "mps":
        device = "cpu"  # MPS has no float64
    model, _ = load(folder, device=device)
    if note := tf32.judged(devices.tf32_state(model.device)):
        print(note, file=sys.stderr)
    if request.exact:
        model.double()._dtype = torch.float64
    request.check(model.config, str(folder))
    tokens, targets = (torch.tensor(array, device=model.wte.weight.device) for array in request.batch)
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
        with torch.no_grad():
            logits = model(torch.tensor([(prompt + drawn)[:-1]], device=tokens.device))[0, -len(drawn) :].cpu().numpy()
        yield "greedy.tokens", np.array(drawn, np.int32)
        yield "greedy.margins", probing.margins(logits)
