"""Small floats with a scale a block, in numpy: fp8 as transformers reads it, and MLX's mxfp4, mxfp8 and nvfp4.

A weight is its code's value times its block's scale, a product in float32. The layouts are those of transformers 5.23
and mlx 0.32: words of 32 bits, the lowest bits first.
"""

import ml_dtypes
import numpy as np

# mode of mlx-lm -> bits of a code, inputs that share a scale
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


def dequantize(words: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """float32 (out, in) of uint32 words (out, in bits / 32) and scales uint8 (out, in / group) of a mode of mlx-lm."""
    bits, group = MODES[mode]
    codes = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    if bits == 4:
        pairs = np.stack([codes & 15, codes >> 4], axis=-1)
        values = _E2M1[pairs.reshape(*codes.shape[:-1], -1)]
    else:
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    kind = ml_dtypes.float8_e4m3fn if mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    return _scaled(values, scales.view(kind).astype(np.float32), (1, group))


def block_of(shape: tuple[int, ...], grid: tuple[int, ...], said: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, of a matrix with a ``grid`` of scales; None where they do not fit.

    ``said`` is the block that config.json names, (0, 0) if it names none: then a scale for the matrix, or one a row, or
    as many to a side as divide it, which is how transformers tells.
    """
    if len(shape) != 2 or len(grid) > 2:
        return None
    (rows, columns), (high, wide) = shape, (1, 1)
    if grid:
        high, wide = grid[0], grid[1] if len(grid) == 2 else 1
    if high == wide == 1:
        return rows, columns
    if said[0] and (-(-rows // said[0]), -(-columns // said[1])) == (high, wide):
        return said
    if high < 1 or wide < 1 or rows % high or columns % wide or (said[0] and high != rows):
        return None
    return rows // high, columns // wide


def scale_fp8(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 of codes (out, in) in a float8 dtype and their scales, each for ``block`` rows and columns.

    Bytes as scales are exponents of two (E8M0).
    """
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    grid = scales.astype(np.float32).reshape(scales.shape if scales.ndim == 2 else (-1, 1))
    return _scaled(codes.astype(np.float32), grid, block)


def _scaled(values: np.ndarray, grid: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """``values``, a fresh array (out, in), times their blocks' scales; blocks at the far edges may be cut short."""
    matrix = values.reshape(-1, values.shape[-1])
    rows = np.repeat(grid, block[0], axis=0)[: len(matrix)]
    if matrix.shape[1] == rows.shape[1] * block[1]:
        groups = matrix.reshape(len(matrix), -1, block[1])
        groups *= rows[..., None]
    else:
        matrix *= np.repeat(rows, block[1], axis=1)[:, : matrix.shape[1]]
    return values
