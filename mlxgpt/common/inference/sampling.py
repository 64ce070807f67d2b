"""How the next token is drawn: the specification, in numpy, which both frameworks' generate.py equal token for token.

    logits (B, V) float32 of the last position
    1. repetition penalty   tokens in the prompt or drawn since: logit / r if positive, * r if not (Keskar et al. 2019)
    2. added                + bias - presence * (count > 0) - frequency * count, count of the tokens drawn since the
                            prompt (OpenAI's formula and logit_bias); -inf for what a grammar forbids
       temperature 0        the largest of these, the lowest index among equals; nothing below applies
    3. temperature          logits / T
    4. top-k                keep the k largest; all tokens equal to the k-th stay; k >= V keeps all (Fan et al. 2018)
    5. top-p                of what is left, keep the likeliest until they hold probability p, the one that crosses it
                            included, and all tokens equal to the last one kept (Holtzman et al. 2020)
    6. min-p                keep tokens with at least min_p times the probability of the likeliest (Nguyen et al. 2024)
    7. draw                 argmax(logits + Gumbel noise), a sample of their softmax (Gumbel 1954)

Whether the logits are finite is asked before all of this. The order is transformers'; penalties by counts stand where
vLLM has them, whose logit_bias comes before 1.

The noise of vocabulary entry v at a step is a hash of v under the 32-bit key ``key32(seed, "sample", copy, step)``: no
generator state, so a resumed or batched run draws what a single one would. B rows, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from numbers import Integral, Real

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.config import LARGEST, SampleConfig
from mlxgpt.common.errors import UserError

KEYS = 256  # steps whose keys are computed at once: a twelfth of the time of one by one


def step_keys(seed: int, copies: list[int], step: int) -> np.ndarray:
    """The noise keys (B,) uint32 of one step, from 0.

    ``copies[b]`` counts the equal prompts before row b: a prompt draws the same in any batch, its repetitions differ.
    """
    return np.array([rng.key32(seed, "sample", copy, step) for copy in copies], dtype=np.uint32)


def keys(seed: int, copy: int, first: int, count: int) -> np.ndarray:
    """The noise keys (count,) uint32 of one row from step ``first`` on."""
    return rng.keys32(seed, "sample", copy, numbers=range(first, first + count))


def each_step_keys(seed: int, copies: list[int], steps: int) -> Iterator[np.ndarray]:
    """``step_keys`` of every step, from 0."""
    for first in range(0, steps, KEYS):
        made = {copy: keys(seed, copy, first, min(KEYS, steps - first)) for copy in set(copies)}
        yield from np.stack([made[copy] for copy in copies], axis=1)


def mix(x: np.ndarray) -> np.ndarray:
    """lowbias32 (Chris Wellons, hash-prospector) on every uint32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def gumbel(keys: np.ndarray, size: int) -> np.ndarray:
    """Gumbel noise (B, V) float32 under the keys (B,): -log(-log(1 - v)), v of 31 bits in (0, 1)."""
    bits = mix(np.arange(size, dtype=np.uint32)[None, :] ^ mix(keys)[:, None]) >> np.uint32(1)
    v = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    return -np.log(-np.log1p(-v))


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Repetition penalty where ``seen`` (B, V) bool."""
    return np.where(seen, np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty)), logits)


def added(counts: np.ndarray, bias: np.ndarray | None, presence: float, frequency: float) -> np.ndarray:
    """What is added to logits, float32, of how often each token was drawn: ``counts`` (B, V) or (V,), bias (V,)."""
    count = counts.astype(np.float32)
    penalty = np.float32(presence) * (count > 0) + np.float32(frequency) * count
    return -penalty if bias is None else bias - penalty


def biases(bias: Mapping[int, float], n_vocab: int) -> np.ndarray | None:
    """What ``bias`` adds to logits: (V,) float32, None if it names no token.

    Raises:
        UserError: an id that is outside the vocabulary, or a value that is no number or too large.
    """
    made = np.zeros(n_vocab, dtype=np.float32)
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < n_vocab:
            raise UserError(f"logit_bias: token id {token!r}; expected 0 to {n_vocab - 1}, the model's vocabulary")
        if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= LARGEST:
            expected = f"expected a number between {-LARGEST:g} and {LARGEST:g}"
            raise UserError(f"logit_bias of token {token} = {value!r}: {expected}")
        made[token] = value
    return made if bias else None


def keep(logits: np.ndarray, sample: SampleConfig) -> np.ndarray:
    """``logits`` (B, V) with -inf wherever top-k, top-p or min-p drops the token; at least one stays."""
    if 0 < sample.top_k < logits.shape[-1]:
        lowest = np.sort(logits, axis=-1)[:, -sample.top_k, None]
        logits = np.where(logits < lowest, -np.inf, logits)
    if sample.top_p < 1:
        ordered = np.sort(logits, axis=-1)
        weights = np.exp(ordered - ordered[:, -1:])
        dropped = np.cumsum(weights, axis=-1) <= (1 - sample.top_p) * weights.sum(axis=-1, keepdims=True)
        dropped[:, -1] = False
        lowest = np.where(dropped, np.inf, ordered).min(axis=-1, keepdims=True)
        logits = np.where(logits < lowest, -np.inf, logits)
    if sample.min_p > 0:
        lowest = logits.max(axis=-1, keepdims=True) + math.log(sample.min_p)
        logits = np.where(logits < lowest, -np.inf, logits)
    return logits


def sample_tokens(
    logits: np.ndarray,
    seen: np.ndarray,
    keys: np.ndarray,
    sample: SampleConfig,
    added: np.ndarray | None = None,
) -> np.ndarray:
    """The next tokens (B,) from ``logits`` (B, V) float32, ``seen`` (B, V) bool, the step's ``keys`` (B,) uint32 and
    what is ``added`` (B, V) float32: penalties by counts, biases, -inf.
    """
    logits = penalize(logits, seen, sample.repetition_penalty)
    if added is not None:
        logits = logits + added
    if sample.temperature == 0:
        return logits.argmax(axis=-1)
    logits = keep(logits / np.float32(sample.temperature), sample)
    return (logits + gumbel(keys, logits.shape[-1])).argmax(axis=-1)
