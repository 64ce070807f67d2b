"""An animal that somebody wrote as functions of numpy arrays in a dict."""

import math

import numpy as np

from zoo.choices import Spec
from zoo.names import name


def gelu(x: np.ndarray, tanh: bool) -> np.ndarray:
    """x times the normal distribution function, or its approximation."""
    if tanh:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS = {
    "gelu_tanh": lambda x: gelu(x, True),
    "gelu": lambda x: gelu(x, False),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def forward(spec: Spec, params: dict[str, np.ndarray], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) of ids (T,), and the residual stream before the first block and after each, (L + 1, T, C)."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    T = len(ids)
    H, K, D = spec.H, spec.K, spec.D

    def get(role: str, leaf: str, n: int = 0, h: int = 0) -> np.ndarray | None:
        found = p.get(name(spec, role, leaf, n, h))
        inside = role not in ("tok", "pos", "enorm", "final", "head")
        return found if found is None or not (spec.stacked and inside) else found[n]

    def matmul(x: np.ndarray, role: str, n: int = 0, h: int = 0) -> np.ndarray:
        w, b = get(role, "w", n, h), get(role, "b", n, h)
        assert w is not None
        w = w.reshape(w.shape[-2:])
        y = x @ (w if spec.matrix == "in out" else w.T)
        return y if b is None else y + b

    def norm(x: np.ndarray, role: str, n: int = 0) -> np.ndarray:
        if spec.norm.startswith("layer"):
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.eps)
        g, b = get(role, "w", n), get(role, "b", n)
        if g is not None:
            y = y * (1 + g if spec.norm == "rms1" else g)
        return y if b is None else y + b

    def split(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q (H, T, D), k and v (K, T, D)."""

        def cut(y: np.ndarray) -> np.ndarray:
            return y.reshape(T, -1, D).transpose(1, 0, 2)

        if spec.qkv == "einsum":
            parts = []
            for role in "qkv":
                w, b = get(role, "w", n), get(role, "b", n)
                assert w is not None
                y = np.einsum("tc,hdc->htd" if spec.matrix == "out in" else "tc,chd->htd", x, w)
                parts.append(y if b is None else y + b[:, None])
            return tuple(parts)
        if spec.qkv == "head list":
            q, k, v = (np.stack([matmul(x, f"h{role}", n, h) for h in range(H)]) for role in "qkv")
            return q, k, v
        if spec.qkv == "apart":
            return cut(matmul(x, "q", n)), cut(matmul(x, "k", n)), cut(matmul(x, "v", n))
        if spec.qkv == "q, k v":
            k, v = np.split(matmul(x, "kv", n), 2, axis=-1)
            return cut(matmul(x, "q", n)), cut(k), cut(v)
        y = matmul(x, "qkv", n)
        if spec.qkv in ("by head", "by group"):
            y = y.reshape(T, K, H // K + 2, D)
            q = y[:, :, :-2].reshape(T, H, D)
            return q.transpose(1, 0, 2), y[:, :, -2].transpose(1, 0, 2), y[:, :, -1].transpose(1, 0, 2)
        if spec.qkv == "k q v":
            k, q, v = np.split(y, [K * D, (K + H) * D], axis=-1)
        else:
            q, k, v = np.split(y, [H * D, (H + K) * D], axis=-1)
        return cut(q), cut(k), cut(v)

    def turn(x: np.ndarray) -> np.ndarray:
        """Rotary positions of x (heads, T, D)."""
        R = spec.rotated
        if not R:
            return x
        x, rest = x[..., :R], x[..., R:]
        angle = np.outer(np.arange(T), spec.theta ** (-np.arange(0, R, 2) / R))
        cos, sin = np.cos(angle), np.sin(angle) * (-1 if "reversed" in spec.position else 1)
        if "pairs" in spec.position:
            a, b = x[..., 0::2], x[..., 1::2]
            y = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
        else:
            a, b = x[..., : R // 2], x[..., R // 2 :]
            y = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        return np.concatenate([y, rest], axis=-1)

    def attention(x: np.ndarray, n: int) -> np.ndarray:
        q, k, v = split(x, n)
        if spec.qk_norm == "head":
            q, k = norm(q, "qn", n), norm(k, "kn", n)
        q, k = turn(q), turn(k)
        k, v = np.repeat(k, H // K, axis=0), np.repeat(v, H // K, axis=0)
        scores = np.einsum("hqd,hkd->hqk", q, k) * spec.multiplier
        if spec.position == "alibi":
            far = np.arange(T)[None, :] - np.arange(T)[:, None]
            scores = scores + np.array(slopes(H))[:, None, None] * far
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        y = np.einsum("hqk,hkd->qhd", softmax(scores), v)
        if spec.qkv == "einsum":
            w, b = get("o", "w", n), get("o", "b", n)
            assert w is not None
            y = np.einsum("qhd,chd->qc" if spec.matrix == "out in" else "qhd,hdc->qc", y, w)
            return y if b is None else y + b
        return matmul(y.reshape(T, -1), "o", n)

    def mlp(x: np.ndarray, n: int) -> np.ndarray:
        act = ACTIVATIONS[spec.act]
        if spec.mlp == "plain":
            return matmul(act(matmul(x, "up", n)), "down", n)
        if spec.mlp == "gate, up":
            return matmul(act(matmul(x, "gate", n)) * matmul(x, "up", n), "down", n)
        gate, up = np.split(matmul(x, "gateup", n), 2, axis=-1)[:: 1 if spec.mlp == "gate up" else -1]
        return matmul(act(gate) * up, "down", n)

    table = get("tok", "w")
    assert table is not None
    x = table[ids] * (math.sqrt(spec.C) if spec.embed == "sqrt(C)" else 1)
    if spec.position == "learned":
        x = x + p[name(spec, "pos", "w")].reshape(-1, spec.C)[:T]
    elif spec.position.startswith("sin"):
        x = x + _waves(spec, T) * spec.waves
    if spec.embed_norm:
        x = norm(x, "enorm")
    stream = [x]
    for n in range(spec.L):
        if spec.placement == "post_add":
            x = norm(x + attention(x, n), "ln1", n)
            x = norm(x + mlp(x, n), "ln2", n)
        elif spec.placement == "post":
            x = x + norm(attention(x, n), "ln1", n)
            x = x + norm(mlp(x, n), "ln2", n)
        elif spec.placement == "sandwich":
            x = x + norm(attention(norm(x, "ln1", n), n), "ln1p", n)
            x = x + norm(mlp(norm(x, "ln2", n), n), "ln2p", n)
        elif spec.placement == "pre":
            x = x + attention(norm(x, "ln1", n), n)
            x = x + mlp(norm(x, "ln2", n), n)
        else:
            y = norm(x, "ln1", n)
            x = x + attention(y, n) + mlp(y if spec.placement == "parallel" else norm(x, "ln2", n), n)
        stream.append(x)
    if spec.final:
        x = norm(x, "final")
    if spec.tie.startswith("tied"):
        logits = x @ table.T
    else:
        w, b = get("head", "w"), get("head", "b")
        assert w is not None
        w = w.reshape(w.shape[-2:])
        logits = x @ (w if spec.matrix == "in out" else w.T) + (0 if b is None else b)
    if spec.logits == "scaled":
        logits = logits * spec.C**-0.5
    elif spec.logits == "capped":
        logits = 15 * np.tanh(logits / 15)
    return logits.astype(np.float32), np.stack(stream).astype(np.float32)


def _waves(spec: Spec, T: int) -> np.ndarray:
    """Sines and cosines of the position."""
    half = spec.C // 2
    rates = [1e4 ** (-i / (half - (spec.position == "sin span"))) for i in range(half)]
    table = np.zeros((T, spec.C))
    for i, rate in enumerate(rates):
        a, b = (2 * i, 2 * i + 1) if spec.position == "sin pairs" else (i, half + i)
        table[:, a], table[:, b] = np.sin(np.arange(T) * rate), np.cos(np.arange(T) * rate)
    return table


def slopes(heads: int) -> list[float]:
    """ALiBi's, as Press et al. give them for any number of heads."""
    below = 2 ** math.floor(math.log2(heads))
    made = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    more = [2 ** (-4 * (i + 1) / below) for i in range(0, 2 * (heads - below), 2)]
    return made + more
