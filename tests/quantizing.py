"""Tiny models and texts of ids to quantize with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny, weights

from mlxgpt.common.folders import model_folder

WIDE: dict[str, Any] = dict(n_embd=64, n_hidden=96, block_size=32, vocab_size=80)
CONFIGS = {
    "llama": tiny(family="llama", **WIDE),
    "qwen3": tiny(family="qwen3", n_kv_head=2, head_dim=16, tied=False, **WIDE),
    "gpt2": tiny(family="gpt2", **WIDE | {"n_hidden": 256}),  # mlx-lm has no other
}

NAMES = ["llama", pytest.param("qwen3", marks=pytest.mark.slow), "gpt2"]


def model(place: Path, name: str, dtype: str = "float32") -> Path:
    """Weights of which a few norms' channels are loud."""
    if (place / name).exists():
        return place / name
    made = weights(CONFIGS[name], scale=6.0)
    for each in made:
        if each.endswith(("ln_1.weight", "ln_2.weight")):
            made[each][::16] *= 8
    model_folder.write_model(place / name, CONFIGS[name], made, dtype=dtype)
    return place / name


def text(place: Path, windows: int = 24, seed: int = 3) -> str:
    """Ids of so many windows of 32, and one, as nanoGPT's files have them."""
    made = place / f"{windows}-{seed}.bin"
    drawn = np.random.default_rng(seed).zipf(1.3, size=32 * windows + 1) % 80
    drawn.astype("<u2").tofile(made)
    return str(made)
