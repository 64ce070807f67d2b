"""Adapter folders."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.common.adapters import Target
from mlxgpt.common.config import AdapterConfig, ModelConfig


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder holds it, by canonical names."""

    method: str  # lora or dora
    targets: dict[str, Target]
    params: dict[str, np.ndarray]  # updates, and tensors that were trained whole
    adapter: AdapterConfig | None = None  # ours, where it was written here
    base_sha256: str | None = None


def read(path: Path | str, base_folder: Path | str, config: ModelConfig, force: bool = False) -> Adapter:
    """Reads an adapter folder."""
    raise NotImplementedError
