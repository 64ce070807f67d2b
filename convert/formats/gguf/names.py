"""What GGUF calls our tensors and fields, in both directions, from the ``Gguf`` of each row of the table of families.

An architecture's graph is fixed in llama.cpp; the keys only size it. ``metadata`` writes the keys, ``config_from``
reads any file's, ``deviations`` says where llama.cpp computes something else than our config, or cannot load it.
Read from llama.cpp's conversion/*.py, src/models/*.cpp and gguf-py's constants.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.formats.gguf import rope
from convert.formats.gguf.file import Stored, Value, read_stored
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import parse_json
from mlxgpt.common.model import families
from mlxgpt.common.model.family.own_config import FAMILY, NOTE
from mlxgpt.common.model.family.row import Family, Gguf

# architecture -> the families that run with it; the first is what a file of it is read as, if it fits
ARCHS: dict[str, list[str]] = {}
for _name, _row in families.FAMILIES.items():
    if _row.gguf.arch:
        ARCHS.setdefault(_row.gguf.arch, []).append(_name)

_MODULES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "h.{n}.ln_1": "blk.{n}.attn_norm",
    "h.{n}.attn.c_attn": "blk.{n}.attn_qkv",
    "h.{n}.attn.q_proj": "blk.{n}.attn_q",
    "h.{n}.attn.k_proj": "blk.{n}.attn_k",
    "h.{n}.attn.v_proj": "blk.{n}.attn_v",
    "h.{n}.attn.q_norm": "blk.{n}.attn_q_norm",
    "h.{n}.attn.k_norm": "blk.{n}.attn_k_norm",
    "h.{n}.attn.c_proj": "blk.{n}.attn_output",
    "h.{n}.ln_1_post": "blk.{n}.post_attention_norm",
    "h.{n}.ln_2": "blk.{n}.ffn_norm",
    "h.{n}.ln_2_post": "blk.{n}.post_ffw_norm",
    "h.{n}.mlp.c_gate": "blk.{n}.ffn_gate",
    "h.{n}.mlp.c_fc": "blk.{n}.ffn_up",
    "h.{n}.mlp.c_gate_fc": "blk.{n}.ffn_up",
    "h.{n}.mlp.c_proj": "blk.{n}.ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}

# keys behind the architecture's name -> our field; there in every file that llama.cpp loads
_SIZES = {
    "block_count": "n_layer",
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_hidden",
    "attention.head_count": "n_head",
}
_SOFTCAPS = {"attn_logit_softcapping": "attn_softcap", "final_logit_softcapping": "final_softcap"}
# what would change the result and is in no architecture here, unless it has this value
_NEUTRAL = {
    "expert_count": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 0.0,
}


def arch_of(config: ModelConfig) -> str:
    """The architecture that llama.cpp runs this family with.

    Raises:
        UserError: there is none.
    """
    arch = families.family_of(config).gguf.arch
    if not arch:
        reason = NOTE if config.family == FAMILY else f"llama.cpp has no family {config.family}"
        raise UserError(f"cannot be written as GGUF: {reason}: expected --to hf or npz")
    return arch


def name_of(config: ModelConfig, name: str) -> str:
    """GGUF's name of our tensor."""
    module, _, leaf = name.rpartition(".")
    block = re.match(r"h\.(\d+)\.", module)
    pattern = module.replace(block[0], "h.{n}.", 1) if block else module
    modules = {**_MODULES, **families.family_of(config).gguf.modules}
    return f"{modules[pattern].replace('{n}', block[1] if block else '')}.{leaf}"


