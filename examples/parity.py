"""Does one's own change compute the same in MLX and in PyTorch: logits and every gradient by name; exit code 1 if not.

    python examples/parity.py

The change is the one of swap_mlp_mlx.py and swap_mlp_torch.py; put your own two functions in their place. Losses alone
would not do: at initial weights many a bug hides in them. So logits and gradients are compared, and again with matrices
times eight, where a difference of formulas shows.
"""

import sys

import swap_mlp_mlx  # before MLX: on Linux it loads a fast BLAS
import swap_mlp_torch

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_unflatten

import mlxgpt.api
import torch_ref.api

GATE = 1e-5  # of a tensor's largest value; float32 on CPUs, where 1e-6 is found


def worst(found: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """The largest difference, of the largest expected value; infinite where one of the two is not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), floor))


def compare(scale: float) -> dict[str, float]:
    """The worst difference of the logits, and of the gradient of each tensor, with matrices times ``scale``."""
    ours, theirs = swap_mlp_mlx.changed(), swap_mlp_torch.changed()
    weights = {name: each.detach().numpy() for name, each in theirs.named_parameters()}
    weights = {name: each * np.float32(scale if each.ndim > 1 else 1) for name, each in weights.items()}
    theirs.load_state_dict({name: torch.from_numpy(each) for name, each in weights.items()})
    assert weights.keys() == dict(tree_flatten(ours.parameters())).keys(), "the two do not name the same parameters"
    ours.update(tree_unflatten([(name, mx.array(each)) for name, each in weights.items()]))

    rows = np.random.default_rng(0).integers(ours.config.vocab_size, size=(3, ours.config.block_size + 1))
    x, y = rows[:, :-1], rows[:, 1:]
    made = {"logits": worst(np.array(ours(x)), theirs(x).detach().numpy())}
    loss = nn.value_and_grad(ours, lambda model: mlxgpt.api.cross_entropy(model(x), mx.array(y)).mean())
    gradients = dict(tree_flatten(loss(ours)[1]))
    torch_ref.api.cross_entropy(theirs(x), torch.from_numpy(y)).mean().backward()
    expected = {name: each.grad.numpy() for name, each in theirs.named_parameters() if each.grad is not None}
    largest = max(float(np.abs(each).max()) for each in expected.values())
    for name, each in expected.items():  # a gradient that is zero but for rounding counts by the largest of all
        made[f"gradient of {name}"] = worst(np.array(gradients[name]), each, 1e-3 * largest)
    return made


def main() -> int:
    """Prints the worst of each scale; 1 if one is over its gate."""
    failed = 0
    for scale in (1, 8):
        found = compare(scale)
        name = max(found, key=lambda key: found[key])
        failed |= not found[name] <= GATE
        print(f"matrices x{scale}: {len(found)} tensors, the worst is {name}: {found[name]:.1e}, the gate {GATE:.0e}")
    print("they differ" if failed else "they agree")
    return failed


if __name__ == "__main__":
    sys.exit(main())
