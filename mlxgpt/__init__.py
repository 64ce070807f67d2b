"""mlxgpt trains small GPTs on a MacBook with MLX and moves them to and from PyTorch without anything changing."""

import os

__version__ = "0.1.0"

# Else MKL, PyTorch's own too, may split a sum between threads as they become free: other bits under load. It reads this
# at its first product; AUTO keeps the kernels, and with them the speed and the usual bits.
os.environ.setdefault("MKL_CBWR", "AUTO")
