"""GPTModel of "Build a Large Language Model (From Scratch)": a .pth of its state dict, alone or beside an optimizer's.

Query, key and value apart, biases there or not, tanh GELU, and a head that is a tensor of its own, also where GPT-2's
weights were copied into it. The head counts as tied only where the file holds it and the embedding as one tensor.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.limits import check_expressible, left_behind
from convert.formats.opened import Opened, Options, Tensor
from convert.formats.torch_files import adamw as torch_adamw
from convert.formats.torch_files import file as torch_file
from convert.formats.torch_files import head_count
from mlxgpt.common.config import ModelConfig, OptimConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

KIND = "file"
_HEAD = "out_head.weight"
_PARTS = ("W_query", "W_key", "W_value")
_WEIGHTS, _OPTIMIZER = "model_state_dict", "optimizer_state_dict"
_HINTS = {"activation": "its code computes tanh GELU and no other"}
# our module in a block -> theirs, in the order in which their class makes them
_BLOCK = {
    "attn.c_attn": "att",
    "attn.c_proj": "att.out_proj",
    "mlp.c_fc": "ff.layers.0",
    "mlp.c_proj": "ff.layers.2",
    "ln_1": "norm1",
    "ln_2": "norm2",
}
_MODULES = {"wte": "tok_emb", "wpe": "pos_emb", "ln_f": "final_norm", "lm_head": "out_head"}


def recognize(path: Path) -> bool:
    """A file of torch.save with GPTModel's names."""
    names = torch_file.strings_in_pickle(path) if path.is_file() else frozenset()
    return all(any(name.endswith(end) for name in names) for end in ("tok_emb.weight", "blocks.0.att.W_query.weight"))


def _foreign(name: str) -> list[str]:
    """Their names of one of our tensors: three for q, k and v."""
    module, _, leaf = name.rpartition(".")
    if "ln_" in name:
        leaf = {"weight": "scale", "bias": "shift"}[leaf]
    if module in _MODULES:
        return [f"{_MODULES[module]}.{leaf}"]
    _, n, rest = module.split(".", 2)
    parts = [f".{part}" for part in _PARTS] if rest == "attn.c_attn" else [""]
    return [f"trf_blocks.{n}.{_BLOCK[rest]}{part}.{leaf}" for part in parts]


def _order(config: ModelConfig) -> list[str]:
    """Their names in the order of ``GPTModel.parameters()``, by which an optimizer's positions count."""

    def place(name: str) -> tuple[int, int, int]:
        block = name.split(".")
        if block[0] != "h":
            return {"wte": -2, "wpe": -1}.get(block[0], config.n_layer), 0, 0
        return int(block[1]), list(_BLOCK).index(".".join(block[2:-1])), 0

    made: list[str] = []
    ordered = sorted(params.table(config), key=place)  # stable: weight before bias
    for name in ordered:
        if not name.endswith("attn.c_attn.bias"):
            made += _foreign(name)
        if name.endswith("attn.c_attn.weight") and config.qkv_bias:
            weights, biases = made[-3:], _foreign(name.replace("weight", "bias"))
            made[-3:] = [one for pair in zip(weights, biases, strict=True) for one in pair]
    return made


def read(path: Path, n_head: int = 0) -> Opened:
    """The model in a .pth; ``n_head`` is needed where nothing says it, see ``head_count.find_head_count``.

    Raises:
        UserError: damaged, more than tensors, or a tensor is missing, unexpected or of another shape.
    """
    path = Path(path)
    content = torch_file.load_file(path)
    pair = content if isinstance(content, Mapping) and _WEIGHTS in content else {_WEIGHTS: content}
    state = torch_file.state_dict(str(path), pair[_WEIGHTS], table="tok_emb.weight")
    config, notes = _config_of(path, state, pair[_WEIGHTS], n_head)
    if config.tied:
        del state[_HEAD]
    for name in [name for name in state if name.endswith(".att.mask")]:
        del state[name]
    shapes = _shapes(config)
    for name in shapes:
        if name not in state:
            raise UserError(f"{path}: tensor {name} is missing")
    plain = {name: torch_file.lazy(f"{path}: {name}", state.pop(name), shape) for name, shape in shapes.items()}
    if state:
        raise UserError(f"{path}: unexpected tensor {min(state)} {list(state[min(state)].shape)}")
    lost = [str(key) for key in pair if key not in (_WEIGHTS, _OPTIMIZER)]
    notes += [f"{path}: left behind: {', '.join(lost)}"] if lost else []
    made = Opened(path, "gptmodel", config, _ours(config, plain), (path,), notes=notes)
    _read_moments(made, pair.get(_OPTIMIZER), shapes)
    return made


