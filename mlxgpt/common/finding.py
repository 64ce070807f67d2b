"""Which base model and which adapters the command line means: ``--model DIR --adapter DIR[:WEIGHT]``."""

from collections.abc import Sequence
from pathlib import Path

from mlxgpt.common import adapter_folder, checkpoint
from mlxgpt.common.errors import UserError
from mlxgpt.common.tensors import read_json

Given = str | Path | Sequence[tuple[str | Path, float]] | None
"""An adapter, or several with their weights."""


def find(model: str | Path, given: Given = None) -> tuple[Path, list[tuple[Path, float]]]:
    """The base model's folder, and the folders of adapters with their weights.

    ``model`` may be an adapter, or a run that trained one: then its base is the one that it names.

    Raises:
        UserError: there is no such model or adapter, or the base that an adapter names is gone.
    """
    place = checkpoint.resolve_model(model)
    listed = [(given, 1.0)] if isinstance(given, str | Path) else list(given or ())
    found = [(_adapter(path), weight) for path, weight in listed]
    if is_adapter(place):
        return base_of(place), [(place, 1.0), *found]
    return place, found


def is_adapter(place: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (place / adapter_folder.CONFIG).is_file() and not (place / "config.json").is_file()


def base_of(adapter: Path) -> Path:
    """The folder of the model that an adapter says it was trained on.

    Raises:
        UserError: it says none, or that one is not there.
    """
    values = read_json(adapter / adapter_folder.CONFIG)
    name = values.get("base_model_name_or_path") or values.get("model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter}: an adapter that names no base: expected --model BASE --adapter {adapter}")
    try:
        place = checkpoint.resolve_model(name)
    except UserError as error:
        raise UserError(
            f"{adapter}: its base is gone: {error}; --model BASE --adapter {adapter} names another"
        ) from None
    if is_adapter(place):
        raise UserError(f"{adapter}: its base {name} is an adapter: expected a model (mlxgpt fuse makes one)")
    return place


def _adapter(path: str | Path) -> Path:
    """The folder of an adapter: of a run its best, else last.

    Raises:
        UserError: there is none, or it is a model.
    """
    place = checkpoint.resolve_model(path)
    if not (place / adapter_folder.CONFIG).is_file():
        raise UserError(f"{place}: a model, expected an adapter ({adapter_folder.CONFIG})")
    return place


def parse(items: Sequence[str]) -> list[tuple[str, float]]:
    """(path, weight) of ``DIR`` or ``DIR:WEIGHT``.

    Raises:
        UserError: a weight that is no number.
    """
    made = []
    for item in items:
        path, colon, text = item.rpartition(":")
        if not colon or Path(item).expanduser().exists():
            made.append((item, 1.0))
            continue
        try:
            weight = float(text)
        except ValueError:
            raise UserError(f"--adapter {item}: weight {text!r}: expected a number, such as {path}:0.5") from None
        if not abs(weight) < float("inf"):
            raise UserError(f"--adapter {item}: weight {text}: expected a finite number")
        made.append((path, weight))
    return made
