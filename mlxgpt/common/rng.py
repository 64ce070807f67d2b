"""Randomness is an address: every random thing is a pure function of (seed, *names), drawn with numpy's Philox.

Nothing here keeps state, so resuming a run needs the step number and nothing else, and both frameworks start from
the same numbers. Raw Philox words are used wherever integers are enough: numpy promises their stream for ever.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)  # of Philox4x64
WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)  # is added to its key in every round
BITS, HALF = np.uint64(32), np.uint64(0xFFFFFFFF)
MULTIPLIERS_LOW, MULTIPLIERS_HIGH = MULTIPLIERS & HALF, MULTIPLIERS >> BITS


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


def keys32(seed: int, *address: object, numbers: Iterable[int]) -> np.ndarray:
    """``key32(seed, *address, n)`` of every n in ``numbers``, as uint32: Philox4x64-10 over all of them at once.

    Salmon et al. 2011. numpy's first block has the counter (1, 0, 0, 0), so that the first round only moves the key.
    """
    prefix = hashlib.blake2b("/".join(map(str, (seed, *address, ""))).encode(), digest_size=16)
    digests = []
    for number in numbers:
        digest = prefix.copy()
        digest.update(b"%d" % number)
        digests.append(digest.digest())
    key = np.frombuffer(b"".join(digests), dtype="<u8").reshape(len(digests), 2).T.astype(np.uint64)  # (2, n)
    even, odd = key.copy(), np.zeros_like(key)  # words 0 and 2 of the counter, 1 and 3
    odd[1] = MULTIPLIERS[0]
    for _ in range(9):
        key += WEYL
        high = _high(even)[::-1]
        even, odd = high ^ odd ^ key, (even * MULTIPLIERS)[::-1]
    return even[0].astype(np.uint32)


def _high(words: np.ndarray) -> np.ndarray:
    """The upper 64 of the 128 bits of ``words`` (2, n) uint64 times MULTIPLIERS."""
    low, high = words & HALF, words >> BITS
    middle = high * MULTIPLIERS_LOW
    middle += (low * MULTIPLIERS_LOW) >> BITS
    low *= MULTIPLIERS_HIGH
    low += middle & HALF
    high *= MULTIPLIERS_HIGH
    high += middle >> BITS
    high += low >> BITS
    return high
