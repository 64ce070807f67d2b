"""An animal's weights: drawn as plain matrices [out, in] by our names, then laid out as the animal has them."""

import ml_dtypes
import numpy as np

from zoo.choices import Spec
from zoo.names import STYLES, name

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def plain(spec: Spec) -> dict[str, np.ndarray]:
    """Float32 weights by our names, rotary pairs as halves; so large that each choice shows in the logits."""
    dice = np.random.default_rng(spec.seed + 1000)
    made: dict[str, np.ndarray] = {}
    C, D, H, K, F, V = spec.C, spec.D, spec.H, spec.K, spec.F, spec.V
    sharp = (1.5 / (spec.multiplier * D**0.5)) ** 0.5  # scores spread by about 1.5

    def draw(key: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        drawn = (mean + std * dice.standard_normal(shape)).astype(DTYPES[spec.dtype])
        made[key] = drawn.astype(np.float32)

    def linear(key: str, n_out: int, n_in: int, bias: bool, gain: float = 1.0) -> None:
        draw(f"{key}.weight", (n_out, n_in), gain / n_in**0.5)
        if bias:
            draw(f"{key}.bias", (n_out,), 0.2)

    def norm(key: str, size: int = C, gain: float = 1.0, bias: bool = True) -> None:
        if "bare" not in spec.norm:
            draw(f"{key}.weight", (size,), 0.25 * gain, gain - 1 if spec.norm == "rms1" else gain)
        if bias and spec.norm == "layer":
            draw(f"{key}.bias", (size,), 0.2)

    draw("wte.weight", (V, C), 0.15 if spec.embed == "sqrt(C)" else 0.7)
    if spec.position == "learned":
        draw("wpe.weight", (spec.P, C), 0.4)
    if spec.embed_norm:
        norm("ln_e")
    for n in range(spec.L):
        norm(f"h.{n}.ln_1")
        linear(f"h.{n}.attn.q_proj", H * D, C, spec.biased("q"), sharp)
        linear(f"h.{n}.attn.k_proj", K * D, C, spec.biased("k"), sharp)
        linear(f"h.{n}.attn.v_proj", K * D, C, spec.biased("v"))
        if spec.qk_norm == "head":
            norm(f"h.{n}.attn.q_norm", D, sharp, False)
            norm(f"h.{n}.attn.k_norm", D, sharp, False)
        linear(f"h.{n}.attn.c_proj", C, H * D, spec.biased("o"))
        if spec.placement == "sandwich":
            norm(f"h.{n}.ln_1_post")
        if spec.placement != "parallel":
            norm(f"h.{n}.ln_2")
        if spec.mlp != "plain":
            linear(f"h.{n}.mlp.c_gate", F, C, spec.biased("up"))
        linear(f"h.{n}.mlp.c_fc", F, C, spec.biased("up"))
        linear(f"h.{n}.mlp.c_proj", C, F, spec.biased("down"))
        if spec.placement == "sandwich":
            norm(f"h.{n}.ln_2_post")
    if spec.final:
        norm("ln_f")
    if spec.tie.startswith("untied"):
        linear("lm_head", V, C, spec.tie == "untied bias", 3.0)
    return made


def order(spec: Spec) -> np.ndarray:
    """Which row of ours each row of theirs is, within a head of q or k."""
    turned, half = spec.rotated, spec.rotated // 2
    rows = np.arange(spec.D)
    if "reversed" in spec.position:
        rows[:turned] = np.roll(rows[:turned], half)
    if "pairs" in spec.position and turned:
        rows[:turned] = rows[:turned].reshape(2, half).T.reshape(-1)
    return rows


def laid_out(spec: Spec) -> dict[str, np.ndarray]:
    """The animal's own state dict, in the order of its modules; buffers are not among it."""
    ours = plain(spec)
    made: dict[str, np.ndarray] = {}
    D, C = spec.D, spec.C

    def heads(key: str, n: int, leaf: str) -> np.ndarray | None:
        """q, k or v of a block as (heads, D, C) or (heads, D), in their order of rows."""
        array = ours.get(f"h.{n}.attn.{key}_proj.{leaf}")
        if array is None:
            return None
        array = array.reshape(-1, D, *array.shape[1:])
        return array if key == "v" else array[:, order(spec)]

    def lies(array: np.ndarray) -> np.ndarray:
        """A matrix [out, in] as this animal keeps matrices."""
        if array.ndim == 1 or spec.matrix == "out in":
            return array
        return array.T[None] if spec.style == "tf" and not spec.stacked else array.T

    def put(role: str, leaf: str, n: int, array: np.ndarray | None, h: int = 0) -> None:
        if array is not None:
            made[f"{name(spec, role, leaf, n, h)}|{n}" if spec.stacked else name(spec, role, leaf, n, h)] = array

    def pair(role: str, key: str, n: int = 0) -> None:
        for leaf, long in (("w", "weight"), ("b", "bias")):
            if (array := ours.get(f"{key}.{long}")) is not None:
                put(role, leaf, n, lies(array))

    def top(role: str, key: str, array: np.ndarray | None = None) -> None:
        for leaf, long in (("w", "weight"), ("b", "bias")):
            found = ours.get(f"{key}.{long}") if array is None else array if leaf == "w" else None
            if found is not None:
                made[name(spec, role, leaf)] = found

    top("tok", "wte")
    if spec.position == "learned":
        top("pos", "wpe", ours["wpe.weight"][None] if spec.style == "camel" else None)
    top("enorm", "ln_e")
    for n in range(spec.L):
        pair("ln1", f"h.{n}.ln_1", n)
        for leaf in "wb":
            long = "weight" if leaf == "w" else "bias"
            q, k, v = (heads(key, n, long) for key in "qkv")
            _attention(spec, leaf, n, q, k, v, put, lies)
            o = ours.get(f"h.{n}.attn.c_proj.{long}")
            if leaf == "w" and spec.qkv == "einsum":
                assert o is not None
                split = o.reshape(C, spec.H, D)
                o = split if spec.matrix == "out in" and spec.style != "lens" else split.transpose(1, 2, 0)
                put("o", leaf, n, o)
            elif o is not None:
                put("o", leaf, n, lies(o))
        if spec.qk_norm == "head":
            for role, key in (("qn", "q_norm"), ("kn", "k_norm")):
                weight = ours.get(f"h.{n}.attn.{key}.weight")
                put(role, "w", n, None if weight is None else weight[order(spec)])
        pair("ln1p", f"h.{n}.ln_1_post", n)
        pair("ln2", f"h.{n}.ln_2", n)
        if spec.mlp in ("gate up", "up gate"):
            for leaf, long in (("w", "weight"), ("b", "bias")):
                halves = [ours.get(f"h.{n}.mlp.{key}.{long}") for key in ("c_gate", "c_fc")]
                halves = [half for half in halves if half is not None]
                if halves:
                    put("gateup", leaf, n, lies(np.concatenate(halves if spec.mlp == "gate up" else halves[::-1])))
        else:
            pair("gate", f"h.{n}.mlp.c_gate", n)
            pair("up", f"h.{n}.mlp.c_fc", n)
        pair("down", f"h.{n}.mlp.c_proj", n)
        pair("ln2p", f"h.{n}.ln_2_post", n)
    top("final", "ln_f")
    if spec.tie == "tied copy":
        made[name(spec, "head", "w")] = ours["wte.weight"]
    elif spec.tie != "tied":
        made[name(spec, "head", "w")] = lies(ours["lm_head.weight"])
        if spec.tie == "untied bias":
            made[name(spec, "head", "b")] = ours["lm_head.bias"]
    if spec.stacked:
        made = _stacked(made)
    return {key: np.ascontiguousarray(array).astype(DTYPES[spec.dtype]) for key, array in made.items()}


def _attention(spec: Spec, leaf: str, n: int, q, k, v, put, lies) -> None:
    """q, k and v of a block, each (heads, D, C), (heads, D) or None, as the animal keeps them."""

    def flat(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])

    kind = spec.qkv
    if kind == "einsum":
        for role, array in zip("qkv", (q, k, v), strict=True):
            if array is not None and leaf == "w":
                moved = (0, 2, 1) if spec.style == "lens" else (0, 1, 2) if spec.matrix == "out in" else (2, 0, 1)
                array = array.transpose(moved)
            put(role, leaf, n, array)
    elif kind == "apart":
        for role, array in zip("qkv", (q, k, v), strict=True):
            put(role, leaf, n, None if array is None else lies(flat(array)))
    elif kind == "head list":
        for h in range(spec.H):
            for role, array in zip("qkv", (q, k, v), strict=True):
                put(f"h{role}", leaf, n, None if array is None else lies(array[h]), h)
    elif q is None:
        return
    elif kind == "q, k v":
        put("q", leaf, n, lies(flat(q)))
        put("kv", leaf, n, lies(flat(k, v)))
    elif kind in ("by head", "by group"):
        groups = [part.reshape(spec.K, -1, *part.shape[1:]) for part in (q, k, v)]
        joined = np.concatenate(groups, axis=1)  # (K, H / K + 2, D, C)
        put("qkv", leaf, n, lies(joined.reshape(-1, *joined.shape[3:])))
    else:
        put("qkv", leaf, n, lies(flat(k, q, v) if kind == "k q v" else flat(q, k, v)))


