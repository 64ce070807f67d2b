"""The parts of config.json that families spell in several ways, read and written: rotary positions, windows, NoPE.

Where two spellings disagree, what transformers 5 does is done: a true ``rope_scaling`` counts before
``rope_parameters``, and both before keys of their own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import rotary
from mlxgpt.common.model.family.row import Family, Rope, Windows

FULL, SLIDING = "full_attention", "sliding_attention"
_ORIGINAL = "original_max_position_embeddings"
# key of a rope table -> our field, by rope type
_SCALING = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low",
        "high_freq_factor": "rope_high",
        _ORIGINAL: "rope_original",
    },
    "yarn": {
        "factor": "rope_factor",
        _ORIGINAL: "rope_original",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "truncate": "rope_truncate",
    },
    "dynamic": {"factor": "rope_factor"},
    "longrope": {"short_factor": "rope_short", "long_factor": "rope_long", _ORIGINAL: "rope_original"},
}
# keys that only say what cos and sin are multiplied by, or the context before scaling once more
_BESIDE = {
    "yarn": {"attention_factor", "mscale", "mscale_all_dim"},
    "dynamic": {_ORIGINAL},
    "longrope": {"attention_factor", "factor", "short_mscale", "long_mscale"},
}


def typed(where: str, key: str, ours: str, value: Any) -> Any:
    """``value`` as our field's type; a whole number passes for a float, and floats are finite and positive."""
    kind = type(next(f.default for f in dataclasses.fields(ModelConfig) if f.name == ours))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} = {value!r}: expected {kind.__name__}")
    if kind is float and not 0 < value < math.inf:
        raise UserError(f"{where}: {key} = {value!r}: expected a positive number")
    return value


