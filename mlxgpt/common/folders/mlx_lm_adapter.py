"""Adapters as mlx-lm has them: adapters.safetensors, and the keys of adapter_config.json that belong to it.

    MODULE.lora_a (n_in, r)   MODULE.lora_b (r, n_out)   MODULE.m (n_out,)      y = W x + scale (x a) b; dora: m

MODULE is what mlx-lm calls a module. One rank and one scale hold for all, and the same modules of the last num_layers
blocks are adapted (keys), so what differs by block is padded: ranks with zeros, absent matrices with an update of
zeros, other scales by a factor in b.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import mlx_lm_names
from mlxgpt.common.folders.adapter import Adapter
from mlxgpt.common.model import params
from mlxgpt.common.model.adapters import Target

TENSORS = "adapters.safetensors"
OLD_TENSORS = "adapters.npz"
_KINDS = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "magnitude"}


def modules(config: ModelConfig) -> dict[str, str]:
    """What mlx-lm calls a matrix that can be adapted -> our path."""
    able = {name for name, param in params.table(config).items() if param.adaptable}
    named = mlx_lm_names.names(config).items()
    return {name.removesuffix(".weight"): ours.removesuffix(".weight") for name, ours in named if ours in able}


def _key(name: str) -> str:
    """What ``keys`` calls a module: its name inside the block, or the whole one outside."""
    return re.sub(r".*?\.\d+\.", "", name, count=1)


def encode(
    config: ModelConfig,
    method: str,
    targets: Mapping[str, Target],
    arrays: Mapping[str, np.ndarray],
    dropout: float = 0.0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys of adapter_config.json, and the tensors by mlx-lm's names, of an adapter that has no ``gap``."""
    names = modules(config)
    rank = max(target.rank for target in targets.values())
    scale = Counter(target.scale for target in targets.values()).most_common(1)[0][0]
    keys = {_key(name) for name, path in names.items() if path in targets}
    tensors: dict[str, np.ndarray] = {}
    for name, path in names.items():
        if _key(name) not in keys:
            continue
        target = targets.get(path)
        if target is None:
            n_out, n_in = params.table(config)[f"{path}.weight"].shape
            tensors[f"{name}.lora_a"] = np.zeros((n_in, rank), np.float32)
            tensors[f"{name}.lora_b"] = np.zeros((rank, n_out), np.float32)
            continue  # dora: mlx-lm takes m from the matrix itself where no tensor says it
        a, b = np.zeros((target.n_in, rank), np.float32), np.zeros((rank, target.n_out), np.float32)
        a[:, : target.rank] = arrays[f"{path}.lora_a"].T
        b[: target.rank] = arrays[f"{path}.lora_b"].T * np.float32(target.scale / scale)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        if method == "dora":
            tensors[f"{name}.m"] = arrays[f"{path}.magnitude"]
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, "keys": sorted(keys)}
    return {"fine_tune_type": method, "num_layers": config.n_layer, "lora_parameters": parameters}, tensors


def gap(targets: Mapping[str, Target], arrays: Mapping[str, Any], apart: bool = False) -> str | None:
    """Why mlx-lm cannot hold an adapter of these targets and tensors (names); None where it can.

    ``apart``: its base is tied, and it gives the head weights of its own.
    """
    if "score.weight" in arrays:
        return "mlx-lm has no heads of labels or scores: the adapter is for PEFT alone"
    whole = [name for name in arrays if name.endswith((".weight", ".bias", ".rows"))]
    if apart:
        return (
            "mlx-lm adapts a tied head with its embedding alone, and here they are changed apart: the adapter is for "
            "PEFT alone; mlxgpt fuse makes an untied model of it that mlx-lm can hold"
        )
    if whole and whole[0].endswith(".rows"):
        return (
            f"mlx-lm trains no single rows ({whole[0].removesuffix('.rows')}): the adapter is for PEFT alone; mlxgpt "
            "fuse makes a model of it that mlx-lm can hold"
        )
    if whole:
        return (
            f"mlx-lm holds no tensors that train whole ({whole[0]}): the adapter is for PEFT alone; mlxgpt fuse makes "
            "a model of it that mlx-lm can hold"
        )
    return None if targets else "mlx-lm needs an adapted matrix"


