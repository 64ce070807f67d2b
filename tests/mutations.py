"""What goes wrong in conversions, done on purpose to a converted folder: ``verify`` must name each (test_verify.py).

``python -m benchmarks.verify --mutations`` prints what it says. A mutation belongs to a base: a source, and the folder
that ``convert`` made of it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import models
import numpy as np

from convert import convert
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.files import read_json, write_json
from mlxgpt.common.folders import model_folder, tensors
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

Arrays = dict[str, np.ndarray]
Change = Callable[[Path], None]
VOCABULARY = 300


@dataclass(frozen=True)
class Mutation:
    """``change`` breaks the folder; ``rung`` names ``name``.

    ``place``: where the residual stream first diverges; ``logits``: those alone do; '': nothing that runs.
    """

    base: str
    change: Change
    rung: str
    name: str
    place: str = ""


def sized(family: str, **model: Any) -> ModelConfig:
    return models.tiny(family=family, **({"vocab_size": VOCABULARY} | models.LONG | model))


# base -> the model, and the format that the source has
BASES: dict[str, tuple[ModelConfig, str]] = {
    "llama": (sized("llama", rope_theta=5e5, n_kv_head=2, **models.LLAMA3), "gguf"),
    "gpt2": (sized("gpt2", activation="gelu"), "nanogpt"),
    "llama2c": (sized("llama", tied=False), "llama2c"),
    "gemma2": (sized("gemma2", n_kv_head=2, head_dim=16, attn_scale=12**-0.5, window=12), "gguf"),
    "mistral": (sized("mistral", n_kv_head=2, head_dim=16, window=12), "hf"),
    "gpt_neox": (sized("gpt_neox", rotary_dim=6), "npz"),
    "gemma3": (sized("gemma3_text", n_kv_head=2, head_dim=16, window=12, window_layers=[0]), "mlx-lm"),
    "smollm3": (sized("smollm3", n_kv_head=2, no_rope=[1]), "mlx-lm"),
}
_FILES = {"gguf": "source.gguf", "nanogpt": "source.pt", "llama2c": "source.bin"}


def tokenizer() -> Tokenizer:
    text = "".join(topics.topics[name] for name in sorted(topics.topics)[:20])
    return train_tokenizer("bpe", [text], VOCABULARY)


def pair(base: str, place: Path, words: Tokenizer) -> tuple[Path, Path]:
    """The source, and the folder that it converts to."""
    config, form = BASES[base]
    carries = form not in ("nanogpt", "llama2c")
    model_folder.write_model(
        place / "made", config, models.weights(config), tokenizer=words if carries else None,
        max_shard=100_000 if base == "mistral" else 10**9,
    )  # fmt: skip
    if carries:
        settings = read_json(place / "made" / "tokenizer_config.json")
        template = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
        write_json(place / "made" / "tokenizer_config.json", settings | template)
    source = place / "made" if form == "hf" else convert(place / "made", place / _FILES.get(form, "source"), form).path
    return source, convert(source, place / "converted").path


def weights(change: Callable[[Arrays], None]) -> Change:
    """Edits the tensors of model.safetensors."""

    def run(place: Path) -> None:
        file = place / "model.safetensors"
        arrays = {name: array.copy() for name, array in tensors.read_tensors(file).items()}
        change(arrays)
        tensors.write_tensors(file, arrays)

    return run


def on(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    """Edits one tensor, in place or by what is returned."""

    def run(arrays: Arrays) -> None:
        made = change(arrays[name])
        arrays[name] = arrays[name] if made is None else np.ascontiguousarray(made)

    return weights(run)


def flip(mask: int) -> Callable[[np.ndarray], None]:
    def run(array: np.ndarray) -> None:
        array.view(np.uint32).reshape(-1)[41] ^= mask

    return run


def swap_layers(arrays: Arrays) -> None:
    for name in [name for name in arrays if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        arrays[name], arrays[other] = arrays[other], arrays[name]


def swap_gate(arrays: Arrays) -> None:
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    arrays[gate], arrays[up] = arrays[up], arrays[gate]


def interleave(array: np.ndarray) -> np.ndarray:
    """Rows from halves into pairs, in every head of 12: what a reader that does not permute leaves."""
    return array.reshape(-1, 2, 6, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def break_tie(arrays: Arrays) -> None:
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] * np.float32(1.5)


def lose(arrays: Arrays) -> None:
    del arrays[_UP]


def nan(array: np.ndarray) -> None:
    array[3, 5] = np.nan


def wrong_head_order(arrays: Arrays) -> None:
    """gpt_neox has q, k, v head by head; here they are one after the other."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    array = arrays[name]
    arrays[name] = np.ascontiguousarray(array.reshape(4, 3, 12, 48).swapaxes(0, 1).reshape(array.shape))