def read_rope(where: str, rope: Rope, values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Our rope fields. ``sizes`` has head_dim and block_size."""
    spelled = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    table = values.get(spelled) or {}
    made: dict[str, Any] = {}
    if rope.local:
        table = _nested(where, values)
        local = table[SLIDING]
        _refuse_type(where, f"rope_parameters.{SLIDING}", local, ())
        theta = local.get("rope_theta", values.get("rope_local_base_freq", rope.local))
        made["rope_local_theta"] = typed(where, "rope_local_base_freq", "rope_local_theta", theta)
        table = table[FULL]
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise UserError(f"{where}: {spelled} = {table!r} is not supported: expected one table for all layers")
    kind = _refuse_type(where, spelled, table, rope.scalings, rope.longrope)
    theta = table.get("rope_theta", values.get(rope.theta_key, rope.theta))
    made["rope_theta"] = typed(where, rope.theta_key, "rope_theta", theta)
    made |= _scaling(where, spelled, table, kind, values, sizes["block_size"], rope.original)
    part = table.get("partial_rotary_factor", values.get(rope.part_key, rope.part))
    if rope.part is None:
        if part not in (None, 1):
            place = f"{spelled}." if "partial_rotary_factor" in table else ""
            raise UserError(f"{where}: {place}partial_rotary_factor = {part!r} is not supported: expected 1.0")
        return made
    if type(part) not in (int, float) or not 0 < part <= 1 or not int(sizes["head_dim"] * part):
        raise UserError(f"{where}: {rope.part_key} = {part!r}: expected a share of a head, above 0 and at most 1")
    return made | {"rotary_dim": int(sizes["head_dim"] * part)}


def _nested(where: str, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Gemma 3's two tables; ``rope_scaling`` is for the blocks that see everything."""
    given = values.get("rope_parameters") or {}
    known = isinstance(given, dict) and set(given) <= {FULL, SLIDING}
    if not known or not all(isinstance(table, dict | None) for table in given.values()):
        raise UserError(f"{where}: rope_parameters = {given!r} is not supported: expected tables {FULL} and {SLIDING}")
    scaling = values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_scaling = {scaling!r} is not supported: expected a table")
    return {FULL: (given.get(FULL) or {}) | scaling, SLIDING: given.get(SLIDING) or {}}


def _refuse_type(
    where: str, place: str, table: Mapping[str, Any], scalings: tuple[str, ...], longrope: tuple[str, ...] = ()
) -> str:
    """The rope type of a table; one that is not supported, or a key that it does not have, is refused."""
    kind = table.get("rope_type", table.get("type", "default"))
    kind = "longrope" if kind in longrope else kind
    able = ("default", *scalings)
    if kind not in able:
        expected = " or ".join(repr(name) for name in able)
        raise UserError(f"{where}: {place}: rope type {kind!r} is not supported: expected {expected}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALING[kind], *_BESIDE.get(kind, ())}
    for key, value in table.items():
        if key not in known and value is not None:
            raise UserError(f"{where}: {place}.{key} = {value!r} is not supported with rope type {kind!r}")
    return kind


def _scaling(
    where: str, place: str, table: Mapping[str, Any], kind: str, values: Mapping[str, Any], block_size: int, own: int
) -> dict[str, Any]:
    """``own``: what the key original_max_position_embeddings beside the table is where nothing says it; 0: nothing."""
    if kind == "default":
        return {"rope_scaling": "none"}
    made: dict[str, Any] = {"rope_scaling": kind}
    for key, ours in _SCALING[kind].items():
        value = table.get(key)
        if ours == "rope_original":
            value = _original(where, place, table, values, block_size, own)
        elif key in ("beta_fast", "beta_slow"):
            value = value or getattr(ModelConfig, ours)
        elif key == "truncate":
            value = bool(value) if key in table and value is None else table.get(key, True)
        elif key == "factor" and kind == "yarn" and value is None:
            value = block_size / _original(where, place, table, values, block_size, own)
        if ours in ("rope_short", "rope_long"):
            if not isinstance(value, list):
                raise UserError(f"{where}: {place}.{key} = {value!r}: expected a list of numbers")
            made[ours] = tuple(value)
        else:
            made[ours] = typed(where, f"{place}.{key}", ours, value)
    if kind == "dynamic":
        if table.get(_ORIGINAL) not in (None, block_size):
            found = f"{place}.{_ORIGINAL} = {table[_ORIGINAL]!r}"
            raise UserError(
                f"{where}: {found}: expected max_position_embeddings = {block_size}, which transformers takes"
            )
        made["rope_original"] = block_size
    if kind in ("dynamic", "yarn"):  # the context that scaling makes of the original one
        made["block_size"] = max(block_size, int(made["rope_factor"] * made["rope_original"]))
    if kind in ("yarn", "longrope"):
        made["rope_attention"] = _attention(where, place, table, made, block_size)
    return made


def _original(
    where: str, place: str, table: Mapping[str, Any], values: Mapping[str, Any], block_size: int, own: int
) -> Any:
    """The context before scaling: in the table, beside it, or where neither says it ``own`` or the context."""
    beside, said = values.get(_ORIGINAL), table.get(_ORIGINAL)
    beside = own or None if beside is None else beside
    if beside is not None and said is not None and beside != said:
        how = "" if _ORIGINAL in values else ", as it is where nothing says it"
        raise UserError(f"{where}: {_ORIGINAL} = {beside!r}{how}, but {said!r} in {place}: expected one value")
    return block_size if beside is None and said is None else beside if said is None else said


def _attention(where: str, place: str, table: Mapping[str, Any], made: Mapping[str, Any], block_size: int) -> float:
    """rope_attention: 0 where it is what follows from the factor that ``rotary.attention`` takes."""
    given, original = table.get("attention_factor"), made["rope_original"]
    usual = rotary.usual_attention(made["rope_scaling"], made.get("rope_factor", block_size / original), original)
    if given is not None:
        found = typed(where, f"{place}.attention_factor", "rope_attention", given)
    elif made["rope_scaling"] == "longrope":
        factor = table.get("factor")
        found = usual
        if factor is not None:
            factor = typed(where, f"{place}.factor", "rope_factor", factor)
            found = rotary.usual_attention("longrope", factor, original)
        for key in ("short_mscale", "long_mscale"):
            if table.get(key, found) != found:
                said = f"{place}.{key} = {table[key]!r}"
                raise UserError(f"{where}: {said} is not supported: transformers does not read it and takes {found}")
    else:
        scales = [table.get("mscale"), table.get("mscale_all_dim")]
        found = usual
        if all(scales):
            scales = [typed(where, f"{place}.mscale", "rope_attention", each) for each in scales]
            one, other = (rotary.usual_attention("yarn", made["rope_factor"], original, each) for each in scales)
            found = one / other
    return 0.0 if found == usual else found


def write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Both spellings: ``rope_parameters`` for transformers 5, keys of their own for older readers and mlx-lm."""
    rope, kind = family.rope, "default" if config.rope_scaling == "none" else config.rope_scaling
    assert rope
    scaling = {key: getattr(config, ours) for key, ours in _SCALING[kind].items()}
    scaling |= {key: list(value) for key, value in scaling.items() if isinstance(value, tuple)}
    if config.rope_attention:
        scaling["attention_factor"] = config.rope_attention
    table = {"rope_type": kind, "rope_theta": config.rope_theta} | scaling
    made: dict[str, Any] = {rope.theta_key: config.rope_theta}
    if scaling:
        made["rope_scaling"] = {"rope_type": kind} | scaling
    if kind == "longrope":
        made["rope_scaling"]["type"] = kind  # mlx-lm looks for it under the older key alone
        made[_ORIGINAL] = config.rope_original
    if kind == "dynamic":
        made[family.fields["block_size"]] = config.rope_original
    if rope.part is not None:
        part = config.rotary_dim / config.head_dim
        while int(config.head_dim * part) < config.rotary_dim:
            part = math.nextafter(part, 1.0)
        made[rope.part_key] = table["partial_rotary_factor"] = part
    if rope.local:
        made["rope_local_base_freq"] = config.rope_local_theta
        table = {FULL: table, SLIDING: {"rope_type": "default", "rope_theta": config.rope_local_theta}}
    return made | {"rope_parameters": table}


def read_layers(where: str, family: Family, values: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """no_rope, window and window_layers."""
    made: dict[str, Any] = {}
    if "no_rope" not in family.fixed:
        made["no_rope"] = _no_rope(where, values, n_layer, family.no_rope_every)
    types = values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != n_layer:
            raise UserError(f"{where}: layer_types = {types!r}: expected a list of {n_layer}, one a layer")
        able = (FULL, SLIDING) if family.windows else (FULL,)
        for kind in types:
            if kind not in able:
                expected = " or ".join(repr(name) for name in able)
                raise UserError(f"{where}: layer_types: {kind!r} is not supported: expected {expected} in every layer")
    if family.windows and family.windows.nested:
        return made | _nested_layers(where, family.windows, values, n_layer)
    if family.windows is None:
        if types is None and values.get("use_sliding_window"):
            raise UserError(f"{where}: use_sliding_window = true is not supported without layer_types: expected false")
        return made
    window = values.get("sliding_window", family.windows.absent)
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"{where}: sliding_window = {window!r}: expected a positive number or null")
    if family.windows.switch and not values.get("use_sliding_window", False):
        if types and SLIDING in types:
            raise UserError(f"{where}: layer_types has {SLIDING!r}, but use_sliding_window is not true")
        window = None
    if types is None:
        types = _types(where, family.windows, values, n_layer, window, made.get("no_rope"))
    elif not family.windows.types and set(types) != {FULL if window is None else SLIDING}:
        raise UserError(f"{where}: layer_types does not go with sliding_window = {window!r}, which is for all layers")
    layers = tuple(n for n, kind in enumerate(types) if kind == SLIDING)
    if layers and window is None:
        raise UserError(f"{where}: layer_types has {SLIDING!r}, but sliding_window is null")
    return made | {"window": window if layers else 0, "window_layers": layers}


def _nested_layers(where: str, windows: Windows, values: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """GPT-Neo's attention_types: [[kinds of blocks, how many times], ...], kinds global and local."""
    found, kinds = values.get("attention_types"), list[str]()
    for item in [[["global", "local"], 12]] if found is None else found if isinstance(found, list) else [found]:
        fits = isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and type(item[1]) is int
        if not fits or not 0 <= item[1] <= 10_000 or not all(kind in ("global", "local") for kind in item[0]):
            expected = "lists of kinds, global or local, and how many times they come"
            raise UserError(f"{where}: attention_types = {found!r}: expected {expected}")
        kinds += item[0] * item[1]
    if len(kinds) != n_layer:
        said = "" if found is not None else ", as they are where nothing says it,"
        raise UserError(f"{where}: attention_types{said} has {len(kinds)} blocks: expected {n_layer}")
    window = values.get(windows.key, windows.absent)
    if type(window) is not int or window < 1:
        raise UserError(f"{where}: {windows.key} = {window!r}: expected a positive number")
    layers = tuple(n for n, kind in enumerate(kinds) if kind == "local")
    return {"window": window if layers else 0, "window_layers": layers}


def _no_rope(where: str, values: Mapping[str, Any], n_layer: int, absent: int) -> tuple[int, ...]:
    turns = values.get("no_rope_layers")
    if turns is None:
        every = values.get("no_rope_layer_interval", absent)
        if type(every) is not int or every < 1:
            raise UserError(f"{where}: no_rope_layer_interval = {every!r}: expected a positive number")
        return tuple(range(every - 1, n_layer, every))
    if not isinstance(turns, list) or len(turns) < n_layer or any(turn not in (0, 1) for turn in turns):
        raise UserError(f"{where}: no_rope_layers = {turns!r}: expected {n_layer} values, 1 where a layer has rope")
    return tuple(n for n in range(n_layer) if not turns[n])


def _types(
    where: str,
    windows: Windows,
    values: Mapping[str, Any],
    n_layer: int,
    window: int | None,
    no_rope: tuple[int, ...] | None,
) -> list[str]:
    """layer_types where config.json has none."""
    if windows.every:
        every = values.get(windows.every_key, windows.every) if windows.every_key else windows.every
        if type(every) is not int or every < 1:
            raise UserError(f"{where}: {windows.every_key} = {every!r}: expected a positive number")
        return [SLIDING if (n + 1) % every else FULL for n in range(n_layer)]
    if window is None:
        return [FULL] * n_layer
    if not windows.types:
        return [SLIDING] * n_layer
    if no_rope is not None:
        return [SLIDING if n in no_rope else FULL for n in range(n_layer)]
    first = values.get("max_window_layers", 28)
    if type(first) is not int:
        raise UserError(f"{where}: max_window_layers = {first!r}: expected int")
    return [SLIDING if n >= first else FULL for n in range(n_layer)]


def write_layers(config: ModelConfig, family: Family) -> dict[str, Any]:
    """no_rope_layers, sliding_window and layer_types, with the older keys where they say the same."""
    made: dict[str, Any] = {}
    if "no_rope" not in family.fixed:
        made["no_rope_layers"] = [int(n not in config.no_rope) for n in range(config.n_layer)]
    windows = family.windows
    if windows is None:
        return made
    if windows.nested:
        kinds = ["local" if n in config.window_layers else "global" for n in range(config.n_layer)]
        turns = kinds == ["global", "local"] * (config.n_layer // 2)
        types = [[["global", "local"], config.n_layer // 2]] if turns else [[kinds, 1]]
        return {windows.key: config.window or windows.absent, "attention_types": types, "attention_layers": kinds}
    # transformers builds the mask of a window also where no block looks through it
    made["sliding_window"] = config.window or (windows.absent if windows.every else None)
    if windows.switch:
        made["use_sliding_window"] = config.window > 0
    if windows.types:
        made["layer_types"] = [SLIDING if n in config.window_layers else FULL for n in range(config.n_layer)]
    if windows.every_key:  # a reader of this key alone fails over n_layer + 1, which is better than another model
        made[windows.every_key] = full_every(config) or config.n_layer + 1
    if windows.switch and "no_rope" in family.fixed:
        tail = config.window_layers == tuple(range(config.n_layer - len(config.window_layers), config.n_layer))
        made["max_window_layers"] = config.n_layer - len(config.window_layers) if tail else config.n_layer
    return made


def full_every(config: ModelConfig) -> int:
    """n if exactly every n-th block sees everything, else 0."""
    full = [n for n in range(config.n_layer) if n not in config.window_layers]
    every = full[0] + 1 if full else config.n_layer + 1
    return every if full == list(range(every - 1, config.n_layer, every)) else 0
