"""Adapters as PEFT has them: adapter_model.safetensors, and the keys of adapter_config.json that belong to it.

    base_model.model.MODULE.lora_A.weight (r, n_in)   .lora_B.weight (n_out, r)   .lora_magnitude_vector (n_out,)
    base_model.model.MODULE.lora_embedding_A (r, V)   .lora_embedding_B (C, r)    of an embedding
    base_model.model.MODULE.weight  .bias                                         modules_to_save
    base_model.model.MODULE.base_layer.bias                                       bias: lora_only, all

MODULE is what transformers calls a module in memory. Ranks and alphas may differ by module (rank_pattern,
alpha_pattern); what is adapted is target_modules, as ends of names or as one regular expression.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, params
from mlxgpt.common.model.adapters import Target

TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KINDS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base_weight",
    "original_module.bias": "base_bias",
    "modules_to_save.bias": "bias_again",
    "base_layer.bias": "bias",
    "weight": "weight",
    "bias": "bias",
}
_NAME = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+?)\.(?P<kind>{'|'.join(map(re.escape, _KINDS))})")
_READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "modules_to_save", "init_lora_weights",
}  # fmt: skip
_IDLE = {  # says nothing about what the tensors compute
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "fan_in_fan_out", "lora_dropout", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
    "eva_config", "_custom_doc", "fine_tune_type", "num_layers", "lora_parameters", "mlxgpt",
}  # fmt: skip
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it is


def module(config: ModelConfig, path: str) -> str:
    """What transformers calls our module ``path`` in memory."""
    family = families.family_of(config)
    foreign = families.to_foreign(config, f"{path}.weight")[0].removesuffix(".weight")
    for other, filed in family.aliases.items():
        if foreign == filed:
            return other
    return foreign if path in ("lm_head", "score") or not family.prefixes else family.prefixes[0] + foreign


def modules(config: ModelConfig) -> dict[str, str]:
    """What transformers calls a module that has parameters -> our path; the head also where it is tied."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in params.table(config))
    head = [] if "lm_head" in paths or config.labels else ["lm_head"]
    return {module(config, path): path for path in [*paths, *head]}


def suffixes(wanted: set[str], names: list[str]) -> list[str] | None:
    """The shortest ends of names that all of ``wanted``, and none other of ``names``, have; None where none do."""
    found: dict[str, None] = {}
    for name in names:
        if name not in wanted:
            continue
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        good = (end for end in ends if all(n in wanted for n in names if n == end or n.endswith(f".{end}")))
        found[next(good)] = None
    made = list(found)
    return None if any(part.isdigit() for end in made for part in end.split(".")) else made


def regex(wanted: list[str]) -> str:
    """One expression for exactly these names: blocks with the same modules share an alternative."""
    layers: dict[tuple[str, ...], list[str]] = {}
    ends: dict[tuple[str, str], list[str]] = {}
    single = []
    for name in wanted:
        match = re.fullmatch(r"(.*?\.)(\d+)\.(.*)", name)
        if match:
            ends.setdefault((match[1], match[2]), []).append(match[3])
        else:
            single.append(re.escape(name))
    for (prefix, layer), modules in ends.items():
        layers.setdefault((prefix, *modules), []).append(layer)
    made = [
        rf"{re.escape(prefix)}({'|'.join(numbers)})\.({'|'.join(map(re.escape, modules))})"
        for (prefix, *modules), numbers in layers.items()
    ]
    return "|".join(made + single)


