"""GPTs in PyTorch with the parameter names of nanoGPT, minGPT and GPTModel: whose files convert reads and writes.

Written from their formats, to judge what is converted: logits, ``load_state_dict`` as strict as theirs, and nanoGPT's
order of parameters in AdamW.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mlxgpt.common.config import ModelConfig


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_head: int) -> torch.Tensor:
    """Causal attention of (B, T, C) by heads."""
    b, t, c = q.shape
    q, k, v = (one.reshape(b, t, n_head, c // n_head).transpose(1, 2) for one in (q, k, v))
    scores = (q @ k.mT / math.sqrt(c // n_head)).masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c)


class Norm(nn.Module):
    """LayerNorm with a bias or none, under the names that are given."""

    def __init__(self, size: int, bias: bool, names: tuple[str, str] = ("weight", "bias")):
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Parameter(torch.ones(size)))
        setattr(self, names[1], nn.Parameter(torch.zeros(size)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], getattr(self, self.names[0]), getattr(self, self.names[1]), 1e-5)


class Fused(nn.Module):
    """Attention of nanoGPT and minGPT."""

    def __init__(self, c: ModelConfig, bias: bool, mask: bool):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=bias)
        if mask:
            self.register_buffer("bias", torch.ones(1, 1, c.block_size, c.block_size).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return self.c_proj(attend(q, k, v, self.n_head))


class Block(nn.Module):
    """A block of nanoGPT and minGPT."""

    def __init__(self, c: ModelConfig, bias: bool, mask: bool, gelu: str):
        super().__init__()
        self.gelu = gelu
        self.ln_1 = Norm(c.n_embd, bias)
        self.attn = Fused(c, bias, mask)
        self.ln_2 = Norm(c.n_embd, bias)
        linear = {"c_fc": nn.Linear(c.n_embd, 4 * c.n_embd, bias), "c_proj": nn.Linear(4 * c.n_embd, c.n_embd, bias)}
        self.mlp = nn.ModuleDict(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.gelu))


class NanoGPT(nn.Module):
    """nanoGPT's names: tied, erf GELU, all biases or none. With ``minGPT`` its: untied, tanh GELU, a mask a block."""

    def __init__(self, c: ModelConfig, bias: bool = True, mask: bool = False, mingpt: bool = False):
        super().__init__()
        gelu = "tanh" if mingpt else "none"
        wte = nn.Embedding(c.vocab_size, c.n_embd)
        embeddings = {"wte": wte, "wpe": nn.Embedding(c.block_size, c.n_embd)}
        blocks = nn.ModuleList(Block(c, bias, mask or mingpt, gelu) for _ in range(c.n_layer))
        self.transformer = nn.ModuleDict(embeddings | {"h": blocks, "ln_f": Norm(c.n_embd, bias)})
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if not mingpt:
            self.lm_head.weight = wte.weight
        scramble(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts: Any = self.transformer
        x = parts["wte"](tokens) + parts["wpe"].weight[: tokens.shape[1]]
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))

    def optimizer(self, lr: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
        """nanoGPT's two groups."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas)


class Apart(nn.Module):
    """GPTModel's attention."""

    def __init__(self, c: ModelConfig, bias: bool):
        super().__init__()
        self.n_head = c.n_head
        self.W_query, self.W_key, self.W_value = (nn.Linear(c.n_embd, c.n_embd, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(c.n_embd, c.n_embd)
        self.register_buffer("mask", torch.ones(c.block_size, c.block_size).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(attend(self.W_query(x), self.W_key(x), self.W_value(x), self.n_head))


class Forward(nn.Module):
    """GPTModel's MLP."""

    def __init__(self, width: int):
        super().__init__()
        tanh = nn.GELU(approximate="tanh")
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), tanh, nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class BookBlock(nn.Module):
    """GPTModel's block."""

    def __init__(self, c: ModelConfig, bias: bool):
        super().__init__()
        self.att, self.ff = Apart(c, bias), Forward(c.n_embd)
        self.norm1, self.norm2 = (Norm(c.n_embd, True, ("scale", "shift")) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class GPTModel(nn.Module):
    """GPTModel's names."""

    def __init__(self, c: ModelConfig, bias: bool = False):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.trf_blocks = nn.Sequential(*(BookBlock(c, bias) for _ in range(c.n_layer)))
        self.final_norm = Norm(c.n_embd, True, ("scale", "shift"))
        self.out_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        scramble(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_emb(tokens) + self.pos_emb.weight[: tokens.shape[1]]
        return self.out_head(self.final_norm(self.trf_blocks(x)))


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Weights at which every tensor matters: N(0, 0.1^2), around 1 for the scales of norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1)
            if p.dim() == 1 and name.endswith(("scale", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                p.add_(1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, clip: float = 1.0) -> list[float]:
    """The loss of each (tokens, targets) before its update."""
    losses = []
    for tokens, targets in batches:
        logits = model(torch.from_numpy(tokens).long())
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses
