"""Tensors that are no weights: masks, tables of rope, sinusoids, slopes of ALiBi, counters; and what they tell."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.adopt.reading import words

SINUSOIDS = ("pairs", "halves", "span")
_MASK = frozenset({"mask", "masked", "tril", "triu", "causal"})
_ROPE = frozenset({"rope", "rotary", "freq", "freqs", "cis", "cos", "sin", "inv", "theta", "thetas"})
_GAINS = frozenset(
    {"scale", "alpha", "temperature", "lambda", "gain", "gate", "gamma", "beta", "logit", "lambdas", "factor"}
)
_TABLE = 1 << 24  # values at the most of a table that is read to be recognized
_CLOSE = 2e-3


@dataclass(frozen=True)
class Buffer:
    """Why a tensor is no weight, and the fields of a model that it tells; ``rope``: the pairing, of rules.ROPES."""

    why: str
    model: dict[str, Any] = field(default_factory=dict)
    rope: str = ""


def recognize(
    name: str, shape: tuple[int, ...], kind: str, read: Callable[[], np.ndarray], width: int, square: bool
) -> Buffer | None:
    """What kind of buffer a tensor is; None for a weight. ``kind``: numpy's name of its dtype.

    ``width`` is n_embd; ``square``: a matrix (n, n) with n = n_embd may be a weight.
    """
    said = set(words.words(".".join(name.split(".")[-2:])))
    size = int(np.prod(shape))
    sides = [side for side in shape if side != 1]
    leaf = set(words.words(name.rpartition(".")[2]))
    square_axes = len(sides) == 2 and sides[0] == sides[1]
    masked = bool(leaf & _MASK) or kind == "bool"
    loose = not (leaf & (words.WEIGHT_KINDS | words.BIAS_KINDS) and len(leaf) == 1)
    # (1, n, n) may be learned positions whose context is the width: only its values tell
    extra = len(shape) > 3 or (len(shape) == 3 and square_axes and (sides[0] != width or _is_mask(read())))
    if square_axes and (masked or (extra and not (square and sides[0] == width))):
        return Buffer("causal mask", {"block_size": sides[0]})
    if kind.startswith(("int", "uint", "bool")):
        return Buffer(
            "integers, not weights", {"block_size": sides[0]} if said & words.POSITION and len(sides) == 1 else {}
        )
    if size == 1:
        return _constant(leaf, read)
    if kind.startswith("complex") or (said & _ROPE and loose and not said & words.NORM):
        return _rope(leaf | said, shape, kind, read) if size <= _TABLE else Buffer("table of rope")
    if said & {"alibi", "slope", "slopes"}:
        return _alibi(sides, read)
    if square_axes and (said & {"bias"}) and size <= _TABLE and _is_mask(read()):
        return Buffer("causal mask", {"block_size": sides[0]})
    if square_axes and not (square and sides[0] == width) and 16 < size <= _TABLE and _is_mask(read()):
        return Buffer("causal mask", {"block_size": sides[0]})
    if (
        len(sides) == 1
        and 2 <= size <= 128
        and size != width
        and np.allclose(np.ravel(read()), slopes(size), rtol=1e-3)
    ):
        return Buffer("slopes of ALiBi", {"position": "alibi", "n_head": size})
    return None


def _constant(leaf: set[str], read: Callable[[], np.ndarray]) -> Buffer | None:
    """A single number; None for a learned gain. sqrt(d) or 1 / sqrt(d) of a whole d multiplies scores."""
    value = abs(float(np.asarray(read()).reshape(-1)[0].real))
    if not leaf & _GAINS:
        return Buffer("a constant")
    square = value**2 if value > 1 else 1 / value**2 if value else 0.0
    if square > 1 and abs(square - round(square)) < 1e-4 * square and leaf & {"scale", "temperature", "factor"}:
        return Buffer("a constant: the scale of scores", {"attn_scale": float(round(square)) ** -0.5})
    return None


def _is_mask(array: np.ndarray) -> bool:
    """Whether a square array has one value on and below the diagonal, and another above it."""
    square = np.asarray(array, dtype=np.float64).squeeze()
    below, above = square[np.tril_indices(len(square))], square[np.triu_indices(len(square), 1)]
    flat = [float(values[0]) for values in (below, above) if len(values) and bool(np.all(values == values[0]))]
    return len(flat) == 2 and flat[0] != flat[1]


def _rope(said: set[str], shape: tuple[int, ...], kind: str, read: Callable[[], np.ndarray]) -> Buffer:
    """A table of rope: frequencies (d / 2), or cosines and sines (T, d / 2 or d), also as one complex table."""
    table = np.asarray(read())
    sides = [side for side in shape if side != 1]
    table = table.reshape(sides or [1])
    why = "table of rope"
    if table.ndim == 3 and table.shape[-1] == 2 and not np.iscomplexobj(table):  # (T, d / 2, cosine and sine)
        table = table[..., 0] + 1j * table[..., 1]
    if table.ndim == 1:
        steps = table.astype(np.float64)
        if len(steps) > 1 and steps[0] > 0 and abs(steps[0] - 1) < _CLOSE and bool(np.all(np.diff(steps) < 0)):
            return Buffer(why, _rates(steps, 0))
        return Buffer(why)
    if table.ndim != 2 or len(table) < 2:
        return Buffer(why)
    length = table.shape[0]
    first = np.asarray(table[1])
    if np.iscomplexobj(first):
        angles = np.angle(first)
    elif "sin" in said and "cos" not in said:
        angles = np.arcsin(np.clip(first.astype(np.float64), -1, 1))
    elif bool(np.all(np.abs(table[0].astype(np.float64) - 1) < _CLOSE)):
        angles = np.arccos(np.clip(first.astype(np.float64), -1, 1))
    elif bool(np.all(table[0] == 0)) and abs(float(first.reshape(-1)[0]) - 1) < _CLOSE:
        angles = first.astype(np.float64)  # positions times frequencies
    else:
        return Buffer(why, {"block_size": length})
    half = len(angles) // 2
    pairing = "pairs" if np.iscomplexobj(table) or "freqs" in said else ""
    if len(angles) > 2 and np.allclose(angles[:half], angles[half:], atol=_CLOSE):
        angles, pairing = angles[:half], "halves"
    elif len(angles) > 2 and np.allclose(angles[0::2], angles[1::2], atol=_CLOSE):
        angles, pairing = angles[0::2], "pairs"
    return Buffer(why, _rates(angles, length), pairing)


def slopes(heads: int) -> np.ndarray:
    """ALiBi's, of a power of two of heads."""
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)