def encode(
    config: ModelConfig,
    method: str,
    targets: Mapping[str, Target],
    arrays: Mapping[str, np.ndarray],
    rslora: bool = False,
    dropout: float = 0.0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys of adapter_config.json, and the tensors by PEFT's names, of an adapter in our names and layout.

    Raises:
        UserError: PEFT cannot hold it: see ``gap``.
    """
    reason = gap(config, method, targets, arrays)
    if reason:
        raise UserError(reason)
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for path, target in targets.items():
        name = module(config, path)
        kinds = ("lora_embedding_A", "lora_embedding_B") if path == "wte" else ("lora_A.weight", "lora_B.weight")
        for kind, ours in zip(kinds, ("lora_a", "lora_b"), strict=True):
            tensors[f"{_PREFIX}{name}.{kind}"] = arrays[f"{path}.{ours}"]
        if method == "dora":
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = arrays[f"{path}.magnitude"]
        ranks[name], alphas[name] = target.rank, tidy(target.scale * (target.rank**0.5 if rslora else target.rank))
        if path == "wte" and config.tied:  # the same update of the head, which PEFT knows as a module of its own
            head = module(config, "lm_head")
            tensors[f"{_PREFIX}{head}.lora_A.weight"] = arrays["wte.lora_b"].T
            tensors[f"{_PREFIX}{head}.lora_B.weight"] = arrays["wte.lora_a"].T
            ranks[head], alphas[head] = ranks[name], alphas[name]
    saved, bias = _whole(config, targets, arrays)
    for name in (name for name in params.table(config) if name in arrays):
        path, _, leaf = name.rpartition(".")
        turned = leaf == "weight" and families.to_foreign(config, name)[1]
        inner = "base_layer." if path in targets else ""
        tensors[f"{_PREFIX}{module(config, path)}.{inner}{leaf}"] = arrays[name].T if turned else arrays[name]
        if path == "wte" and config.tied:
            tensors[f"{_PREFIX}{module(config, 'lm_head')}.weight"] = arrays[name]
            saved.append("lm_head")
    names = list(modules(config))
    rank, alpha = usual(ranks, 8), usual(alphas, 16)
    both = "wte" in targets or "wte" in saved
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.labels else "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": suffixes(set(ranks), names) or regex([name for name in names if name in ranks]),
        "rank_pattern": by_suffix(ranks, rank),
        "alpha_pattern": by_suffix(alphas, alpha),
        "fan_in_fan_out": any(families.to_foreign(config, f"{path}.weight")[1] for path in targets),
        "use_rslora": rslora,
        "use_dora": method == "dora",
        "bias": bias,
        "modules_to_save": [module(config, path) for path in saved] or None,
        "init_lora_weights": True,
        "ensure_weight_tying": config.tied and both,
    }
    return values, tensors


def labels(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The labels of an adapter that makes a classifier, as transformers numbers them; () where it makes none."""
    score = tensors.get(f"{_PREFIX}score.weight")
    if values.get("task_type") != "SEQ_CLS" or score is None or score.ndim != 2:
        return ()
    return tuple(f"LABEL_{n}" for n in range(len(score)))


def gap(config: ModelConfig, method: str, targets: Mapping[str, Target], arrays: Mapping[str, Any]) -> str | None:
    """Why PEFT cannot hold an adapter of these targets and whole tensors (names); None where it can."""
    if not targets:
        return "PEFT needs an adapted matrix beside what trains whole"
    if method == "dora" and "wte" in targets:
        return "dora on the embedding: PEFT normalizes its columns, here and in mlx-lm its rows are"
    try:
        _whole(config, targets, arrays)
    except UserError as error:
        return str(error)
    return None


def _whole(config: ModelConfig, targets: Mapping[str, Target], names: Mapping[str, Any]) -> tuple[list[str], str]:
    """The modules that train whole, and which other biases do: none, lora_only or all."""
    table = params.table(config)
    saved = [name.removesuffix(".weight") for name in table if name in names and name.endswith(".weight")]
    rest = {name for name in table if name.endswith(".bias") and name.removesuffix(".bias") not in saved}
    given = {name for name in rest if name in names}
    adapted = {name for name in rest if name.removesuffix(".bias") in targets}
    if not given:
        return saved, "none"
    if given == rest:
        return saved, "all"
    if given == adapted:
        return saved, "lora_only"
    raise UserError(f"PEFT trains the biases of all modules, or of the adapted ones: not {min(given ^ adapted)} apart")


def tidy(value: float) -> int | float:
    """A whole number where rounding hides one: PEFT's own files say 16, not 16.000000000000004."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value


def usual(values: Mapping[str, Any], otherwise: Any) -> Any:
    """The value that most have."""
    return Counter(values.values()).most_common(1)[0][0] if values else otherwise


def by_suffix(values: Mapping[str, float], most: float) -> dict[str, float]:
    """What differs from what ``most`` have, by ends of names where all that end so agree, else by whole names."""
    made: dict[str, float] = {}
    for value in dict.fromkeys(values.values()):
        if value == most:
            continue
        wanted = {name for name, other in values.items() if other == value}
        made |= dict.fromkeys(suffixes(wanted, list(values)) or sorted(wanted), value)
    return made


def decode(
    values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str
) -> tuple[str, dict[str, Target], dict[str, np.ndarray]]:
    """Method, targets, and tensors by our names in our layout, of PEFT's adapter_config.json and tensors.

    Raises:
        UserError: the config asks for what is not supported, or does not fit the tensors, or they not the model.
    """
    _check_values(values, where)
    known = modules(config)
    loose = {families.strip(config, f"{name}.weight"): path for name, path in known.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        match = _NAME.fullmatch(name)
        path = loose.get(families.strip(config, f"{match['module']}.weight")) if match else None
        if match is None or path is None:
            raise UserError(f"{where}: unexpected tensor {name} {list(array.shape)}: no module of this model has it")
        held, kind = found.setdefault(path, {}), _KINDS[match["kind"]]
        if kind in held:
            raise UserError(f"{where}: tensor {name} is there twice, under two names")
        held[kind] = array
    adapted = _matched(values, known, config, where)
    targets: dict[str, Target] = {}
    made: dict[str, np.ndarray] = {}
    method = "dora" if values.get("use_dora") else "lora"
    needed = ["lora_a", "lora_b"] + ["magnitude"] * (method == "dora")
    for name, path in known.items():
        held = found.get(path, {})
        lora = {kind: held.pop(kind) for kind in ("lora_a", "lora_b", "magnitude") if kind in held}
        if name not in adapted:
            if lora:
                raise UserError(f"{where}: unexpected tensor {name}.{min(lora)}: target_modules does not name {name}")
            continue
        if not lora and name in _tied_head(values, config, adapted):
            lora = {"lora_a": made["wte.lora_b"].T, "lora_b": made["wte.lora_a"].T}  # PEFT saves a tied update once
        missing = [kind for kind in needed if kind not in lora]
        if missing:
            raise UserError(f"{where}: {missing[0]} of {name} is missing, which target_modules names")
        if "magnitude" in lora and method != "dora":
            raise UserError(f"{where}: unexpected magnitude of {name}: use_dora is not true")
        rank = _by_pattern(values.get("rank_pattern"), name, values["r"])
        alpha = _by_pattern(values.get("alpha_pattern"), name, values["lora_alpha"])
        targets[path] = _target(
            config, path, lora, rank, alpha / (rank**0.5 if values.get("use_rslora") else rank), where
        )
        made |= {f"{path}.{kind}": array for kind, array in lora.items()}
    if "wte" in targets and method == "dora":
        raise UserError(f"{where}: dora on the embedding: PEFT normalizes its columns, which is not supported")
    made |= _saved(values, found, config, targets, where)
    if config.tied:
        _tie(targets, made, where)
    return method, targets, made


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuses by name what this reader does not compute."""
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {values.get('peft_type')!r} is not supported: expected 'LORA'")
    init = values.get("init_lora_weights", True)
    if not (init in _INITS or (isinstance(init, str) and init.startswith("lora_init"))):
        raise UserError(
            f"{where}: init_lora_weights {init!r} changes the base model: save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for key, value in values.items():
        if key not in _READ | _IDLE and value:
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


def _matched(values: Mapping[str, Any], names: Mapping[str, str], config: ModelConfig, where: str) -> set[str]:
    """The modules that PEFT would give an adapter."""
    wanted, excluded = (_strings(values, key, where) for key in ("target_modules", "exclude_modules"))
    saved = _strings(values, "modules_to_save", where)
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

    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        table = params.table(config)
        chosen = {name for name, path in names.items() if path.startswith("h.") and table[f"{path}.weight"].adaptable}
    elif isinstance(wanted, str):
        chosen = {name for name in names if ends(name, wanted)}
    else:
        chosen = {name for name in names if ends(name, wanted) and layered(name)}
    chosen = {name for name in chosen if not ends(name, excluded) and not (saved and ends(name, saved))}
    return chosen | _tied_head(values, config, chosen)


def _tied_head(values: Mapping[str, Any], config: ModelConfig, chosen: set[str]) -> set[str]:
    """The head, which PEFT ties to a chosen embedding where it is told to, and knows it as one by its name."""
    embedding = module(config, "wte")
    known = embedding.endswith("embed_tokens") and embedding in chosen
    return {module(config, "lm_head")} if known and config.tied and values.get("ensure_weight_tying") else set()


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    for key, value in (pattern or {}).items():
        if _search(rf"(.*\.)?({key})", name, "rank_pattern, alpha_pattern"):
            return value
    return usual


def _target(
    config: ModelConfig, path: str, lora: Mapping[str, np.ndarray], rank: int, scale: float, where: str
) -> Target:
    """The target whose tensors these are, once their shapes are those of the model's matrix."""
    if path == "lm_head" and config.tied:
        n_out, n_in = config.vocab_size, config.n_embd
    else:
        table = params.table(config)
        if not table[f"{path}.weight"].adaptable:
            raise UserError(f"{where}: {path} is no matrix that an adapter can change")
        n_out, n_in = table[f"{path}.weight"].shape
    magnitude = (n_out,)
    if path == "wte":
        n_out, n_in = n_in, n_out
    for kind, shape in (("lora_a", (rank, n_in)), ("lora_b", (n_out, rank)), ("magnitude", magnitude)):
        if kind in lora and lora[kind].shape != shape:
            raise UserError(
                f"{where}: {kind} of {path} has shape {list(lora[kind].shape)}, expected {list(shape)} by the model "
                "and the rank"
            )
    return Target(n_out, n_in, rank, float(scale))


def _saved(
    values: Mapping[str, Any],
    found: Mapping[str, Mapping[str, np.ndarray]],
    config: ModelConfig,
    targets: Mapping[str, Target],
    where: str,
) -> dict[str, np.ndarray]:
    """modules_to_save and biases, by our names."""
    made: dict[str, np.ndarray] = {}
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    ours = params.table(config)
    known, wanted = modules(config), _strings(values, "modules_to_save", where)
    chosen = {name for name in known if any(name.endswith(end) for end in wanted)}
    chosen |= _tied_head(values, config, chosen)
    for name, path in known.items():
        for kind, array in found.get(path, {}).items():
            full = f"{path}.{kind}"
            if kind == "base_weight":
                made[f"{path}.base"] = array
            if kind.startswith(("base", "bias_again")):
                continue
            shape = shapes.get(full, (config.vocab_size, config.n_embd) if full == "lm_head.weight" else None)
            if kind == "weight":
                if name not in chosen:
                    raise UserError(f"{where}: unexpected tensor {name}.weight: modules_to_save does not name it")
                array = array.T if families.to_foreign(config, full)[1] else array
            elif values.get("bias", "none") == "none" and name not in chosen:
                raise UserError(f"{where}: unexpected tensor {name}.bias: bias is none")
            if path in ("wte", "lm_head") and shape and array.ndim == len(shape) and array.shape[1:] == shape[1:]:
                shape = array.shape  # a vocabulary may have grown: who reads on holds it against the rest
            if shape is None or array.shape != shape:
                raise UserError(f"{where}: {name}.{kind} has shape {list(array.shape)}, expected {shape}")
            if full in ours or path == "lm_head":
                made[full] = array
            elif array.any():
                raise UserError(f"{where}: {name}.{kind} is not zero, but the model has no such bias")
    for name, path in known.items():
        if name in chosen and f"{path}.weight" not in made:
            raise UserError(f"{where}: {name}.weight is missing, which modules_to_save names")
    return made


def _tie(targets: dict[str, Target], made: dict[str, np.ndarray], where: str) -> None:
    """Makes one of embedding and head, which a tied model has once; refuses where they are not equal."""
    if ("wte" in targets) != ("lm_head" in targets):
        alone = "embedding" if "wte" in targets else "head"
        raise UserError(f"{where}: only the {alone} is adapted, but embedding and head are tied in this model")
    if "wte" in targets:
        head = targets.pop("lm_head")
        same = head.scale == targets["wte"].scale and np.array_equal(made.pop("lm_head.lora_a"), made["wte.lora_b"].T)
        if not same or not np.array_equal(made.pop("lm_head.lora_b"), made["wte.lora_a"].T):
            raise UserError(f"{where}: embedding and head are adapted apart, but they are tied in this model")
    if ("wte.weight" in made) != ("lm_head.weight" in made):
        alone = "embedding" if "wte.weight" in made else "head"
        raise UserError(f"{where}: only the {alone} is trained, but embedding and head are tied in this model")
    if "wte.weight" in made and not np.array_equal(made.pop("lm_head.weight"), made["wte.weight"]):
        raise UserError(f"{where}: embedding and head are trained apart, but they are tied in this model")
    made.pop("lm_head.base", None)
