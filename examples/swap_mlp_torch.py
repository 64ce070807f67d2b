"""Another MLP in every block, in PyTorch: squared ReLU (So et al. 2021, Primer). swap_mlp_mlx.py is its twin.

    python examples/swap_mlp_torch.py
    python examples/parity.py        # do the two compute the same

A module takes (x, drop) as the one that it replaces and may ignore ``drop``. Here it keeps that one's parameters, so
both frameworks start equal; with other parameters, copy them from one framework to the other, as parity.py does.
"""

import numpy as np
import torch

from torch_ref.api import cross_entropy, new
from torch_ref.model import MLP, Block, Dropout, Model

CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}


class SquaredReLU(MLP):
    """proj(relu(fc(x))^2): (B, T, C) -> (B, T, C)."""

    def forward(self, x: torch.Tensor, drop: Dropout | None = None) -> torch.Tensor:
        return self.c_proj(torch.relu(self.c_fc(x, drop)).square(), drop)


def changed(seed: int = 1) -> Model:
    """A new model with the other MLP."""
    model = new(CONFIG, seed, device="cpu")
    for block in model.h:
        assert isinstance(block, Block)
        mlp = SquaredReLU(model.config)
        mlp.load_state_dict(block.mlp.state_dict())
        block.mlp = mlp
    return model


if __name__ == "__main__":
    model = changed()
    print(model)
    tokens = np.random.default_rng(0).integers(50, size=(4, 17))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for number in range(20):
        loss = cross_entropy(model(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number in (0, 19):
            print(f"step {number + 1}: loss {loss.item():.4f}")
