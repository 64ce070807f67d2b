"""Where the shipped recipes lie: beside the package in a checkout, inside it when installed from a wheel."""

from pathlib import Path

from mlxgpt.common.config import nearest
from mlxgpt.common.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """The folder of the shipped recipes."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


FINETUNE = "finetune"  # what mlxgpt finetune starts from: no RECIPE


def names() -> list[str]:
    """The shipped recipes, sorted: what `mlxgpt train` takes as RECIPE beside a path."""
    return sorted(path.stem for path in folder().glob("*.toml") if path.stem != FINETUNE)


def find(recipe: str) -> Path:
    """The file of a shipped recipe's name or of a path; a path has a slash or ends in .toml.

    Raises:
        UserError: there is no such recipe or file.
    """
    path = Path(recipe)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"{recipe}: no such recipe file")
        return path
    if recipe not in names():
        raise UserError(f"recipe {recipe!r}{nearest(recipe, names())}: expected a path or one of {', '.join(names())}")
    return folder() / f"{recipe}.toml"
