"""An animal as nn.Modules, somebody else's: names as the style has them, layers that do what the choices say."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from zoo.choices import Spec
from zoo.in_numpy import slopes
from zoo.names import name


class Tree(nn.Module):
    """Parameters and buffers under dotted names; what a model of nested modules looks like from its state dict."""

    def put(self, path: str, value: torch.Tensor, buffer: bool = False) -> None:
        """Registers ``value`` as path's last part, in modules for the parts before it."""
        *parts, last = path.split(".")
        at: nn.Module = self
        for part in parts:
            if part not in at._modules:
                at.add_module(part, Tree())
            at = at._modules[part]  # type: ignore[assignment]
        if buffer:
            at.register_buffer(last, value)
        else:
            at.register_parameter(last, nn.Parameter(value, requires_grad=False))


class Home(Tree):
    """The model; built empty from names, shapes and dtypes, it loads its state dict with ``strict``."""

    def __init__(self, spec: Spec, state: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]):
        super().__init__()
        self.spec = spec
        for path, value in state.items():
            self.put(path, torch.zeros_like(value))
        for path, value in buffers.items():
            self.put(path, value, buffer=True)

    def got(self, role: str, leaf: str, n: int = 0, h: int = 0) -> torch.Tensor | None:
        """The tensor, in float32, or None."""
        at: object = self
        for part in name(self.spec, role, leaf, n, h).split("."):
            inner = at._modules if isinstance(at, nn.Module) else {}
            at = inner[part] if part in inner else at._parameters.get(part) if isinstance(at, nn.Module) else None
        if not isinstance(at, torch.Tensor):
            return None
        inside = role not in ("tok", "pos", "enorm", "final", "head")
        return (at[n] if self.spec.stacked and inside else at).float()

    def lin(self, x: torch.Tensor, role: str, n: int = 0, h: int = 0) -> torch.Tensor:
        """A linear layer of this model."""
        w = self.got(role, "w", n, h)
        assert w is not None
        return F.linear(x, w.t() if self.spec.matrix == "in out" else w, self.got(role, "b", n, h))

    def normed(self, x: torch.Tensor, role: str, n: int = 0) -> torch.Tensor:
        """A norm of this model, over the last axis."""
        w, b, size = self.got(role, "w", n), self.got(role, "b", n), x.shape[-1:]
        if self.spec.norm.startswith("layer"):
            return F.layer_norm(x, size, w, b, self.spec.eps)
        if self.spec.norm == "rms1":
            assert w is not None
            w = 1.0 + w
        return F.rms_norm(x, size, w, self.spec.eps)

    def qkv(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, H, T, D), k and v (B, K, T, D)."""
        s = self.spec
        B, T, _ = x.shape
        if s.qkv == "einsum":
            rule = (
                "bte,hed->bhtd" if s.style == "lens" else "bte,hde->bhtd" if s.matrix == "out in" else "bte,ehd->bhtd"
            )
            made = []
            for role in "qkv":
                w, b = self.got(role, "w", n), self.got(role, "b", n)
                assert w is not None
                y = torch.einsum(rule, x, w)
                made.append(y if b is None else y + b.unsqueeze(1))
            return made[0], made[1], made[2]
        if s.qkv == "head list":
            q, k, v = (torch.stack([self.lin(x, f"h{r}", n, h) for h in range(s.H)], dim=1) for r in "qkv")
            return q, k, v
        if s.qkv == "apart":
            q, k, v = self.lin(x, "q", n), self.lin(x, "k", n), self.lin(x, "v", n)
        elif s.qkv == "q, k v":
            q, (k, v) = self.lin(x, "q", n), self.lin(x, "kv", n).chunk(2, dim=-1)
        elif s.qkv in ("by head", "by group"):
            y = self.lin(x, "qkv", n).view(B, T, s.K, s.H // s.K + 2, s.D)
            q, k, v = y[..., :-2, :].flatten(2), y[..., -2, :].flatten(2), y[..., -1, :].flatten(2)
        elif s.qkv == "k q v":
            k, q, v = self.lin(x, "qkv", n).split([s.K * s.D, s.H * s.D, s.K * s.D], dim=-1)
        else:
            q, k, v = self.lin(x, "qkv", n).split([s.H * s.D, s.K * s.D, s.K * s.D], dim=-1)
        return tuple(y.view(B, T, -1, s.D).transpose(1, 2) for y in (q, k, v))  # type: ignore[return-value]

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """As Meta's code does it for pairs (complex numbers), as Hugging Face's for halves."""
        s, R, T = self.spec, self.spec.rotated, x.shape[-2]
        turned, rest = x[..., :R].double(), x[..., R:]
        angle = torch.outer(torch.arange(T).double(), 1.0 / s.theta ** (torch.arange(0, R, 2).double() / R))
        if "reversed" in s.position:
            angle = -angle
        if "pairs" in s.position:
            z = torch.view_as_complex(turned.reshape(*turned.shape[:-1], -1, 2).contiguous())
            y = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        else:
            both = torch.cat([angle, angle], dim=-1)
            a, b = turned.chunk(2, dim=-1)
            y = turned * both.cos() + torch.cat([-b, a], dim=-1) * both.sin()
        return torch.cat([y.to(x.dtype), rest], dim=-1)

    def attend(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """Causal attention of block n."""
        s = self.spec
        B, T, _ = x.shape
        q, k, v = self.qkv(x, n)
        if s.qk_norm == "head":
            q, k = self.normed(q, "qn", n), self.normed(k, "kn", n)
        if s.rotated:
            q, k = self.rope(q), self.rope(k)
        k, v = (y.repeat_interleave(s.H // s.K, dim=1) for y in (k, v))
        mask = torch.full((T, T), -torch.inf).triu(1)
        if s.position == "alibi":
            mask = (
                mask - torch.tensor(slopes(s.H)).view(-1, 1, 1) * (torch.arange(T).view(-1, 1) - torch.arange(T)).abs()
            )
        y = ((q @ k.transpose(-2, -1)) * s.multiplier + mask).softmax(-1) @ v
        if s.qkv == "einsum":
            rule = "bhtd,hde->bte" if s.style == "lens" or s.matrix == "in out" else "bhtd,ehd->bte"
            w, b = self.got("o", "w", n), self.got("o", "b", n)
            assert w is not None
            y = torch.einsum(rule, y, w)
            return y if b is None else y + b
        return self.lin(y.transpose(1, 2).reshape(B, T, -1), "o", n)

    def feed(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """The MLP of block n."""
        s = self.spec
        act = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "gelu": F.gelu, "relu": F.relu,
               "relu2": lambda y: F.relu(y).square(), "silu": F.silu}[s.act]  # fmt: skip
        if s.mlp == "plain":
            return self.lin(act(self.lin(x, "up", n)), "down", n)
        if s.mlp == "gate, up":
            gate, up = self.lin(x, "gate", n), self.lin(x, "up", n)
        else:
            gate, up = self.lin(x, "gateup", n).chunk(2, dim=-1)
            gate, up = (gate, up) if s.mlp == "gate up" else (up, gate)
        return self.lin(act(gate) * up, "down", n)

    def decoder_block(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """Block n."""
        place = self.spec.placement
        if place == "post_add":
            x = self.normed(x + self.attend(x, n), "ln1", n)
            return self.normed(x + self.feed(x, n), "ln2", n)
        if place == "post":
            x = x + self.normed(self.attend(x, n), "ln1", n)
            return x + self.normed(self.feed(x, n), "ln2", n)
        y = self.normed(x, "ln1", n)
        if place == "parallel":
            return x + self.attend(y, n) + self.feed(y, n)
        if place == "parallel2":
            return x + self.attend(y, n) + self.feed(self.normed(x, "ln2", n), n)
        y = self.attend(y, n)
        x = x + (self.normed(y, "ln1p", n) if place == "sandwich" else y)
        y = self.feed(self.normed(x, "ln2", n), n)
        return x + (self.normed(y, "ln2p", n) if place == "sandwich" else y)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) and the stream (L + 1, B, T, C)."""
        s, T = self.spec, ids.shape[1]
        table = self.got("tok", "w")
        assert table is not None
        x = F.embedding(ids, table)
        if s.embed == "sqrt(C)":
            x = x * math.sqrt(s.C)
        if s.position == "learned":
            wpe = self.got("pos", "w")
            assert wpe is not None
            x = x + wpe.view(-1, s.C)[:T]
        elif s.position.startswith("sin"):
            x = x + s.waves * self.waves(T)
        if s.embed_norm:
            x = self.normed(x, "enorm")
        stream = [x]
        for n in range(s.L):
            x = self.decoder_block(x, n)
            stream.append(x)
        if s.final:
            x = self.normed(x, "final")
        logits = F.linear(x, table) if s.tie.startswith("tied") else self.lin(x, "head")
        if s.logits == "scaled":
            logits = logits * s.C**-0.5
        if s.logits == "capped":
            logits = 15.0 * torch.tanh(logits / 15.0)
        return logits, torch.stack(stream)

    def waves(self, T: int) -> torch.Tensor:
        """(T, C), the fixed table of positions."""
        s = self.spec
        steps = s.C // 2 - (1 if s.position == "sin span" else 0)
        rates = torch.exp(torch.arange(s.C // 2).double() * (-math.log(10000.0) / steps))
        at = torch.arange(T).double().unsqueeze(1) * rates
        if s.position == "sin pairs":
            table = torch.zeros(T, s.C, dtype=torch.float64)
            table[:, 0::2], table[:, 1::2] = at.sin(), at.cos()
        else:
            table = torch.cat([at.sin(), at.cos()], dim=1)
        return table.float()


def run(spec: Spec, model: Home, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) and stream (L + 1, T, C) of ids (T,)."""
    with torch.no_grad():
        logits, stream = model(torch.from_numpy(ids.astype(np.int64))[None])
    return logits[0].numpy(), stream[:, 0].numpy()
