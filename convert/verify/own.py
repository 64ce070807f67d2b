"""``module:FILE.py:Class`` as a side: the user's own class computes, with the other side's weights taken back by a map.

With the folder's map.toml the other side's tensors are written as the user's code has them, and read again: that proves
the way back too. ``module:FILE.py:Class@CKPT`` loads a checkpoint of theirs in its place, and the map reads that.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from convert.adopt import apply, map_file, source
from convert.adopt import module as own_module
from convert.adopt.evidence import is_normalized, log_softmax
from convert.adopt.maps import buffers
from convert.adopt.module import Module, Sizes
from convert.adopt.rules import Map, matching
from convert.formats.opened import Opened, Tensor
from convert.verify.logits import Pair
from convert.verify.processes import GREEDY, Plan, Runs
from convert.verify.report import worst
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference.probe import SCALES, growth, spell

PREFIX = "module"
FORMAT = "module"  # of the side as it is opened


@dataclass(frozen=True)
class Own:
    """A user's class as a judge: what to run, and how its tensors are ours."""

    module: Module
    map: Map
    buffers: Mapping[str, np.ndarray]  # by their names, without prefix


def split(given: str) -> tuple[str, str]:
    """FILE.py:Class and the checkpoint, or ''."""
    spec, _, checkpoint = given.removeprefix(f"{PREFIX}:").partition("@")
    return spec, checkpoint


def open_side(given: str, kwargs: str | None, other: Opened) -> tuple[Opened, Own]:
    """The side as a model that is read, of the same config as the ``other``.

    Raises:
        UserError: no such file, no map beside the other side, or a map that does not fit.
    """
    spec, checkpoint = split(given)
    module = own_module.parse(spec, kwargs, PREFIX + ":")
    run = [other.path.parent.parent] if other.path.parent.name == "checkpoints" else []
    beside = (folder / map_file.NAME for folder in (other.path, *run))
    place = next((file for file in beside if file.is_file()), None) if other.path.is_dir() else None
    if place is None:
        raise UserError(
            f"{given}: {other.path} has no {map_file.NAME}: expected a folder that mlxgpt adopt has written, or "
            "its map beside the weights or in the run"
        )
    made = map_file.read(place)
    unfused = apply.lazily(apply.fusion(other.config), other.tensors)
    if checkpoint:
        state = source.read(checkpoint)
        theirs = {name: tensor for name, tensor in state.tensors.items()}
        left = {name: theirs[name].read() for name in theirs if _is_left(made, name)}
    else:
        theirs = apply.back_lazily(made, unfused)
        left = buffers.again(made, map_file.read_kept(place, made))
        theirs = theirs | {
            name: Tensor(array.shape, array.dtype, functools.partial(np.asarray, array)) for name, array in left.items()
        }
    ours = apply.lazily(made, theirs, f"{checkpoint}: " if checkpoint else "")
    tensors = apply.back_lazily(apply.fusion(other.config), ours)
    tensors = {name: tensors[name] for name in other.tensors}
    opened = dataclasses.replace(
        other, path=module.path, format=FORMAT, tensors=tensors, companions={}, moments=None, notes=[]
    )  # fmt: skip
    return opened, Own(module, made, left)


def _is_left(made: Map, name: str) -> bool:
    return any(matching(line).fullmatch(name) for line in made.left)


def theirs(own: Own, opened: Opened, scale: float) -> dict[str, np.ndarray]:
    """Their tensors with every matrix times ``scale``, by their full names."""
    grown = growth(opened.config, scale, 1.0)

    def scaled(name: str) -> np.ndarray:
        array = opened.tensors[name].read().astype(np.float32)
        return array * np.float32(grown[name]) if name in grown else array

    tensors = {
        name: Tensor(tensor.shape, np.dtype(np.float32), functools.partial(scaled, name))
        for name, tensor in opened.tensors.items()
    }
    made = apply.back_lazily(own.map, apply.lazily(apply.fusion(opened.config), tensors))
    return {own.map.prefix + name: tensor.read() for name, tensor in made.items()} | {
        own.map.prefix + name: array for name, array in own.buffers.items()
    }


