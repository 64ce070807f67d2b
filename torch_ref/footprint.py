"""What a training step holds at most, from the operations of the step itself, on tensors that have shapes only."""

import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlxgpt.common.config import Recipe
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.plan.memory import Footprint, Piece
from torch_ref import engine as engines
from torch_ref import losses, optim

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "int32", "int64", "uint32", "bool")}


class Watch(TorchDispatchMode):
    """Counts the bytes of the storages that live, and keeps what lived at the peak."""

    def __init__(self):
        super().__init__()
        self.tied: tuple[int, ...] = ()  # shape of a matrix that is used twice
        self.live: dict[int, tuple[weakref.ref, Piece]] = {}
        self.bytes = self.peak = 0
        self.at_peak: list[Piece] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.add.Tensor and args[0].shape == self.tied == getattr(args[1], "shape", None):
            func = torch.ops.aten.add_.Tensor  # autograd's sum is in place, but for who watches and so holds the tensor
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return made

    def note(self, tensor: torch.Tensor, label: str = "") -> None:
        """Takes up a storage that is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return

        def gone(_: weakref.ref) -> None:
            self.live.pop(key)
            self.bytes -= size

        self.live[key] = weakref.ref(storage, gone), Piece(label, tuple(tensor.shape), size)
        self.bytes += size
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.at_peak = [piece for _, piece in self.live.values()]


def outlined(recipe: Recipe) -> dict[str, Any]:
    """The base's tensors without values: quantized where the engine would have them so."""
    adapter, trains = recipe.adapter, engines.adapter_params.trainable(recipe)
    stay = adapter and adapter.bits and adapter.dequantize == "never"
    made: dict[str, Any] = {}
    for name, param in engines.parameters.table(recipe.model).items():
        made[name] = _empty(*param.shape)
        if adapter and stay and param.adaptable and name not in trains and not param.shape[1] % adapter.group_size:
            n_out, n_in = param.shape
            scales = _empty(n_out, n_in // adapter.group_size)
            words = np.zeros((n_out, n_in * adapter.bits // 32), np.uint32)
            made[name] = Quantized(words, scales, scales, adapter.bits, adapter.group_size)
    return made


def _empty(*shape: int) -> np.ndarray:
    """Memory that is asked for and never touched, so that it is none."""
    return np.zeros(shape, np.float32)


class Outline(engines.Engine):
    """An engine of the right shapes without values."""

    def __init__(self, recipe: Recipe):
        devices, quantize_base = engines.devices, engines.quantize_base
        patches = [
            (devices, "use", lambda *_: torch.device("meta")),
            (devices, "limit", lambda *_: []),
            (quantize_base, "prepare", lambda *_: (outlined(recipe), "")),
            (torch, "from_numpy", lambda a: torch.empty(a.shape, dtype=_DTYPES[a.dtype.name], device="meta")),
        ]
        kept = [(place, name, getattr(place, name)) for place, name, _ in patches]
        shapes = engines.adapter_params.shapes(recipe)
        try:
            for place, name, value in patches:
                setattr(place, name, value)
            with torch.device("meta"):
                super().__init__(recipe, {name: _empty(*shape) for name, shape in shapes.items()})
        finally:
            for place, name, value in kept:
                setattr(place, name, value)

    def _put(self, params: dict) -> None:
        """Keeps the zeros that the model was made of."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention as the CPU runs it; on tensors without values torch would take another kernel."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -float("inf"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def step(outline: Outline, rows: int, length: int, micro_batches: int) -> None:
    """What Engine.train_step does, but for the values."""
    device, config = outline.device, outline.recipe.optim
    ints = torch.zeros((rows, length), dtype=torch.int32, device=device)
    batch = losses.Arrays(ints, ints, torch.zeros((rows, length), device=device), None, None)
    keys = torch.zeros((2 + engines.SITES * outline.recipe.model.n_layer + len(outline.adapted),), dtype=torch.int32,
                       device=device)  # fmt: skip
    for _ in range(min(micro_batches, 2)):  # the second finds the first one's gradients, as any other does
        outline._gradients(batch, keys, torch.zeros((), dtype=torch.int32, device=device))
    with torch.no_grad():
        for name, p in outline.weights.items():
            g, m, scalars = p.grad, outline.m[name], [0.0] * 5
            assert g is not None
            if name in outline.muon:
                optim.muon(p, g, m, scalars, config)
            else:
                optim.adamw(p, g, m, outline.v[name], scalars, outline.table[name], config)


def footprint(recipe: Recipe, rows: int, length: int, micro_batches: int = 1) -> Footprint:
    """Of a step on ``micro_batches`` of ``rows`` rows of ``length`` tokens, run eagerly on the CPU."""
    outline, watch = Outline(recipe), Watch()
    if recipe.model.tied and "wte.weight" in outline.weights:
        watch.tied = outline.weights["wte.weight"].shape
    groups = {"weights": [*outline.model.parameters(), *outline.model.buffers()],
              "moments": [*outline.m.values(), *outline.v.values()]}  # fmt: skip
    for label, tensors in groups.items():
        for tensor in tensors:
            watch.note(tensor, label)
    kept, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        with watch:
            step(outline, rows, length, micro_batches)
    finally:
        F.scaled_dot_product_attention = kept
    return Footprint(watch.peak, watch.at_peak)
