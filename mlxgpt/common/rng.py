"""Randomness is an address: every random thing is a pure function of (seed, *names), drawn with numpy's Philox.

Nothing here keeps state, so resuming a run needs the step number and nothing else, and both frameworks start from
the same numbers. Raw Philox words are used wherever integers are enough: numpy promises their stream for ever.
"""

import hashlib

import numpy as np


def philox(seed: int, *address: object) -> np.random.Philox:
    """The bit generator at an address such as ``(seed, "batch", "train", step)``; 128-bit key from BLAKE2b."""
    text = "/".join(str(part) for part in (seed, *address))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))


def normal(seed: int, *address: object, shape: tuple[int, ...], std: float) -> np.ndarray:
    """N(0, std^2) as float32 of ``shape``."""
    draw = np.random.Generator(philox(seed, *address)).standard_normal(shape, dtype=np.float32)
    return draw * np.float32(std)


def uniform(seed: int, *address: object, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """U(-bound, bound) as float32 of ``shape``."""
    draw = np.random.Generator(philox(seed, *address)).random(shape, dtype=np.float32)
    return (2 * draw - 1) * np.float32(bound)


def integers(seed: int, *address: object, count: int, high: int) -> np.ndarray:
    """``count`` int64 values in [0, high); the modulo bias is below high / 2^64."""
    return (philox(seed, *address).random_raw(count) % np.uint64(high)).astype(np.int64)


def permutation(seed: int, *address: object, count: int) -> np.ndarray:
    """A permutation of range(count) as int64: the order that sorts ``count`` random words."""
    return np.argsort(philox(seed, *address).random_raw(count), kind="stable")


def key32(seed: int, *address: object) -> int:
    """One 32-bit word: the key that the counter hash of dropout and of sampling noise starts from."""
    return int(philox(seed, *address).random_raw(1)[0] & 0xFFFFFFFF)