def _stacked(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of all blocks as one each."""
    joined: dict[str, list[np.ndarray]] = {}
    for key, array in made.items():
        joined.setdefault(key.split("|")[0], []).append(array)
    return {key: np.stack(arrays) if f"{key}|0" in made else arrays[0] for key, arrays in joined.items()}


def angles(spec: Spec, length: int) -> np.ndarray:
    """(length, rotated / 2): by how much each pair of a head is turned at each position."""
    half = spec.rotated // 2
    return np.outer(np.arange(length), spec.theta ** (-np.arange(half) / half))


def buffers(spec: Spec) -> dict[str, np.ndarray]:
    """What is no weight and lies in the file all the same."""
    if not spec.buffers:
        return {}
    P, made = spec.P, {}
    lower = np.tril(np.ones((P, P)))
    upper = np.where(lower > 0, 0, -np.inf).astype(np.float32)
    block, within = STYLES[spec.style]["block"], STYLES[spec.style]["o"]
    sep = "/" if "/" in block else "."
    within = within.rsplit(sep, 1)[0] if sep in within else "attn"
    masks = {"snake": ("causal_mask", lower.astype(bool)[None, None]), "course": ("tril", lower.astype(np.float32)),
             "meta": ("mask", upper[None, None]), "camel": ("causalMask", lower.astype(np.int64)),
             "opaque": ("mask", upper < 0), "lens": ("mask", lower.astype(bool))}  # fmt: skip
    label, mask = masks.get(spec.style, ("mask", lower.astype(np.float32)))
    for n in range(1 if spec.stacked else spec.L):
        place = block.format(n=n)
        if spec.stacked:
            place = block.replace(".{n}", "").replace("_{n}", "").replace("{n}", "")
        if spec.style == "course" and spec.qkv == "head list":
            made |= {f"{place}sa.heads.{h}.tril": mask for h in range(spec.H)}
        else:
            made[f"{place}{within}{sep}{label}"] = mask
        if spec.style == "lens":
            made[f"{place}attn.IGNORE"] = np.array(-1e5, np.float32)
        if spec.style == "hub" and spec.rotated:
            made[f"{place}self_attn.rotary_emb.inv_freq"] = angles(spec, 2)[1].astype(np.float32)
    if spec.rotated and spec.style in ("meta", "course", "snake"):
        made["freqs_cos"], made["freqs_sin"] = (f(angles(spec, P)).astype(np.float32) for f in (np.cos, np.sin))
    if spec.position.startswith("sin"):
        table = sinusoid(spec, P).astype(np.float32)
        made["pos_encoder.pe"] = table[:, None] if spec.style == "encoder" else table[None]
    if spec.style in ("camel", "hub"):
        made["position_ids"] = np.arange(P, dtype=np.int64)[None]
    return made


def sinusoid(spec: Spec, length: int) -> np.ndarray:
    """(length, C) in float64: the fixed table that is added to the embeddings."""
    half = spec.C // 2
    steps = half - 1 if spec.position == "sin span" else half
    turned = np.outer(np.arange(length), 1e4 ** (-np.arange(half) / steps))
    table = np.concatenate([np.sin(turned), np.cos(turned)], axis=1)
    return table.reshape(length, 2, half).transpose(0, 2, 1).reshape(length, -1) if "pairs" in spec.position else table
