"""The only comparison that parity tests use: the largest difference, relative to the reference's largest value."""

import numpy as np


def worst(name: str, found: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """max |found - expected| / scale, where scale is max |expected| unless given; prints the worst element.

    NaN or Inf on either side, or another shape, gives infinity: a broken tensor agrees with nothing.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        print(f"{name}: shape {found.shape}, expected {expected.shape}")
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        print(f"{name}: not finite: {(~np.isfinite(found)).sum()} and {(~np.isfinite(expected)).sum()} elements")
        return float("inf")
    if not found.size:
        return 0.0
    gap = np.abs(found - expected)
    at = np.unravel_index(gap.argmax(), gap.shape)
    scale = np.abs(expected).max() if scale is None else scale
    figure = float(gap[at] / scale) if scale else float(gap[at])
    print(f"{name}: {figure:.2e} at {tuple(map(int, at))}: {found[at]:.9g}, expected {expected[at]:.9g}")
    return figure


def agree(name: str, found: np.ndarray, expected: np.ndarray, gate: float, scale: float | None = None) -> None:
    """Fails unless ``worst`` is at most ``gate``."""
    figure = worst(name, found, expected, scale)
    assert figure <= gate, f"{name}: {figure:.2e} is over the gate of {gate:.2e}"


def worst_gradient(name: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest ``worst`` over gradients by name, each of its own max; where that is below 1e-7 of all, of all's."""
    if found.keys() != expected.keys():
        print(f"{name}: names differ: {sorted(found.keys() ^ expected.keys())}")
        return float("inf")
    tops = {key: float(np.abs(value).max()) for key, value in expected.items()}
    largest = max(tops.values())
    scales = {key: top if top >= 1e-7 * largest else largest for key, top in tops.items()}
    return max(worst(f"{name} {key}", found[key], expected[key], scales[key]) for key in expected)
