"""A format that has no field for a choice can hold one value of it: what it holds, against what the model is."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from convert.model import Opened, Options
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError


def check(config: ModelConfig, able: ModelConfig, name: str, hints: Mapping[str, str] | None = None) -> None:
    """Refuses a model that the format ``name`` would make another of.

    ``able`` is the model that reading the written file gives; ``hints`` say by field how to go on.

    Raises:
        UserError: names the first field that differs, its value, and what the format has.
    """
    for field in dataclasses.fields(ModelConfig):
        found, expected = getattr(config, field.name), getattr(able, field.name)
        if found != expected:
            hint = (hints or {}).get(field.name)
            raise UserError(
                f"model.{field.name} = {found!r}: {name} has only {expected!r}" + (f"; {hint}" if hint else "")
            )


def check_options(options: Options, name: str, versions: Sequence[int] = (0,)) -> None:
    """Refuses what only other formats do.

    Raises:
        UserError: names the option.
    """
    if options.bits:
        raise UserError(f"--bits {options.bits}: {name} is not written quantised; expected none")
    if options.version not in versions:
        raise UserError(f"--version {options.version}: {name}: expected {' or '.join(map(str, versions))}")


def left_behind(opened: Opened, name: str, moments: bool = False, extra: Sequence[str] = ()) -> Iterator[str]:
    """What of the source the format has no place for; ``moments`` and these keys of ``extra`` it has."""
    lost = [*opened.companions, *(f"{key} of config.json" for key in opened.extra if key not in extra)]
    if opened.moments and not moments:
        lost.append("AdamW's moments")
    if lost:
        yield f"left behind, as {name} has no place for it: {', '.join(lost)}"
