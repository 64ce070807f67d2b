"""Continuous batching, in PyTorch: a prompt is read alone, joins the rows that draw, and a row leaves when it is done.

Rows begin at the first place of the cache; ``starts`` tell the model where each goes on. Sizes in the comments: B rows,
T tokens, K key and value heads, S places of the cache, D head_dim, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mlxgpt.common.inference import choosing
from mlxgpt.common.inference.choosing import Choice, Chosen
from mlxgpt.common.model import rotary
from torch_ref.cache import Held
from torch_ref.generate import logprobs, sample_tokens, scores
from torch_ref.layers import Array
from torch_ref.model import Model, make_cache

Layers = list[Held]  # keys and values of each layer


def size(layers: Layers) -> int:
    """Bytes of keys and values."""
    return sum(layer.nbytes for layer in layers)


def first(layers: Layers, tokens: int) -> Layers:
    """Keys and values of the first tokens."""
    return [layer.first(tokens) for layer in layers]


def reaches(layers: Layers, tokens: int) -> bool:
    """Whether a prompt may go on after the first tokens; layers with a window hold the last tokens only."""
    return all(layer.reaches(tokens) for layer in layers)


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
        kv_bits: of the cache: 8 or 4; 0 holds keys and values as they are.
    """

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        n_vocab: int,
        held: Layers | None = None,
        top: int | None = None,
        kv_bits: int = 0,
    ):
        self.ids, self._model, self._n_vocab, self._top = list(ids), model, n_vocab, top
        self.cache = make_cache(model, 1, len(self.ids), kv_bits=kv_bits)
        for layer, theirs in zip(self.cache, held or (), strict=False):
            layer.hold(theirs)
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
        return [layer.only() for layer in self.cache]


class Drawn:
    """Tokens that were drawn, on the device until they are read."""

    def __init__(self, tokens: Array, choices: Sequence[Choice], names: Sequence[Array]):
        self.tokens, self._choices, self._names = tokens, choices, names  # (B,)

    def read(self) -> list[Chosen]:
        """Waits for them."""
        return choosing.told(self.tokens.cpu().numpy(), self._choices, [each.cpu().numpy() for each in self._names])


class Batch:
    """Rows of one model that draw together, in the order in which they joined."""

    def __init__(self, model: Model, n_vocab: int, kv_bits: int = 0):
        self._model, self._n_vocab, self._device = model, n_vocab, model.device
        self.lengths: list[int] = []  # tokens of each row that the cache holds
        self._cache = make_cache(model, 0, model.config.block_size, kv_bits=kv_bits)
        self._logits = torch.zeros((0, n_vocab), device=model.device)  # (B, V) of each row's last token

    def join(self, prompt: Prompt, count: int) -> None:
        """Adds a prompt that was read, ``count`` times."""
        self._align()
        for layer, held in zip(self._cache, prompt.layers(), strict=True):
            layer.join(held, count)
        self.lengths = self.lengths + [len(prompt.ids)] * count
        self._logits = torch.cat([self._logits, prompt.logits.expand(count, -1)])

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that stay; the others leave."""
        if len(rows) == len(self.lengths):
            return
        self._align()
        self.lengths = [self.lengths[row] for row in rows]
        index = self._index(rows)
        self._logits = self._logits[index]
        for layer in self._cache:
            layer.keep(rows, index)

    def _align(self) -> None:
        """Tells the layers of what was cut."""
        for layer in self._cache:
            layer.lengths = list(self.lengths)

    def cut(self, lengths: Sequence[int]) -> None:
        """Leaves each row its first tokens; what is drawn next comes after others are read."""
        self.lengths = list(lengths)

    def _index(self, values: Sequence[int]) -> Array:
        """Whole numbers on the device."""
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def layers(self, row: int, end: int) -> Layers:
        """Keys and values of a row's first tokens, in memory of their own."""
        return [layer.row(row, end) for layer in self._cache]

    @torch.no_grad()
    def draw(self, choices: Sequence[Choice]) -> Drawn:
        """The next token of every row."""
        return self._drawn(self._logits, choices)

    def _drawn(self, source: Array, choices: Sequence[Choice]) -> Drawn:
        """The next tokens under logits (n, V), a choice each."""
        pieces, found = [], choosing.groups(choices)
        for rows in found:
            ours = [choices[row] for row in rows]
            logits = source if len(found) == 1 else source[self._index(rows)]
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
            names = logprobs(source[index], tokens[index], max(choices[row].top or 0 for row in asked))
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
        self._logits = self._model.head(self._read(tokens[:, None], [1] * len(self.lengths)))[:, -1, : self._n_vocab]
        self.lengths = [length + 1 for length in self.lengths]

    def _read(self, tokens: Array, counts: Sequence[int]) -> Array:
        """Hidden states (B, T, C) of the next tokens (B, T) of every row; the first ``counts`` of them count."""
        self._align()
        lengths = None
        if rotary.by_length(self._model.config):
            lengths = self._index([length + count for length, count in zip(self.lengths, counts, strict=True)])[:, None]
        return self._model.hidden(tokens, cache=self._cache, lengths=lengths)

    def _padded(self, tokens: Sequence[Sequence[int]]) -> Array:
        """Hidden states (B, T, C) of one or more next tokens of each row."""
        counts = [len(each) for each in tokens]
        padded = np.zeros((len(tokens), max(counts)), np.int64)
        for row, each in enumerate(tokens):
            padded[row, : len(each)] = each
        return self._read(torch.tensor(padded, device=self._device), counts)

    def _settle(self, hidden: Array, counts: Sequence[int]) -> None:
        """The first ``counts`` tokens of hidden states (B, T, C) are the rows', and the next is drawn behind them."""
        last = self._index([count - 1 for count in counts])
        self._logits = self._model.head(hidden[self._index(range(len(counts))), last][:, None])[:, 0, : self._n_vocab]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    @torch.no_grad()
    def read(self, tokens: Sequence[Sequence[int]]) -> None:
        """Reads one or more tokens of each row; no row may pass the context by the longest."""
        self._settle(self._padded(tokens), [len(each) for each in tokens])

    @torch.no_grad()
    def ahead(
        self, tokens: Sequence[int], drafts: Sequence[Sequence[int]], choices: Sequence[Sequence[Choice]]
    ) -> list[list[Chosen]]:
        """Reads a token of every row and what may follow it, and tells how much of that is what the row draws.

        Args:
            tokens: the last that each row drew.
            drafts: what may follow, () for nothing; no row may pass the context by the longest of them.
            choices: how each token of a draft would be drawn.
        """
        hidden = self._padded([[token, *draft] for token, draft in zip(tokens, drafts, strict=True)])
        places = [(row, place) for row, draft in enumerate(drafts) for place in range(len(draft))]
        told: list[Chosen] = []
        if places:
            rows, columns = (self._index(each) for each in zip(*places, strict=True))
            logits = self._model.head(hidden[rows, columns][None])[0, :, : self._n_vocab]
            told = self._drawn(logits, [choice for each in choices for choice in each]).read()
        accepted = choosing.accepted(drafts, told)
        self._settle(hidden, [1 + len(each) for each in accepted])
        return accepted
