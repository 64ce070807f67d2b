"""The verb ``fuse``: a model and adapters become one model, a tensor at a time.

What an adapter changes is computed in float64 and kept as the base keeps it, quantised anew where the base is; all
other tensors are copied byte for byte.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf, stream
from convert.command import line
from convert.conversion import Report, convert_opened
from convert.formats import open_model
from convert.model import Opened, Packed, Tensor
from mlxgpt.common import adapter_folder, adapters, finding, folder, params
from mlxgpt.common.adapters import Target
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizer import FILES

FORMAT = "adapter"


@dataclass(frozen=True)
class Loss:
    """What quantising the merged matrices again did to them; errors are root mean squares over all their weights."""

    matrices: int
    weights: float  # error relative to the merged weights
    update: float  # error relative to what the adapters changed
    worst: float  # largest error of a weight, relative to the largest weight of its matrix
    name: str  # that matrix

    def __str__(self) -> str:
        return (
            f"{self.matrices} merged matrices quantised again: an error of {self.weights:.2%} of the weights and of "
            f"{self.update:.1%} of what the adapter changed (root mean square), at most {self.worst:.2%} of the "
            f"largest weight (in {self.name}); --dequantize keeps them exact"
        )


def fuse(
    model: Path | str,
    given: finding.Given,
    out: Path | str,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
) -> tuple[Report, Loss | None]:
    """Writes the model that ``model`` is with the adapters ``given`` (a folder, or folders with weights) to ``out``.

    Args:
        model: a model; or an adapter, or a run that trained one, whose base is then meant.
        given: adapters; None where ``model`` is one.
        out: the folder to make.
        dtype: float32, float16 or bfloat16 of all weights; default: the base's.
        dequantize: write a quantised base as plain weights, of bfloat16 unless ``dtype`` says otherwise.
        force: also with a base of other weights than the adapter was trained on.

    Raises:
        UserError: no adapter, one of another model, ones that cannot be added up; see ``convert``.
    """
    place, found = finding.find(model, given)
    if not found:
        raise UserError(f"{place}: a model without an adapter: expected --adapter DIR")
    base = open_model(place)
    opened = fused(base, found, force, dtype)
    packed = any(tensor.packed for tensor in base.tensors.values())
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    if packed and not dequantize:
        if dtype:
            raise UserError(f"--dtype {dtype}: {place} is quantised and stays so: expected --dequantize with it")
        report = convert_opened(opened, place, out, "mlx-lm", keep_bits=True)
        return report, _loss(base, opened, open_model(out))
    if packed and not dtype:
        options = {"dtype": "bfloat16"}
        opened = fused(base, found, force, "bfloat16")
    return convert_opened(opened, place, out, "hf", **options), None


def read(path: Path) -> Opened:
    """An adapter's folder as the model that it makes of its base.

    Raises:
        UserError: see ``adapter_folder.read`` and ``base_of``.
    """
    made = fused(open_model(adapter_folder.base_of(path)), [(path, 1.0)])
    return dataclasses.replace(made, path=path, format=FORMAT)


def fused(base: Opened, given: Sequence[tuple[Path, float]], force: bool = False, dtype: str | None = None) -> Opened:
    """The model that ``base`` is with the adapters in these folders, times their weights.

    What changes is rounded once, to ``dtype`` or what the base has.
    """
    read = [(adapter_folder.read(path, base.path, base.config, force), weight) for path, weight in given]
    targets, arrays, whole = adapters.add_up([(each.targets, each.params, weight) for each, weight in read])
    config = base.config
    for each, _ in read:
        config = adapter_folder.grown(config, each)
    tensors = {}
    for name, param in params.table(config).items():
        # a score that the base does not have is kept as its norms are
        tensor, path = base.tensors.get(name, base.tensors["ln_f.weight"]), name.removesuffix(".weight")
        kept = folder.DTYPES[dtype] if dtype else tensor.dtype
        if name in whole:
            tensor = _given(name, whole[name], tensor, kept)
        elif path in targets and path != name:
            tensor = _merged(tensor, targets[path], arrays, path, kept)
        if tensor.shape != param.shape:
            raise UserError(f"{given[0][0]}: {name} has shape {list(tensor.shape)}, expected {list(param.shape)}")
        tensors[name] = tensor
    companions = dict(base.companions)
    for place, _ in given:
        own = {name: content for name, content in hf.companions(place).items() if name in FILES}
        if own:
            companions = {name: content for name, content in companions.items() if name not in FILES} | own
    files = tuple(file for place, _ in given for file in sorted(place.glob("adapter*.safetensors")))
    notes = [*(note for each, _ in read for note in each.notes), *hf.left(base.path, base)]
    return dataclasses.replace(
        base, config=config, tensors=tensors,
        files=(*base.files, *files), companions=companions, moments=None, notes=notes,
    )  # fmt: skip


def _given(name: str, array: np.ndarray, tensor: Tensor, dtype: np.dtype) -> Tensor:
    """A tensor that was trained whole."""
    return Tensor(array.shape, dtype, lambda: stream.cast(name, array, dtype), packed=_anew(tensor))


def _merged(tensor: Tensor, target: Target, arrays: Mapping[str, np.ndarray], path: str, dtype: np.dtype) -> Tensor:
    """A matrix with its update."""

    def read() -> np.ndarray:
        made = adapters.fuse(tensor.read().astype(np.float32), target, arrays, path)
        return stream.cast(f"{path}.weight", made, dtype)

    return Tensor(tensor.shape, dtype, read, packed=_anew(tensor))


def _anew(tensor: Tensor) -> Packed | None:
    """How a quantised matrix that changes is quantised again."""
    return dataclasses.replace(tensor.packed, parts=None) if tensor.packed else None


def _loss(base: Opened, merged: Opened, written: Opened) -> Loss | None:
    """Holds the quantised matrices that changed against what they should be."""
    count, error, size, change, worst = 0, 0.0, 0.0, 0.0, (0.0, "")
    for name, tensor in merged.tensors.items():
        if not tensor.packed or tensor.packed.parts:
            continue
        exact, before, after = (each.tensors[name].read().astype(np.float64) for each in (merged, base, written))
        count += 1
        off = exact - after
        error, size = error + float((off**2).sum()), size + float((exact**2).sum())
        if before.shape == exact.shape:
            change += float(((exact - before) ** 2).sum())
        worst = max(worst, (float(np.abs(off).max() / max(np.abs(exact).max(), 1e-30)), name.removesuffix(".weight")))
    if not count:
        return None
    return Loss(count, math.sqrt(error / max(size, 1e-30)), math.sqrt(error / max(change, 1e-30)), *worst)


def fuse_command(args: argparse.Namespace) -> int:
    """Fuses and says in the last line what was written.

    Args:
        args: model, adapter, out, dtype, dequantize, force, json.
    """
    report, loss = fuse(
        args.model, finding.parse(args.adapter), args.out, dtype=args.dtype, dequantize=args.dequantize,
        force=args.force,
    )  # fmt: skip
    if args.json:
        made = dataclasses.asdict(report) | {"loss": dataclasses.asdict(loss) if loss else None}
        print(json.dumps(made, default=str))
        return 0
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if loss:
        print(loss)
    print(line(report))
    return 0
