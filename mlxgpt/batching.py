"""Continuous batching, in MLX: a prompt is read alone, joins the rows that draw, and a row leaves when it is done.

Rows end at a common place of the cache and are padded on its left; ``pad`` and positions tell the model where each
begins. Sizes in the comments: B rows, K key and value heads, S places of the cache, D head_dim, V vocabulary.
"""

from collections.abc import Sequence

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlxgpt.attention import BLOCK
from mlxgpt.common.inference import choosing
from mlxgpt.common.inference.choosing import Choice, Chosen
from mlxgpt.common.model import rotary
from mlxgpt.generate import logprobs, sample_tokens, scores
from mlxgpt.layers import Array
from mlxgpt.model import Cache, Model, make_cache

Layers = list[tuple[Array, Array]]  # keys and values (1, K, S, D) of each layer


def size(layers: Layers) -> int:
    """Bytes of keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def first(layers: Layers, tokens: int) -> Layers:
    """Keys and values of the first tokens."""
    return [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in layers]


def leave() -> None:
    """Called at the end of a thread that computed: its streams end first, else one process in ten aborts at exit."""
    if hasattr(mx, "clear_streams"):
        mx.clear_streams()


class Prompt:
    """A prompt on its way through the model, some tokens at a time.

    Args:
        model: in evaluation mode.
        ids: one token at least, at most the context.
        n_vocab: tokens that may be drawn.
        held: keys and values of the first tokens, fewer than all.
        top: names so many likeliest tokens at each place, with log-probabilities; None: none.
    """

    def __init__(
        self, model: Model, ids: Sequence[int], n_vocab: int, held: Layers | None = None, top: int | None = None
    ):
        self.ids, self._model, self._n_vocab, self._top = list(ids), model, n_vocab, top
        self.cache = make_cache(model, 1, len(self.ids))
        for layer, (keys, values) in zip(self.cache, held or (), strict=False):
            layer.keys, layer.values, layer.offset = keys, values, keys.shape[2]
        self.logits = mx.zeros((1, n_vocab))  # (1, V) of the last token, when all were read
        self.scores: list[tuple[np.ndarray, ...]] = []  # as generate.scores gives them, of each piece

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self.ids) - self.cache[0].offset

    def read(self, tokens: int) -> int:
        """Passes up to so many tokens through the model; how many they were."""
        start = self.cache[0].offset
        piece = self.ids[start : start + tokens]
        lengths = mx.array([[len(self.ids)]]) if rotary.by_length(self._model.config) else None
        hidden = self._model.hidden(mx.array([piece]), cache=self.cache, lengths=lengths)
        if self._top is not None:
            targets = np.array(self.ids[start + 1 : start + len(piece) + 1])
            self.scores.append(scores(self._model, hidden[:, : len(targets)], targets, self._n_vocab, self._top))
        if not self.left:
            self.logits = self._model.head(hidden[:, -1:])[:, -1, : self._n_vocab]
        mx.async_eval(self.logits, self.layers())
        return len(piece)

    def layers(self) -> Layers:
        """Keys and values of what was read."""
        return [(layer.keys[:, :, : layer.offset], layer.values[:, :, : layer.offset]) for layer in self.cache]


class Drawn:
    """Tokens that were drawn, on the device until they are read."""

    def __init__(self, tokens: Array, choices: Sequence[Choice], names: Sequence[Array]):
        self.tokens, self._choices, self._names = tokens, choices, names  # (B,)
        mx.async_eval(tokens, *names)

    def read(self) -> list[Chosen]:
        """Waits for them."""
        return choosing.told(np.array(self.tokens), self._choices, [np.array(each) for each in self._names])


class Batch:
    """Rows of one model that draw together, in the order in which they joined."""

    def __init__(self, model: Model, n_vocab: int):
        self._model, self._n_vocab = model, n_vocab
        self.lengths: list[int] = []  # tokens of each row that the cache holds
        self._cache: list[Cache] = []
        self._logits = mx.zeros((0, n_vocab))  # (B, V) of each row's last token
        self._pads = mx.array([0])

    def join(self, prompt: Prompt, count: int) -> None:
        """Adds a prompt that was read, ``count`` times."""
        old, new = self._cache[0].offset if self.lengths else 0, len(prompt.ids)
        ends = max(old, new)
        room = min(self._model.config.block_size, -(-(ends + 1) // BLOCK) * BLOCK)
        made = make_cache(self._model, len(self.lengths) + count, self._model.config.block_size)
        for n, (layer, (keys, values)) in enumerate(zip(made, prompt.layers(), strict=True)):
            held = self._cache[n] if self.lengths else None
            layer.keys = _joined(held and held.keys[:, :, :old], keys, count, ends, room)
            layer.values = _joined(held and held.values[:, :, :old], values, count, ends, room)
            layer.offset = ends
        self._cache, self.lengths = made, self.lengths + [new] * count
        self._logits = mx.concatenate([self._logits, mx.repeat(prompt.logits, count, axis=0)])
        self._place()

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay; the others leave."""
        if len(rows) == len(self.lengths):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._cache, self._logits = [], self._logits[:0]
            return
        index, start = mx.array(list(rows), mx.uint32), self._cache[0].offset - max(self.lengths)
        self._logits = self._logits[index]
        for layer in self._cache:
            layer.keys, layer.values = layer.keys[index][:, :, start:], layer.values[index][:, :, start:]
            layer.offset -= start
        self._place()

    def _place(self) -> None:
        """Says where the rows begin."""
        self._pads = mx.array([self._cache[0].offset - length for length in self.lengths])

    def layers(self, row: int) -> Layers:
        """Keys and values of a row, in memory of their own."""
        start, end, rows = self._cache[0].offset - self.lengths[row], self._cache[0].offset, slice(row, row + 1)
        made = [
            (mx.contiguous(layer.keys[rows, :, start:end]), mx.contiguous(layer.values[rows, :, start:end]))
            for layer in self._cache
        ]
        mx.async_eval(made)
        return made

    def draw(self, choices: Sequence[Choice]) -> Drawn:
        """The next token of every row."""
        pieces, found = [], choosing.groups(choices)
        for rows in found:
            ours = [choices[row] for row in rows]
            logits = self._logits if len(found) == 1 else self._logits[mx.array(rows)]
            seen, added = (choosing.stacked(ours, name) for name in ("seen", "added"))
            keys = mx.array(np.array([each.key for each in ours], np.uint32))
            seen, added = (None if each is None else mx.array(each) for each in (seen, added))
            pieces.append(sample_tokens(logits, seen, keys, ours[0].sample, added))
        tokens = pieces[0]
        if len(found) > 1:
            order = np.argsort([row for rows in found for row in rows])
            tokens = mx.concatenate(pieces)[mx.array(order)]
        names: tuple[Array, ...] = ()
        if asked := [row for row, choice in enumerate(choices) if choice.top is not None]:
            index = mx.array(asked)
            names = logprobs(self._logits[index], tokens[index], max(choices[row].top or 0 for row in asked))
        return Drawn(tokens, choices, names)

    def go_on(self, drawn: Drawn, rows: Sequence[int]) -> None:
        """Reads the tokens that were drawn, of the rows that go on; the others leave."""
        tokens = mx.maximum(drawn.tokens, 0)
        if len(rows) < len(self.lengths):
            tokens = tokens[mx.array(list(rows), mx.uint32)]
            self.keep(rows)
        if not self.lengths:
            return
        offset, config, pad, positions = self._cache[0].offset, self._model.config, None, None
        if min(self.lengths) < offset:
            pad = self._pads
            positions = (offset - pad)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        lengths = mx.array(self.lengths)[:, None] if rotary.by_length(config) else None
        hidden = self._model.hidden(tokens[:, None], positions, pad=pad, cache=self._cache, lengths=lengths)
        self._logits = self._model.head(hidden)[:, -1, : self._n_vocab]
        mx.async_eval(self._logits)


def _joined(old: Array | None, new: Array, count: int, ends: int, room: int) -> Array:
    """Rows (B, K, S, D) and ``count`` times a row, all ending at one place, in an array with room for more."""
    parts = [] if old is None else [old]
    parts.append(mx.repeat(new, count, axis=0) if count > 1 else new)
    return mx.concatenate(
        [mx.pad(each, [(0, 0), (0, 0), (ends - each.shape[2], room - ends), (0, 0)]) for each in parts]
    )
