"""Rotary positions in GGUF: the keys of rope.scaling, and the tensors of what frequencies are divided by.

llama.cpp's common loader reads type, factor, original_context_length and attn_factor; beta_fast and beta_slow of yarn
only some architectures.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from convert.formats.gguf.file import Value
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, rotary
from mlxgpt.common.model.family.row import Family, Gguf

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
_ATTENTION, _ORIGINAL = "rope.scaling.attn_factor", "rope.scaling.original_context_length"
_BETAS = {"rope.scaling.yarn_beta_fast": "rope_beta_fast", "rope.scaling.yarn_beta_slow": "rope_beta_slow"}


class Keys(Protocol):
    """The metadata of one file, see ``names.Keys``."""

    where: str
    values: Mapping[str, Any]
    arch: str

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value behind the architecture's name."""
        ...


def tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """What llama.cpp divides each rotary frequency by, float32 (rotary_dim / 2,), by the name of the tensor."""
    if config.rope_scaling == "longrope":
        return {LONG: np.array(config.rope_long, np.float32), SHORT: np.array(config.rope_short, np.float32)}
    if config.rope_scaling != "llama3":
        return {}
    return {FREQS: (_plain(config) / rotary.frequencies(config)).astype(np.float32)}


def _plain(config: ModelConfig) -> np.ndarray:
    return config.rope_theta ** (-np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim)


def metadata(config: ModelConfig) -> dict[str, Value]:
    """The keys behind the architecture's name.

    Raises:
        UserError: llama.cpp has no such scaling.
    """
    made: dict[str, Value] = {}
    if config.position == "rope":
        made["rope.dimension_count"] = Value("u32", config.rotary_dim)
        made["rope.freq_base"] = Value("f32", config.rope_theta)
    if config.rope_local_theta:
        made["rope.freq_base_swa"] = Value("f32", config.rope_local_theta)
    kind = config.rope_scaling
    if kind == "dynamic":
        raise UserError("model.rope_scaling = dynamic cannot be written as GGUF: llama.cpp has no such scaling")
    if kind in ("linear", "yarn"):
        made["rope.scaling.type"] = Value("str", kind)
        made["rope.scaling.factor"] = Value("f32", config.rope_factor)
    if kind in ("yarn", "longrope"):
        made[_ORIGINAL] = Value("u32", config.rope_original)
    if kind == "longrope":
        made[_ATTENTION] = Value("f32", rotary.attention(config))
    if kind == "yarn" and config.rope_attention:  # llama.cpp multiplies its own by this
        usual = rotary.usual_attention(kind, config.rope_factor, config.rope_original)
        made[_ATTENTION] = Value("f32", config.rope_attention / usual)
    for key, ours in _BETAS.items():
        if getattr(config, ours) != getattr(ModelConfig, ours):
            made[key] = Value("f32", getattr(config, ours))
    return made


def deviations(config: ModelConfig, does: Gguf) -> list[str]:
    """What llama.cpp does otherwise, a line each to print."""
    found = []
    if config.rope_scaling == "llama3" and not does.factors:
        found.append(f"llama.cpp ignores {FREQS} in {does.arch}, this model has llama3 rope scaling")
    if any(getattr(config, name) != getattr(ModelConfig, name) for name in _BETAS.values()):
        found.append(f"llama.cpp takes beta_fast 32 and beta_slow 1 of yarn in {does.arch}, this model has others")
    if not config.rope_truncate:
        found.append("llama.cpp rounds the bounds of yarn, this model does not (truncate)")
    if config.rope_short != config.rope_long:
        found.append("llama.cpp chooses longrope's factors by its context, this model by the length of a sequence")
    return found


