"""MLX's affine quantization in numpy: equal to mx.quantize and mx.dequantize, bit for bit."""

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.common import rng
from mlxgpt.common.model import affine

DTYPES = {
    "float32": (np.dtype(np.float32), mx.float32),
    "float16": (np.dtype(np.float16), mx.float16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), mx.bfloat16),
}


def bits_of(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def from_mx(array: mx.array) -> np.ndarray:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def matrices() -> dict[str, np.ndarray]:
    """Weights as they are, and the groups that the rules bend for."""
    normal = rng.normal(1, "affine", shape=(24, 256), std=0.02)
    corners = np.zeros((8, 256), np.float32)
    corners[1], corners[2], corners[3] = 0.25, -0.25, 1e-9  # equal: the smallest scale; 0: no bias
    corners[4, ::2], corners[5, ::2] = 1.0, -1.0  # one sign only
    corners[6] = np.linspace(-1, 1, 256)
    corners[7] = 100 + normal[0]  # far from 0: more steps to the edge than levels
    return {"normal": normal, "corners": corners, "large": normal * np.float32(1e3)}


@pytest.mark.parametrize("group_size", affine.GROUP_SIZES)
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_mx_quantize(dtype: str, bits: int, group_size: int) -> None:
    ours, theirs = DTYPES[dtype]
    for name, matrix in matrices().items():
        weight = matrix.astype(ours)
        expected = mx.quantize(mx.array(weight.astype(np.float32)).astype(theirs), group_size=group_size, bits=bits)
        found = affine.quantize(weight, bits, group_size)
        for part, a, b in zip(("words", "scales", "biases"), found, expected, strict=True):
            assert a.shape == b.shape and bits_of(a) == bits_of(from_mx(b)), f"{name}: {part}"
        wide = [mx.array(np.asarray(part, np.float32)) for part in found[1:]]
        back = mx.dequantize(mx.array(found[0]), *wide, group_size=group_size, bits=bits)
        assert bits_of(affine.dequantize(*found, bits, group_size)) == bits_of(np.array(back)), name


@pytest.mark.parametrize("bits", affine.BITS)
def test_words_hold_every_level(bits: int) -> None:
    levels = np.random.default_rng(0).integers(0, 2**bits, (3, 64), dtype=np.uint8)
    words = affine.pack(levels, bits)
    assert words.shape == (3, 2 * bits) and words.dtype == np.uint32
    assert np.array_equal(affine.unpack(words, bits), levels)
    assert not np.array_equal(affine.unpack(words ^ np.uint32(1), bits), levels)


def test_the_first_level_is_in_the_lowest_bits() -> None:
    levels = np.zeros((1, 32), np.uint8)
    levels[0, 0], levels[0, 1] = 5, 9
    assert affine.pack(levels, 4)[0, 0] == 5 + (9 << 4)


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_quantized_once_is_found_again(dtype: str, bits: int) -> None:
    for name, matrix in matrices().items():
        found = affine.quantize(matrix.astype(DTYPES[dtype][0]), bits, 64)
        values = affine.dequantize(*found, bits, 64)
        again = affine.recover(values, bits, 64, DTYPES[dtype][0])
        assert again is not None, name
        assert bits_of(affine.dequantize(*again, bits, 64)) == bits_of(values), name
        if name == "corners":
            continue  # two values to a group lie on a grid, whatever they are
        values[3, 7] = np.nextafter(values[3, 7], np.float32(2))
        assert affine.recover(values, bits, 64, DTYPES[dtype][0]) is None, name
