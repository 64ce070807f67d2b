"""What weights cannot say: the choices of a model with their options, likeliest first for the style of its names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.adopt.rules import ROPES, Choice, Option

_DIMS = (64, 32, 16, 128, 8, 48, 24, 96, 80, 12, 40, 20, 256, 4, 10, 6)
THETAS = (10000.0, 500000.0, 1000000.0, 100000.0, 50000.0, 1000.0)
_EPS = (1e-5, 1e-6, 1.1920928955078125e-07, 1e-8, 1e-12, 1e-3)
_PLAIN = {"rope_scaling": "none", "rope_factor": 1.0, "rope_low": 1.0, "rope_high": 4.0, "rope_original": 8192}
# Llama 3.1 and 3.2
_SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("none", _PLAIN),
    ("llama3, 8 times 8192", _PLAIN | {"rope_scaling": "llama3", "rope_factor": 8.0}),
    ("llama3, 32 times 8192", _PLAIN | {"rope_scaling": "llama3", "rope_factor": 32.0}),
]


@dataclass(frozen=True)
class Style:
    """What the names and tensors of a model remind of: of which choices are likeliest."""

    llama: bool = False  # gated, RMSNorm, no biases
    lecture: bool = False  # sa, ffwd, a list of heads
    encoder: bool = False  # torch's or MLX's nn.TransformerEncoder
    gpt2: bool = False
    flax: bool = False  # kernels
    nanochat: bool = False  # no norms at all
    meta: bool = False  # wq and w1: Meta's names, and the pairs of its rope
    behind: bool = False  # names of norms say that they come after a branch


def pick(name: str, values: Sequence[tuple[str, Mapping[str, Any]]], why: str = "") -> Choice:
    """A choice among fields."""
    return Choice(name, tuple(Option(label, dict(model)) for label, model in values), why)


def n_head(
    width: int, kv: int, head_dim: int, known: Mapping[str, Any], rope: bool, turned: int = 0
) -> tuple[dict[str, int], Choice | None]:
    """(fields, None) where sizes or settings say the number of heads; else the choice among divisors.

    ``width`` is n_head head_dim, ``kv`` n_kv_head head_dim; ``head_dim`` 0 where no tensor tells it;
    ``turned``: how much of a head the table of rope turns, or 0.
    """

    def fields(dim: int) -> dict[str, int]:
        return {"n_head": width // dim, "n_kv_head": kv // dim, "head_dim": dim}

    dims = [dim for dim in range(1, kv + 1) if width % dim == 0 and kv % dim == 0 and (width // dim) % (kv // dim) == 0]
    if head_dim:
        return fields(head_dim), None
    said = known.get("n_head")
    dims = [dim for dim in dims if not rope or dim % 2 == 0] or dims
    if said and width % said == 0 and width // said in dims:
        return fields(width // said), None
    if kv < width and (groups := known.get("n_kv_head")) and kv % groups == 0 and kv // groups in dims:
        return fields(kv // groups), None
    if turned:
        dims = [dim for dim in dims if dim >= turned] or dims
    best = turned if turned else 64 if width >= 320 else 32 if width >= 128 else max(width // 4, 1)

    def rank(dim: int) -> tuple[float, int]:
        odd = (0.0 if dim in _DIMS else 0.7) + (0.25 if (width // dim) % 2 and width // dim > 1 else 0.0)
        return abs(math.log2(dim / best)) + odd, dim

    dims.sort(key=rank)
    if len(dims) == 1:
        return fields(dims[0]), None
    shared = kv < width
    values = [
        (f"{width // dim} heads" + (f", {kv // dim} of keys and values" if shared else "") + f" of {dim}", fields(dim))
        for dim in dims
    ]
    return fields(dims[0]), pick("n_head", values, "no tensor tells how wide a head is")


def activation(style: Style, gated: bool, known: Mapping[str, Any]) -> Choice | None:
    """Of the MLP."""
    if known.get("activation"):  # who says gelu may mean either
        order = ["gelu", "gelu_tanh"] if known["activation"] == "gelu" else [known["activation"]]
        return pick("activation", [(name, {"activation": name}) for name in order], "what settings say")
    order = ["gelu", "gelu_tanh", "relu", "silu", "relu2"]
    if gated:
        order = ["silu", "gelu_tanh", "gelu", "relu", "relu2"]
    elif style.nanochat:
        order = ["relu2", "gelu", "gelu_tanh", "relu", "silu"]
    elif style.lecture or style.encoder:
        order = ["relu", "gelu", "gelu_tanh", "silu", "relu2"]
    elif style.flax:
        order = ["gelu_tanh", "gelu", "relu", "silu", "relu2"]
    elif style.llama:
        order = ["gelu", "silu", "gelu_tanh", "relu2", "relu"]
    return pick("activation", [(name, {"activation": name}) for name in order], "an activation has no weights")


def norm_eps(norm: str, known: Mapping[str, Any], style: Style) -> Choice | None:
    """Epsilon of norms."""
    if known.get("norm_eps"):
        return None
    order = list(_EPS)
    if style.nanochat:
        order.sort(key=lambda eps: eps not in (1.1920928955078125e-07,))
    elif style.flax:
        order.sort(key=lambda eps: eps != 1e-6)
    return pick("norm_eps", [(f"{eps:g}", {"norm_eps": eps}) for eps in order], "epsilon is not among the weights")


def norm(said: frozenset[str], near_zero: bool, style: Style, known: Mapping[str, Any]) -> Choice:
    """LayerNorm or RMSNorm, where no bias tells."""
    order = ["rms", "layer", "rms1"]
    if known.get("norm"):
        order = [known["norm"]] if known["norm"] == "layer" else ["rms1", "rms"] if near_zero else ["rms", "rms1"]
    elif "rms" in said or "rmsnorm" in said:
        order = ["rms", "rms1", "layer"] if not near_zero else ["rms1", "rms", "layer"]
    elif near_zero:
        order = ["rms1", "rms", "layer"]
    elif style.gpt2 or (said & {"ln", "layernorm", "layer"} and not style.llama):
        order = ["layer", "rms", "rms1"]
    else:
        order = ["rms", "layer", "rms1"]
    return pick("norm", [(name, {"norm": name}) for name in order], "a norm's weight alone does not say which norm")


def placement(count: int, style: Style, final_norm: bool, known: Mapping[str, Any]) -> tuple[str, Choice | None]:
    """Where the norms of a block are, by how many it has."""
    if count == 0:
        order = ["pre", "post_add", "parallel", "post", "sandwich"]
        return order[0], pick("placement", [(name, {"placement": name}) for name in order], "no norm has a tensor")
    if count == 4:
        return "sandwich", None
    if count == 1:
        return "parallel", None
    order = ["pre", "post_add", "parallel2", "post"]
    if known.get("pre") is False or (
        known.get("pre") is None and (style.encoder or not final_norm) and not style.llama
    ):
        order = ["post_add", "pre", "post", "parallel2"]
    if known.get("parallel"):
        order.sort(key=lambda name: name != "parallel2")
    elif style.behind:
        order = ["post", "post_add", "pre", "parallel2"]
    return order[0], pick(
        "placement", [(name, {"placement": name}) for name in order], "where a norm acts has no weights"
    )


def position(said: str | None, style: Style, width: int) -> tuple[dict[str, Any], list[Choice]]:
    """What tells positions where no tensor does; and how rope turns, if it is rope."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("rope", {"position": "rope"}),
        ("sinusoidal, pairs", {"position": "sinusoidal", "sinusoid": "pairs"}),
        ("sinusoidal, span", {"position": "sinusoidal", "sinusoid": "span"}),
        ("sinusoidal, halves", {"position": "sinusoidal", "sinusoid": "halves"}),
        ("sinusoidal, span, times sqrt(2 / n_embd)",
         {"position": "sinusoidal", "sinusoid": "span", "position_multiplier": math.sqrt(2 / width)}),
        ("none", {"position": "none"}),
        ("alibi", {"position": "alibi"}),
    ]  # fmt: skip
    options = [(label, {"sinusoid": "pairs", "position_multiplier": 1.0, **fields}) for label, fields in options]
    if style.encoder and not style.llama:
        options = [*options[1:5], options[0], *options[5:]]
    if said:
        options = [each for each in options if each[1]["position"] == said]
    choices = [pick("position", options, "no tensor tells positions")] if len(options) > 1 else []
    return options[0][1], choices


