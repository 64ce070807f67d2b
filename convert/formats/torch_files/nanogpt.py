"""nanoGPT's ckpt.pt: weights, sizes and the optimizer's state, so that runs resume here or there.

GPT-2's names with matrices [out, in], the head stored beside the embedding that it is, erf GELU. ``iter_num`` counts
the updates that are over, as our step does; positions in the optimizer are those of its two groups, matrices first.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.limits import check_expressible, left_behind
from convert.formats.opened import Moments, Opened, Options
from convert.formats.torch_files import adamw as torch_adamw
from convert.formats.torch_files import file as torch_file
from mlxgpt.common.config import ModelConfig, OptimConfig
from mlxgpt.common.errors import TensorError, UserError
from mlxgpt.common.model import params
from mlxgpt.common.model.families import BIASES

KIND = "file"
_PREFIX = "transformer."
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# key of config.json under which what nanoGPT says beside the model travels
_OWN = "nanogpt"
# nanoGPT's setting -> ours
_OPTIM = {"learning_rate": "lr", "min_lr": "min_lr", "grad_clip": "clip", "warmup_iters": "warmup"}
_HINTS = {
    "activation": "its code computes erf GELU and no other; --to mingpt has these names with tanh GELU",
    "tied": "--to mingpt has a head of its own",
}


def recognize(path: Path) -> bool:
    """A file of torch.save with model_args and GPT-2's names."""
    names = torch_file.strings_in_pickle(path) if path.is_file() else frozenset()
    return "model_args" in names and any(name.endswith(_PREFIX + "wte.weight") for name in names)


def _config(bias: bool, **sizes: Any) -> ModelConfig:
    """The one kind of model that nanoGPT has."""
    biases: dict[str, Any] = dict.fromkeys(BIASES, bias)
    return ModelConfig(family="gpt2", activation="gelu", **biases, **sizes)


def read(path: Path) -> Opened:
    """The model in a ckpt.pt; an optimizer's state that is not of this model is left behind with a note.

    Raises:
        UserError: damaged, more than tensors and plain values, or a tensor is missing, unexpected or of another shape.
    """
    path = Path(path)
    content = torch_file.load_file(path)
    if not isinstance(content, Mapping) or not {"model", "model_args"} <= set(content):
        raise UserError(f"{path}: expected model and model_args, as nanoGPT's train.py saves them")
    state = torch_file.state_dict(f"{path}: model", content["model"], ("transformer",), f"{_PREFIX}wte.weight")
    args = content["model_args"]
    config = _read_args(f"{path}: model_args", args, len(state))
    wanted = params.table(config)
    head = state.pop("lm_head.weight", None)
    for name in [name for name in state if name.endswith(".attn.bias")]:
        del state[name]  # the causal mask of slow attention
    tensors = {}
    for name, param in wanted.items():
        if _PREFIX + name not in state:
            raise TensorError(name, f"{path}: tensor {_PREFIX + name} is missing, which model_args ask for")
        tensors[name] = torch_file.lazy(f"{path}: {_PREFIX}{name}", state.pop(_PREFIX + name), param.shape)
    if state:
        name = min(state)
        said = f"unexpected tensor {name} {list(state[name].shape)}, which model_args do not ask for"
        raise TensorError(name, f"{path}: {said}")
    if head is not None:
        _check_head(path, head, content["model"])
    own, notes = _beside(path, content, args)
    made = Opened(path, "nanogpt", config, tensors, (path,), extra={_OWN: own}, notes=notes)
    _read_moments(made, content)
    return made


def _read_args(where: str, args: Any, count: int) -> ModelConfig:
    """The model that model_args describe, of which the file has ``count`` tensors."""
    if not isinstance(args, Mapping):
        raise UserError(f"{where}: {type(args).__name__}, expected sizes by name")
    for key in args:
        if key not in (*_SIZES, "bias", "dropout"):
            raise UserError(f"{where}: {key!r} = {args[key]!r} is not nanoGPT's: expected {', '.join(_SIZES)}, bias")
    for key in _SIZES:
        if type(args.get(key)) is not int or args[key] < 1:
            raise UserError(f"{where}: {key} = {args.get(key)!r}: expected a positive whole number")
    if args["n_layer"] > count:
        raise UserError(f"{where}: n_layer = {args['n_layer']}, but the file has {count} tensors")
    bias = args.get("bias", True)  # checkpoints from before there was a choice have biases
    if type(bias) is not bool:
        raise UserError(f"{where}: bias = {bias!r}: expected True or False")
    try:
        return _config(bias, **{key: args[key] for key in _SIZES})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_head(path: Path, head: Any, state: Mapping[str, Any]) -> None:
    """The head is the embedding, if not in memory then in every bit."""
    table = next(tensor for name, tensor in state.items() if name.endswith(_PREFIX + "wte.weight"))
    if head.shape != table.shape or head.dtype != table.dtype:
        raise UserError(f"{path}: lm_head.weight has shape {list(head.shape)}, expected the embedding's")
    if torch_file.shared(head, table):
        return
    one, other = (torch_file.lazy(f"{path}: head", each, tuple(table.shape)) for each in (head, table))
    if not np.array_equal(one.read(), other.read()):
        raise UserError(f"{path}: lm_head.weight differs from transformer.wte.weight, which nanoGPT ties it to")