def _rates(steps: np.ndarray, length: int) -> dict[str, Any]:
    """theta and width of the frequencies 1, theta^(-2/d), theta^(-4/d) ...; nothing where they are scaled."""
    made: dict[str, Any] = {"block_size": length} if length else {}
    count = len(steps)
    made |= {"rotary_dim": 2 * count, "position": "rope"}
    if count > 1 and steps[1] > 0:
        theta = float(steps[1] ** -count)
        near = float(f"{theta:.2g}") if abs(float(f"{theta:.2g}") / theta - 1) < 0.02 else theta
        expected = near ** (-np.arange(count) / count)
        if np.allclose(steps, expected, rtol=2e-2, atol=1e-4):
            made["rope_theta"] = near
    return made


def _alibi(sides: list[int], read: Callable[[], np.ndarray]) -> Buffer:
    """Slopes (H,), or the biases (H, T, T) or (H, T)."""
    heads = {"n_head": sides[0]} if sides else {}
    return Buffer("slopes of ALiBi", {"position": "alibi", **heads})


def sinusoid(table: np.ndarray) -> dict[str, Any] | None:
    """The fields of a table (T, C) of sinusoids, or None: which kind, multiplied by how much."""
    length, width = table.shape
    if length < 2 or width < 4 or width % 2:
        return None
    table = np.asarray(table[: min(length, 64)], dtype=np.float64)
    half = width // 2
    size = float(np.abs(table[0]).max())
    if not size or not np.isfinite(size):
        return None
    for kind in SINUSOIDS:
        rates = 10000.0 ** -(np.arange(half) / (half - 1 if kind == "span" else half))
        angles = np.arange(len(table))[:, None] * rates[None]
        made = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        if kind == "pairs":
            made = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(table), width)
        if np.abs(made * size - table).max() < _CLOSE * size:
            more = {} if abs(size - 1) < 1e-5 else {"position_multiplier": size}
            return {"position": "sinusoidal", "sinusoid": kind, **more}
    return None
