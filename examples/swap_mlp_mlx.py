"""Another MLP in every block, in MLX: squared ReLU (So et al. 2021, Primer). swap_mlp_torch.py is its twin.

    python examples/swap_mlp_mlx.py
    python examples/parity.py        # do the two compute the same

A module takes (x, drop) as the one that it replaces and may ignore ``drop``. Here it keeps that one's parameters, so
both frameworks start equal; with other parameters, copy them from one framework to the other, as parity.py does.
"""

from mlxgpt.api import cross_entropy, new  # before MLX: on Linux it loads a fast BLAS
from mlxgpt.model import MLP, Dropout, Model

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np

CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}


class SquaredReLU(MLP):
    """proj(relu(fc(x))^2): (B, T, C) -> (B, T, C)."""

    def __call__(self, x: mx.array, drop: Dropout | None = None) -> mx.array:
        return self.c_proj(mx.square(nn.relu(self.c_fc(x, drop))), drop)


def changed(seed: int = 1) -> Model:
    """A new model with the other MLP."""
    model = new(CONFIG, seed, device="cpu")
    for block in model.h:
        mlp = SquaredReLU(model.config)
        mlp.update(block.mlp.parameters())
        block.mlp = mlp
    return model


if __name__ == "__main__":
    model = changed()
    print(model)
    tokens = np.random.default_rng(0).integers(50, size=(4, 17))
    step = nn.value_and_grad(model, lambda model: cross_entropy(model(tokens[:, :-1]), mx.array(tokens[:, 1:])).mean())
    optimizer = mlx.optimizers.SGD(0.5)
    for number in range(20):
        loss, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
        if number in (0, 19):
            print(f"step {number + 1}: loss {loss.item():.4f}")
