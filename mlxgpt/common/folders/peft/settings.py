"""What PEFT's adapter_config.json asks for: which modules, which ranks and scales; what is not computed is refused."""

import re
from collections.abc import Mapping
from typing import Any

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

READ = {
    "peft_type", "task_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "modules_to_save",
    "init_lora_weights", "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip
IDLE = {  # says nothing about what the tensors compute; *_config: how they began, which init_lora_weights decides
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "fan_in_fan_out",
    "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "_custom_doc", "fine_tune_type", "num_layers",
    "lora_parameters", "mlxgpt",
}  # fmt: skip
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it is
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")


def check(values: Mapping[str, Any], where: str) -> None:
    """Refuses by name what this reader does not compute.

    Raises:
        UserError: another method, an initialization that changes the base, a key that is set and not known.
    """
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {values.get('peft_type')!r} is not supported: expected 'LORA'")
    if values.get("task_type") not in _TASKS:
        expected = ", ".join(str(task) for task in _TASKS[1:])
        raise UserError(f"{where}: task_type {values['task_type']!r} is not supported: expected one of {expected}")
    init = values.get("init_lora_weights", True)
    if init not in _INITS:
        raise UserError(
            f"{where}: init_lora_weights {init!r} changes the base model: save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for key, value in values.items():
        if key not in READ | IDLE and value:
            raise UserError(f"{where}: {key} = {str(value)[:60]} is not supported: expected it unset")
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = values.get(key)
        if value is None or type(value) not in kinds or not 0 < value < 2**31:
            raise UserError(f"{where}: {key} = {value!r}: expected a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        kinds = (int,) if key == "rank_pattern" else (int, float)
        if not isinstance(pattern, dict) or not all(type(v) in kinds and 0 < v < 2**31 for v in pattern.values()):
            raise UserError(f"{where}: {key}: expected positive numbers by name")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError(f"{where}: bias = {values['bias']!r}: expected none, all or lora_only")


def _strings(values: Mapping[str, Any], key: str, where: str) -> list[str] | str:
    found = values.get(key)
    if found is None:
        return []
    if isinstance(found, str) or (isinstance(found, list) and all(isinstance(item, str) for item in found)):
        return found
    raise UserError(f"{where}: {key}: expected names, or one regular expression")


def _search(pattern: str, name: str, where: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: {pattern[:60]!r} is not a regular expression: {error}") from None


def targets(
    values: Mapping[str, Any], names: Mapping[str, str], there: set[str], config: ModelConfig, where: str
) -> set[str]:
    """The modules that PEFT would give an update.

    Args:
        values: adapter_config.json.
        names: what transformers calls a module -> our path.
        there: those that have an update in the file.
        config: the model's.
        where: the folder, for messages.
    """
    wanted, excluded = (_strings(values, key, where) for key in ("target_modules", "exclude_modules"))
    kept = _strings(values, "modules_to_save", where)
    layers = values.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers or []
    patterns = _strings(values, "layers_pattern", where)
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{where}: layers_to_transform: expected numbers of layers")

    def ends(name: str, given: list[str] | str) -> bool:
        if isinstance(given, str):
            return _search(given, name, where)
        return any(name == end or name.endswith(f".{end}") for end in given)

    def layered(name: str) -> bool:
        if not layers or name in wanted:
            return True
        middles = [rf"(?:.*?\.)?(?:{pattern})" for pattern in patterns] or [r".*?\.[^.]*"]
        return any(_search(rf"{m}\.({'|'.join(map(str, layers))})\..*", name, where) for m in middles)

    if values.get("target_modules") is None:  # PEFT's defaults of the architecture, which may change: as they were
        chosen = set(there)
    elif isinstance(wanted, str) and wanted.lower() == "all-linear":
        table = params.table(config)
        chosen = {name for name, path in names.items() if path.startswith("h.") and table[f"{path}.weight"].adaptable}
    elif isinstance(wanted, str):
        chosen = {name for name in names if ends(name, wanted)}
    else:
        chosen = {name for name in names if ends(name, wanted) and layered(name)}
    inside = [rf"(.*\.)?({each})(\..*)?" for each in ([kept] if isinstance(kept, str) else kept)]
    chosen = {n for n in chosen if not ends(n, excluded) and not any(_search(each, n, where) for each in inside)}
    return chosen | tied_head(values, names, config, chosen)


def tied_head(values: Mapping[str, Any], names: Mapping[str, str], config: ModelConfig, chosen: set[str]) -> set[str]:
    """The head, which PEFT ties to a chosen embedding where it is told to, and knows it as one by its name."""
    embedding, head = (next((n for n, path in names.items() if path == each), "") for each in ("wte", "lm_head"))
    known = embedding.endswith("embed_tokens") and embedding in chosen
    return {head} if head and known and config.tied and values.get("ensure_weight_tying") else set()


def saved(values: Mapping[str, Any], names: Mapping[str, str], config: ModelConfig, where: str) -> set[str]:
    """The modules that train whole, also as parts of one that does."""
    wanted = _strings(values, "modules_to_save", where)
    wanted = [wanted] if isinstance(wanted, str) else wanted

    def whole(name: str) -> bool:
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(each.endswith(end) for each in above for end in wanted)

    chosen = {name for name in names if whole(name)}
    return chosen | tied_head(values, names, config, chosen)


def tokens(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, list[int]]:
    """The ids of the rows that train, by our path of the embedding or the head.

    Raises:
        UserError: they are no ids, or of a module that has none.
    """
    given = values.get("trainable_token_indices")
    if given is None:
        return {}
    if isinstance(given, list):
        given = {next(name for name, path in names.items() if path == "wte"): given}
    made: dict[str, list[int]] = {}
    for end, ids in given.items() if isinstance(given, dict) else [("", None)]:
        if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 2**31 for each in ids):
            raise UserError(f"{where}: trainable_token_indices: expected token ids, or lists of them by module")
        paths = [path for name, path in names.items() if name.endswith(end)]
        if not paths or not set(paths) <= {"wte", "lm_head"}:
            raise UserError(f"{where}: trainable_token_indices of {end!r}: expected the embedding or the head")
        if len(set(ids)) != len(ids):
            raise UserError(f"{where}: trainable_token_indices of {end!r}: an id is there twice")
        made |= dict.fromkeys(paths, ids)
    return made


def by_pattern(pattern: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """The value of the first pattern that means the module ``name``."""
    for key, value in (pattern or {}).items():
        if _search(rf"(.*\.)?({key})", name, "rank_pattern, alpha_pattern"):
            return value
    return usual
