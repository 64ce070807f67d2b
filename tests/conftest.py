"""Before any test file is imported: the BLAS, without which MLX would stay slow for the whole process; signals."""

import signal

from mlxgpt import blas  # noqa: F401

# a shell that runs the suite in the background ignores Ctrl-C, and so would every child that a test interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
