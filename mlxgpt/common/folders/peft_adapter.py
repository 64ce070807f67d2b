"""Adapters as PEFT has them: adapter_model.safetensors, and the keys of adapter_config.json that belong to it.

    base_model.model.MODULE.lora_A.weight (r, n_in)   .lora_B.weight (n_out, r)   .lora_magnitude_vector (n_out,)
    base_model.model.MODULE.lora_embedding_A (r, V)   .lora_embedding_B (C, r)    of an embedding
    base_model.model.MODULE.token_adapter.trainable_tokens_delta (k, C)           its rows trainable_token_indices
    base_model.model.MODULE.weight  .bias                                         modules_to_save
    base_model.model.MODULE.base_layer.bias                                       bias: lora_only, all
    base_model.model.MODULE.base_layer.weight, or .weight alone                   the base's, where it was resized

MODULE is what transformers calls a module in memory (peft/names.py). Ranks and alphas may differ by module
(rank_pattern, alpha_pattern); what is adapted is target_modules (peft/settings.py). Where the base is tied, embedding
and head may be changed apart: then the head has weights of its own.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.adapter import VOCABULARY, Adapter
from mlxgpt.common.folders.peft import names as peft_names
from mlxgpt.common.folders.peft import settings as peft_settings
from mlxgpt.common.folders.peft.names import PREFIX, by_suffix, module, modules, regex, suffixes, tidy, usual
from mlxgpt.common.model import families, params
from mlxgpt.common.model.adapters import Target

TENSORS = "adapter_model.safetensors"
Tensors = dict[str, np.ndarray]
_CURE = "expected PEFT's save_pretrained(..., save_embedding_layers=True)"


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
            tensors[f"{PREFIX}{name}.{kind}"] = arrays[f"{path}.{ours}"]
        if method == "dora":
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = arrays[f"{path}.magnitude"]
        ranks[name], alphas[name] = target.rank, tidy(target.scale * (target.rank**0.5 if rslora else target.rank))
        if path == "wte" and config.tied:  # the same update of the head, which PEFT knows as a module of its own
            head = module(config, "lm_head")
            tensors[f"{PREFIX}{head}.lora_A.weight"] = arrays["wte.lora_b"].T
            tensors[f"{PREFIX}{head}.lora_B.weight"] = arrays["wte.lora_a"].T
            ranks[head], alphas[head] = ranks[name], alphas[name]
    saved, bias = _whole(config, targets, arrays)
    for name in (name for name in params.table(config) if name in arrays):
        path, _, leaf = name.rpartition(".")
        turned = leaf == "weight" and families.to_foreign(config, name)[1]
        inner = "base_layer." if path in targets else ""
        for each in (path, "lm_head") if path == "wte" and config.tied else (path,):
            tensors[f"{PREFIX}{module(config, each)}.{inner}{leaf}"] = arrays[name].T if turned else arrays[name]
        saved += ["lm_head"] if path == "wte" and config.tied and not inner else []
    tokens = {path: arrays[f"{path}.tokens"].tolist() for path in ("wte", "lm_head") if f"{path}.tokens" in arrays}
    for path in tokens:
        tensors[f"{PREFIX}{module(config, path)}.token_adapter.trainable_tokens_delta"] = arrays[f"{path}.rows"]
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
        "trainable_token_indices": {module(config, path): ids for path, ids in tokens.items()} or None,
        "init_lora_weights": True,
        "ensure_weight_tying": config.tied and both,
    }
    return values, tensors


def labels(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The labels of an adapter that makes a classifier, as transformers numbers them; () where it makes none."""
    score = re.compile(r"(.*\.)?score\.(modules_to_save\.)?([^.]+\.)?weight")
    found = [array for name, array in tensors.items() if score.fullmatch(name) and array.ndim == 2]
    return tuple(f"LABEL_{n}" for n in range(len(found[0]))) if found and values.get("task_type") == "SEQ_CLS" else ()


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
    saved = [path for path in saved if path not in targets]
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


