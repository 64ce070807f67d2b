"""Generation, in PyTorch: a key-value cache, and tokens drawn on the device as common/inference/sampling.py specifies.

Sizes in the comments: B rows, T new tokens, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.inference import generation, sampling
from mlxgpt.common.inference.generation import OnText, Result, Row
from mlxgpt.common.model import rotary
from mlxgpt.common.tokenizers.protocol import Tokenizer
from torch_ref import fast, noise
from torch_ref.cache import Cache
from torch_ref.layers import Array
from torch_ref.losses import cross_entropy
from torch_ref.model import Model, make_cache

PREFILL = 512  # tokens of a prompt that pass through the model at once
HEAD = 256  # tokens a row whose logits are held at once when a text is scored


def prepare(model: Model, *others: Model) -> None:
    """Stores matrices by columns, on the CPU: the product of a single row and W^T then reads them a fourth faster.

    Names, shapes and values stay. For a model that will only generate: an update would undo it. ``others`` go on
    to share the matrices that they share with it; what is theirs alone stays by rows.
    """
    if model.device.type == "cpu":
        held = [dict(each.named_parameters()) for each in (model, *others)]
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                found = [weights[name] for weights in held if name in weights]
                same = [each for each in found if each.data_ptr() == weight.data_ptr()]
                columns = weight.data.T.contiguous().T
                for each in same:
                    each.data = columns


def gumbel(keys: Array, size: int) -> Array:
    """Gumbel noise (B, V) float32 under the keys (B,) int32."""
    elements = torch.arange(size, dtype=torch.int32, device=keys.device)
    bits = (noise.mix(elements[None, :] ^ noise.mix(keys)[:, None]) >> 1) & 0x7FFFFFFF
    v = torch.clamp((bits.to(torch.float32) + 0.5) * 2**-31, max=1 - 2**-24)
    return -torch.log(-torch.log1p(-v))


def penalize(logits: Array, seen: Array, penalty: float) -> Array:
    """Repetition penalty where ``seen`` (B, V) bool."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def drop(logits: Array, lowest: Array) -> Array:
    """``logits`` (B, V) with -inf below ``lowest`` (B, 1)."""
    return torch.where(logits < lowest, -math.inf, logits)


def keep(logits: Array, sample: SampleConfig) -> Array:
    """``logits`` (B, V) with -inf wherever top-k, top-p or min-p drops the token; at least one stays."""
    if 0 < sample.top_k < logits.shape[-1]:
        lowest = torch.topk(logits, sample.top_k, dim=-1).values.amin(dim=-1, keepdim=True)
        logits = drop(logits, lowest)
    if sample.top_p < 1:
        ordered = torch.sort(logits, dim=-1).values
        weights = torch.exp(ordered - ordered[:, -1:])
        dropped = fast.running_sums(weights) <= (1 - sample.top_p) * weights.sum(dim=-1, keepdim=True)
        dropped = dropped & (ordered < ordered[:, -1:])
        lowest = torch.where(dropped, math.inf, ordered).amin(dim=-1, keepdim=True)
        logits = drop(logits, lowest)
    if sample.min_p > 0:
        lowest = logits.amax(dim=-1, keepdim=True) + math.log(sample.min_p)
        logits = drop(logits, lowest)
    return logits


def added(counts: Array, bias: Array | None, presence: float, frequency: float) -> Array:
    """What is added to logits, of how often each token was drawn: ``counts`` (B, V) float32, ``bias`` (V,)."""
    penalty = presence * (counts > 0).to(torch.float32) + frequency * counts
    return -penalty if bias is None else bias - penalty


def sample_tokens(
    logits: Array, seen: Array | None, keys: Array, sample: SampleConfig, added: Array | None = None
) -> Array:
    """The next tokens (B,) from ``logits`` (B, V) float32, -1 where one is not finite; ``seen`` None: no penalty.

    ``added`` (B, V) float32 are penalties by counts, biases, and -inf for what may not come.
    """
    finite = torch.isfinite(logits).all(dim=-1)
    if seen is not None:
        logits = penalize(logits, seen, sample.repetition_penalty)
    if added is not None:
        logits = logits + added
    if sample.temperature > 0:
        logits = keep(logits / sample.temperature, sample) + gumbel(keys, logits.shape[-1])
    return torch.where(finite, torch.argmax(logits, dim=-1), -1)


