"""A state dict as an opened model, by a map that leaves nothing open; and what a ready map says of a file."""

from pathlib import Path

from convert.adopt import apply, map_file, source
from convert.adopt.landing import land
from convert.adopt.maps import moments, ready
from convert.adopt.maps.complete import Complete, complete
from convert.adopt.rules import Map
from convert.adopt.source import State
from convert.formats.opened import Opened, Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError


def tensors(made: Map, state: State, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of ``config``, which is how the map's model is written; each is read when it is asked for.

    Raises:
        UserError: see ``apply.lazily``.
    """
    return apply.fused(config, apply.lazily(made, state.tensors, f"{state.path}: "))


def known(path: Path) -> tuple[Opened, Complete] | None:
    """The model in a file that a ready map determines; None if none does."""
    try:
        state = source.read(path)
        proposal = ready.propose(state)
        if proposal is None or proposal.choices:
            return None
        config = land(apply.config_of(proposal.map.model)).config
        whole = complete(proposal.map, state)
        found = tensors(whole.map, state, config)
    except UserError:
        return None
    given = moments.fused(whole.moments, config) if whole.moments else None
    notes = [*state.notes, *proposal.notes, *whole.notes]
    return Opened(state.path, "map", config, found, state.files, moments=given, notes=notes), whole


def write_map(place: Path, whole: Complete) -> None:
    """Writes the map into a folder of the model, if it is one."""
    if place.is_dir():
        map_file.write(place / map_file.NAME, whole.map, whole.kept)
