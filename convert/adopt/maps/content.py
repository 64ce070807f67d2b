"""Where the tensors lie in what a file of torch.save holds, and what lies beside them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.formats.torch_files import records
from mlxgpt.common.errors import UserError

# keys under which training programs save a model's tensors; what is taken first, where there are several, comes first
_WRAPPERS = ("model", "model_state", "model_state_dict", "state_dict", "params", "module", "net", "network", "weights",
             "gpt", "parameters", "generator", "state", "checkpoint", "ckpt", "variables", "ema", "model_ema",
             "ema_model", "ema_state_dict", "best_model", "best_state", "best_model_state")  # fmt: skip
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optimizer_state", "optim", "opt", "opt_state")
_NOTHING = object()  # in place of what is no plain value


@dataclass(frozen=True)
class Held:
    """What a file holds: ``tensors`` by names with dots, and plain values: all by name, and as they lie in the file."""

    tensors: Mapping[str, Any] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    nested: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    optimizer_at: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def look(place: Path, content: Any) -> Held:
    """Down to where the tensors lie.

    Raises:
        UserError: nothing is by name, or two tensors have one name.
    """
    extras: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    optimizer: tuple[Mapping[str, Any] | None, tuple[str, ...]] = None, ()
    under: list[str] = []
    notes: list[str] = []
    here = content

    def keep(at: tuple[str, ...], value: Any) -> None:
        level = beside
        for word in at[:-1]:
            level = level.setdefault(word, {})
        level[at[-1]] = value

    while isinstance(here, Mapping):
        inside = {key: each for key, each in here.items() if not _is_optimizer(key, each) and _weights_in(each)}
        key = _next_key(inside)
        found, at = _optimizer(here)
        optimizer = optimizer if optimizer[0] else (found, (*under, *at))
        if key is None:
            break
        left = []
        for other, value in here.items():
            if other == key or _is_optimizer(other, value):
                continue
            made = _NOTHING if other in inside else plain(value)
            if made is _NOTHING:
                left.append(str(other))
                continue
            keep((*under, str(other)), made)
            if made is not None:
                extras.setdefault(str(other), made)
        if left:
            notes.append(f"{place}: left behind beside {key}: {', '.join(left)}")
        under.append(key)
        here = here[key]
    if not isinstance(here, Mapping | list | tuple):
        shown = f"one tensor {list(here.shape)}" if _is_tensor(here) else type(here).__name__
        raise UserError(f"{place}: {shown}, expected tensors by name")
    tensors: dict[str, Any] = {}
    for name, each in _leaves(here, ""):
        if not _is_tensor(each):
            if (made := plain(each)) is not _NOTHING and made is not None:
                extras.setdefault(name, made)
                if isinstance(here, Mapping) and name in here:
                    keep((*under, name), made)
            continue
        if name in tensors:
            raise UserError(f"{place}: two tensors are named {name} once dicts are flattened: expected one")
        tensors[name] = each
    nested = any(not _is_tensor(each) and _holds_tensors(each) for each in _values(here))
    return Held(tensors, tuple(under), nested, extras, beside, *optimizer, tuple(notes))


def plain(value: Any) -> Any:
    """A plain value, JSON's and dicts by numbers, of what is one; an object of settings as its attributes."""
    if isinstance(value, records.Record):
        found = records.plain(value)
        return _NOTHING if found is None else plain(found)
    if isinstance(value, type) and issubclass(value, records.Record):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if _is_tensor(value):
        return value.item() if value.numel() == 1 and not value.is_complex() else _NOTHING
    if isinstance(value, Mapping):
        made = {key: plain(each) for key, each in value.items() if isinstance(key, str | int)}
        return {key: each for key, each in made.items() if each is not _NOTHING}
    if isinstance(value, list | tuple | set):
        listed = [plain(each) for each in value]
        return _NOTHING if any(each is _NOTHING for each in listed) else listed
    return _NOTHING


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _is_optimizer(key: Any, value: Any) -> bool:
    """Whether a value is an optimizer's state, or stands under such a key."""
    return _is_state(value) or (isinstance(key, str) and key.lower() in _OPTIMIZERS)


def _optimizer(here: Mapping[Any, Any]) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """A torch optimizer's state among values, and its keys; Lightning has it in a list."""
    for key, value in here.items():
        each: Any = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        if _is_state(each):
            return each, (str(key), *(["0"] if each is not value else []))
    return None, ()


def _weights_in(value: Any) -> int:
    """How many tensors of two axes or more are in dicts and lists; those of an optimizer do not count."""
    if _is_tensor(value):
        return int(value.dim() >= 2)
    if isinstance(value, Mapping):
        return sum(_weights_in(each) for key, each in value.items() if not _is_optimizer(key, each))
    return sum(map(_weights_in, value)) if isinstance(value, list | tuple) else 0


def _next_key(inside: Mapping[Any, Any]) -> str | None:
    """The key under which the tensors lie, if they do not lie here; ``inside``: what holds tensors."""
    if any(_is_tensor(each) for each in inside.values()) or not all(isinstance(key, str) for key in inside):
        return None
    if len(inside) == 1:
        key = next(iter(inside))
        # the one list of a model's blocks, or a dict of them, is no wrapper
        return key if isinstance(inside[key], Mapping) else None
    known = [key for key in _WRAPPERS if key in inside]
    return known[0] if known and len(known) == len(inside) else None


def _values(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()


def _leaves(value: Any, before: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of nested dicts and lists that hold tensors."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, each in items:
        name = f"{before}.{key}" if before else str(key)
        if _holds_tensors(each):
            yield from _leaves(each, name)
        else:
            yield name, each


def _holds_tensors(value: Any) -> bool:
    return any(_is_tensor(each) or _holds_tensors(each) for each in _values(value))