def decode(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str) -> Adapter:
    """The adapter that PEFT's adapter_config.json and tensors are, for a base of ``config``.

    Raises:
        UserError: the config asks for what is not supported, or does not fit the tensors, or they not the model.
    """
    peft_settings.check(values, where)
    found, names = _by_module(tensors, config, where)
    tokens = peft_settings.tokens(values, names, where)
    there = {name for name, path in names.items() if "lora_a" in found.get(path, {})}
    adapted = peft_settings.targets(values, names, there, config, where)
    tied = peft_settings.tied_head(values, names, config, adapted)
    saved = peft_settings.saved(values, names, config, where)
    known, config = config.vocab_size, _resized(found, tokens, config, where)
    method = "dora" if values.get("use_dora") else "lora"
    made = Adapter(method, {}, {}, vocab_size=config.vocab_size if config.vocab_size != known else None)
    for name, path in names.items():
        held = found.get(path, {})
        lora = {kind: held.pop(kind) for kind in ("lora_a", "lora_b", "magnitude") if kind in held}
        if name not in adapted:
            if lora:
                raise UserError(f"{where}: unexpected tensor {name}.{min(lora)}: target_modules does not name {name}")
            continue
        if not lora and name in tied:
            lora = {"lora_a": made.params["wte.lora_b"].T, "lora_b": made.params["wte.lora_a"].T}  # saved once
        missing = [kind for kind in ("lora_a", "lora_b", "magnitude") if kind not in lora]
        if missing and not (missing == ["magnitude"] and method == "lora"):
            raise UserError(f"{where}: {missing[0]} of {name} is missing, which target_modules names")
        if "magnitude" in lora and method != "dora":
            raise UserError(f"{where}: unexpected magnitude of {name}: use_dora is not true")
        rank = peft_settings.by_pattern(values.get("rank_pattern"), name, values["r"])
        alpha = peft_settings.by_pattern(values.get("alpha_pattern"), name, values["lora_alpha"])
        scale = alpha / (rank**0.5 if values.get("use_rslora") else rank)
        made.targets[path] = _target(config, path, lora, rank, scale, where)
        made.params |= {f"{path}.{kind}": array for kind, array in lora.items()}
    if "wte" in made.targets and method == "dora":
        raise UserError(f"{where}: dora on the embedding: PEFT normalizes its columns, which is not supported")
    _add_weights(made, values, found, names, saved, config, where)
    _add_rows(made, found, tokens, config, where)
    made.apart = config.tied and not _tied(made)
    _check_vocabulary(made, known, dataclasses.replace(config, tied=config.tied and not made.apart), where)
    return made


def _by_module(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str
) -> tuple[dict[str, Tensors], dict[str, str]]:
    """The tensors by our path and kind, and what the file calls a module -> our path."""
    keys = peft_names.parse(config, tensors, where)
    found: dict[str, Tensors] = {}
    for name, key in keys.items():
        held = found.setdefault(key.path, {})
        if key.kind in held and not np.array_equal(held[key.kind], tensors[name]):
            raise UserError(f"{where}: tensor {name} is there twice, under two names")
        held |= {key.kind: tensors[name]} if key.kind else {}
    return found, peft_names.spelled(config, {key.path: key.module for key in keys.values()})


def _resized(
    found: Mapping[str, Tensors], tokens: Mapping[str, list[int]], config: ModelConfig, where: str
) -> ModelConfig:
    """``config`` with the vocabulary of the embedding and the head that the file holds."""
    kinds = ("weight", "saved_weight", "base_weight")
    held = {f"{path}.{kind}": found.get(path, {}).get(kind) for path in ("wte", "lm_head") for kind in kinds}
    sizes = {len(array): name for name, array in held.items() if array is not None and array.ndim == 2}
    if len(sizes) > 1:
        said = " and ".join(f"{name} has {size:,} rows" for size, name in sizes.items())
        raise UserError(f"{where}: {said}: expected one vocabulary")
    for path, kind, axis in (("wte", "lora_a", 1), ("lm_head", "lora_b", 0)):
        array = found.get(path, {}).get(kind)
        if not sizes and array is not None and array.ndim == 2 and array.shape[axis] != config.vocab_size:
            raise UserError(
                f"{where}: {kind} of {path} is for a vocabulary of {array.shape[axis]:,}, the base's is "
                f"{config.vocab_size:,}, and the file does not hold the resized {path}: {_CURE}"
            )
    most = max((max(ids) + 1 for ids in tokens.values() if ids), default=0)
    size = next(iter(sizes), max(most, config.vocab_size))
    if most > size:
        raise UserError(f"{where}: trainable_token_indices: {most - 1}: expected less than the vocabulary, {size:,}")
    return dataclasses.replace(config, vocab_size=size)


def _target(
    config: ModelConfig, path: str, lora: Mapping[str, np.ndarray], rank: int, scale: float, where: str
) -> Target:
    """The target whose tensors these are, once their shapes are those of the model's matrix."""
    table = params.table(dataclasses.replace(config, tied=False) if path == "lm_head" else config)
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


