"""Continuous batching, in PyTorch: a prompt is read alone, joins the rows that draw, and a row leaves when it is done.

Rows end at a common place of the cache and are padded on its left; ``pad`` and positions tell the model where each
begins. Sizes in the comments: B rows, K key and value heads, S places of the cache, D head_dim, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mlxgpt.common.inference import choosing
from mlxgpt.common.inference.choosing import Choice, Chosen
from mlxgpt.common.model import rotary
from torch_ref.attention import BLOCK
from torch_ref.generate import logprobs, sample_tokens, scores
from torch_ref.layers import Array
from torch_ref.model import Cache, Model, make_cache

Layers = list[tuple[Array, Array]]  # keys and values (1, K, S, D) of each layer


def size(layers: Layers) -> int:
    """Bytes of keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def first(layers: Layers, tokens: int) -> Layers:
    """Keys and values of the first tokens."""
    return [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in layers]


def leave() -> None:
    """Called at the end of a thread that computed."""


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
        self.logits = torch.zeros((1, n_vocab), device=model.device)  # (1, V) of the last token, when all were read
        self.scores: list[tuple[np.ndarray, ...]] = []  # as generate.scores gives them, of each piece

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self.ids) - self.cache[0].offset

    @torch.no_grad()
    def read(self, tokens: int) -> int:
        """Passes up to so many tokens through the model; how many they were."""
        start = self.cache[0].offset
        piece = self.ids[start : start + tokens]
        lengths = (
            torch.tensor([[len(self.ids)]], device=self._model.device) if rotary.by_length(self._model.config) else None
        )
        hidden = self._model.hidden(torch.tensor([piece], device=self._model.device), cache=self.cache, lengths=lengths)
        if self._top is not None:
            targets = np.array(self.ids[start + 1 : start + len(piece) + 1])
            self.scores.append(scores(self._model, hidden[:, : len(targets)], targets, self._n_vocab, self._top))
        if not self.left:
            self.logits = self._model.head(hidden[:, -1:])[:, -1, : self._n_vocab]
        return len(piece)

    def layers(self) -> Layers:
        """Keys and values of what was read."""
        return [(layer.keys[:, :, : layer.offset], layer.values[:, :, : layer.offset]) for layer in self.cache]


class Drawn:
    """Tokens that were drawn, on the device until they are read."""

    def __init__(self, tokens: Array, choices: Sequence[Choice], names: Sequence[Array]):
        self.tokens, self._choices, self._names = tokens, choices, names  # (B,)

    def read(self) -> list[Chosen]:
        """Waits for them."""
        return choosing.told(self.tokens.cpu().numpy(), self._choices, [each.cpu().numpy() for each in self._names])


class Batch:
    """Rows of one model that draw together, in the order in which they joined."""

    def __init__(self, model: Model, n_vocab: int):
        self._model, self._n_vocab, self._device = model, n_vocab, model.device
        self.lengths: list[int] = []  # tokens of each row that the cache holds
        self._cache: list[Cache] = []
        self._logits = torch.zeros((0, n_vocab), device=model.device)  # (B, V) of each row's last token
        self._pads = torch.zeros(1, dtype=torch.int64, device=model.device)

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
        self._logits = torch.cat([self._logits, prompt.logits.expand(count, -1)])
        self._place()

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay; the others leave."""
        if len(rows) == len(self.lengths):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._cache, self._logits = [], self._logits[:0]
            return
        index, start = self._index(rows), self._cache[0].offset - max(self.lengths)
        self._logits = self._logits[index]
        for layer in self._cache:
            layer.keys, layer.values = layer.keys[index][:, :, start:], layer.values[index][:, :, start:]
            layer.offset -= start
        self._place()

    def _place(self) -> None:
        """Says where the rows begin."""
        self._pads = self._index([self._cache[0].offset - length for length in self.lengths])

    def _index(self, values: Sequence[int]) -> Array:
        """Whole numbers on the device."""
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def layers(self, row: int) -> Layers:
        """Keys and values of a row, in memory of their own."""
        start, end, rows = self._cache[0].offset - self.lengths[row], self._cache[0].offset, slice(row, row + 1)
        return [
            (layer.keys[rows, :, start:end].clone(), layer.values[rows, :, start:end].clone()) for layer in self._cache
        ]

    @torch.no_grad()
    def draw(self, choices: Sequence[Choice]) -> Drawn:
        """The next token of every row."""
        pieces, found = [], choosing.groups(choices)
        for rows in found:
            ours = [choices[row] for row in rows]
            logits = self._logits if len(found) == 1 else self._logits[self._index(rows)]
            seen, added = (choosing.stacked(ours, name) for name in ("seen", "added"))
            keys = torch.tensor(np.array([each.key for each in ours], np.uint32).view(np.int32), device=self._device)
            seen, added = (None if each is None else torch.tensor(each, device=self._device) for each in (seen, added))
            pieces.append(sample_tokens(logits, seen, keys, ours[0].sample, added))
        tokens = pieces[0]
        if len(found) > 1:
            order = np.argsort([row for rows in found for row in rows])
            tokens = torch.cat(pieces)[self._index(order.tolist())]
        names: tuple[Array, ...] = ()
        if asked := [row for row, choice in enumerate(choices) if choice.top is not None]:
            index = self._index(asked)
            names = logprobs(self._logits[index], tokens[index], max(choices[row].top or 0 for row in asked))
        return Drawn(tokens, choices, names)

    @torch.no_grad()
    def go_on(self, drawn: Drawn, rows: Sequence[int]) -> None:
        """Reads the tokens that were drawn, of the rows that go on; the others leave."""
        tokens = drawn.tokens.clip(0)
        if len(rows) < len(self.lengths):
            tokens = tokens[self._index(rows)]
            self.keep(rows)
        if not self.lengths:
            return
        offset, config, pad, positions = self._cache[0].offset, self._model.config, None, None
        if min(self.lengths) < offset:
            pad = self._pads
            positions = (offset - pad)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        lengths = self._index(self.lengths)[:, None] if rotary.by_length(config) else None
        hidden = self._model.hidden(tokens[:, None], positions, pad=pad, cache=self._cache, lengths=lengths)
        self._logits = self._model.head(hidden)[:, -1, : self._n_vocab]


def _joined(old: Array | None, new: Array, count: int, ends: int, room: int) -> Array:
    """Rows (B, K, S, D) and ``count`` times a row, all ending at one place, in an array with room for more."""
    parts = [] if old is None else [old]
    parts.append(new.expand(count, -1, -1, -1))
    made = new.new_zeros((sum(len(each) for each in parts), new.shape[1], room, new.shape[3]))
    row = 0
    for each in parts:
        made[row : row + len(each), :, ends - each.shape[2] : ends] = each
        row += len(each)
    return made
