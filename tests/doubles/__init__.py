"""Doubles of a Mac for Linux: a Metal device for MLX (metal.py) and macOS for Python (macos.py)."""