def _add_weights(
    made: Adapter,
    values: Mapping[str, Any],
    found: Mapping[str, Tensors],
    names: Mapping[str, str],
    saved: set[str],
    config: ModelConfig,
    where: str,
) -> None:
    """modules_to_save, biases, and what the file carries of the base's weights.

    A tied base has one matrix for both, so a carried one counts for embedding and head.
    """
    shapes = {name: param.shape for name, param in params.table(families.on_disk(config)).items()}
    shapes.setdefault("lm_head.weight", (config.vocab_size, config.n_embd))
    trained, base = Tensors(), Tensors()
    for name, path in names.items():
        held = found.get(path, {})
        for leaf, trains in (
            ("weight", name in saved),
            ("bias", name in saved or values.get("bias", "none") != "none"),
        ):
            full, plain = f"{path}.{leaf}", held.get(leaf)
            own = held.get(f"saved_{leaf}", plain if trains else None)
            if own is not None and plain is not None and not np.array_equal(own, plain):
                raise UserError(
                    f"{where}: {name}.{leaf} and {name}.modules_to_save.{leaf} differ: expected one of them"
                )
            carried = held.get(f"base_{leaf}", None if trains else plain)
            trained |= {full: own} if own is not None else {}
            base |= {full: carried} if carried is not None else {}
        if name in saved and f"{path}.weight" not in trained and f"{path}.weight" in shapes:
            if path != "lm_head" or not config.tied or "wte.weight" not in trained:
                raise UserError(f"{where}: {name}.weight is missing, which modules_to_save names")
            trained["lm_head.weight"] = trained["wte.weight"]  # PEFT saved what is tied once
    if config.tied:
        shared = [base[full] for full in ("wte.weight", "lm_head.weight") if full in base]
        if len(shared) == 2 and not np.array_equal(shared[0], shared[1]):
            raise UserError(
                f"{where}: embedding and head of the base differ in the file, but they are tied in this model"
            )
        base |= dict.fromkeys(("wte.weight", "lm_head.weight"), shared[0]) if shared else {}
    ours = params.table(config)
    for full, array in (base | trained).items():
        path, _, leaf = full.rpartition(".")
        array = array.T if leaf == "weight" and families.to_foreign(config, full)[1] else array
        if array.shape != shapes.get(full):
            raise UserError(f"{where}: {full} has shape {list(array.shape)}, expected {shapes.get(full)}")
        if full in ours or path == "lm_head":
            made.params[full] = array
        elif array.any():
            raise UserError(f"{where}: {full} is not zero, but the model has no such bias")
    made.carried = tuple(full for full in base if full not in trained and full in made.params)


def _add_rows(
    made: Adapter, found: Mapping[str, Tensors], tokens: Mapping[str, list[int]], config: ModelConfig, where: str
) -> None:
    """The rows that trainable_token_indices names; PEFT saves those of a tied head with the embedding's."""
    tokens, held = dict(tokens), {path: each["rows"] for path, each in found.items() if "rows" in each}
    if config.tied and "wte" in tokens and tokens.get("lm_head", tokens["wte"]) == tokens["wte"]:
        tokens["lm_head"] = tokens["wte"]
        if "wte" in held:
            held.setdefault("lm_head", held["wte"])
    for path in held.keys() - tokens.keys():
        raise UserError(f"{where}: unexpected rows of {path}: trainable_token_indices does not name it")
    for path, ids in tokens.items():
        rows, shape = held.get(path), (len(ids), config.n_embd)
        if rows is None:
            raise UserError(
                f"{where}: trainable_tokens_delta of {path} is missing, which trainable_token_indices names"
            )
        if rows.shape != shape:
            raise UserError(f"{where}: the rows of {path} have shape {list(rows.shape)}, expected {list(shape)}")
        whole = f"{path}.weight" in made.params and f"{path}.weight" not in made.carried
        if path in made.targets or whole:
            raise UserError(f"{where}: trainable_token_indices of {path}, which trains otherwise as well")
        made.params |= {f"{path}.rows": rows, f"{path}.tokens": np.array(ids, np.int64)}


def _tied(made: Adapter) -> bool:
    """Whether embedding and head of a tied base are changed alike; then what the head has is dropped."""
    head = {kind: made.params.get(f"lm_head.{kind}") for kind in ("lora_a", "lora_b", "weight", "rows", "tokens")}
    one, other = made.targets.get("wte"), made.targets.get("lm_head")
    alike = (one and one.scale) == (other and other.scale) and "lm_head.magnitude" not in made.params
    for kind, array in head.items():
        twin = made.params.get("wte." + {"lora_a": "lora_b", "lora_b": "lora_a"}.get(kind, kind))
        alike = alike and (array is None) == (twin is None)
        if alike and array is not None and twin is not None:
            alike = np.array_equal(array, twin.T if kind.startswith("lora") else twin)
    if alike:
        made.targets.pop("lm_head", None)
        made.params = {name: array for name, array in made.params.items() if not name.startswith("lm_head.")}
        made.carried = tuple(name for name in made.carried if not name.startswith("lm_head."))
    return alike


def _check_vocabulary(made: Adapter, known: int, config: ModelConfig, where: str) -> None:
    """Refuses a resized vocabulary of which the file does not hold all rows."""
    table = params.table(config)
    for name in VOCABULARY if config.vocab_size != known else ():
        ids = made.params.get(f"{name.removesuffix('.weight')}.tokens", np.array([], np.int64))
        new = config.vocab_size - known
        if name in table and name not in made.params and not (new > 0 and np.count_nonzero(ids >= known) == new):
            raise UserError(
                f"{where}: the vocabulary was resized from {known:,} to {config.vocab_size:,}, and the file does not "
                f"hold {name} of that size: {_CURE}"
            )
