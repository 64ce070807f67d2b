"""Meta's own layout of Llama, which Mistral's files have too: params.json, and names and row orders of their own.

q and k are ordered for a rotation of pairs (x0, x1), (x2, x3); transformers' rotate the two halves of a head.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.llama2c import halves
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.tensors import Stored

_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_BUFFERS = ("rope.freqs",)
# keys of params.json -> those of config.json
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "sliding_window": "sliding_window",
}
# what the tensors' shapes say, or what says nothing of the model
_IDLE = {"vocab_size", "hidden_dim", "multiple_of", "ffn_dim_multiplier", "max_batch_size", "model_parallel_size"}
_SCALED = {"use_scaled_rope", "rope_scaling_factor"}
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192  # constants of Meta's code for Llama 3.1 and later
_SMALL = ((2048, 16), (3072, 28))  # (width, blocks) of Llama 3.2, whose factor is not 8 but 32


@dataclass(frozen=True)
class Turned:
    """q or k with its rows as transformers orders them."""

    source: Stored
    heads: int

    @property
    def path(self) -> Path:
        """The source's file."""
        return self.source.path

    @property
    def dtype(self) -> str:
        """The source's."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""
        return self.source.shape

    def read(self) -> np.ndarray:
        """The rows of each head: first those of even, then those of odd numbers."""
        return halves(self.source.read(), self.heads)


def has_names(names: Collection[str]) -> bool:
    """Whether tensors have Meta's names."""
    return "tok_embeddings.weight" in names


def is_split(files: Collection[Path]) -> bool:
    """Whether files are the parts of one model, a part a machine."""
    return len(files) > 1 and all(re.fullmatch(r"consolidated[.-]\d+.*", path.name) for path in files)


def config_json(
    where: Path, params: Mapping[str, Any], entries: Mapping[str, Stored]
) -> tuple[dict[str, Any], list[str]]:
    """config.json for Meta's params.json and tensors, and notes of what they do not say.

    Raises:
        UserError: a key that is not known, or a tensor that says a size is missing.
    """
    for key, value in params.items():
        if key not in {*_KEYS, *_IDLE, *_SCALED} and value not in (None, False):
            raise UserError(f"{where}: {key} = {value!r} is not supported: expected a dense Llama's keys, or --config")
    sizes = []
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in entries or len(entries[name].shape) != 2:
            raise UserError(f"{where.parent}: tensor {name} is missing or no matrix")
        sizes.append(entries[name].shape[0])
    values: dict[str, Any] = {_KEYS[key]: value for key, value in params.items() if key in _KEYS and value is not None}
    values = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0} | values
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if type(values.get(key)) is not int or values[key] < 1:
            name = next(name for name, theirs in _KEYS.items() if theirs == key)
            raise UserError(f"{where}: {name} = {values.get(key)!r}: expected a positive whole number")
    window = "sliding_window" in values
    values |= {"model_type": "mistral" if window else "llama", "vocab_size": sizes[0], "intermediate_size": sizes[1]}
    values |= {"hidden_act": "silu", "tie_word_embeddings": False}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    notes = []
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor")
        if factor is None:
            factor = 32 if (values["hidden_size"], values["num_hidden_layers"]) in _SMALL else 8
            notes.append(f"{where}: no rope_scaling_factor: {factor} is taken, as the Llama 3 of these sizes has it")
        table = {"factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH}
        values["rope_scaling"] = {"rope_type": "llama3", "original_max_position_embeddings": _ORIGINAL} | table
    if "max_position_embeddings" not in values:
        length = _length(values)
        notes.append(
            f"{where}: no length of context: {length} is taken, as Llama of these settings has it; else --config"
        )
        values["max_position_embeddings"] = length
    return values, notes


def _length(values: Mapping[str, Any]) -> int:
    """The context of the published model with these settings."""
    if "rope_scaling" in values:
        return 131072
    if values["rope_theta"] == 500000:
        return 8192
    return 2048 if values["rms_norm_eps"] == 1e-6 else 4096


def renamed(place: Path, values: Mapping[str, Any], entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """``entries`` of Meta's names as transformers has them, rows of q and k too; ``values`` is config.json.

    Raises:
        UserError: a tensor that Llama does not have, or rows that the heads do not divide.
    """
    heads = values.get("num_attention_heads")
    counts = {"q_proj": heads, "k_proj": values.get("num_key_value_heads") or heads}
    made: dict[str, Stored] = {}
    for name, entry in entries.items():
        if name in _BUFFERS:
            continue
        module, _, leaf = name.rpartition(".")
        layer = _LAYER.fullmatch(module)
        theirs = _BLOCK.get(layer[2]) if layer else _TOP.get(module)
        if theirs is None:
            raise UserError(f"{place}: unexpected tensor {name} {list(entry.shape)}, which Llama does not have")
        count = counts.get(theirs.rpartition(".")[2])
        if theirs.endswith(tuple(counts)):
            if type(count) is not int or count < 1 or len(entry.shape) != 2 or entry.shape[0] % (2 * count):
                raise UserError(f"{place}: {name} has shape {list(entry.shape)}, which {count!r} heads do not divide")
            entry = Turned(entry, count)
        made[f"model.layers.{layer[1]}.{theirs}.{leaf}" if layer else f"{theirs}.{leaf}"] = entry
    return made