def rope(known: Mapping[str, Any], style: Style, pairing: str, dims: Sequence[int], told: bool) -> list[Choice]:
    """Pairing, theta and width of rope.

    ``dims`` are the widths that a head may have, likeliest first. ``told``: a table of the state dict gave theta and
    how much of a head is turned; ``pairing``: it repeats each angle as this pairing does.
    """
    order, why = list(ROPES), "how rope pairs dimensions has no weights"
    if style.meta:
        order = ["pairs", "halves", "pairs reversed", "halves reversed"]
    elif style.nanochat:
        order = ["halves reversed", "halves", "pairs", "pairs reversed"]
    if pairing:
        order.sort(key=lambda name: not name.startswith(pairing))
        why = "as the table of rope has its angles"
    made = [Choice("rope", tuple(Option(name, rope=name) for name in order), why)]
    if not told and not known.get("rope_theta"):
        made.append(pick("rope_theta", [(f"{each:g}", {"rope_theta": each}) for each in THETAS], "no table of rope"))
    if not told and known.get("rotary_part", 1.0) < 1.0:
        part = int(dims[0] * known["rotary_part"]) // 2 * 2
        made.append(pick("rotary_dim", [(f"{part}", {"rotary_dim": part})], "what settings say"))
    elif not told:
        parts = [part for dim in dims[:4] for part in (dim // 4 * 2, dim // 8 * 2) if part]
        values = [("all", {"rotary_dim": 0}), *((f"{part}", {"rotary_dim": part}) for part in dict.fromkeys(parts))]
        if len(values) > 1:
            made.append(pick("rotary_dim", values, "how many dimensions of a head rope turns"))
    if not told:
        made.append(pick("rope_scaling", _SCALINGS, "how rope is stretched for longer texts has no weights"))
    return made


def learned(width: int) -> Choice:
    """The multiplier of a table of positions; x-transformers has the second."""
    values = [("1", 1.0), ("1 / sqrt(n_embd)", width**-0.5)]
    fields = [(label, {"position_multiplier": value}) for label, value in values]
    return pick("position_multiplier", fields, "a multiplier of positions has no weights")


def others(
    known: Mapping[str, Any], style: Style, width: int, dims: Sequence[int], scale: float | None = None
) -> list[Choice]:
    """Scales and caps; ``scale``: a constant in the state dict."""
    made: list[Choice] = []
    if "attn_scale" not in known:
        scales: list[tuple[str, dict[str, Any]]] = [("1 / sqrt(head_dim)", {"attn_scale": 0.0})]
        scales.append(("1 / sqrt(n_embd)", {"attn_scale": width**-0.5}))
        scales.append(("1", {"attn_scale": 1.0}))
        scales += [(f"1 / head_dim = 1 / {dim}", {"attn_scale": 1.0 / dim}) for dim in dims[:3]]
        scales += [(f"8 / head_dim = 8 / {dim}", {"attn_scale": 8.0 / dim}) for dim in dims[:3] if dim > 8]
        if scale is not None:
            scales.insert(0, (f"{scale:.6g}, a constant of the file", {"attn_scale": scale}))
        scales = [each for i, each in enumerate(scales) if each[1] not in [other[1] for other in scales[:i]]]
        made.append(pick("attn_scale", scales, "a multiplier of scores has no weights"))
    if "embed_scale" not in known:
        order = [True, False] if style.encoder else [False, True]
        values: list[tuple[str, dict[str, Any]]] = [
            ("sqrt(n_embd)" if each else "1", {"embed_scale": each}) for each in order
        ]
        made.append(pick("embed_scale", values, "a multiplier of embeddings has no weights"))
    caps = (15.0, 0.0, 30.0, 50.0) if style.nanochat else (0.0, 30.0, 15.0, 50.0)
    made.append(
        pick("final_softcap", [(f"{cap:g}", {"final_softcap": cap}) for cap in caps], "a cap of logits has no weights")
    )
    values = [("off", {"logit_scale": 0.0}), ("1 / sqrt(n_embd)", {"logit_scale": width**-0.5})]
    if abs(width**-0.5 - 1 / 16) > 1e-9:
        values.append(("1 / 16", {"logit_scale": 1 / 16}))  # Cohere's
    made.append(pick("logit_scale", values, "a multiplier of logits has no weights"))
    made.append(pick("attn_softcap", [(f"{cap:g}", {"attn_softcap": cap}) for cap in (0.0, 50.0)], "a cap of scores"))
    return made


def bare_norms(has_qk: bool, style: Style) -> list[Choice]:
    """Norms without weights, of which there are no tensors: where nanochat, modded-nanogpt and OLMo have them."""
    why = "no norm has a tensor"
    made = [pick("norm", [("rms", {"norm": "rms"}), ("layer", {"norm": "layer"})], why)]
    if not has_qk:
        made.append(pick("qk_norm", [("head", {"qk_norm": "head"}), ("none", {"qk_norm": "none"})], why))
    made.append(pick("embed_norm", [("yes", {"embed_norm": True}), ("no", {"embed_norm": False})], why))
    made.append(pick("final_norm", [("yes", {"final_norm": True}), ("no", {"final_norm": False})], why))
    return made