def decode(
    values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], config: ModelConfig, where: str, old: bool = False
) -> Adapter:
    """The adapter that mlx-lm's adapter_config.json and tensors are, for a base of ``config``.

    Args:
        values: adapter_config.json.
        tensors: by mlx-lm's names.
        config: the model's.
        where: the folder, for messages.
        old: they come from adapters.npz.

    Raises:
        UserError: the config asks for what is not supported, or does not fit the tensors, or they not the model.
    """
    method, parameters = values.get("fine_tune_type", "lora"), values.get("lora_parameters")
    if method not in ("lora", "dora"):
        raise UserError(f"{where}: fine_tune_type {method!r} is not supported: expected 'lora' or 'dora'")
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: lora_parameters is missing")
    rank, scale, notes = _numbers(parameters, where, old)
    names = modules(config)
    count = values.get("num_layers", values.get("lora_layers"))
    if type(count) is not int:
        raise UserError(f"{where}: num_layers = {count!r}: expected a number of blocks, or -1 for all")
    if count > config.n_layer:
        raise UserError(f"{where}: num_layers = {count}, but the model has {config.n_layer} blocks")
    first = config.n_layer - count if count > 0 else 0
    able = {n for n, path in names.items() if not path.startswith("h.") or int(path.split(".")[1]) >= first}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in _KINDS or module not in able or (kind == "m" and method != "dora"):
            told = "is not in the last num_layers blocks" if kind in _KINDS and module in names else "no such tensor"
            raise UserError(f"{where}: unexpected tensor {name} {list(array.shape)}: {told}")
        found.setdefault(module, {})[_KINDS[kind]] = array
    keys = _keys(parameters, found, where)
    wanted = [name for name in names if name in able and (name in keys or _key(name) in keys)]
    for name in found:
        if name not in wanted:
            raise UserError(f"{where}: unexpected tensors of {name}: keys does not name it")
    if not wanted:
        raise UserError(f"{where}: keys name no module of this model: {', '.join(sorted(keys))[:80]}")
    targets: dict[str, Target] = {}
    made: dict[str, np.ndarray] = {}
    for name in wanted:
        path = names[name]
        n_out, n_in = params.table(config)[f"{path}.weight"].shape
        shapes = {"lora_a": (n_in, rank), "lora_b": (rank, n_out), "magnitude": (n_out,)}
        if path == "wte":
            n_out, n_in = n_in, n_out
            shapes |= {"lora_a": (n_in, rank), "lora_b": (rank, n_out)}
        held = found.get(name, {})
        update = [held.get(kind) for kind in ("lora_a", "lora_b")]
        if method == "dora" and "magnitude" not in held and all(a is not None and not a.any() for a in update):
            continue  # padding, see encode
        for kind in ("lora_a", "lora_b", "magnitude") if method == "dora" else ("lora_a", "lora_b"):
            if kind not in held:
                raise UserError(f"{where}: {kind} of {name} is missing, which keys and num_layers ask for")
            if held[kind].shape != shapes[kind]:
                raise UserError(
                    f"{where}: {kind} of {name} has shape {list(held[kind].shape)}, expected {list(shapes[kind])} "
                    "by the model and lora_parameters.rank"
                )
        targets[path] = Target(n_out, n_in, rank, scale)
        for kind, array in held.items():
            made[f"{path}.{kind}"] = array.T if array.ndim == 2 else array
    return Adapter(method, targets, made, notes=notes)


def _numbers(parameters: Mapping[str, Any], where: str, old: bool) -> tuple[int, float, list[str]]:
    """Rank and scale."""
    rank, scale, alpha = (parameters.get(key) for key in ("rank", "scale", "alpha"))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 2**31:
        raise UserError(f"{where}: lora_parameters.rank = {rank!r}: expected a positive whole number")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < abs(scale) < 1e30:
        raise UserError(f"{where}: lora_parameters.scale = {scale!r}: expected a number")
    notes = []
    if isinstance(alpha, int | float) and alpha != scale * rank:
        # mlx-lm multiplied by scale * alpha / rank until March 2024, when files were .npz; scale alone counts since
        if old and alpha != rank:
            raise UserError(
                f"{where}: lora_parameters: alpha {alpha} and scale {scale} disagree, and {OLD_TENSORS} may mean "
                f"{scale} or {scale * alpha / rank:g}: expected scale alone"
            )
        notes.append(f"{where}: lora_parameters.alpha = {alpha} is not used, scale = {scale} counts (as in mlx-lm)")
    return rank, float(scale), notes


def _keys(parameters: Mapping[str, Any], found: Mapping[str, Any], where: str) -> set[str]:
    """What is adapted in each block: as the config says it, else what the tensors have, for defaults have changed."""
    keys = parameters.get("keys")
    if keys is None:
        return {_key(name) for name in found}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{where}: lora_parameters.keys: expected names of modules")
    return set(keys)