def heads_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """How rows lie otherwise in the file than here: reshaped to this, the first two axes of it behind the heads swap.

    (heads, 2, head_dim / 2): the halves of a head, which rope turns against each other, lie in pairs there.
    (1, heads, 3, head_dim): q, k, v of a head follow each other here, all q, all k, all v there. None: no difference.
    """
    if families.family_of(config).gguf.permuted and ".attn." in name:
        for part, heads in (("q_proj", config.n_head), ("k_proj", config.n_kv_head)):
            if f".{part}." in name:
                return (heads, 2, config.head_dim // 2)
    if config.qkv_by_head and ".attn.c_attn." in name:
        return (1, config.n_head, 3, config.head_dim)
    return None


def rearranged(array: np.ndarray, heads: tuple[int, ...] | None, back: bool = False) -> np.ndarray:
    """Rows in the file's order, or ``back`` in ours."""
    if heads is None:
        return array
    shape = (heads[0], heads[2], heads[1], *heads[3:]) if back else heads
    return array.reshape(*shape, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def metadata(config: ModelConfig) -> dict[str, Value]:
    """The architecture's own keys."""
    row = families.family_of(config)
    made = {key: Value("u32", getattr(config, ours)) for key, ours in _SIZES.items()}
    made["vocab_size"] = Value("u32", config.vocab_size)
    made["attention.head_count_kv"] = Value("u32", config.n_kv_head)
    made["attention.key_length"] = made["attention.value_length"] = Value("u32", config.head_dim)
    made[_eps_key(config.norm != "layer")] = Value("f32", config.norm_eps)
    made |= rope.metadata(config)
    if row.parallel_key:
        made["use_parallel_residual"] = Value("bool", config.placement == "parallel2")
    made |= {key: Value("f32", getattr(config, ours)) for key, ours in _SOFTCAPS.items() if getattr(config, ours)}
    for key, ours in row.gguf.multipliers.items():
        made[key] = Value("f32", getattr(config, ours) or config.head_dim**-0.5)  # attn_scale 0 is that
    if row.divisor_key:
        made["logit_scale"] = Value("f32", families.divisor_of(config.logit_scale))
    if row.gguf.needs_window or config.window:
        made["attention.sliding_window"] = Value("u32", config.window)
    if row.gguf.window or (config.window and row.gguf.windows != "all"):
        pattern = [n in config.window_layers for n in range(config.n_layer)]
        made["attention.sliding_window_pattern"] = Value("bool[]", pattern)
    return {f"{row.gguf.arch}.{key}": value for key, value in made.items()}


def _eps_key(rms: bool) -> str:
    return "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"


def deviations(config: ModelConfig) -> list[str]:
    """What llama.cpp does otherwise with the file of this model, a line each to print."""
    row = families.family_of(config)
    does, arch = row.gguf, row.gguf.arch
    found = []
    if config.activation != does.activation:
        found.append(f"llama.cpp computes {does.activation} in {arch}, this model has {config.activation}")
    if config.window and config.window < config.block_size and does.windows != "keys":
        found.append(f"llama.cpp sees everything in {arch}, this model has a window of {config.window} tokens")
    found += rope.deviations(config, does)
    scaled = config.attn_scale and "attention.scale" not in does.multipliers
    if scaled and config.attn_scale != _default_scale(does, config.n_layer, config.n_embd, config.n_head):
        found.append(f"llama.cpp knows no other scale of attention scores in {arch}, this model has one")
    if does.capped and not (config.attn_softcap and config.final_softcap):
        found.append(f"llama.cpp caps scores and logits in {arch}, this model does not")
    every = row.no_rope_every
    if every and config.no_rope != _no_rope(row, config.n_layer):
        found.append(f"llama.cpp leaves rope out in every {every}th layer of {arch}, this model in others")
    if does.head and does.head != ("tied" if config.tied else "untied"):
        found.append(f"llama.cpp cannot load {arch} with {'an untied' if does.head == 'tied' else 'a tied'} head")
    if any(getattr(config, name) for name in ("qkv_bias", "out_bias", "mlp_bias") if name not in does.biases):
        found.append(f"llama.cpp may not load {arch} with these biases, which {config.family} seldom has")
    if missing := [name for name in does.needs if not getattr(config, name)]:
        found.append(f"llama.cpp cannot load {arch} without {' and '.join(missing)}")
    if does.whole_heads and config.head_dim * config.n_head != config.n_embd:
        found.append(f"llama.cpp cannot load {arch} with head_dim = {config.head_dim}, only n_embd / n_head")
    return found


def _default_scale(does: Gguf, n_layer: int, n_embd: int, n_head: int) -> float:
    """attn_scale as llama.cpp takes it; 0 is 1 / sqrt(head_dim)."""
    return (n_embd // n_head) ** -0.5 if does.largest == n_layer else 0.0


def _no_rope(row: Family, n_layer: int) -> tuple[int, ...]:
    """The blocks that llama.cpp leaves rope out of."""
    return tuple(range(row.no_rope_every - 1, n_layer, row.no_rope_every)) if row.no_rope_every else ()


class Keys:
    """The metadata of one file, whose faults name the file and the key."""

    def __init__(self, where: str, values: Mapping[str, Any], arch: str) -> None:
        self.where, self.values, self.arch = where, values, arch

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value behind the architecture's name; without a default it must be there."""
        full = f"{self.arch}.{key}"
        if full not in self.values:
            if default is None:
                raise UserError(f"{self.where}: metadata key {full} is missing")
            return default
        value = self.values[full]
        if kind is int and isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not kind or (kind is float and not 0 <= value < np.inf):
            raise UserError(f"{self.where}: {full} = {_shown(value)}: expected {kind.__name__}")
        # 1e-5 as float32 is not 1e-5 as float64: the shortest decimal that rounds to it is what its writer had
        return float(str(np.float32(value))) if kind is float else value


def _shown(value: Any) -> str:
    return repr(value)[:60]


def config_from(where: str, values: Mapping[str, Any], tensors: Mapping[str, Stored]) -> tuple[ModelConfig, list[str]]:
    """The model that the standard keys and the tensors' names describe, and what a user must know of it.

    Raises:
        UserError: a key is missing or of another type, or says what this decoder does not do.
    """
    arch = values.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHS:
        raise UserError(f"{where}: general.architecture = {_shown(arch)}: expected one of {', '.join(ARCHS)}")
    keys, row, notes = Keys(where, values, arch), families.FAMILIES[ARCHS[arch][0]], []
    for key, neutral in _NEUTRAL.items():
        if key in row.gguf.multipliers or (key == "logit_scale" and row.divisor_key):
            continue
        if key == "rope.scaling.attn_factor" and rope.scales(keys, tensors):
            continue
        found = values.get(f"{arch}.{key}", neutral)
        if isinstance(found, np.ndarray) or found != neutral:
            raise UserError(f"{where}: {arch}.{key} = {_shown(found)} is not supported: expected {neutral}")
    sizes = {ours: keys.get(key, int) for key, ours in _SIZES.items()}
    for name, size in sizes.items():
        if not 0 < size < 1 << 31 or (name == "n_layer" and size > len(tensors)):
            key = next(key for key, ours in _SIZES.items() if ours == name)
            raise UserError(f"{where}: {arch}.{key} = {size}, which the file's {len(tensors)} tensors cannot be")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{where}: tensor token_embd.weight is missing")
    sizes["vocab_size"] = tensors["token_embd.weight"].shape[0]
    made: dict[str, Any] = {**row.fixed, **sizes}
    made["n_kv_head"] = keys.get("attention.head_count_kv", int, sizes["n_head"])
    made["tied"] = "output.weight" not in tensors
    made["norm_eps"] = keys.get(_eps_key(made["norm"] != "layer"), float)
    made["activation"] = row.gguf.assumed or row.gguf.activation
    if row.gguf.assumed:
        notes.append(f"{where}: GGUF does not say which GELU: taken as erf, as GPT-NeoX has it (llama.cpp: tanh)")
    if row.parallel_key:
        made["placement"] = "parallel2" if keys.get("use_parallel_residual", bool, True) else "pre"
    made |= _biases(tensors) | rope.read(keys, row, sizes) | _attention(keys, row, sizes)
    for key, ours in row.gguf.multipliers.items():
        made[ours] = keys.get(key, float, 0.0 if ours == "attn_scale" else 1.0)
    if row.divisor_key:
        divisor = keys.get("logit_scale", float, 1.0)
        made["logit_scale"] = 0.0 if divisor in (0.0, 1.0) else 1 / divisor
    if made.get("attn_scale") == float(str(np.float32(made["head_dim"] ** -0.5))):
        made["attn_scale"] = 0.0
    if row.no_rope_every:
        made["no_rope"] = _no_rope(row, sizes["n_layer"])
    try:
        config = ModelConfig(family=_fitting(arch, made), **made)
        families.check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    found = {name: read_stored(tensors[name]) for name in rope.TENSORS if name in tensors}
    config = rope.with_tensors(keys, config, found)
    return config, notes


def _fitting(arch: str, made: Mapping[str, Any]) -> str:
    """The first family of the architecture that fixes nothing else than what was read; else the first."""
    for name in ARCHS[arch]:
        if all(made.get(field, value) == value for field, value in families.FAMILIES[name].fixed.items()):
            return name
    return ARCHS[arch][0]


def _biases(tensors: Mapping[str, Stored]) -> dict[str, bool]:
    """Which biases there are, by the first block."""
    return {
        "qkv_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "norm_bias": "output_norm.bias" in tensors,
        "head_bias": "output.bias" in tensors,
    }


def _attention(keys: Keys, row: Family, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Soft caps, the scale of scores, and windows."""
    n_layer, arch = sizes["n_layer"], keys.arch
    made: dict[str, Any] = {"window": 0, "window_layers": ()}
    made |= {ours: keys.get(key, float, row.absent[ours]) for key, ours in _SOFTCAPS.items() if ours not in row.fixed}
    if row.scale_key:
        made["attn_scale"] = _default_scale(row.gguf, n_layer, sizes["n_embd"], sizes["n_head"])
    window = keys.get("attention.sliding_window", int, row.gguf.window)
    if not window:
        return made
    if row.windows is None and row.gguf.windows == "none":
        raise UserError(f"{keys.where}: {arch}.attention.sliding_window = {window} is not supported: expected 0")
    pattern = keys.values.get(f"{arch}.attention.sliding_window_pattern", row.windows.every if row.windows else 0)
    if isinstance(pattern, int) and type(pattern) is not bool:
        if row.gguf.windows == "none":  # llama.cpp has no windows here, whatever the key says
            return made
        pattern = [row.gguf.windows == "all" or not pattern or (n + 1) % pattern != 0 for n in range(n_layer)]
    flags = pattern.tolist() if isinstance(pattern, np.ndarray) else pattern
    if not isinstance(flags, list) or len(flags) != n_layer or any(flag not in (0, 1) for flag in flags):
        expected = f"a number or {n_layer} booleans"
        raise UserError(
            f"{keys.where}: {arch}.attention.sliding_window_pattern = {_shown(pattern)}: expected {expected}"
        )
    layers = tuple(n for n, flag in enumerate(flags) if flag)
    return {**made, "window": window if layers else 0, "window_layers": layers}


def check_keys(where: str, config: ModelConfig, values: Mapping[str, Any]) -> None:
    """Refuses a file whose standard keys tell another model than ``config``, which our own key told."""
    for key, value in metadata(config).items():
        found = values.get(key)
        found = found.tolist() if isinstance(found, np.ndarray) else found
        expected = np.float32(value.value).item() if value.type == "f32" else value.value
        if found != expected or type(found) is not type(expected):
            raise UserError(f"{where}: {key} = {_shown(found)}, expected {expected!r} by mlxgpt.config")


def own_config(where: str, text: Any, arch: Any, n_tensors: int) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of our own key, and what config.json says beside it.

    Raises:
        UserError: it is no config.json of ours, of another architecture, or of more blocks than the file has tensors.
    """
    place = f"{where}: mlxgpt.config"
    try:
        values = parse_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{place}: {type(values).__name__}, expected an object")
    for key in ("n_layer", "num_hidden_layers"):
        if type(values.get(key)) is int and values[key] > n_tensors:
            raise UserError(f"{place}: {key} = {values[key]}, which the file's {n_tensors} tensors cannot be")
    config = families.config_from_hf(values, where=place)
    if not isinstance(arch, str) or arch_of(config) != arch:
        raise UserError(
            f"{where}: general.architecture = {_shown(arch)}, expected {arch_of(config)!r} by mlxgpt.config"
        )
    known = families.config_to_hf(config)
    return config, {key: value for key, value in values.items() if key not in known}