def read(keys: Keys, row: Family, sizes: Mapping[str, int]) -> dict[str, Any]:
    """head_dim, rotary_dim and the rope fields, but for what tensors say."""
    head_dim = keys.get("attention.key_length", int, 0)
    turned = keys.get("rope.dimension_count", int, 0)
    if not head_dim:  # llama.cpp takes it so, whatever rope turns
        head_dim = max(sizes["n_embd"] // sizes["n_head"], 1)
    if keys.get("attention.value_length", int, head_dim) != head_dim:
        raise UserError(f"{keys.where}: {keys.arch}.attention.value_length differs from the key's: not supported")
    made: dict[str, Any] = {"head_dim": head_dim}
    if row.rope is None:
        return made
    if row.rope.part is None and turned not in (0, head_dim):
        raise UserError(f"{keys.where}: {keys.arch}.rope.dimension_count = {turned}: expected {head_dim}, a whole head")
    made["rotary_dim"] = turned or head_dim
    made["rope_theta"] = keys.get("rope.freq_base", float, 10000.0)
    if row.rope.local:
        made["rope_local_theta"] = keys.get("rope.freq_base_swa", float, row.rope.local)
    name = f"{keys.arch}.rope.scaling.type"
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.get("rope.scaling.factor", float, keys.get("rope.scale_linear", float, 1.0))
    able = ("none", "linear", "yarn") + (("longrope",) if "longrope" in row.rope.scalings else ())
    if kind not in able or (kind == "yarn" and kind not in row.rope.scalings):
        raise UserError(f"{keys.where}: {name} = {kind[:60]!r}: expected {' or '.join(able)}")
    if kind == "yarn":
        original = keys.get(_ORIGINAL, int, sizes["block_size"])
        made |= {"rope_scaling": "yarn", "rope_factor": factor, "rope_original": original}
        made |= {ours: keys.get(key, float, getattr(ModelConfig, ours)) for key, ours in _BETAS.items()}
        times = keys.get(_ATTENTION, float, 1.0)
        made["rope_attention"] = 0.0 if times == 1 else times * rotary.usual_attention("yarn", factor, original)
    elif kind == "linear" or (factor not in (0.0, 1.0) and name not in keys.values):
        made |= {"rope_scaling": "linear", "rope_factor": factor}
    return made


def scales(keys: Keys, there: Mapping[str, Any]) -> bool:
    """Whether attn_factor has a place in this file: that of yarn, or of longrope."""
    return keys.values.get(f"{keys.arch}.rope.scaling.type") == "yarn" or LONG in there


def with_tensors(keys: Keys, config: ModelConfig, found: Mapping[str, np.ndarray]) -> ModelConfig:
    """``config`` with the settings that these tensors say.

    Raises:
        UserError: they have another shape, one of longrope's is missing, or no setting of llama3 gives them.
    """
    for name, array in found.items():
        if array.shape != (config.rotary_dim // 2,):
            shape = list(array.shape)
            raise UserError(f"{keys.where}: {name} has shape {shape}, expected [{config.rotary_dim // 2}]")
    if FREQS in found:
        return _llama3(keys.where, config, found[FREQS])
    if not found:
        return config
    if set(found) != {LONG, SHORT}:
        raise UserError(f"{keys.where}: {min({LONG, SHORT} - set(found))} is missing beside {min(found)}")
    original = keys.get(_ORIGINAL, int)
    lists = {name: tuple(float(str(one)) for one in found[each]) for name, each in
             (("rope_long", LONG), ("rope_short", SHORT))}  # fmt: skip
    attention = keys.get(_ATTENTION, float, 1.0)
    try:
        made = dataclasses.replace(config, rope_scaling="longrope", rope_original=original, **lists)
        if np.float32(rotary.attention(made)) != np.float32(attention):
            made = dataclasses.replace(made, rope_attention=attention)
        families.check(made)
    except UserError as error:
        raise UserError(f"{keys.where}: {error}") from None
    return made


def _llama3(where: str, config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """``config`` with llama3's settings, which give exactly these factors; GGUF has the factors alone.

    low_freq_factor 1 and high_freq_factor 4 are what all of Llama 3 has; the rest follows from the factors.
    """
    largest = float(factors.max()) if np.isfinite(factors).all() and factors.size else 0.0
    candidates = [8192]
    mixed = (factors > 1) & (factors < largest)
    if largest > 1 and mixed.any():
        kept = (1 / factors[mixed].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
        candidates += {round(float(one)) for one in 2 * np.pi / _plain(config)[mixed] * (kept * 3 + 1)}
    elif largest > 1:
        candidates += [1 << n for n in range(4, 21)]
    for original in candidates:
        if largest <= 1 or original < 1:
            continue
        made = {"rope_scaling": "llama3", "rope_factor": float(str(np.float32(largest)))}
        made |= {"rope_low": 1.0, "rope_high": 4.0, "rope_original": original}
        scaled = dataclasses.replace(config, **made)
        if np.allclose(tensors(scaled)[FREQS], factors, rtol=1e-4):
            return scaled
    raise UserError(f"{where}: {FREQS}: no llama3 scaling with low_freq_factor 1, high_freq_factor 4 gives these")


def check_tensors(where: str, config: ModelConfig, found: Mapping[str, np.ndarray]) -> None:
    """Refuses tensors that are not those of the config.

    Raises:
        UserError: one is missing, there without reason, or differs.
    """
    expected = tensors(config)
    for name in TENSORS:
        if (name in expected) != (name in found):
            is_there = "there" if name in found else "missing"
            raise UserError(f"{where}: tensor {name} is {is_there}, but rope scaling is {config.rope_scaling}")
    for name, array in found.items():
        if array.shape != expected[name].shape or not np.allclose(array, expected[name], rtol=1e-4):
            raise UserError(f"{where}: {name} differs from what its {config.rope_scaling} scaling gives")
