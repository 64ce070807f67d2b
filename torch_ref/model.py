"""One decoder for every family, in PyTorch. ``diff mlxgpt/model.py torch_ref/model.py`` shows how MLX differs.

Sizes in the comments: B rows, T new tokens, S tokens attended to, C n_embd, H query heads, K key and value heads,
D head_dim, F n_hidden, V vocab_size. Parameters are named and shaped as common/model/params.py lists them.
"""

import itertools
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params, rotary
from mlxgpt.common.model import positions as places
from mlxgpt.common.model.sizes import describe
from torch_ref import fast, inputs, noise, rope
from torch_ref.attention import Attention, Mask
from torch_ref.cache import Cache, make_room
from torch_ref.layers import Array, Bias, Dropout, Embedding, Linear, Norm, finish


def activate(x: Array, kind: str) -> Array:
    """GELU as tanh or erf (Hendrycks and Gimpel 2016), SiLU, ReLU, or its square (So et al. 2021)."""
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "gelu":
        return F.gelu(x)
    if kind in ("relu", "relu2"):
        x = F.relu(x)
        return x if kind == "relu" else x * x
    assert kind == "silu"
    return F.silu(x)


class MLP(nn.Module):
    """proj(act(fc(x))), or gated (Shazeer 2020): proj(act(gate(x)) * fc(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config = config
        if config.fused_mlp:
            self.c_gate_fc = Linear(config.n_embd, 2 * config.n_hidden, config.has_bias("mlp.c_gate_fc"))
        else:
            if config.gated:
                self.c_gate = Linear(config.n_embd, config.n_hidden, config.has_bias("mlp.c_gate"))
            self.c_fc = Linear(config.n_embd, config.n_hidden, config.has_bias("mlp.c_fc"))
        self.c_proj = Linear(config.n_hidden, config.n_embd, config.has_bias("mlp.c_proj"))

    def forward(self, x: Array, drop: Dropout | None = None) -> Array:
        if self._config.fused_mlp:
            gate, x = self.c_gate_fc(x, drop).chunk(2, dim=-1)
        elif self._config.gated:
            gate, x = self.c_gate(x, drop), self.c_fc(x, drop)
        else:
            return self.c_proj(activate(self.c_fc(x, drop), self._config.activation), drop)
        return self.c_proj(activate(gate, self._config.activation) * x, drop)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; ``placement`` says where their norms sit."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._placement, self._multiplier = config.placement, config.residual_multiplier
        self.ln_1 = Norm(config.n_embd, config, "ln_1")
        self.attn = Attention(config)
        if config.placement == "sandwich":
            self.ln_1_post = Norm(config.n_embd, config, "ln_1_post")
        if config.placement != "parallel":
            self.ln_2 = Norm(config.n_embd, config, "ln_2")
        self.mlp = MLP(config)
        if config.placement == "sandwich":
            self.ln_2_post = Norm(config.n_embd, config, "ln_2_post")

    def forward(
        self,
        x: Array,
        mask: Mask,
        rope: tuple[Array, Array] | None = None,
        cache: Cache | None = None,
        drop: Dropout | None = None,
    ) -> Array:
        """(B, T, C) -> (B, T, C).

        pre: GPT-2; post: OLMo 2; sandwich: Gemma 2; post_add: Vaswani et al.; parallel: GPT-J; parallel2: GPT-NeoX.
        """
        place = self._placement
        y = self.attn(x if place in ("post", "post_add") else self.ln_1(x), mask, rope, cache, drop)
        if place == "post":
            y = self.ln_1(y)
        elif place == "sandwich":
            y = self.ln_1_post(y)
        if drop and drop.rate:
            y = noise.dropout(y, drop.rate, drop.keys[1], drop.first_row)
        if self._multiplier != 1:
            y = y * self._multiplier
        after = x + y
        if place == "post_add":
            after = self.ln_1(after)
        before = x if place in ("parallel", "parallel2") else after  # what the MLP reads
        if place == "post":
            z = self.ln_2(self.mlp(before, drop))
        elif place == "post_add":
            z = self.mlp(before, drop)
        else:
            z = self.mlp(self.ln_1(before) if place == "parallel" else self.ln_2(before), drop)
        if place == "sandwich":
            z = self.ln_2_post(z)
        if drop and drop.rate:
            z = noise.dropout(z, drop.rate, drop.keys[2], drop.first_row)
        if self._multiplier != 1:
            z = z * self._multiplier
        if place == "post_add":
            return self.ln_2(after + z)
        return after + z


def make_cache(
    model: "Model", batch: int, length: int, dtype: torch.dtype | None = None, kv_bits: int = 0
) -> list[Cache]:
    """One empty cache a layer; dtype defaults to the model's compute dtype.

    Raises:
        UserError: ``kv_bits`` is not 8, 4 or 0, or no group of them divides head_dim.
    """
    config, dtype, device = model.config, dtype or model.dtype, model.device
    windows = [config.window if layer in config.window_layers else 0 for layer in range(config.n_layer)]
    return [Cache(batch, length, config, dtype, device, window, kv_bits) for window in windows]


class Model(nn.Module):
    """tokens (B, T) -> logits (B, T, V) in float32.

    ``checks``: a call looks whether the vocabulary has its tokens; see inputs.taken.

    Args:
        config: sizes and choices; vocab_size must be set.
        dtype: what the blocks compute in; weights may be kept in another.
        seed: of the initial weights, those of params.init_params, and of dropout; None leaves all weights zero.

    Raises:
        UserError: config has no vocab_size.
    """

    checks = True

    _places: Array
    _slopes: Array | None

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int | None = 1337):
        super().__init__()
        if not config.vocab_size:
            raise UserError("model.vocab_size = 0: expected the number of tokens, such as tokenizer.n_vocab")
        self._config, self._dtype, self._seed, self._masks, self._given = config, dtype, seed or 0, None, None
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        elif config.position == "rope":
            self._rope: list[list[str]] = [[], []]
            for local, names in zip((False, True), self._rope, strict=True):
                for table in rotary.tables(config, local):
                    names.append(f"_rope_{local:d}_{len(names)}")
                    self.register_buffer(names[-1], torch.from_numpy(table), persistent=False)
        elif config.position == "sinusoidal":
            self.register_buffer("_places", torch.from_numpy(places.sinusoids(config)), persistent=False)
        slopes = torch.from_numpy(places.slopes(config.n_head)) if config.position == "alibi" else None
        self.register_buffer("_slopes", slopes, persistent=False)
        if config.embed_norm:
            self.ln_e = Norm(config.n_embd, config, "ln_e")
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = Norm(config.n_embd, config, "ln_f") if config.final_norm else nn.Identity()
        if config.labels:
            self.score = Linear(config.n_embd, len(config.labels), False)
        elif not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, config.has_bias("lm_head"))
        elif config.has_bias("lm_head"):
            self.lm_head = Bias(config.vocab_size)
        for name, array in params.init_params(config, seed).items() if seed is not None else ():
            path, _, kind = name.rpartition(".")
            getattr(self.at(path), kind).data = torch.from_numpy(array)

    @property
    def config(self) -> ModelConfig:
        """The configuration that the model was built from."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in."""
        return self._dtype

    @property
    def dropout(self) -> float:
        """The rate at which a call in training mode drops, on embeddings, attention weights and both branches.

        Set it to begin the masks again: those of call n are a function of (seed, n), in both frameworks the same.
        """
        return self._masks.rate if self._masks else 0.0

    @dropout.setter
    def dropout(self, rate: float) -> None:
        made = noise.Masks(rate, self._seed, self._config.n_layer) if params.rate(rate) else None
        self._masks = made.to(self.device) if made else None

    def give(self, drop: Dropout | None) -> None:
        """The masks of the calls that follow; None: what ``dropout`` says."""
        object.__setattr__(self, "_given", drop)  # a tuple of a step's arrays is no part of the model

    def masks(self) -> Dropout | None:
        """What a call drops that is not told: what was given, else, in training mode, what ``dropout`` says."""
        if self._given is not None or self._masks is None or not self.training:
            return self._given
        return self._masks.draw()

    def __repr__(self) -> str:
        trained = {name for name, each in self.named_parameters() if each.requires_grad}
        return describe(self, dict(itertools.chain(self.named_parameters(), self.named_buffers())), trained)

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def at(self, path: str) -> Any:
        """The module at a path such as h.0.attn.q_proj."""
        found: Any = self
        for part in path.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    def mask(
        self,
        T: int,
        S: int,
        segments: Array | None,
        pad: Array | None,
        window: int = 0,
        fused: bool = True,
        flexible: bool = False,
        starts: Array | None = None,
    ) -> Mask:
        """True where query i may look at key j: i - window < j <= i, one segment, not padding. (T, S) or (B, 1, T, S).

        None if every query may look everywhere; "causal" where a fused kernel knows that by itself; blocks of it if
        it is ``flexible``. With ALiBi what is added to scores, (1 or B, H, T, S): one for all blocks, whose gradients
        keep it. The first query of each row is ``starts`` (B,), else S - T.
        """
        slides, slopes = 0 < window < S, self._slopes
        if segments is None and pad is None and starts is None and not slides:
            if T == 1 and slopes is None:
                return None
            if fused and slopes is None and T == S:
                return "causal"  # torch aligns is_causal to the upper left, which is right only without a cache
        if flexible:
            return fast.block_mask(T, window if slides else 0, segments, self.device)
        i, j = torch.arange(S - T, S, device=self.device)[:, None], torch.arange(S, device=self.device)[None, :]
        if starts is not None:
            i = starts[:, None, None, None] + torch.arange(T, device=self.device)[:, None]
        mask = j <= i
        if slides:
            mask = mask & (i - j < window)
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        if pad is not None:
            mask = mask & ((j >= pad[:, None, None, None]) | (i == j))
        if slopes is not None:
            added = fast.lean(slopes, T, S, self._dtype, starts)
            return torch.where(mask, added if starts is not None else added[None], -float("inf"))
        return mask

    def rope(self, positions: Array, local: bool, lengths: Array | None) -> tuple[Array, Array]:
        """cos and sin at the positions, (T, d / 2) or (B, 1, T, d / 2), of layers with a window or without."""
        tables = [getattr(self, name) for name in self._rope[local]]
        cos, sin = (each.to(self._dtype) for each in rope.turn(self._config, tables, positions, lengths))
        return (cos[:, None], sin[:, None]) if cos.ndim == 3 else (cos, sin)

    def placed(self, x: Array, positions: Array) -> Array:
        """What dropout and the first block are given of embeddings x (B, T, C) at the positions."""
        config, added = self._config, None
        if config.position == "learned":
            added = self.wpe(positions)
        elif config.position == "sinusoidal":
            added = self._places[positions]
        else:
            x = x.to(self._dtype)
        if config.embed_scale:
            x = x * torch.tensor(config.n_embd**0.5, dtype=x.dtype)
        if config.embed_multiplier != 1:
            x = x * config.embed_multiplier
        if added is not None:
            if config.position == "learned" and config.position_multiplier != 1:
                added = added * config.position_multiplier
            x = (x + added).to(self._dtype)
        return self.ln_e(x) if config.embed_norm else x

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        pad: Array | None = None,
        cache: list[Cache] | None = None,
        drop: Dropout | None = None,
        recompute: bool = False,
        inside: Array | None = None,
        lengths: Array | None = None,
    ) -> Array:
        """What the head sees: (B, T, C) after the last norm. ``recompute`` keeps no activations inside a block.

        ``inside`` (B, T) is False where a token is to count as NaN. ``lengths`` (B, 1) of the whole sequences, where
        the frequencies depend on them; default: up to the last position of this call.
        """
        T, drop = tokens.shape[1], drop or self.masks()
        start, read = (cache[0].offset, cache[0].lengths) if cache else (0, [])
        if pad is None and start + T > self._config.block_size:  # padding takes no positions
            raise UserError(f"{start + T} tokens: the model's context holds {self._config.block_size}")
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)
            if len(set(read)) > 1:
                positions = torch.tensor(read, device=tokens.device)[:, None] + torch.arange(T, device=tokens.device)
        config, windows = self._config, set(self._config.window_layers)
        drops = bool(drop and drop.rate)
        fused = not drops and not config.attn_softcap
        flexible = not drops and pad is None and cache is None and fast.flexes(self.device, config.head_dim)
        # recomputed with a cap, FlexAttention of torch 2.13 gives wrong gradients of q and k; ALiBi was not measured
        flexible = flexible and not (recompute and (config.attn_softcap or config.position == "alibi"))
        make_room(cache or [], T)
        masks = {}
        for local in {n in windows for n in range(config.n_layer)}:
            held, begin, starts = 0, 0, None
            if cache:
                layer = next(layer for n, layer in enumerate(cache) if (n in windows) == local)
                held, begin, starts = layer.held, layer.begins[0], layer.starts
            padding = pad - begin if pad is not None and begin else pad  # a place in what the layer holds
            window = config.window if local else 0
            masks[local] = self.mask(T, held + T, segments, padding, window, fused, flexible, starts)
        x = self.wte(tokens)
        if inside is not None:
            x = torch.where(inside[..., None], x, float("nan"))
        if drop and drop.neftune:
            x = noise.neftune(x, drop.neftune, drop.neftune_key, drop.first_row, segments)
        x = self.placed(x, positions)
        if not rotary.by_length(config):
            lengths = None
        elif lengths is None:
            lengths = rope.lengths(positions, segments)
        turns = {local: self.rope(positions, local, lengths) for local in masks} if config.position == "rope" else {}
        if drop and drop.rate:
            x = noise.dropout(x, drop.rate, drop.keys[0], drop.first_row)
        for n, block in enumerate(self.h):
            run, local = partial(checkpoint, block, use_reentrant=False) if recompute else block, n in windows
            turn = None if n in config.no_rope else turns.get(local)
            site = 1 + noise.SITES * n
            keys = None if drop is None else drop._replace(keys=drop.keys[site : site + noise.SITES])
            x = run(x, masks[local], turn, cache[n] if cache else None, keys)
        return self.ln_f(x)

    def head(self, x: Array, drop: Dropout | None = None) -> Array:
        """Logits (..., V), a classifier's (..., n), in float32 of hidden states (..., C)."""
        if self._config.tied:
            logits = self.wte.head(x)
            if self._config.has_bias("lm_head"):
                logits = logits + cast(Bias, self.lm_head).bias.to(logits.dtype)
        else:
            logits = (self.score if self._config.labels else self.lm_head)(x, drop)
        return finish(logits, self._config.logit_scale, self._config.final_softcap)

    def forward(
        self,
        tokens: Any,
        positions: Array | None = None,
        segments: Array | None = None,
        pad: Array | None = None,
        cache: list[Cache] | None = None,
        last_only: bool = False,
    ) -> Array:
        """Logits (B, T, V), or (B, 1, V) of the last position.

        Args:
            tokens: (B, T) ids, a tensor, an array of numpy or lists.
            positions: (T,) or (B, T); default: what follows the cache.
            segments: (B, T); a token sees its own segment only.
            pad: (B,) left padding that nobody may look at.
            cache: from make_cache; T tokens are appended.

        Raises:
            UserError: more tokens than block_size, none, an id that the vocabulary lacks, or no rows of integers.
        """
        inside = None
        if self.checks or not isinstance(tokens, Array):
            # a GPU is not made to wait for each step of training, nor for each token that is drawn
            read = not (self.training or (cache and cache[0].offset))
            tokens, inside = inputs.taken(tokens, self._config.vocab_size, read, self.device)
        x = self.hidden(tokens, positions, segments, pad, cache, inside=inside)
        return self.head(x[:, -1:] if last_only else x)
