"""mlxgpt trains small GPTs on a MacBook with MLX and moves them to and from PyTorch without anything changing."""

__version__ = "0.1.0"
