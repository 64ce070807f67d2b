"""How likely texts are behind others, in MLX: each context is read once, and what contexts share.

Sizes in the comments: B rows, T tokens, C n_embd, N tokens that are asked for, V vocabulary.
"""

from collections.abc import Callable, Sequence

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlxgpt.cache import Cache
from mlxgpt.common.tasks import reading
from mlxgpt.common.tasks.reading import Group, Read
from mlxgpt.common.tasks.task import Continued
from mlxgpt.layers import Array
from mlxgpt.model import Model, make_cache

LOGITS = 1 << 24  # that exist at once: 64 MiB


def read(model: Model, part: Read, held: list[Cache] | None, keep: bool, kv_bits: int) -> tuple[Array, list[Cache]]:
    """Hidden states (B, T, C) of rows that go on from those of ``held``, and what they leave; [] unless ``keep``."""
    cache: list[Cache] = []
    start = int(part.starts.max())
    if keep or start or kv_bits:
        cache = make_cache(model, len(part.tokens), model.config.block_size, kv_bits=kv_bits)
    if start:
        assert held
        sources = mx.array(part.sources)
        for layer, source in zip(cache, held, strict=True):
            layer.take(source, part.sources.tolist(), sources, part.starts.tolist(), part.tokens.shape[1])
    hidden = model.hidden(mx.array(part.tokens), cache=cache or None, lengths=mx.array(part.lengths[:, None]))
    return hidden, cache if keep else []


def told(model: Model, hidden: Array, part: Read) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (N,) float32 of what is asked for of hidden states (B, T, C), and what is likeliest.

    The head sees the places that are asked alone, and a few at a time.
    """
    places, at = np.unique(part.places, return_inverse=True)
    flat, few = hidden.reshape(-1, hidden.shape[-1]), max(1, LOGITS // model.config.vocab_size)
    logprobs, best = np.zeros(len(at), np.float32), np.zeros(len(at), bool)
    for start in range(0, len(places), few):
        logits = model.head(flat[mx.array(places[start : start + few])])
        inside = np.flatnonzero((start <= at) & (at < start + few))
        rows, targets = mx.array(at[inside] - start), mx.array(part.targets[inside])
        chosen = logits[rows, targets] - mx.logsumexp(logits, axis=-1)[rows]
        logprobs[inside] = np.array(chosen)
        best[inside] = np.array(mx.argmax(logits, axis=-1)[rows] == targets)
    return logprobs, best


def continuations(
    model: Model,
    groups: Sequence[Group],
    rows: int = reading.ROWS,
    say: Callable[[str], None] = lambda _: None,
    kv_bits: int = 0,
) -> list[list[Continued]]:
    """What the model says of each continuation of each group; the numbers do not depend on ``rows``, those at once.

    The softmax is over all of the model's vocabulary. Sums of float32 logarithms are float64. ``say`` is told the
    progress. With ``kv_bits`` 8 or 4 queries see keys and values as a cache of so many bits gives them.
    """
    counts = [len(group.continuations) for group in groups]
    total, done = sum(counts), 0
    sums, greedy = np.zeros(total), np.ones(total, bool)
    prefix, shared = (), None
    training = model.training
    model.eval()
    try:
        for batch in reading.batches(groups, model.config, rows):
            if batch.prefix != prefix:
                prefix = batch.prefix
                shared = read(model, reading.beginning(prefix), None, True, kv_bits)[1] if prefix else None
            hidden, held = read(model, batch.first, shared, bool(batch.others), kv_bits)
            for part in (batch.first, *batch.others):
                if part is not batch.first:
                    hidden, _ = read(model, part, held, False, kv_bits)
                logprobs, best = told(model, hidden, part)
                np.add.at(sums, part.owners, logprobs.astype(np.float64))
                np.logical_and.at(greedy, part.owners, best)
            done += len(np.unique(batch.first.owners))
            say(f"{done} of {total} answers")
    finally:
        model.train(training)
    made = iter(map(Continued, sums.tolist(), greedy.tolist()))
    return [[next(made) for _ in range(count)] for count in counts]