def logprobs(logits: Array, tokens: Array, count: int) -> tuple[Array, Array, Array]:
    """Log-probabilities (B,) of ``tokens`` (B,) under ``logits`` (B, V), and the ``count`` likeliest tokens (B, count)
    with theirs (B, count), at most V; of equal ones the lower id comes first. No setting of sampling is in them.
    """
    size = logits.shape[-1]
    normal = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = torch.gather(logits, -1, tokens.clip(0)[:, None].long()) - normal
    count = min(count, size)
    if not count:
        return chosen[:, 0], chosen[:, :0].int(), chosen[:, :0]
    # topk breaks ties in any way: what is above the last value stays, and of its equals the lowest ids
    lowest = torch.topk(logits, count, dim=-1).values.amin(dim=-1, keepdim=True)
    places = torch.arange(size, dtype=torch.int32, device=logits.device)
    ranks = torch.where(logits > lowest, size + 1, torch.where(logits == lowest, size - places, 0))
    ids = torch.sort(torch.topk(ranks, count, dim=-1).indices, dim=-1).values
    values = torch.gather(logits, -1, ids)
    before = (values[:, None, :] > values[:, :, None]) | (
        (values[:, None, :] == values[:, :, None]) & (ids[:, None, :] < ids[:, :, None])
    )
    order = torch.argsort(before.sum(dim=-1), dim=-1)
    return chosen[:, 0], torch.gather(ids, -1, order).int(), torch.gather(values, -1, order) - normal


@torch.no_grad()
def decode(
    model: Model,
    rows: list[Row],
    sample: SampleConfig,
    n_vocab: int,
    cache: list[Cache] | None = None,
    bias: np.ndarray | None = None,
    top: int | None = None,
    kv_bits: int = 0,
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Yields the next token of every row, step by step, as far as max_tokens and the context go; with ``top`` also what
    ``logprobs`` says of them and of so many others.

    Prompts of unequal length are padded on the left; a row that ran out of context draws tokens that mean nothing.
    ``cache`` has room for the context and holds the first tokens of the only row, which are not read again.
    ``bias`` (V,) float32 is added to logits.
    """
    device = model.device
    width, steps = max(len(row.prompt) for row in rows), generation.steps(model.config, rows, sample)
    if not steps:
        return
    tokens = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)  # (B, T)
    pads = [width - len(row.prompt) for row in rows]
    pad = torch.tensor(pads, device=device) if any(pads) else None
    cache = cache or make_cache(model, len(rows), width + steps, kv_bits=kv_bits)
    held, by_length, fed = cache[0].offset, rotary.by_length(model.config), []
    keys = sampling.each_step_keys(sample.seed, [row.copy for row in rows], steps)
    seen = None
    if sample.repetition_penalty != 1:
        seen = torch.tensor(generation.seen(rows, n_vocab), device=device)
    penalties = (sample.presence_penalty, sample.frequency_penalty)
    counts = torch.zeros((len(rows), n_vocab), device=device) if any(penalties) else None
    biases = None if bias is None else torch.tensor(bias, device=device)

    def forward(tokens: Array, length: int) -> Array:
        positions = None
        if pad is not None:
            positions = torch.arange(cache[0].offset, cache[0].offset + tokens.shape[1], device=device)
            positions = torch.clip(positions[None, :] - pad[:, None], 0, model.config.block_size - 1)
        lengths = torch.tensor([[length - each] for each in pads], device=device) if by_length else None
        hidden = model.hidden(tokens, positions, pad=pad, cache=cache, lengths=lengths)  # no id needs a check here
        return model.head(hidden[:, -1:])[:, -1, :n_vocab]

    def read(tokens: Array, start: int) -> Array:
        """What follows rows of which the cache holds ``start`` tokens."""
        width = tokens.shape[1]
        logits = forward(tokens[:, start : start + PREFILL], width)
        for at in range(start + PREFILL, width, PREFILL):
            logits = forward(tokens[:, at : at + PREFILL], width)
        return logits

    def go_on(token: Array, step: int) -> Array:
        """What follows one more token; keys that were held are read anew where longrope's factors change."""
        token = token.clip(0)[:, None]
        fed.extend([token] if by_length else [])
        if not generation.switches(model.config, rows, step):
            return forward(token, width + step)
        for layer in cache:
            layer.cut(0)
        return read(torch.cat([tokens, *fed], dim=1), 0)

    def draw(logits: Array) -> tuple[Array, ...]:
        nonlocal seen, counts
        more = None if biases is None else biases[None, :]
        if counts is not None:
            more = added(counts, biases, *penalties)
        drawn = sample_tokens(logits, seen, torch.tensor(next(keys).view(np.int32), device=device), sample, more)
        if seen is not None or counts is not None:
            now = torch.arange(n_vocab, device=device)[None, :] == drawn[:, None]
            seen = None if seen is None else seen | now
            counts = None if counts is None else counts + now
        return (drawn, *(() if top is None else logprobs(logits, drawn, top)))

    drawn = draw(read(tokens, held))
    for step in range(1, steps + 1):
        # the next step is queued before this step's token is read, so the device never waits for the host
        following = draw(go_on(drawn[0], step)) if step < steps else drawn
        yield drawn[0].tolist(), [each.cpu().numpy() for each in drawn[1:]]
        drawn = following


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[int]],
    sample: SampleConfig,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
    ends: Collection[int] = (),
    bias: Mapping[int, float] = MappingProxyType({}),
    top: int | None = None,
    kv_bits: int = 0,
) -> list[Result]:
    """What follows each prompt (text, or token ids); a prompt gets in a batch what it gets alone. Nothing is dropped.

    ``ends`` are tokens that end a text besides those of ``tokenizer``; ``bias`` is added to the logits of its ids;
    with ``top`` the log-probability of each token is told, and so many of the likeliest. ``kv_bits`` 8 or 4
    holds keys and values in so many bits; 0 as they are.

    Raises:
        UserError: a prompt that is empty, longer than the context, or has ids outside the vocabulary; a bias of such
            an id, or one that is no finite number; kv_bits that the model cannot have.
        RunError: the model's logits are not finite.
    """
    rows = generation.start_rows(model.config, tokenizer, prompts, stop, ends)
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size) if tokenizer else model.config.vocab_size
    biases = sampling.biases(bias, n_vocab)
    training = model.training
    model.eval()
    try:
        if rows and sample.max_tokens:
            for tokens, names in decode(model, rows, sample, n_vocab, bias=biases, top=top, kv_bits=kv_bits):
                if generation.advance(model.config, rows, tokens, sample, on_text, names):
                    break
    finally:
        model.train(training)
    return [row.result() for row in rows]


