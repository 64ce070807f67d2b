"""Loads the BLAS before a test file imports MLX: one that came first would leave the whole process the slow one."""

from mlxgpt import blas  # noqa: F401