def run(own: Own, key: str, opened: Opened, plan: Plan, notes: list[str], runs: Runs) -> None:
    """Runs the user's class on the plan's ids; what it said goes into ``notes``."""
    scales = (1.0,) if plan.adapted else SCALES
    weights = {spell(scale): theirs(own, opened, scale) for scale in scales}
    config = opened.config
    more = {
        "ids": str(plan.tokens.resolve()),
        "prompt": plan.prompt,
        "greedy": GREEDY if plan.greedy else 0,
        "gradients": plan.gradients,
        "extras": own.map.beside,
        "left": [own.map.prefix + name for name in own.buffers],
    }
    try:
        sizes = Sizes(config.vocab_size, config.n_layer, config.block_size)
        ran = own_module.run(own.module, weights, sizes, more, say=lambda text: print(text, file=sys.stderr))
        arrays, said = _ours(own, opened, ran.arrays)
    except UserError as error:
        runs.failed[f"{PREFIX} {key}"] = str(error)
        return
    notes += [f"{own.module}: {note}" for note in (*ran.notes, *said)]
    runs.arrays[PREFIX, key] = arrays
    count = len(arrays.get("greedy.tokens", range(GREEDY)))
    if any(len(each["greedy.tokens"]) > count for each in runs.arrays.values() if "greedy.tokens" in each):
        notes.append(f"{own.module} takes no more than {plan.prompt + count - 1} tokens: greedy stops there")
        _change(runs, lambda name, array: array[:count] if name.startswith("greedy.") else array)
    if is_normalized(arrays["logits.x1"]):
        notes.append(f"{own.module} gives log-probabilities: the others' logits are compared as such")
        _change(
            runs, lambda name, array: log_softmax(array).astype(np.float32) if name.startswith("logits.") else array
        )


def _change(runs: Runs, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Changes every array of every program."""

    def changed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: change(name, arrays[name]) for name in arrays}

    runs.arrays = {key: changed(arrays) for key, arrays in runs.arrays.items()}
    runs.exact = runs.exact and changed(runs.exact)


def _ours(own: Own, opened: Opened, given: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of probing with gradients by our names, and what is to be said."""
    made = {name: array for name, array in given.items() if not name.startswith("gradient.")}
    for scale in map(spell, SCALES):
        before = f"gradient.{scale}."
        found = {name.removeprefix(before): array for name, array in given.items() if name.startswith(before)}
        if not found:
            continue
        tensors = {
            name.removeprefix(own.map.prefix): Tensor(array.shape, array.dtype, functools.partial(np.asarray, array))
            for name, array in found.items()
        }
        try:
            ours = apply.lazily(own.map, tensors, partial=True)
            fused = apply.back_lazily(apply.fusion(opened.config), ours)
            made |= {before + name: fused[name].read() for name in opened.tensors}
        except UserError as error:
            return made, [f"its gradients are not compared: {error}"]
    return made, []


def angles(pair: Pair, config: ModelConfig) -> dict[str, float]:
    """How far off their embeddings are, by scale, where only the rounding of angles can be why.

    MLX's sinusoids and most people's are computed in float32, ours in float64: token t's are off by about t * 2**-24.
    """
    if config.position != "sinusoidal":
        return {}
    names = {spell(scale): f"hidden.{spell(scale)}.embed" for scale in SCALES}
    there = {scale: name for scale, name in names.items() if name in pair.a and name in pair.b}
    off = {scale: worst(pair.b[name], pair.a[name])[0] for scale, name in there.items()}
    return {scale: value for scale, value in off.items() if value <= len(pair.a[there[scale]]) * 2.0**-22}