def _beside(path: Path, content: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the file says beside the model, as JSON has it, and notes of what it has not."""
    config = content.get("config")
    config = config if isinstance(config, Mapping) else {}
    plain = {key: value for key, value in config.items() if type(value) in (int, float, bool, str)}
    own: dict[str, Any] = {"dropout": float(args.get("dropout", 0.0)), "config": plain}
    if type(content.get("iter_num")) is int:
        own["iter_num"] = content["iter_num"]
    best = torch_file.number(content.get("best_val_loss"))
    if math.isfinite(best):
        own["best_val_loss"] = best
    lost = [str(key) for key in config if key not in plain]
    lost += [key for key in content if key not in ("model", "optimizer", "model_args", "config", *own)]
    return own, [f"{path}: left behind: {', '.join(sorted(lost))}"] if lost else []


def _groups(config: ModelConfig) -> list[list[str]]:
    """Our names in the order in which nanoGPT hands its parameters to AdamW: matrices, then the rest."""
    table = params.table(config)
    return [[name for name in table if len(table[name].shape) >= 2], [n for n in table if len(table[n].shape) < 2]]


def _read_moments(made: Opened, content: Mapping[str, Any]) -> None:
    """The optimizer's state; what does not fit is left behind with a note."""
    optimizer = content.get("optimizer")
    if optimizer is None or (isinstance(optimizer, Mapping) and not optimizer.get("state", True)):
        return  # no update was made yet
    where = f"{made.path}: optimizer"
    own, step = made.extra[_OWN], content.get("iter_num")
    shapes = {name: param.shape for name, param in params.table(made.config).items()}
    try:
        if type(step) is not int or step < 0:
            raise UserError(f"{made.path}: iter_num = {step!r}: expected a whole number")
        m, v, t = torch_adamw.read_moments(where, optimizer, _groups(made.config), shapes)
    except UserError as error:
        made.notes.append(f"{error}; the moments are left behind")
        return
    config = own["config"]
    settings = torch_adamw.settings(optimizer["param_groups"][0])
    settings |= {ours: config[key] for key, ours in _OPTIM.items() if type(config.get(key)) in (int, float)}
    best = {"step": step, "loss": own["best_val_loss"]} if "best_val_loss" in own else None
    made.moments = torch_adamw.moments(m, v, t, step, "nanoGPT", settings, best)
    flags = " ".join(f"--set optim.{key}={value}" for key, value in settings.items())
    made.notes.append(f"{where}: AdamW after {t} updates; as there: --set train.dropout={own['dropout']} {flags}")


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A ckpt.pt that nanoGPT's train.py resumes from and sample.py samples from.

    Raises:
        UserError: nanoGPT has no such model, or a value is not finite or does not fit.
    """
    config = opened.config
    sizes = {key: getattr(config, key) for key in _SIZES}
    check_expressible(config, _config(config.norm_bias, **sizes), "nanoGPT", _HINTS)
    own = opened.extra.get(_OWN)
    own = own if isinstance(own, dict) else {}
    archive = torch_file.Archive(options)
    model = {_PREFIX + name: archive.add(name, one) for name, one in opened.tensors.items()}
    model["lm_head.weight"] = model[_PREFIX + "wte.weight"]
    moments = opened.moments
    content: dict[str, Any] = {
        "model": model,
        "model_args": sizes | {"bias": config.norm_bias, "dropout": own.get("dropout", _dropout(moments))},
        "iter_num": moments.step if moments else own.get("iter_num", 0),
        "best_val_loss": own.get("best_val_loss", _best(moments)),
        "config": own.get("config", {}),
    }
    given = (moments.state or {}).get("recipe", {}).get("optim", {}) if moments else {}
    settings = dataclasses.asdict(OptimConfig()) | given
    kept = (("m", moments.m), ("v", moments.v)) if moments else (("m", {}), ("v", {}))
    groups = list(zip(_groups(config), (settings["weight_decay"], 0.0), strict=True))
    m, v = ({n: archive.add(f"{key}.{n}", one, one.dtype) for n, one in group.items()} for key, group in kept)
    content["optimizer"] = torch_adamw.write_moments(groups, m, v, moments.t if moments else 0, settings)
    archive.save(content, place)
    return list(left_behind(opened, "nanoGPT", moments=True, extra=(_OWN,)))


def _dropout(moments: Moments | None) -> float:
    recipe = (moments.state or {}).get("recipe", {}) if moments else {}
    return float(recipe.get("train", {}).get("dropout", 0.0))


def _best(moments: Moments | None) -> float:
    """The best validation loss; nanoGPT begins with this large one."""
    best = (moments.state or {}).get("best") if moments else None
    return float(best["loss"]) if best else 1e9
