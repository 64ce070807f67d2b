"""Merges adapters into their base model, one tensor at a time."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.conversion import Report, convert_opened
from convert.formats.adapter import fused
from convert.formats.opened import Opened
from convert.formats.registry import open_model
from convert.formats.rounding import Rounding
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters


@dataclass(frozen=True)
class Loss:
    """The error of quantizing merged matrices again, as root mean squares over all their weights."""

    matrices: int
    weights: float  # error relative to the merged weights
    update: float  # error relative to what the adapters changed
    worst: float  # largest error of a weight, relative to the largest weight of its matrix
    name: str  # that matrix

    def __str__(self) -> str:
        return (
            f"{self.matrices} merged matrices quantized again: an error of {self.weights:.2%} of the weights and of "
            f"{self.update:.1%} of what the adapter changed (root mean square), at most {self.worst:.2%} of the "
            f"largest weight (in {self.name}); --dequantize keeps them exact"
        )


def fuse(
    model: Path | str,
    given: base_and_adapters.Given,
    out: Path | str,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
    rounding: Rounding | None = None,
) -> tuple[Report, Loss | None]:
    """Writes the model that ``model`` is with the adapters ``given`` (a folder, or folders with weights) to ``out``.

    Args:
        model: a model; or an adapter, or a run that trained one, whose base is then meant.
        given: adapters; None where ``model`` is one.
        out: the folder to make.
        dtype: float32, float16 or bfloat16 of all weights; default: the base's.
        dequantize: write a quantized base as plain weights, of bfloat16 unless ``dtype`` says otherwise.
        force: also with a base of other weights than the adapter was trained on.
        rounding: gathers what storing the weights loses of the update.

    Returns:
        What was written; the error of matrices quantized again, if there are any.

    Raises:
        UserError: no adapter, one of another model, ones that cannot be added up; see ``convert``.
    """
    place, found = base_and_adapters.find_base(model, given)
    if not found:
        raise UserError(f"{place}: a model without an adapter: expected --adapter DIR")
    base, rounding = open_model(place), Rounding() if rounding is None else rounding
    opened = fused(base, found, force, dtype, rounding)
    packed = any(tensor.packed for tensor in base.tensors.values())
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    if packed and not dequantize:
        if dtype:
            raise UserError(f"--dtype {dtype}: {place} is quantized and stays so: expected --dequantize with it")
        rounding.quantized = True
        report = convert_opened(opened, place, out, "mlx-lm", keep_bits=True)
        return report, _loss(base, opened, open_model(out), rounding)
    if packed and not dtype:
        options = {"dtype": "bfloat16"}
        opened = fused(base, found, force, "bfloat16", rounding)
    return convert_opened(opened, place, out, "hf", **options), None


def _loss(base: Opened, merged: Opened, written: Opened, rounding: Rounding) -> Loss | None:
    """Compares the quantized matrices that changed with their exact values, and adds them to ``rounding``."""
    count, error, size, change, worst = 0, 0.0, 0.0, 0.0, (0.0, "")
    for name, tensor in merged.tensors.items():
        if not tensor.packed or tensor.packed.parts:
            continue
        old = "wte.weight" if name not in base.tensors else name  # a head of its own that was tied
        exact, after = (each.tensors[name].read().astype(np.float64) for each in (merged, written))
        before = base.tensors[old].read().astype(np.float64)
        rounding.add(name, before, exact, after, "packed")
        count += 1
        off = exact - after
        error, size = error + float((off**2).sum()), size + float((exact**2).sum())
        if before.shape == exact.shape:
            change += float(((exact - before) ** 2).sum())
        worst = max(worst, (float(np.abs(off).max() / max(np.abs(exact).max(), 1e-30)), name.removesuffix(".weight")))
    if not count:
        return None
    return Loss(count, math.sqrt(error / max(size, 1e-30)), math.sqrt(error / max(change, 1e-30)), *worst)
