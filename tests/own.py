"""Decoders of family mlxgpt: every two answers to the questions below meet in at least one of them."""

import itertools
from typing import Any

from models import NO_BIAS, tiny

from mlxgpt.common.config import ModelConfig

SIZES: dict[str, Any] = dict(family="mlxgpt", n_embd=36, n_head=6, n_hidden=40, block_size=24, vocab_size=50)
# question -> its answers, each the fields that it sets
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "position": {
        "learned": {},
        "scaled": dict(position_multiplier=0.5),
        "rope": dict(position="rope"),
        "pairs": dict(position="sinusoidal", rope_theta=500.0),
        "halves": dict(position="sinusoidal", sinusoid="halves", position_multiplier=0.25),
        "span": dict(position="sinusoidal", sinusoid="span", position_multiplier=(2 / 36) ** 0.5),
        "alibi": dict(position="alibi"),
        "none": dict(position="none"),
    },
    "placement": {
        name: dict(placement=name) for name in ("pre", "post", "sandwich", "post_add", "parallel", "parallel2")
    },
    "norm": {
        "layer": {},
        "rms": dict(norm="rms"),
        "rms1": dict(norm="rms1"),
        "bare layer": dict(norm_weight=False, norm_bias=False),
        "bare rms": dict(norm="rms", norm_weight=False),
    },
    "activation": {name: dict(activation=name) for name in ("gelu_tanh", "gelu", "silu", "relu", "relu2")},
    "mlp": {"plain": {}, "gated": dict(gated=True), "fused": dict(gated=True, fused_mlp=True)},
    "qkv": {"fused": {}, "split": dict(fused_qkv=False), "by head": dict(qkv_by_head=True)},
    "heads": {"all": {}, "grouped": dict(n_kv_head=2), "wide": dict(head_dim=8)},
    "qk_norm": {name: dict(qk_norm=name) for name in ("none", "head", "full")},
    "bias": {"all": {}, "none": NO_BIAS, "some": dict(no_bias=("mlp.c_proj", "attn.c_proj"))},
    "head": {
        "tied": {},
        "tied, bias": dict(head_bias=True),
        "untied": dict(tied=False),
        "untied, bias": dict(tied=False, head_bias=True),
    },
    "last norm": {"yes": {}, "no": dict(final_norm=False)},
    "first norm": {"no": {}, "yes": dict(embed_norm=True)},
    "scores": {"scaled": {}, "plain": dict(attn_scale=1.0), "capped": dict(attn_softcap=2.0)},
    "window": {"no": {}, "one": dict(window=5, window_layers=[1])},
    "multipliers": {
        "none": {},
        "some": dict(embed_scale=True, residual_multiplier=0.5, logit_scale=0.3),
        "others": dict(embed_multiplier=3.0, final_softcap=4.0),
    },
}
Answer = tuple[str, str]


def possible(chosen: dict[str, str]) -> bool:
    """Whether the answers go together."""
    return not (chosen.get("qkv") == "by head" and chosen.get("heads") == "grouped")


def pairwise() -> dict[str, ModelConfig]:
    """Models by their number in which every possible pair of answers is there."""
    pairs = itertools.combinations([(question, answer) for question in CHOICES for answer in CHOICES[question]], 2)
    left = {pair for pair in pairs if pair[0][0] != pair[1][0] and possible(dict(pair))}
    made: dict[str, ModelConfig] = {}
    while left:
        chosen: dict[str, str] = dict(min(left))
        for question in [each for each in CHOICES if each not in chosen]:
            able = [answer for answer in CHOICES[question] if possible(chosen | {question: answer})]
            new = {
                answer: sum(
                    pair in left
                    for other in chosen.items()
                    for pair in (((question, answer), other), (other, (question, answer)))
                )
                for answer in able
            }
            chosen[question] = max(new, key=lambda answer, new=new: new[answer])
        ordered = [(question, chosen[question]) for question in CHOICES]
        left -= set(itertools.combinations(ordered, 2))
        fields = {name: value for question, answer in ordered for name, value in CHOICES[question][answer].items()}
        made[f"own-{len(made)}"] = tiny(**(SIZES | fields))
    return made
