"""minGPT's state dict: nanoGPT's names, tanh GELU, a head of its own, and the causal mask a block.

The layout since 2022; the older one (tok_emb, blocks.N.attn.key) has another name for everything and is not read.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from convert.formats.limits import check_expressible, left_behind
from convert.formats.opened import Opened, Options, Tensor
from convert.formats.torch_files import file as torch_file
from convert.formats.torch_files import head_count
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

KIND = "file"
_PREFIX = "transformer."
_HINTS = {"activation": "its code computes tanh GELU and no other; --to nanogpt has these names with erf GELU"}


def recognize(path: Path) -> bool:
    """A state dict with GPT-2's names and a head, without model_args."""
    names = torch_file.strings_in_pickle(path) if path.is_file() else frozenset()
    ends = (f"{_PREFIX}wte.weight", "lm_head.weight")
    return all(any(name.endswith(end) for name in names) for end in ends) and "model_args" not in names


def read(path: Path, n_head: int = 0) -> Opened:
    """The model in a state dict; ``n_head`` is needed where nothing says it, see ``head_count.find_head_count``.

    Raises:
        UserError: damaged, more than tensors, of another project, or a tensor missing, unexpected or of another shape.
    """
    path = Path(path)
    content = torch_file.load_file(path)
    state = torch_file.state_dict(str(path), content, ("transformer",), f"{_PREFIX}wte.weight")
    n_layer = len({name.split(".")[2] for name in state if name.startswith(_PREFIX + "h.")})
    sizes = []
    for name in ("wte", "wpe"):
        tensor = state.get(f"{_PREFIX}{name}.weight")
        if tensor is None or tensor.dim() != 2:
            raise UserError(f"{path}: tensor {_PREFIX}{name}.weight is missing or no matrix")
        sizes.append(tuple(tensor.shape))
    (vocab_size, n_embd), (block_size, _) = sizes
    tied = torch_file.shared(state.get("lm_head.weight"), state[_PREFIX + "wte.weight"])
    if tied and not head_count.own_head_count(content):
        raise UserError(f"{path}: the head is the embedding, as in nanoGPT: expected its ckpt.pt, which says the sizes")
    n_head, notes = head_count.find_head_count(path, content, n_head, n_layer, n_embd)
    try:
        config = _config(n_layer, n_head, n_embd, block_size, vocab_size, tied)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for n in range(n_layer):
        if state.pop(f"{_PREFIX}h.{n}.attn.bias", None) is None:
            raise UserError(
                f"{path}: tensor {_PREFIX}h.{n}.attn.bias, minGPT's mask, is missing; "
                "of nanoGPT the whole ckpt.pt is needed, which says the sizes"
            )
    if tied:
        del state["lm_head.weight"]
    tensors: dict[str, Tensor] = {}
    for name, param in params.table(config).items():
        foreign = _foreign(name)
        if foreign not in state:
            raise UserError(f"{path}: tensor {foreign} is missing")
        tensors[name] = torch_file.lazy(f"{path}: {foreign}", state.pop(foreign), param.shape)
    if state:
        raise UserError(f"{path}: unexpected tensor {min(state)} {list(state[min(state)].shape)}")
    return Opened(path, "mingpt", config, tensors, (path,), notes=notes)


def _foreign(name: str) -> str:
    return name if name.startswith("lm_head") else _PREFIX + name


def _config(
    n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, tied: bool = False
) -> ModelConfig:
    """The one kind of model that minGPT has."""
    sizes: dict[str, Any] = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    return ModelConfig(family="gpt2", vocab_size=vocab_size, tied=tied, **sizes)


def write(opened: Opened, place: Path, options: Options) -> list[str]:
    """A state dict that minGPT's ``load_state_dict`` takes whole.

    Raises:
        UserError: minGPT has no such model, or a value is not finite or does not fit.
    """
    import torch

    c = opened.config
    check_expressible(c, _config(c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, c.tied), "minGPT", _HINTS)
    state: Any = OrderedDict()
    mask = torch.ones(c.block_size, c.block_size).tril().view(1, 1, c.block_size, c.block_size)
    archive = torch_file.Archive(options)
    for name, tensor in opened.tensors.items():
        state[_foreign(name)] = archive.add(name, tensor)
    state |= {f"{_PREFIX}h.{n}.attn.bias": mask for n in range(c.n_layer)}
    notes = list(left_behind(opened, "minGPT"))
    if c.tied:
        state["lm_head.weight"] = state[_PREFIX + "wte.weight"]
        notes.append("minGPT ties nothing: its head begins as the embedding's copy and trains on its own")
    head_count.keep_head_count(state, c.n_head)
    archive.save(state, place)
    return notes
