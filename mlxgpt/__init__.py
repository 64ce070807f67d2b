"""mlxgpt trains small GPTs on a MacBook with MLX and moves them to and from PyTorch without anything changing."""

import os

__version__ = "0.1.0"

# MKL, PyTorch's own too, reads this at its first product: sums are split between threads in one way, whatever the load.
# AUTO keeps the kernels, and with them the usual bits.
os.environ.setdefault("MKL_CBWR", "AUTO")