def sample_text(model: Model, tokenizer: Tokenizer, sample: SampleConfig) -> str:
    """``sample.prompt`` and what follows it."""
    return sample.prompt + generate(model, tokenizer, [sample.prompt], sample)[0].text


@torch.no_grad()
def score(
    model: Model, tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None = None, kv_bits: int = 0
) -> np.ndarray:
    """Next-token losses (B, T) float32 of host arrays (B, T), the head a few tokens at a time to save memory.

    With ``kv_bits`` 8 or 4 queries see keys and values as a cache of so many bits gives them.
    """
    cache = make_cache(model, *tokens.shape, kv_bits=kv_bits) if kv_bits else None
    device = model.device
    places = None if positions is None else torch.tensor(positions, device=device)
    hidden, labels = (
        model.hidden(torch.tensor(tokens, device=device), places, cache=cache),
        torch.tensor(targets, device=device),
    )
    pieces = []
    for start in range(0, hidden.shape[1], HEAD):
        piece = slice(start, start + HEAD)
        pieces.append(cross_entropy(model.head(hidden[:, piece]), labels[:, piece]))
    return torch.cat(pieces, dim=1).cpu().numpy()


@torch.no_grad()
def scores(
    model: Model, hidden: Array, targets: np.ndarray, n_vocab: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``logprobs`` of ``targets`` (T,) behind hidden states (1, T, C), on the host, HEAD tokens at a time."""
    if not len(targets):
        few = min(count, n_vocab)
        return np.zeros(0, np.float32), np.zeros((0, few), np.int32), np.zeros((0, few), np.float32)
    labels, pieces = torch.tensor(targets, device=model.device), []
    for start in range(0, len(targets), HEAD):
        piece = slice(start, start + HEAD)
        made = logprobs(model.head(hidden[:, piece])[0, :, :n_vocab], labels[piece], count)
        pieces.append([each.cpu().numpy() for each in made])
    chosen, ids, values = (np.concatenate(each) for each in zip(*pieces, strict=True))
    return chosen, ids, values


@torch.no_grad()
def classify(model: Model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A classifier's logits (B, n) float32 of texts (B, T), padded on the right, by their last token."""
    device = model.device
    ends = torch.tensor(lengths[:, None], device=device)
    hidden = model.hidden(torch.tensor(tokens, device=device), lengths=ends)
    last = hidden[torch.arange(len(tokens), device=device), torch.tensor(lengths - 1, device=device)]
    return model.head(last).cpu().numpy()
