"""Peak FLOP/s of chips and FLOPs of models: the two numbers of MFU (model FLOPs utilization)."""

import platform
import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.model import params


class Chip(NamedTuple):
    """``float32`` and ``bfloat16`` are dense TFLOP/s, ``bandwidth`` GB/s, ``memory`` the largest configuration, GB."""

    name: str
    float32: float
    bfloat16: float
    bandwidth: float | None
    memory: int
    utilization: float  # assumed share of the peak that training reaches

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s in a compute dtype."""
        return 1e12 * (self.bfloat16 if dtype == "bfloat16" else self.float32)


def _apple(name: str, tflops: float, bandwidth: float | None, memory: int) -> tuple[str, Chip]:
    return name.lower().replace(" ", "-"), Chip(f"Apple {name}", tflops, tflops, bandwidth, memory, 0.35)


# Apple: float32 TFLOP/s of the largest GPU sold under the name (huggingface.js, packages/tasks/src/hardware.ts, PR
# 1044); bfloat16 at the same rate (philipturner/metal-benchmarks; without the M5's matrix units). Bandwidth: Apple's
# specifications, None where none was found. Utilization 0.35: 0.28 to 0.47 was worked out from reports of MLX training
# (ml-explore/mlx-examples issue 127 and others). There was no M4 Ultra or M5 Ultra to list.
# NVIDIA: data sheets of A100 80GB SXM, H100 SXM, H200 SXM, and the Ada architecture's whitepaper (RTX 4090; bfloat16
# summed in float32), dense. Utilization 0.35: PaLM (Chowdhery et al. 2022) lists 0.21 to 0.46 of large models.
CHIPS = dict(
    [
        _apple("M1", 2.6, 68, 16), _apple("M1 Pro", 5.2, 200, 32), _apple("M1 Max", 10.4, 400, 64),
        _apple("M1 Ultra", 21.0, 800, 128),
        _apple("M2", 3.6, 100, 24), _apple("M2 Pro", 6.8, 200, 32), _apple("M2 Max", 13.5, 400, 96),
        _apple("M2 Ultra", 27.2, 800, 192),
        _apple("M3", 4.1, 100, 24), _apple("M3 Pro", 7.4, 150, 36), _apple("M3 Max", 14.2, 400, 128),
        _apple("M3 Ultra", 28.4, 819, 512),
        _apple("M4", 4.6, 120, 32), _apple("M4 Pro", 9.2, 273, 64), _apple("M4 Max", 18.4, 546, 128),
        _apple("M5", 5.7, 153, 32), _apple("M5 Pro", 11.4, None, 64), _apple("M5 Max", 22.8, None, 128),
        ("a100", Chip("NVIDIA A100 80GB", 19.5, 312.0, 2039, 80, 0.35)),
        ("h100", Chip("NVIDIA H100", 67.0, 989.0, 3350, 80, 0.35)),
        ("h200", Chip("NVIDIA H200", 67.0, 989.0, 4800, 141, 0.35)),
        ("rtx4090", Chip("NVIDIA GeForce RTX 4090", 82.6, 165.2, 1008, 24, 0.35)),
    ]
)  # fmt: skip

# the GPU of a Mac where a framework does not name it: the host's chip; any other name is the device's own
_UNNAMED = ("mps", "gpu")
# CUDA's names of the table's cards: not a part of one (MIG), nor what is slower under nearly the same name
_CARDS = {
    "a100": r"\bA100\b(?!.*\bMIG\b)",
    "h100": r"\bH100\b(?!.*\b(MIG|PCIe|NVL)\b)",
    "h200": r"\bH200\b(?!.*\b(MIG|NVL)\b)",
    "rtx4090": r"\bRTX 4090\b(?! (D|Laptop)\b)",
}


def chip_name() -> str:
    """The chip's name, such as ``Apple M2 Pro``; elsewhere the platform's name of the processor."""
    if sys.platform != "darwin":
        return platform.processor() or platform.machine()
    try:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.machine()


def chip_named(asked: str) -> Chip:
    """The chip of ``--chip``: a key of CHIPS, in any spacing.

    Raises:
        UserError: unknown; lists all names.
    """
    key = asked.lower().strip().replace(" ", "-").replace("_", "-").removeprefix("apple-").removeprefix("nvidia-")
    key = {name.replace("-", ""): name for name in CHIPS}.get(key.replace("-", ""), key)
    if key not in CHIPS:
        raise UserError(f"--chip {asked}: unknown{nearest(key, CHIPS)}: expected one of {', '.join(CHIPS)}")
    return CHIPS[key]


def chip_of(device: str) -> Chip | None:
    """The chip of a device in environment.json; None for a CPU or an unknown chip."""
    names = {chip.name: chip for chip in CHIPS.values()}
    card = next((key for key, pattern in _CARDS.items() if re.search(pattern, device)), "")
    return names.get(chip_name() if device in _UNNAMED else device) or CHIPS.get(card)


def peak_flops(device: str) -> float | None:
    """Peak float32 FLOP/s; None for a CPU or an unknown chip."""
    chip = chip_of(device)
    return chip and chip.flops("float32")


def training_flops(config: ModelConfig) -> float:
    """FLOPs of a training token in a row of block_size: 6 a weight that multiplies it, and 12 L H D T for attention.

    Chowdhery et al. 2022 (PaLM), appendix B. Embeddings are looked up and count only as the head.
    """
    lookups = ("wte.weight", "wpe.weight")
    table = params.table(config)
    weights = sum(int(np.prod(param.shape)) for key, param in table.items() if param.decay and key not in lookups)
    if config.tied:
        weights += config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_head * config.head_dim * config.block_size
