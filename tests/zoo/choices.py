"""What an animal is: one value of each choice, and a list of animals in which every pair of values meets."""

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

VALUES: dict[str, tuple] = {
    "norm": ("layer", "layer no bias", "layer bare", "rms", "rms bare", "rms1"),
    "eps": (1e-5, 1e-6, 1e-8),
    "placement": ("pre", "post_add", "post", "parallel", "parallel2", "sandwich"),
    "final": (True, False),
    "act": ("gelu_tanh", "gelu", "relu", "relu2", "silu"),
    "mlp": ("plain", "gate, up", "gate up", "up gate"),  # gated: two matrices, or one with its halves in this order
    "position": ("learned", "halves", "pairs", "halves reversed", "partial halves", "sin pairs", "sin halves",
                 "sin span", "alibi", "none"),
    "theta": (1e4, 5e5),
    "scale": ("1/sqrt(D)", "1/sqrt(C)", "1", "1/D"),
    "heads": ("all", "grouped", "one"),
    "qkv": ("apart", "q k v", "k q v", "by head", "by group", "q, k v", "head list", "einsum", "in_proj"),
    "matrix": ("out in", "in out"),
    "stacked": (False, True),
    "tie": ("tied", "tied copy", "untied", "untied bias"),
    "bias": ("all", "none", "qkv only", "not k", "not qkv", "mlp only"),
    "embed": ("1", "sqrt(C)"),
    "logits": ("plain", "scaled", "capped"),
    "embed_norm": (False, True),
    "qk_norm": ("none", "head"),
    "sizes": ("square", "wide heads", "odd"),
    "framework": ("torch", "mlx", "numpy"),
    "file": ("pt", "pt nested", "pth wrapped", "bin", "safetensors", "npz"),
    "dtype": ("float32", "float16", "bfloat16"),
    "buffers": (False, True),
}  # fmt: skip
"""Choice -> its values."""

STYLES = {"torch": ("snake", "course", "meta", "camel", "opaque", "lens", "encoder"), "mlx": ("mlx", "brief", "hub"),
          "numpy": ("flax", "terse", "tf")}  # fmt: skip
"""Framework -> the naming styles of its animals, of names.STYLES."""
EXTRA = ({"position": "pairs reversed"}, {"position": "partial pairs"},
         {"position": "partial pairs", "framework": "mlx", "file": "npz"})  # fmt: skip
"""Rarer values, once."""
ROTARY = ("halves", "pairs", "halves reversed", "pairs reversed", "partial halves", "partial pairs")