def config(**changes: Any) -> Change:
    """Sets keys of config.json, also in rope_parameters; None takes a key away."""

    def run(place: Path) -> None:
        values = read_json(place / "config.json")
        before = json.dumps(values)
        inner = [values, *(values.get("rope_parameters") or {}).values(), values.get("rope_parameters")]
        for table in [each for each in inner if isinstance(each, dict)]:
            for key in [key for key in changes if key in table]:
                if changes[key] is None:
                    del table[key]
                else:
                    table[key] = changes[key]
        assert json.dumps(values) != before
        write_json(place / "config.json", values)

    return run


def untie(place: Path) -> None:
    weights(lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"]}))(place)
    config(tie_word_embeddings=False)(place)


def unscaled(place: Path) -> None:
    """rope scaling dropped, in both spellings."""
    values = read_json(place / "config.json")
    theta = values["rope_parameters"]["rope_theta"]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_scaling": None}
    write_json(place / "config.json", values | plain)


def default_theta(place: Path) -> None:
    """rope_theta dropped, in both spellings: readers then take 10000."""
    values = read_json(place / "config.json")
    del values["rope_theta"], values["rope_parameters"]["rope_theta"]
    write_json(place / "config.json", values)


def tokens(change: Callable[[dict[str, Any]], None], file: str = "tokenizer.json") -> Change:
    """Edits a JSON file of the tokenizer, or generation_config.json."""

    def run(place: Path) -> None:
        values = read_json(place / file)
        before = json.dumps(values)
        change(values)
        assert json.dumps(values) != before
        write_json(place / file, values)

    return run


def move_special(values: dict[str, Any]) -> None:
    """The end of text and another token exchange ids."""
    vocab, special = values["model"]["vocab"], values["added_tokens"][0]
    other = next(token for token, i in vocab.items() if i == 20)
    vocab[other], vocab[special["content"]] = special["id"], 20
    special["id"] = 20


def forget_ends(place: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        values = read_json(place / file)
        del values["eos_token_id"]
        write_json(place / file, values)


_UP = "model.layers.1.mlp.up_proj.weight"
_Q = "model.layers.0.self_attn.q_proj.weight"

MUTATIONS: dict[str, Mutation] = {
    "two layers swapped": Mutation("llama", weights(swap_layers), "tensors", "h.0 and h.1", "h.0"),
    "gate and up swapped": Mutation("llama", weights(swap_gate), "tensors", "h.0.mlp.c_gate.weight", "h.0"),
    "a transpose forgotten": Mutation(
        "gpt2", on("h.1.attn.c_proj.weight", np.transpose), "tensors", "h.1.attn.c_proj.weight", "h.1"),
    "q not permuted, from GGUF": Mutation(
        "llama", on(_Q, interleave), "tensors", "h.0.attn.q_proj.weight", "h.0"),
    "q not permuted, from llama2.c": Mutation(
        "llama2c", on(_Q, interleave), "tensors", "h.0.attn.q_proj.weight", "h.0"),
    "q, k, v not head by head": Mutation(
        "gpt_neox", weights(wrong_head_order), "tensors", "h.0.attn.c_attn.weight", "h.0"),
    "the lowest bit of one value": Mutation("llama", on(_UP, flip(1)), "tensors", "h.1.mlp.c_fc.weight"),
    "a bit of an exponent": Mutation("llama", on(_UP, flip(1 << 25)), "tensors", "h.1.mlp.c_fc.weight", "h.1"),
    "rows of the embedding shifted": Mutation(
        "llama", on("model.embed_tokens.weight", lambda array: np.roll(array, 1, 0)), "tensors", "wte.weight", "embed"),
    "norms as 1 + w": Mutation(
        "gemma2", on("model.layers.1.input_layernorm.weight", lambda array: array + 1), "tensors", "h.1.ln_1.weight",
        "h.1"),
    "a bias lost": Mutation(
        "gpt2", on("h.0.mlp.c_fc.bias", lambda array: array * 0), "tensors", "h.0.mlp.c_fc.bias", "h.0"),
    "one tensor rounded to bfloat16": Mutation(
        "llama", on(_UP, lambda array: array.astype(model_folder.DTYPES["bfloat16"]).astype(np.float32)), "tensors",
        "h.1.mlp.c_fc.weight", "h.1"),
    "NaN": Mutation("llama", on(_UP, nan), "tensors", "h.1.mlp.c_fc.weight"),
    "a tensor missing": Mutation("llama", weights(lose), "tensors", _UP),
    "a tensor too many": Mutation(
        "gpt2", weights(lambda arrays: arrays.update(extra=np.ones(3, np.float32))), "tensors", "extra"),
    "another shape": Mutation(
        "llama", on(_UP, lambda array: array.T), "tensors", _UP),
    "tie broken, another head": Mutation("llama", weights(break_tie), "tensors", "lm_head.weight", "logits"),
    "tie broken, an equal head": Mutation("llama", untie, "config", "tied"),
    "eps, RMSNorm": Mutation("llama", config(rms_norm_eps=1e-6), "config", "norm_eps", "h.0"),
    "eps, LayerNorm": Mutation("gpt2", config(layer_norm_epsilon=1e-6), "config", "norm_eps", "h.0"),
    "erf for tanh": Mutation("gpt_neox", config(hidden_act="gelu_new"), "config", "activation", "h.0"),
    "tanh for erf": Mutation("gpt2", config(activation_function="gelu_new"), "config", "activation", "h.0"),
    "rope_theta dropped": Mutation("llama", default_theta, "config", "rope_theta", "h.0"),
    "rope scaling dropped": Mutation("llama", unscaled, "config", "rope_scaling", "h.0"),
    "rope of the layers with a window": Mutation(
        "gemma3", config(rope_local_base_freq=2e4, sliding_attention={"rope_type": "default", "rope_theta": 2e4}),
        "config", "rope_local_theta", "h.0"),
    "another share of a head rotated": Mutation(
        "gpt_neox", config(rotary_pct=1.0, partial_rotary_factor=1.0), "config", "rotary_dim", "h.0"),
    "rope in every layer": Mutation(
        "smollm3", config(no_rope_layers=[1, 1], no_rope_layer_interval=None), "config", "no_rope", "h.1"),
    "serial for parallel": Mutation(
        "gpt_neox", config(use_parallel_residual=False), "config", "placement", "h.0"),
    "window dropped": Mutation("mistral", config(sliding_window=None), "config", "window", "h.0"),
    "window one too short": Mutation("mistral", config(sliding_window=11), "config", "window", "h.0"),
    "windows in other layers": Mutation(
        "gemma2", config(layer_types=["full_attention", "sliding_attention"]), "config", "window_layers", "h.0"),
    "soft cap of attention": Mutation("gemma2", config(attn_logit_softcapping=20.0), "config", "attn_softcap", "h.0"),
    "soft cap of the logits": Mutation(
        "gemma2", config(final_logit_softcapping=20.0), "config", "final_softcap", "logits"),
    "another scale of attention": Mutation(
        "gemma2", config(query_pre_attn_scalar=16), "config", "attn_scale", "h.0"),
    "a merge dropped": Mutation("llama", tokens(lambda values: values["model"]["merges"].pop(0)), "tokenizer",
        "if a != b else {}"),
    "a special token moved": Mutation("llama", tokens(move_special), "tokenizer", "eos_id"),
    "another chat template": Mutation(
        "llama", tokens(lambda values: values.update(chat_template="{{ messages }}"), "tokenizer_config.json"),
        "tokenizer", "chat_template"),
    "another end in generation_config": Mutation(
        "llama", tokens(lambda values: values.update(eos_token_id=[0, 7]), "generation_config.json"), "config",
        "eos_token_id"),
    "no end of text any more": Mutation("llama", forget_ends, "config", "eos_token_id"),
}  # fmt: skip
