"""What a chip can do at most, and what a model asks of it: the two numbers of MFU (model FLOPs utilisation)."""

import platform
import subprocess
import sys

import numpy as np

from mlxgpt.common import params
from mlxgpt.common.config import ModelConfig

# float32 TFLOPS of the largest GPU sold under the name (huggingface.js, packages/tasks/src/hardware.ts, PR 1044). On M1
# to M4 bfloat16 runs at the same rate (philipturner/metal-benchmarks); the M5's matrix units are not in its figure.
PEAKS = {
    "Apple M1": 2.6, "Apple M1 Pro": 5.2, "Apple M1 Max": 10.4, "Apple M1 Ultra": 21.0,
    "Apple M2": 3.6, "Apple M2 Pro": 6.8, "Apple M2 Max": 13.5, "Apple M2 Ultra": 27.2,
    "Apple M3": 4.1, "Apple M3 Pro": 7.4, "Apple M3 Max": 14.2, "Apple M3 Ultra": 28.4,
    "Apple M4": 4.6, "Apple M4 Pro": 9.2, "Apple M4 Max": 18.4,
    "Apple M5": 5.7, "Apple M5 Pro": 11.4, "Apple M5 Max": 22.8,
}  # fmt: skip


def name() -> str:
    """The chip's name, such as ``Apple M2 Pro``; what the platform calls the processor elsewhere."""
    if sys.platform != "darwin":
        return platform.processor() or platform.machine()
    try:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.machine()


def peak_flops(device: str) -> float | None:
    """FLOP/s at the most; None where the device is a CPU or the chip is not in the table."""
    tflops = None if device == "cpu" else PEAKS.get(device) or PEAKS.get(name())
    return tflops and tflops * 1e12


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