@dataclass(frozen=True)
class Spec:
    """One animal: a value of each of VALUES, how it names things, and a seed."""

    norm: str = "layer"
    eps: float = 1e-5
    placement: str = "pre"
    final: bool = True
    act: str = "gelu_tanh"
    mlp: str = "plain"
    position: str = "learned"
    theta: float = 1e4
    scale: str = "1/sqrt(D)"
    heads: str = "all"
    qkv: str = "apart"
    matrix: str = "out in"
    stacked: bool = False
    tie: str = "untied"
    bias: str = "all"
    embed: str = "1"
    logits: str = "plain"
    embed_norm: bool = False
    qk_norm: str = "none"
    sizes: str = "square"
    framework: str = "torch"
    file: str = "pt"
    dtype: str = "float32"
    buffers: bool = False
    style: str = "snake"
    seed: int = 0

    @property
    def L(self) -> int:
        """Blocks."""
        return {"square": 2, "wide heads": 3, "odd": 5 if self.seed % 4 == 0 else 2}[self.sizes]

    @property
    def C(self) -> int:
        """Width."""
        return {"square": 32, "wide heads": 40, "odd": 36}[self.sizes]

    @property
    def H(self) -> int:
        """Query heads."""
        return {"square": 4, "wide heads": 4, "odd": 3 if self.heads == "all" else 6}[self.sizes]

    @property
    def K(self) -> int:
        """Key and value heads."""
        return {"all": self.H, "grouped": self.H // 2, "one": 1}[self.heads]

    @property
    def D(self) -> int:
        """Dimensions of a head."""
        return {"square": 8, "wide heads": 16, "odd": self.C // self.H}[self.sizes]

    @property
    def F(self) -> int:
        """Hidden size of the MLP."""
        return {"square": 128, "wide heads": 72, "odd": 90}[self.sizes]

    @property
    def V(self) -> int:
        """Vocabulary."""
        return {"square": 50, "wide heads": 61, "odd": 97}[self.sizes]

    @property
    def P(self) -> int:
        """Longest context."""
        return {"square": 128, "wide heads": 150, "odd": 131}[self.sizes]

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are turned."""
        partial = {"square": 4, "wide heads": 8, "odd": 4 if self.D == 12 else 2}[self.sizes]
        return 0 if self.position not in ROTARY else partial if "partial" in self.position else self.D

    @property
    def multiplier(self) -> float:
        """Of attention scores."""
        return {"1/sqrt(D)": self.D**-0.5, "1/sqrt(C)": self.C**-0.5, "1": 1.0, "1/D": 1 / self.D}[self.scale]

    @property
    def waves(self) -> float:
        """Of sinusoidal positions; that of nn.SinusoidalPositionalEncoding in MLX."""
        return (2 / self.C) ** 0.5 if self.framework == "mlx" and self.position == "sin span" else 1.0

    @property
    def name(self) -> str:
        """What tests call it."""
        return f"{self.seed:03d}-{self.framework}-{self.style}"

    def biased(self, what: str) -> bool:
        """Whether a projection (q k v o up down) has a bias."""
        if what in "qkv":
            return self.bias in ("all", "qkv only") or (self.bias == "not k" and what != "k")
        if what == "o":
            return self.bias in ("all", "not k", "not qkv")
        return self.bias in ("all", "not k", "not qkv", "mlp only")


def sensible(pair: dict[str, Any]) -> bool:
    """Whether somebody would write a model with these values of two choices."""

    def has(**wanted: Any) -> bool:
        return all(
            name in pair and (pair[name] in value if isinstance(value, tuple) else pair[name] == value)
            for name, value in wanted.items()
        )

    return not (
        has(qkv=("by head", "head list", "in_proj"), heads=("grouped", "one"))
        or has(qkv="by group", heads="all")
        or has(qkv="in_proj", matrix="in out")
        or has(qkv="in_proj", stacked=True)
        or has(qkv="in_proj", sizes="wide heads")
        or has(qkv="in_proj", framework=("mlx", "numpy"))
        or has(qkv="in_proj", bias=("not k", "qkv only", "not qkv"))
        or has(qkv="in_proj", qk_norm="head")
        or has(qkv="head list", stacked=True)
        or has(bias="not k", qkv=("q k v", "k q v", "by head", "by group", "q, k v"))
        or has(theta=5e5, position=("learned", "sin pairs", "sin halves", "sin span", "alibi", "none"))
        or has(qk_norm="head", norm=("layer", "layer no bias", "layer bare"))
        or has(file="npz", framework="torch")
        or has(file=("pt", "pt nested", "pth wrapped", "bin"), framework=("mlx", "numpy"))
        or has(file="npz", dtype="bfloat16")
        or has(placement="post_add", norm="rms1")
    )


IDS = [(name, value) for name, values in VALUES.items() for value in values]
"""Every value of every choice; its place here is its number."""


@cache
def together() -> np.ndarray:
    """(values, values): whether two values of different choices may meet, some value of each other choice with them."""
    fits = np.array([[a != b and sensible({a: x, b: y}) for b, y in IDS] for a, x in IDS])
    whole = fits.copy()
    for choice in VALUES:
        of_it = np.array([name == choice for name, _ in IDS])
        common = fits[:, of_it].astype(int) @ fits[of_it] > 0
        whole &= common | of_it[:, None] | of_it
    return whole


def animals() -> list[Spec]:
    """The zoo: greedy, a row at a time, each the best of some random ones at the pairs that are still missing."""
    fits, dice, made = together(), random.Random(14), []
    missing = fits.copy()
    groups = {choice: [n for n, (name, _) in enumerate(IDS) if name == choice] for choice in VALUES}
    while missing.any():
        tries = []
        n, m = np.argwhere(missing)[0]
        for _ in range(4):
            row = [n, m]
            rest = [choice for choice in VALUES if choice not in (IDS[n][0], IDS[m][0])]
            dice.shuffle(rest)
            for choice in rest:
                allowed = [v for v in groups[choice] if fits[v, row].all()]
                if not allowed:
                    break
                gains = [int(missing[v, row].sum()) for v in allowed]
                row.append(dice.choice([v for v, gain in zip(allowed, gains, strict=True) if gain == max(gains)]))
            else:
                tries.append((int(missing[np.ix_(row, row)].sum()), row))
        assert tries, f"nothing has {IDS[n]} and {IDS[m]}"
        row = max(tries)[1]
        missing[np.ix_(row, row)] = False
        made.append(dict(IDS[v] for v in row))
    made += [{**made[n], "theta": 1e4, **extra} for n, extra in enumerate(EXTRA)]
    styles = [STYLES[row["framework"]] for row in made]
    return [Spec(**row, seed=n, style=styles[n][n % len(styles[n])]) for n, row in enumerate(made)]
