"""The line to beat: n-gram models of a corpus's own tokens, by counting.

Interpolated Witten-Bell smoothing (Witten and Bell, 1991; Chen and Goodman, 1998): the probability of token w after the
context h of k - 1 tokens, seen count(h) times with kinds(h) different successors, is

    p_k(w | h) = (count(hw) + kinds(h) p_{k-1}(w | h')) / (count(h) + kinds(h)),

where h' is h without its first token, p_0 = 1 / V, and p_k = p_{k-1} where h was never seen.
"""

import numpy as np

TRAIN, VAL = 2_000_000, 200_000
"""Tokens that are counted and scored at most; memory and time grow with both (2 s and 0.3 GB at these)."""


def cross_entropies(train: np.ndarray, val: np.ndarray, n_vocab: int, order: int = 5) -> list[float]:
    """Nats a token of ``val`` (M,) under the 1-gram to ``order``-gram models of ``train`` (N,), ids below ``n_vocab``.

    Every token of ``val`` but the first ``order`` - 1 is scored, by all models alike, so the figures can be compared.
    """
    assert len(train) and len(val) >= order
    return [float(-np.log(p[order - 1 :]).mean()) for p in probabilities(train, val, n_vocab, order)]


def probabilities(train: np.ndarray, val: np.ndarray, n_vocab: int, order: int) -> list[np.ndarray]:
    """For each model from 1-gram to ``order``-gram the probability (M,) of each token of ``val`` after those before it.

    Of the first tokens, whose context is shorter than a model's, the longest that there is counts.
    """
    seen, asked = train.astype(np.int64), val.astype(np.int64)
    # Number of the k-gram that ends at each position, -1 where val has one that train lacks; contexts are (k-1)-grams.
    context, context_asked = np.zeros(len(seen), np.int64), np.zeros(len(asked), np.int64)
    p, found = np.full(len(asked), 1 / n_vocab), []
    for k in range(1, order + 1):
        words, words_asked = seen[k - 1 :], asked[k - 1 :]
        keys, gram, counts = np.unique(context * n_vocab + words, return_inverse=True, return_counts=True)
        of_context = np.bincount(context, minlength=1)
        kinds = np.bincount(keys // n_vocab, minlength=len(of_context))
        known = context_asked >= 0
        wanted = np.where(known, context_asked * n_vocab + words_asked, -1)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        gram_asked = np.where(keys[place] == wanted, place, -1)
        count = np.where(gram_asked >= 0, counts[place], 0)
        times, different = (np.where(known, table[np.maximum(context_asked, 0)], 0) for table in (of_context, kinds))
        lower = p[k - 1 :]
        total = times + different
        p = p.copy()
        p[k - 1 :] = np.where(total > 0, (count + different * lower) / np.maximum(total, 1), lower)
        found.append(p)
        context, context_asked = gram[:-1], gram_asked[:-1]
    return found
