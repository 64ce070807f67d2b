"""The number of heads of a model whose file does not store it: the weights fit any number."""

from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json

# (n_layer, n_embd) -> n_head of the four that GPT-2 was published in
_PUBLISHED = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}
# minGPT's model_type -> n_head
_NAMED = {"gpt-nano": 3, "gpt-micro": 4, "gpt-mini": 6, "gopher-44m": 16, "openai-gpt": 12, "gpt2": 12}
_NAMED |= {"gpt2-medium": 16, "gpt2-large": 20, "gpt2-xl": 25}


def find_head_count(path: Path, state: Any, given: int, n_layer: int, n_embd: int) -> tuple[int, list[str]]:
    """(number of heads, notes on its origin): --n-head, our own entry, minGPT's config.json, or GPT-2's sizes.

    ``state`` is the file's state dict as it was loaded.

    Raises:
        UserError: nothing says it.
    """
    own = own_head_count(state)
    if own and given and own != given:
        raise UserError(f"{path}: --n-head {given}, but the file says {own}")
    if own or given:
        return own or given, []
    beside = path.parent / "config.json"
    model = read_json(beside).get("model") if beside.is_file() else None
    if isinstance(model, dict):
        named = model.get("n_head") or _NAMED.get(str(model.get("model_type")))
        if type(named) is int and named > 0:
            return named, [f"{beside}: says {named} heads"]
    if (n_layer, n_embd) in _PUBLISHED:
        n_head = _PUBLISHED[n_layer, n_embd]
        return n_head, [
            f"{path}: {n_head} heads, as GPT-2 of {n_layer} blocks and width {n_embd} has; else: --n-head N"
        ]
    raise UserError(f"{path}: the file does not say how many heads: expected --n-head N")


def own_head_count(state: Any) -> int:
    """The number stored by ``keep_head_count``; 0 if there is none."""
    own = getattr(state, "mlxgpt", None)
    found = own.get("n_head") if isinstance(own, dict) else None
    return found if type(found) is int and found > 0 else 0


def keep_head_count(state: Any, n_head: int) -> None:
    """Stores the number in an attribute, as torch does ``_metadata``; ``load_state_dict`` ignores it."""
    state.mlxgpt = {"n_head": n_head}