def _config_of(path: Path, state: dict[str, Any], whole: Any, n_head: int) -> tuple[ModelConfig, list[str]]:
    """The model by the shapes of its tensors."""
    n_layer = len({name.split(".")[1] for name in state if name.startswith("trf_blocks.")})
    sizes = []
    for name in ("tok_emb.weight", "pos_emb.weight"):
        if name not in state or state[name].dim() != 2:
            raise UserError(f"{path}: tensor {name} is missing or no matrix")
        sizes.append(tuple(state[name].shape))
    (vocab_size, n_embd), (block_size, _) = sizes
    n_head, notes = head_count.find_head_count(path, whole, n_head, n_layer, n_embd)
    bias = "trf_blocks.0.att.W_query.bias" in state
    tied = torch_file.shared(state.get(_HEAD), state["tok_emb.weight"])
    try:
        return _config(n_layer, n_head, n_embd, block_size, vocab_size, bias, tied), notes
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _config(
    n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, bias: bool, tied: bool
) -> ModelConfig:
    """The one kind of model that GPTModel is."""
    sizes: dict[str, Any] = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    return ModelConfig(family="gpt2", vocab_size=vocab_size, qkv_bias=bias, tied=tied, **sizes)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Their name -> shape."""
    made: dict[str, tuple[int, ...]] = {}
    for name, param in params.table(config).items():
        foreign = _foreign(name)
        made |= dict.fromkeys(foreign, (param.shape[0] // len(foreign), *param.shape[1:]))
    return made


def _ours(config: ModelConfig, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors as ours."""
    return {
        name: _joined([plain[foreign] for foreign in _foreign(name)], param.shape)
        for name, param in params.table(config).items()
    }


def _joined(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """One tensor of the rows of all."""
    if len(parts) == 1:
        return parts[0]
    return Tensor(shape, parts[0].dtype, lambda: np.concatenate([part.read() for part in parts]))


def _theirs(archive: torch_file.Archive, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our tensors as theirs; the moments' names begin with ``prefix``."""
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        foreign = _foreign(name)
        for i, (one, part) in enumerate(zip(foreign, _split(tensor, len(foreign)), strict=True)):
            made[one] = archive.add(
                f"{prefix}{name}" + f" (part {i})" * (len(foreign) > 1), part, part.dtype if prefix else None
            )
    return made


def _split(tensor: Tensor, count: int) -> list[Tensor]:
    """``count`` tensors of as many rows each."""
    rows = tensor.shape[0] // count
    shape = rows, *tensor.shape[1:]

    def part(i: int) -> Tensor:
        return Tensor(shape, tensor.dtype, lambda: tensor.read()[i * rows : (i + 1) * rows])

    return [part(i) for i in range(count)] if count > 1 else [tensor]


def _read_moments(made: Opened, optimizer: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The state of the book's one-group AdamW; what does not fit is left behind with a note."""
    if optimizer is None:
        return
    where = f"{made.path}: {_OPTIMIZER}"
    names = _order(made.config)
    if made.config.tied and _positions(optimizer) == len(names) + 1:
        names.append(_HEAD)  # tied in the file, yet a parameter of its own to the optimizer
        shapes = {**shapes, _HEAD: shapes["tok_emb.weight"]}
    try:
        m, v, t = torch_adamw.read_moments(where, optimizer, [names], shapes)
    except UserError as error:
        made.notes.append(f"{error}; the moments are left behind")
        return
    settings = torch_adamw.settings(optimizer["param_groups"][0])
    ours = _ours(made.config, m), _ours(made.config, v)
    made.moments = torch_adamw.moments(*ours, t, t, "GPTModel", settings)
    flags = " ".join(f"--set optim.{key}={value}" for key, value in settings.items())
    made.notes.append(f"{where}: AdamW after {t} updates, which decayed biases and norms too; as there: {flags}")


def _positions(optimizer: Any) -> int:
    """How many parameters an optimizer's state is of."""
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    return len(state) if isinstance(state, Mapping) else 0


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A .pth: the state dict that GPTModel's ``load_state_dict`` takes whole; with moments, beside an optimizer's.

    Raises:
        UserError: GPTModel is no such model, or a value is not finite or does not fit.
    """
    import torch

    c, moments = opened.config, opened.moments
    able = _config(c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, c.qkv_bias, c.tied)
    check_expressible(c, able, "GPTModel", _HINTS)
    archive = torch_file.Archive(options)
    state: Any = OrderedDict(_theirs(archive, "", opened.tensors))
    mask = torch.ones(c.block_size, c.block_size).triu(diagonal=1)
    state |= {f"trf_blocks.{n}.att.mask": mask for n in range(c.n_layer)}
    notes = list(left_behind(opened, "GPTModel", moments=True))
    if c.tied:
        state[_HEAD] = state["tok_emb.weight"]
        notes.append("GPTModel ties nothing: its head begins as the embedding's copy and trains on its own")
    head_count.keep_head_count(state, c.n_head)
    if moments is None:
        archive.save(state, place)
        return notes
    given = (moments.state or {}).get("recipe", {}).get("optim", {})
    settings = dataclasses.asdict(OptimConfig()) | given
    m, v = _theirs(archive, "m.", moments.m), _theirs(archive, "v.", moments.v)
    names = _order(c)
    if c.tied:  # the head is a parameter of its own there, with the moments of what it is a copy of
        m[_HEAD], v[_HEAD] = m["tok_emb.weight"], v["tok_emb.weight"]
        names.append(_HEAD)
    optimizer = torch_adamw.write_moments([(names, settings["weight_decay"])], m, v, moments.t, settings)
    archive.save({_WEIGHTS: state, _OPTIMIZER: optimizer}, place)
    return notes
