"""What a format cannot express of a model: choices that it has no field for, and files that it has no place for."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert.formats.opened import Opened
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError


def check_expressible(
    config: ModelConfig, able: ModelConfig, name: str, hints: Mapping[str, str] | None = None
) -> None:
    """Refuses a model that the format ``name`` cannot hold as it is.

    ``able`` is the model that the written file would give when read; ``hints``: field -> the cure.

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


def left_behind(
    opened: Opened, name: str, moments: bool = False, extra: Sequence[str] = (), files: Sequence[str] = ()
) -> Iterator[str]:
    """A note of what the format cannot hold; it can hold ``moments``, these keys of ``extra``, and ``files``."""
    given = opened.companions.items()
    lost = [file for file, content in given if file not in files and not _says_nothing(file, content, extra)]
    lost += [f"{key} of config.json" for key, value in opened.extra.items() if value is not None and key not in extra]
    if opened.moments and not moments:
        lost.append("AdamW's moments")
    if lost:
        yield f"left behind, as {name} has no place for it: {', '.join(lost)}"


def _says_nothing(file: str, content: Path | bytes, extra: Sequence[str]) -> bool:
    """Whether it is the generation_config.json that every folder has, with nothing but these keys of ``extra``."""
    if file != "generation_config.json":
        return False
    try:
        values = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and set(values) <= {"_from_model_config", "transformers_version", *extra}
